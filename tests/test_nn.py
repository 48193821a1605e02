"""What all sparse layers share: state, moves, backends, taps, optimizers, compilation."""

from __future__ import annotations

import copy
import io
from functools import partial
from pathlib import Path

import pytest
import torch
from layers import KINDS, each_pattern, example, first, generator, make
from torch import nn
from torch._dynamo.testing import CompileCounter

from sparse_kernels import Block, SparseConv1d, SparseConv2d, SparseGRU, SparseLinear, backends, sparse_weights, testing


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_carries_the_topology(kind: str) -> None:
    layer, other = make(kind, seed=0), make(kind, seed=1)
    x = example(kind)
    assert not torch.equal(first(layer(x)), first(other(x)))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(first(layer(x)), first(other(x)))
    for weight in sparse_weights(other):
        weight.topology.validate()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("array", "corrupt", "reason"),
    [
        ("col", lambda col: col.fill_(10**6), "col must lie in"),
        ("slot", lambda slot: slot.fill_(0), "slot must be a permutation"),
        ("crow", lambda crow: crow.flip(0), "crow must rise"),
        ("col", lambda col: col.float(), "col must be an int32 tensor; got torch.float32"),
        ("slot", lambda slot: slot[1:], r"nnzb=\d+"),
        (("col",), None, "col is missing"),
        (("crow", "col", "slot"), None, "loaded together"),
    ],
)
def test_a_corrupt_index_is_refused_whole(kind: str, array: str, corrupt: object, reason: str) -> None:
    layer = nn.Sequential(make(kind, seed=1))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state = nn.Sequential(make(kind, seed=0)).state_dict()
    names = [[name for name in state if name.endswith(f".{end}")][-1] for end in ([array] if corrupt else array)]
    for name in names:
        if corrupt is None:
            del state[name]
        else:
            state[name] = corrupt(state[name])
    with pytest.raises(RuntimeError, match=reason):
        layer.load_state_dict(state, strict=False)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_values_of_another_count_are_refused_whole() -> None:
    layer = SparseLinear(16, 16, pattern="4x4", sparsity=0.5)
    before = layer.topology.col.clone()
    with pytest.raises(RuntimeError, match="values: this layer holds"):
        layer.load_state_dict(SparseLinear(16, 16, pattern="4x4", sparsity=0.25).state_dict())
    assert torch.equal(layer.topology.col, before)


