"""Surgery on whole models: what is exchanged, what stays dense and why, and that nothing else changes."""

from __future__ import annotations

import copy
import json
import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from sparse_kernels import (
    Plan,
    SparseConv1d,
    SparseConv2d,
    SparseGRU,
    SparseLayer,
    SparseLinear,
    densify,
    sparse_weights,
    sparsify,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.relu(self.norm(self.conv1(x))))


class SmallResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.Sequential(Residual(32), nn.Conv2d(32, 64, 1, stride=2), Residual(64))
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depthwise(self.blocks(self.stem(x))).mean((2, 3)))


class SmallTransformer(nn.Module):
    def __init__(self, **kwargs: object) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, **kwargs)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 20)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(self.embed(tokens), src_key_padding_mask=padding))


class Sketcher(nn.Module):
    """Calls its GRU in the ways that code written for torch.nn.GRU does."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__()
        self.gru = nn.GRU(16, 32, 2, batch_first=True, bidirectional=True, **kwargs)
        self.out = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        self.gru.flatten_parameters()
        y, h = self.gru(x)
        again, _ = self.gru(x, h)
        packed, _ = self.gru(pack_padded_sequence(x, torch.full((len(x),), x.shape[1]), batch_first=True))
        return self.out(y + again) + packed.data.mean()


def row(plan: Plan, layer: str) -> object:
    return next(row for row in plan.rows if row.layer == layer)


def check_totals(model: nn.Module, plan: Plan, sparsity: float, block: int) -> None:
    """The plan tells the truth about the model, and meets the sparsity within one block."""
    assert abs(plan.nonzeros - (1 - sparsity) * plan.numel) <= block
    sparse = {weight.name: weight.topology for weight in sparse_weights(model)}
    assert {row.layer for row in plan.rows if row.pattern != "dense"} == set(sparse)
    for name, topology in sparse.items():
        assert row(plan, name).nonzeros == topology.nnz
        assert 0 < topology.nnzb < topology.row_blocks * topology.col_blocks


# Whole models


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x4", "block:16x16"])
@pytest.mark.parametrize("allocation", ["erk", "uniform", "flops"])
def test_cnn(pattern: str, allocation: str) -> None:
    torch.manual_seed(0)
    model, x = SmallResNet(), torch.randn(4, 3, 8, 8)
    plan = sparsify(model, sparsity=0.8, pattern=pattern, allocation=allocation, example_inputs=x)
    assert isinstance(model.blocks[0].conv1, SparseConv2d) and type(model.depthwise) is nn.Conv2d
    assert row(plan, "depthwise").reason == "groups=64 is not served"
    if pattern == "block:16x16":
        assert type(model.stem) is nn.Conv2d and "pads" in row(plan, "stem").reason
    check_totals(model, plan, 0.8, 256)
    target = torch.randint(10, (4,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    model.eval()
    before = model(x)
    assert densify(model) is model
    assert not any(isinstance(module, SparseLayer) for module in model.modules())
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformer(activation: str) -> None:
    torch.manual_seed(0)
    model = SmallTransformer(activation=activation)
    heads = [id(module) for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    plan = sparsify(model, sparsity=0.5, pattern="block:4x4")
    assert [id(module) for module in model.modules() if isinstance(module, nn.MultiheadAttention)] == heads
    attention = model.encoder.layers[0].self_attn
    assert isinstance(attention.out_proj, nn.Linear) and isinstance(model.encoder.layers[1].linear2, SparseLinear)
    packed = row(plan, "encoder.layers.0.self_attn.in_proj_weight")
    assert packed.reason == "MultiheadAttention has no sparse twin" and not packed.counted
    check_totals(model, plan, 0.5, 16)
    tokens = torch.randint(20, (3, 6), generator=generator())
    padding = torch.arange(6) >= torch.tensor([6, 4, 2])[:, None]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(tokens, padding).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    # In eval mode torch would hand the dense weights of the layers to one fused kernel.
    model.eval()
    with torch.no_grad():
        evaluated = model(tokens), model(tokens, padding)
        densify(model)
        again = model(tokens), model(tokens, padding)
    real = ~padding
    torch.testing.assert_close(evaluated[0], again[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(evaluated[1][real], again[1][real], rtol=1e-4, atol=1e-5)
    assert model.encoder.layers[0].activation_relu_or_gelu == {"relu": 1, "gelu": 2}[activation]
    assert model.encoder.use_nested_tensor is True


def test_gru_model() -> None:
    model, x = Sketcher(), torch.randn(3, 5, 16)
    plan = sparsify(model, sparsity=0.6, pattern="4x4")
    assert isinstance(model.gru, SparseGRU)
    check_totals(model, plan, 0.6, 16)
    assert row(plan, "gru.weight_hh_l1_reverse").shape == (96, 32)
    before = model(x)
    densify(model)
    assert type(model.gru) is nn.GRU
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-6)


def test_gru_tensor_that_is_filled_stays_dense() -> None:
    model = nn.ModuleDict({"gru": nn.GRU(5, 64), "out": nn.Linear(64, 64)})
    plan = sparsify(model, sparsity=0.8, pattern="16x16")
    assert list(model.gru.topologies) == ["weight_hh_l0"]
    assert model.gru.weights["weight_ih_l0"].shape == (192, 5)
    narrow = row(plan, "gru.weight_ih_l0")
    assert (narrow.pattern, narrow.sparsity, narrow.nonzeros) == ("dense", 0.0, 960) and "pads" in narrow.reason


def test_gru_that_is_filled_stays_an_nn_gru() -> None:
    model = nn.ModuleDict({"gru": nn.GRU(16, 16), "big": nn.Linear(512, 512)})
    plan = sparsify(model, sparsity=0.9, pattern="4x4")
    assert type(model.gru) is nn.GRU and isinstance(model.big, SparseLinear)
    assert row(plan, "gru.weight_ih_l0").reason == "filled by the allocation"
    check_totals(model, plan, 0.9, 16)


def test_conv1d_model() -> None:
    model = nn.Sequential(nn.Conv1d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv1d(32, 32, 5, padding="same"))
    plan = sparsify(model, sparsity=0.7, pattern="4x4")
    assert all(isinstance(model[k], SparseConv1d) for k in (0, 2))
    check_totals(model, plan, 0.7, 16)
    assert model(torch.randn(2, 16, 9)).shape == (2, 32, 9)


# Values, flags, hooks


@pytest.mark.parametrize("init", ["random", "magnitude"])
def test_active_weights_keep_their_values(init: str) -> None:
    model = SmallResNet().double()
    dense = copy.deepcopy(model)
    sparsify(model, sparsity=0.8, pattern="4x4", init=init)
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            weight, original = module.dense_weight(), dense.get_submodule(name).weight
            kept = weight != 0
            assert torch.equal(weight[kept], original[kept])
            if init == "magnitude":
                assert original[kept].abs().mean() > original[~kept].abs().mean()


def test_rescaling_is_an_option() -> None:
    plain, scaled = nn.Sequential(nn.Linear(64, 64)), None
    scaled = copy.deepcopy(plain)
    sparsify(plain, sparsity=0.75, pattern="4x4", generator=generator())
    sparsify(scaled, sparsity=0.75, pattern="4x4", generator=generator(), rescale=True)
    torch.testing.assert_close(scaled[0].values, 2 * plain[0].values)
    assert torch.equal(scaled[0].bias, plain[0].bias)


def test_a_seed_gives_one_topology() -> None:
    models = [nn.Sequential(nn.Linear(64, 64), nn.GRU(64, 64)) for _ in range(2)]
    for model in models:
        sparsify(model, sparsity=0.9, pattern="16x1", generator=generator(3))
    for a, b in zip(*map(sparse_weights, models), strict=True):
        assert torch.equal(a.topology.col, b.topology.col) and torch.equal(a.topology.crow, b.topology.crow)


def test_flags_and_hooks_survive_both_ways() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).to(torch.bfloat16)
    model[0].weight.requires_grad_(False)
    model[1].eval()
    calls: list[int] = []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 32, dtype=torch.bfloat16)
    sparsify(model, sparsity=0.5, pattern="4x4")
    model(x)
    assert not model[0].values.requires_grad and model[0].bias.requires_grad and model[1].values.requires_grad
    assert model[0].training and not model[1].training and model[0].values.dtype == torch.bfloat16
    densify(model)
    model(x)
    assert not model[0].weight.requires_grad and not model[1].training and len(calls) == 2
    handle.remove()
    model(x)
    assert len(calls) == 2


def test_a_module_used_twice_stays_one() -> None:
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared, nn.Linear(32, 32)])})
    plan = sparsify(model, sparsity=0.5, pattern="4x4")
    assert isinstance(model.a, SparseLinear) and model.a is model.b[0]
    assert [row.layer for row in plan.rows] == ["a", "b.1"]
    densify(model)
    assert type(model.a) is nn.Linear and model.a is model.b[0]


# What stays dense


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.body = nn.Linear(32, 512)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OwnName(nn.Linear):
    """A subclass that computes what nn.Linear does."""


def test_tied_weights_stay_dense() -> None:
    model = Tied()
    plan = sparsify(model, sparsity=0.5, pattern="4x4")
    assert isinstance(model.body, SparseLinear) and model.head.weight is model.embed.weight
    assert row(plan, "head").reason == "tied: shared by embed.weight and head.weight"
    check_totals(model, plan, 0.5, 16)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)), "parametrized"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(32, 32, 3)), "parametrized"),
        (lambda: nn.utils.spectral_norm(nn.Linear(32, 32)), "parametrized"),
        (lambda: OwnForward(32, 32), "OwnForward has its own forward"),
        (lambda: nn.Conv2d(32, 32, 3, groups=2), "groups=2"),
        (lambda: nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
        (lambda: nn.LSTM(32, 32), "LSTM has no sparse twin"),
        (lambda: nn.RNN(32, 32), "RNN has no sparse twin"),
        (lambda: nn.GRUCell(32, 32), "GRUCell has no sparse twin"),
        (lambda: nn.ConvTranspose2d(32, 32, 3), "ConvTranspose2d has no sparse twin"),
        (lambda: nn.Conv3d(32, 32, 3), "Conv3d has no sparse twin"),
        (lambda: nn.Bilinear(8, 8, 8), "Bilinear has no sparse twin"),
        (lambda: nn.Embedding(32, 32), "Embedding has no sparse twin"),
        (lambda: nn.Linear(3, 3), "pads"),
        (lambda: nn.Linear(32, 32, dtype=torch.complex64), "its dtype is torch.complex64"),
    ],
)
def test_stays_dense_with_the_reason(build: object, reason: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        odd = build()
    model = nn.ModuleDict({"odd": odd, "plain": nn.Linear(256, 256)})
    kind, state = type(odd), [id(parameter) for parameter in odd.parameters()]
    plan = sparsify(model, sparsity=0.5, pattern="16x16")
    assert type(model.odd) is kind and [id(parameter) for parameter in model.odd.parameters()] == state
    assert isinstance(model.plain, SparseLinear)
    assert reason in next(row for row in plan.rows if row.layer.startswith("odd")).reason
    check_totals(model, plan, 0.5, 256)


def test_a_subclass_that_computes_the_same_is_exchanged() -> None:
    model = nn.Sequential(OwnName(32, 32))
    sparsify(model, sparsity=0.5, pattern="4x4")
    assert isinstance(model[0], SparseLinear)


def test_a_patched_forward_is_respected() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[0].forward = lambda x: x
    plan = sparsify(model, sparsity=0.3, pattern="4x4")
    assert row(plan, "0").reason == "its forward was replaced"


# exclude


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        self.gru = nn.GRU(32, 32)
        self.decoder = nn.Linear(32, 32)


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("decoder", {"encoder.0", "encoder.1", "gru.weight_ih_l0", "gru.weight_hh_l0"}),
        (["encoder"], {"gru.weight_ih_l0", "gru.weight_hh_l0", "decoder"}),
        (["*.0", "gru"], {"encoder.1", "decoder"}),
        (nn.GRU, {"encoder.0", "encoder.1", "decoder"}),
        ([nn.Sequential, "gru.weight_ih*"], {"gru.weight_hh_l0", "decoder"}),
        (["decoder.weight"], {"encoder.0", "encoder.1", "gru.weight_ih_l0", "gru.weight_hh_l0"}),
    ],
    ids=["name", "prefix", "globs", "type", "type and weights", "weight"],
)
def test_exclude(exclude: object, left: set[str]) -> None:
    model = Body()
    plan = sparsify(model, sparsity=0.5, pattern="4x4", allocation="uniform", exclude=exclude)
    assert {weight.name for weight in sparse_weights(model)} == left
    assert {row.layer for row in plan.rows if row.counted} == left
    check_totals(model, plan, 0.5, 16)


def test_exclude_a_module_and_typos() -> None:
    model = Body()
    sparsify(model, sparsity=0.5, pattern="4x4", exclude=(model.decoder,))
    assert type(model.decoder) is nn.Linear
    with pytest.raises(ValueError, match="exclude names 'decodre', which matches no module"):
        sparsify(Body(), sparsity=0.5, pattern="4x4", exclude=["decodre"])


# Errors, edges, output


@pytest.mark.parametrize(
    ("model", "kwargs", "message"),
    [
        (nn.Linear(32, 32), {}, r"itself a layer \(Linear\).*SparseLinear.from_dense"),
        (nn.GRU(32, 32), {}, r"itself a layer \(GRU\)"),
        (nn.Sequential(nn.ReLU()), {}, "nothing in this Sequential can be sparse. It has no linear"),
        (nn.Sequential(nn.LSTM(4, 4)), {}, "0.weight_ih_l0: LSTM has no sparse twin"),
        (nn.Sequential(nn.LazyLinear(32)), {}, "'0' is a lazy layer without its sizes; run one forward"),
        (nn.Sequential(nn.Linear(32, 32)), {"sparsity": 1.0}, "below 1"),
        (nn.Sequential(nn.Linear(32, 32)), {"sparsity": -0.1}, r"in \[0, 1\]; got -0.1"),
        (nn.Sequential(nn.Linear(32, 32)), {"init": "best"}, "init must be one of random, magnitude"),
        (nn.Sequential(nn.Linear(32, 32)), {"allocation": "er"}, "allocation must be one of erk, uniform, flops"),
        (nn.Sequential(nn.Linear(32, 32)), {"allocation": "flops"}, "example_inputs="),
        (nn.Sequential(nn.Linear(32, 3), nn.Linear(16, 16)), {"sparsity": 0.9}, "lowest reachable total is 96"),
    ],
)
def test_sparsify_rejects(model: nn.Module, kwargs: dict, message: str) -> None:
    before = [id(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        sparsify(model, **{"sparsity": 0.5, "pattern": "16x16", **kwargs})
    assert [id(module) for module in model.modules()] == before


def test_densify_rejects_a_bare_layer() -> None:
    with pytest.raises(ValueError, match="itself a SparseLinear; call its to_dense"):
        densify(SparseLinear(16, 16, pattern="4x4", sparsity=0.5))


def test_sparsity_zero_changes_nothing() -> None:
    model = SmallResNet()
    modules = [id(module) for module in model.modules()]
    plan = sparsify(model, sparsity=0.0, pattern="16x16")
    assert [id(module) for module in model.modules()] == modules and plan.sparsity == 0.0


def test_sparsify_twice_leaves_the_sparse_layers() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.GRU(32, 32))
    sparsify(model, sparsity=0.5, pattern="4x4", exclude=nn.GRU)
    first = model[0]
    plan = sparsify(model, sparsity=0.75, pattern="4x4")
    assert model[0] is first and isinstance(model[1], SparseGRU)
    assert row(plan, "0").reason == "already sparse" and not row(plan, "0").counted
    check = [r for r in plan.rows if r.counted]
    assert abs(sum(r.nonzeros for r in check) - 0.25 * sum(r.numel for r in check)) <= 16


def test_flops_empties_what_is_used_most() -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.often, self.seldom = nn.Linear(64, 64), nn.Linear(64, 64)
            self.norm, self.drop = nn.BatchNorm1d(64), nn.Dropout()

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.seldom(self.drop(self.norm(self.often(x).mean(1) * scale)))

    model, state = Uneven(), torch.get_rng_state()
    running = model.norm.running_mean.clone()
    plan = sparsify(
        model,
        sparsity=0.5,
        pattern="4x4",
        allocation="flops",
        example_inputs={"x": torch.ones(2, 3, 64), "scale": 2.0},
        generator=generator(),
    )
    assert model.training and model.drop.training and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.norm.running_mean, running)
    ratio = row(plan, "seldom").nonzeros / row(plan, "often").nonzeros
    assert math.isclose(ratio, 3.0, rel_tol=0.05)


def test_queries_keys_values_share_one_allocation() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_k, self.to_v = (nn.Linear(64, 64) for _ in range(3))
            self.to_out = nn.Linear(64, 64)

    plan = sparsify(Attention(), sparsity=0.8, pattern="unstructured")
    three = [row(plan, f"to_{name}").nonzeros for name in "qkv"]
    assert max(three) - min(three) <= 1
    # ERK gives a stacked [192, 64] tensor (192 + 64) shares and [64, 64] (64 + 64), not three times 128.
    assert math.isclose(sum(three) / row(plan, "to_out").nonzeros, 2.0, rel_tol=0.01)


def test_plan_prints_and_serialises() -> None:
    model = nn.ModuleDict({"gru": nn.GRU(32, 32), "head": nn.Linear(32, 3), "embed": nn.Embedding(4, 4)})
    plan = sparsify(model, sparsity=0.5, pattern="16x16")
    text = str(plan)
    for cell in ("layer", "gru.weight_hh_l0", "96x32", "block:16x16", "nonzeros", "execution", "reason", "total"):
        assert cell in text
    assert "(not counted) Embedding has no sparse twin" in text
    data = json.loads(json.dumps(plan.to_json()))
    assert data["nonzeros"] == plan.nonzeros and data["rows"][0]["layer"] == "gru.weight_ih_l0"
    assert plan.numel == 96 * 32 * 2 + 96
    assert len(plan) == 4 and [row.layer for row in plan] == [row["layer"] for row in data["rows"]]


def test_a_sparse_model_saves_and_loads() -> None:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.ModuleDict({"gru": nn.GRU(32, 32), "conv": nn.Conv2d(32, 32, 3), "norm": nn.LayerNorm(32)})
        sparsify(model, sparsity=0.7, pattern="4x4", generator=generator(seed))
        return model

    one, two = build(1), build(2)
    two.load_state_dict(one.state_dict())
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name])
    x = torch.randn(5, 2, 32)
    assert torch.equal(one.gru(x)[0], two.gru(x)[0])


def test_meta_models() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.GRU(64, 64))
    plan = sparsify(model, sparsity=0.9, pattern="4x4")
    assert abs(plan.nonzeros - 0.1 * plan.numel) <= 16 and all(p.is_meta for p in model.parameters())


def test_a_whole_model_compiles_without_a_break() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 16, 32))
    sparsify(model, sparsity=0.5, pattern="4x4")
    x = torch.randn(2, 16, 4, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_computes_the_same() -> None:
    class Everything(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv2d, self.conv1d = nn.Conv2d(16, 16, 3, padding=1), nn.Conv1d(16, 16, 3, padding="same")
            self.gru = nn.GRU(16, 16, 2, batch_first=True, bidirectional=True)
            self.linear = nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.conv1d(torch.relu(self.conv2d(x)).flatten(2)))
            return self.linear(self.gru(y.transpose(1, 2))[0])

    model, x = Everything(), torch.randn(2, 16, 4, 4)
    sparsify(model, sparsity=0.5, pattern="4x4")
    results = []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append([y.detach(), *[parameter.grad.clone() for parameter in model.parameters()]])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_star_import_leaves_torch_nn_alone() -> None:
    names: dict[str, object] = {}
    exec("from torch import nn\nfrom sparse_kernels import *", names)
    assert names["nn"] is nn and names["SparseLinear"] is SparseLinear
