"""Surgery on whole models of every kind, which then train, save, load, move and compile."""

from __future__ import annotations

import pytest
import torch
from layers import generator
from sparsified import Sketcher, SmallResNet, SmallTransformer, check_totals, row
from torch import Tensor, nn

from sparse_kernels import (
    SparseConv1d,
    SparseConv2d,
    SparseGRU,
    SparseLayer,
    SparseLinear,
    densify,
    sparsify,
)


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