@pytest.mark.parametrize("kind", KINDS)
def test_deepcopy_and_pickle(kind: str) -> None:
    layer = make(kind)
    for weight in sparse_weights(layer):
        weight.open_tap()
    x = example(kind)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(first(layer(x)), first(twin(x)))
        with torch.no_grad():
            next(twin.parameters()).add_(1.0)
        assert not torch.equal(first(layer(x)), first(twin(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_moves(kind: str) -> None:
    layer = make(kind)
    chosen = layer.execution
    assert layer.double().execution == "densified"
    assert first(layer(example(kind, torch.float64))).dtype == torch.float64
    assert layer.float().execution == chosen
    assert layer.to(torch.bfloat16)(example(kind, torch.bfloat16)) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_device_moves_forget_what_belongs_to_the_old_device(kind: str) -> None:
    layer = make(kind)
    layer.to("meta")
    assert layer.execution == "densified"
    for weight in sparse_weights(layer):
        assert len(weight.topology.index("cpu")) == 6
    assert first(layer(example(kind).to("meta"))).is_meta


@pytest.mark.parametrize("kind", KINDS)
def test_execution_by_name(kind: str) -> None:
    layer = make(kind)
    layer.execution = "reference"
    assert layer.double().execution == "reference" and layer.execution_reason == "asked for"
    layer.execution = "auto"
    assert layer.execution == "densified"
    with pytest.raises(ValueError, match="backend must be one of"):
        layer.execution = "abacus"


@pytest.mark.parametrize("kind", KINDS)
def test_a_backend_asked_for_by_name_never_falls_back(kind: str) -> None:
    if "cpu" not in backends.names() or backends.get("cpu").why_unavailable():
        pytest.skip("backend 'cpu' is not available here")
    layer = make(kind)
    if layer.execution != "cpu":
        pytest.skip(f"backend 'cpu' does not serve {kind}: {layer.execution_reason}")
    layer.execution = "cpu"
    layer.double()
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run this: .*; execution='reference' or 'densified'"):
        layer(example(kind, torch.float64))
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run this"):
        layer.execution = "cpu"


def test_running_densified_for_want_of_a_backend_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.get("cpu"), "why_unavailable", lambda: "it was not built; reinstall")
    with pytest.warns(RuntimeWarning, match="linear: layers run densified.*'cpu' is unavailable: it was not built; re"):
        layer = make("linear")
    assert layer.execution == "densified" and "it was not built" in layer.execution_reason


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    layer, x = make(kind), example(kind).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = first(layer(x))
    y.float().sum().backward()
    assert y.dtype in (torch.bfloat16, torch.float32)
    for parameter in layer.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), first(layer(x)), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_score_taps(kind: str) -> None:
    layer, x = make(kind, torch.float64), example(kind, torch.float64)
    layer.execution = "densified"
    handles = sparse_weights(layer)
    assert [handle.tap_scores() for handle in handles] == [None] * len(handles)
    for handle in handles:
        handle.open_tap()
    assert handles[0].tap_scores() is None
    twin = layer.to_dense()
    for _ in range(2):
        first(layer(x)).square().sum().backward()
    first(twin(x)).square().sum().backward()
    for handle in handles:
        name = "weight" if handle.key == "values" else handle.key
        grad = getattr(twin, name).grad
        blocks = handle.topology.weight_index().blocks(
            grad if grad.dim() == 2 else grad.flatten(2).transpose(1, 2).flatten(1)
        )
        expected = 2 * blocks.square().sum((1, 2)).view(handle.topology.row_blocks, -1)
        torch.testing.assert_close(handle.tap_scores(), expected, rtol=1e-6, atol=1e-9)
        handle.close_tap()
        assert handle.tap_scores() is None


def test_taps_and_modes_cost_one_compiled_variant_each() -> None:
    layer = SparseGRU(16, 32, 2, batch_first=True, bidirectional=True, dropout=0.1, pattern="16x16", sparsity=0.5)
    x, lengths = torch.randn(4, 6, 16), torch.tensor([6, 2, 0, 4])
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    layer.eval()
    assert torch.equal(compiled(x, lengths=lengths)[0], layer(x, lengths=lengths)[0])
    layer.train()
    handles = sparse_weights(layer)
    for _ in range(3):
        compiled(x, lengths=lengths)[0].sum().backward()
        for handle in handles:
            handle.open_tap()
        compiled(x, lengths=lengths)[0].sum().backward()
        for handle in handles:
            assert handle.tap_scores().shape == (handle.topology.row_blocks, handle.topology.col_blocks)
            handle.close_tap()
    assert counter.frame_count == 3


def test_sparse_weights_names_and_order() -> None:
    linear, gru = make("linear"), make("gru")
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), linear]), "gru": gru, "again": linear})
    names = [weight.name for weight in sparse_weights(model)]
    assert names == ["layers.1", "gru.weight_ih_l0", "gru.weight_hh_l0"]
    assert [weight.name for weight in sparse_weights(linear)] == ["values"]
    handle = sparse_weights(model)[2]
    assert handle.values is gru.weights["weight_hh_l0"] and handle.topology is gru.topologies["weight_hh_l0"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_optimizers_train(kind: str, optimizer: type[torch.optim.Optimizer]) -> None:
    layer, x = make(kind), example(kind)
    target = torch.randn(first(layer(x)).shape, generator=generator(3)) * 0.1
    step = optimizer(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(15):
        step.zero_grad()
        loss = (first(layer(x)) - target).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        step.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_meta_device(kind: str) -> None:
    with torch.device("meta"):
        layer = {
            "linear": SparseLinear,
            "gru": partial(SparseGRU, batch_first=True),
            "conv1d": partial(SparseConv1d, kernel_size=3),
            "conv2d": partial(SparseConv2d, kernel_size=3),
        }[kind](16, 32, pattern="4x4", sparsity=0.5)
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert layer(example(kind).to("meta")) is not None


def test_a_ragged_layer_on_the_meta_device_has_its_expected_density() -> None:
    with torch.device("meta"):
        layer = SparseLinear(50, 30, pattern="4x4", sparsity=0.5, rescale=True)
    assert layer.topology.density == pytest.approx(0.5, abs=0.01) and "sparsity=0.5" in repr(layer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_leaves_the_meta_device_by_loading(kind: str, assign: bool) -> None:
    source = make(kind)
    with torch.device("meta"):
        layer = make(kind, seed=None)
    if not assign:
        layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert layer.execution == source.execution
    for weight in sparse_weights(layer):
        weight.topology.validate()
    assert torch.equal(first(layer(example(kind))), first(source(example(kind))))


@pytest.mark.parametrize("name", backends.names())
@pytest.mark.parametrize("kind", KINDS)
@each_pattern
def test_every_backend_within_the_budget(kind: str, name: str, pattern: Block) -> None:
    layer = make(kind, pattern=pattern, width=32)
    reason = backends.why_not(name, layer.op, pattern=pattern, dtype=torch.float32, device=torch.device("cpu"))
    if reason:
        pytest.skip(f"{name}: {reason}")
    layer.execution = name
    dense, expected = layer.to_dense(), layer.to_dense().double()
    x = example(kind, width=32)
    results = []
    for module, precision in ((layer, torch.float32), (expected, torch.float64), (dense, torch.float32)):
        leaf = x.clone().to(precision).requires_grad_()
        y = first(module(leaf))
        y.backward(torch.randn(y.shape, generator=generator(5)).to(precision))
        results.append([y.detach(), leaf.grad])
    for key, values, topology in layer.sparse_items():
        for module, result in ((expected, results[1]), (dense, results[2])):
            grad = getattr(module, "weight" if key == "values" else key).grad
            result.append(topology.gather(grad if grad.dim() == 2 else grad.flatten(2).transpose(1, 2).flatten(1)))
        results[0].append(values.grad)
    for actual, exact, torchs in zip(*results, strict=True):
        testing.assert_within_budget(actual, exact, torchs, f"{kind} on {name}")


def test_from_dense_takes_its_own_kind() -> None:
    for layer, module in (
        (SparseLinear, nn.GRU(16, 16)),
        (SparseGRU, nn.LSTM(16, 16)),
        (SparseConv1d, nn.Conv2d(4, 4, 1)),
    ):
        with pytest.raises(TypeError, match=rf"{layer.__name__}.from_dense: module must be a torch.nn"):
            layer.from_dense(module, pattern="4x4", sparsity=0.5)


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.9])
def test_ragged_weights_meet_their_sparsity(sparsity: float) -> None:
    for seed in range(5):
        layer = SparseLinear(1000, 570, pattern="16x16", sparsity=sparsity, generator=generator(seed))
        layer.topology.validate()
        assert layer.topology.nnzb == pytest.approx((1 - sparsity) * 36 * 63, abs=0.5)
        assert abs(layer.topology.nnz - (1 - sparsity) * 570_000) <= 256
        twin = SparseLinear(1000, 570, pattern="16x16", sparsity=sparsity, generator=generator(seed))
        assert torch.equal(twin.topology.mask(), layer.topology.mask())


@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated:FutureWarning")
def test_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer, x = make("linear"), example("linear")
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(layer), broadcast_buffers=False)
        model(x).square().sum().backward()
        layer(x).square().sum().backward()
        for ours, alone in zip(model.parameters(), layer.parameters(), strict=True):
            assert torch.equal(ours.grad, alone.grad)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_break(kind: str) -> None:
    layer, x = make(kind), example(kind)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = first(compiled(x))
    assert torch.equal(y, first(layer(x)))
    y.square().sum().backward()
    grads = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    first(layer(x)).square().sum().backward()
    for parameter, grad in zip(layer.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
