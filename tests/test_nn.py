"""Layers against their dense twins: forward, every gradient, state, moves, compilation."""

from __future__ import annotations

import copy
import io
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from sparse_kernels import (
    Block,
    SparseConv1d,
    SparseConv2d,
    SparseGRU,
    SparseLayer,
    SparseLinear,
    Unstructured,
    backends,
    sparse_weights,
    testing,
)
from sparse_kernels.activations import ACTIVATIONS

PATTERNS = [Unstructured(), Block(4, 4), Block(16, 1), Block(16, 16)]
DENSE_BACKENDS = ["reference", "densified"]
FP64_BUDGET = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(params=PATTERNS, ids=str)
def pattern(request: pytest.FixtureRequest) -> Block:
    return request.param


@pytest.fixture(params=DENSE_BACKENDS)
def execution(request: pytest.FixtureRequest) -> str:
    return request.param


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check_same(sparse: nn.Module, dense: nn.Module, *inputs: Tensor) -> None:
    """Outputs and all gradients of a sparse layer equal those of its dense twin, in fp64."""
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.clone().requires_grad_() for x in inputs]
    ys, yd = sparse(*ours), dense(*theirs)
    ys, yd = (ys if isinstance(ys, tuple) else (ys,)), (yd if isinstance(yd, tuple) else (yd,))
    torch.testing.assert_close(ys, yd, **FP64_BUDGET)
    seeds = [torch.randn(y.shape, dtype=y.dtype, generator=generator(5)) for y in ys]
    torch.autograd.backward(ys, seeds)
    torch.autograd.backward(yd, seeds)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, **FP64_BUDGET)


# SparseLinear


@pytest.mark.parametrize("sparsity", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("shape", [(7, 48), (2, 3, 48), (48,), (0, 48)], ids=str)
def test_linear_equals_dense(pattern: Block, execution: str, sparsity: float, shape: tuple[int, ...]) -> None:
    dense = nn.Linear(48, 64, dtype=torch.float64)
    layer = SparseLinear.from_dense(dense, pattern=pattern, sparsity=sparsity, generator=generator())
    layer.execution = execution
    twin = layer.to_dense()
    kept = layer.topology.gather(torch.ones_like(dense.weight)).bool()
    torch.testing.assert_close(layer.values[kept], layer.topology.gather(dense.weight)[kept])
    check_same(layer, twin, torch.randn(shape, dtype=torch.float64))
    torch.testing.assert_close(layer.values.grad, layer.topology.gather(twin.weight.grad), **FP64_BUDGET)
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad, **FP64_BUDGET)


def test_linear_without_bias() -> None:
    layer = SparseLinear(32, 16, bias=False, pattern="block:4x4", sparsity=0.5, dtype=torch.float64)
    assert layer.bias is None and "bias" not in layer.state_dict()
    check_same(layer, layer.to_dense(), torch.randn(5, 32, dtype=torch.float64))


def test_linear_padding_stays_zero() -> None:
    layer = SparseLinear(60, 62, pattern="block:16x16", sparsity=0.25, rescale=True)
    ragged = layer.topology.gather(torch.ones(62, 60)) == 0
    assert ragged.any()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(3):
        layer(torch.randn(8, 60)).square().mean().backward()
        optimizer.step()
    assert not layer.values[ragged].any()


def test_linear_fresh_values_are_those_of_torch() -> None:
    layer = SparseLinear(256, 512, pattern="block:16x16", sparsity=0.75, generator=generator())
    same = SparseLinear(256, 512, pattern="block:16x16", sparsity=0.75, generator=generator())
    wide = SparseLinear(256, 512, pattern="block:16x16", sparsity=0.75, generator=generator(), rescale=True)
    assert torch.equal(layer.values, same.values) and torch.equal(layer.topology.col, same.topology.col)
    assert layer.values.abs().max() <= 1 / 16 < 1.01 * layer.values.abs().max()
    torch.testing.assert_close(wide.values, 2 * layer.values)
    x = torch.randn(512, 256)
    dense_std = nn.Linear(256, 512, bias=False)(x).std()
    layer.bias, wide.bias = None, None
    torch.testing.assert_close(wide(x).std(), dense_std, rtol=0.05, atol=0.0)
    torch.testing.assert_close(layer(x).std(), dense_std / 2, rtol=0.05, atol=0.0)


def test_linear_keeps_the_largest_blocks() -> None:
    dense = nn.Linear(32, 32)
    with torch.no_grad():
        dense.weight[16:, :16] += 3.0
    layer = SparseLinear.from_dense(dense, pattern="16x16", sparsity=0.75, init="magnitude")
    assert layer.topology.mask().tolist() == [[False, False], [True, False]]
    assert torch.equal(layer.dense_weight()[16:, :16], dense.weight[16:, :16])


def test_linear_flags_survive() -> None:
    dense = nn.Linear(16, 16).eval()
    dense.weight.requires_grad_(False)
    layer = SparseLinear.from_dense(dense, pattern="4x4", sparsity=0.5)
    assert not layer.training and not layer.values.requires_grad and layer.bias.requires_grad
    back = layer.to_dense()
    assert type(back) is nn.Linear and not back.training and not back.weight.requires_grad
    assert layer.bias.data_ptr() != dense.bias.data_ptr() != back.bias.data_ptr()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pattern": "4x4", "sparsity": 1.5}, r"absent weights, in \[0, 1\]; got 1.5"),
        ({"pattern": "5x5", "sparsity": 0.5}, "sides must be one of"),
        ({"pattern": "64x64", "sparsity": 0.5}, "pads .* smaller block"),
    ],
)
def test_linear_rejects(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseLinear(32, 36, **kwargs)


# SparseGRU


GRU_CASES = [
    {"batch_first": True},
    {"batch_first": False, "bidirectional": True},
    {"batch_first": True, "num_layers": 2, "bidirectional": True, "bias": False},
]


def gru_pair(pattern: Block, sparsity: object, **kwargs: object) -> tuple[SparseGRU, nn.GRU]:
    dense = nn.GRU(16, 32, dtype=torch.float64, **kwargs)
    layer = SparseGRU.from_dense(dense, pattern=pattern, sparsity=sparsity, generator=generator())
    return layer, layer.to_dense()


def check_gru_grads(layer: SparseGRU, twin: nn.GRU) -> None:
    for name, weight in layer.weights.items():
        expected = getattr(twin, name).grad
        expected = layer.topologies[name].gather(expected) if name in layer.topologies else expected
        torch.testing.assert_close(weight.grad, expected, **FP64_BUDGET)
    for name, bias in layer.biases.items():
        torch.testing.assert_close(bias.grad, getattr(twin, name).grad, **FP64_BUDGET)


@pytest.mark.parametrize("kwargs", GRU_CASES, ids=lambda kwargs: "-".join(map(str, kwargs)))
@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_gru_equals_dense(pattern: Block, execution: str, sparsity: float, kwargs: dict) -> None:
    layer, twin = gru_pair(pattern, sparsity, **kwargs)
    layer.execution = execution
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    batch = 3 if layer.batch_first else 5
    h0 = torch.randn(layer.num_layers * (1 + layer.bidirectional), batch, 32, dtype=torch.float64)
    check_same(layer, twin, x, h0)
    check_gru_grads(layer, twin)
    torch.testing.assert_close(layer(x), twin(x), **FP64_BUDGET)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("sorted_already", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_gru_lengths_equal_packing(batch_first: bool, sorted_already: bool, with_state: bool) -> None:
    layer, twin = gru_pair(Block(4, 4), 0.5, num_layers=2, bidirectional=True, batch_first=batch_first)
    lengths = torch.tensor([6, 4, 2, 1] if sorted_already else [2, 6, 1, 4])
    x = torch.randn(4, 6, 16, dtype=torch.float64)
    x = (x if batch_first else x.transpose(0, 1)).requires_grad_()
    h0 = torch.randn(4, 4, 32, dtype=torch.float64) if with_state else None
    packed = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=sorted_already)
    expected, expected_h = twin(packed, h0)
    got, got_h = layer(packed, h0)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **FP64_BUDGET)
    torch.testing.assert_close(got_h, expected_h, **FP64_BUDGET)
    padded, padded_h = layer(x, h0, lengths=lengths)
    unpacked = pad_packed_sequence(expected, batch_first=batch_first)[0]
    torch.testing.assert_close(padded, unpacked, **FP64_BUDGET)
    torch.testing.assert_close(padded_h, expected_h, **FP64_BUDGET)
    (unpacked.square().sum() + expected_h.sum()).backward(retain_graph=True)
    expected_grad, x.grad = x.grad, None
    (pad_packed_sequence(got, batch_first=batch_first)[0].square().sum() + got_h.sum()).backward()
    torch.testing.assert_close(x.grad, expected_grad, **FP64_BUDGET)
    check_gru_grads(layer, twin)


def test_gru_ignores_what_lies_past_a_length() -> None:
    layer, _ = gru_pair(Block(4, 4), 0.5, bidirectional=True, batch_first=True)
    x = torch.randn(3, 4, 16, dtype=torch.float64)
    h0 = torch.randn(2, 3, 32, dtype=torch.float64)
    lengths = torch.tensor([4, 0, 2])
    clean, h_n = layer(x, h0, lengths=lengths)
    x[1], x[2, 2:] = torch.nan, torch.inf
    dirty, _ = layer(x, h0, lengths=lengths)
    assert torch.equal(clean, dirty)
    assert not clean[1].any() and not clean[2, 2:].any()
    assert torch.equal(h_n[:, 1], h0[:, 1])


def test_gru_unbatched() -> None:
    layer, twin = gru_pair(Block(4, 4), 0.5, num_layers=2, bidirectional=True)
    x, h0 = torch.randn(5, 16, dtype=torch.float64), torch.randn(4, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x, h0), twin(x, h0), **FP64_BUDGET)
    torch.testing.assert_close(layer(x), twin(x), **FP64_BUDGET)


def test_gru_sparsity_by_name() -> None:
    layer, twin = gru_pair(Block(16, 16), {"weight_ih_l0": 0.0, "weight_hh_l0": 0.5}, batch_first=True, num_layers=2)
    assert list(layer.weights) == ["weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"]
    assert list(layer.topologies) == ["weight_ih_l0", "weight_hh_l0"]
    assert layer.topologies["weight_ih_l0"].density == 1.0 and layer.topologies["weight_hh_l0"].density == 0.5
    assert layer.weights["weight_ih_l1"].shape == (96, 32)
    check_same(layer, twin, torch.randn(2, 3, 16, dtype=torch.float64))
    check_gru_grads(layer, twin)
    with pytest.raises(ValueError, match="names 'weight_ih_l7'; its weights are weight_ih_l0"):
        SparseGRU(16, 32, pattern="16x16", sparsity={"weight_ih_l7": 0.5})


def test_gru_keeps_dense_what_the_pattern_cannot_cut() -> None:
    layer = SparseGRU(5, 32, pattern="16x16", sparsity=0.5)
    assert list(layer.topologies) == ["weight_hh_l0"] and layer.weights["weight_ih_l0"].shape == (96, 5)
    with pytest.raises(ValueError, match=r"no weight would be sparse: .* pads"):
        SparseGRU(5, 5, pattern="64x64", sparsity=0.5)


def test_gru_dropout_acts_in_training_only() -> None:
    layer = SparseGRU(16, 32, 2, dropout=0.5, pattern="4x4", sparsity=0.5)
    x = torch.randn(4, 2, 16)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])
    layer.flatten_parameters()
    assert layer.to_dense().dropout == 0.5


@pytest.mark.parametrize(
    ("x", "h0", "lengths", "message"),
    [
        ((2, 3, 4), None, None, "16 features"),
        ((2, 3, 16), (1, 9, 32), None, r"h0 must be \[D·layers, B, H\] = \[1, 2, 32\]"),
        ((2, 3, 16), (1, 32), None, "batched input takes h0"),
        ((3, 16), (1, 1, 32), None, "unbatched h0"),
        ((3, 16), None, [3], "lengths belong to batched input"),
        ((2, 3, 16), None, [3, 4], r"lengths must lie in 0..3"),
    ],
)
def test_gru_rejects(x: tuple, h0: tuple | None, lengths: list | None, message: str) -> None:
    layer = SparseGRU(16, 32, batch_first=True, pattern="4x4", sparsity=0.5)
    state = None if h0 is None else torch.zeros(h0)
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(x), state, lengths=None if lengths is None else torch.tensor(lengths))


def test_gru_lengths_are_integers() -> None:
    layer = SparseGRU(16, 32, batch_first=True, pattern="4x4", sparsity=0.5)
    with pytest.raises(TypeError, match=r"lengths must be integers; got torch.float32; convert with .long\(\)"):
        layer(torch.zeros(2, 3, 16), lengths=torch.tensor([1.7, 2.0]))


def test_gru_runs_under_another_default_device() -> None:
    layer = SparseGRU(16, 32, batch_first=True, bidirectional=True, pattern="4x4", sparsity=0.5)
    x, lengths = torch.randn(2, 3, 16), torch.tensor([3, 1])
    (weight, *_) = sparse_weights(layer)
    weight.open_tap()
    grads = []
    for device in ("cpu", "meta"):
        layer.zero_grad()
        with torch.device(device):
            layer(x, lengths=lengths)[0].sum().backward()
        grads.append(weight.values.grad)
    assert torch.equal(*grads)


# Convolutions

CONV2D_CASES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 1, "bias": False},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
    {"kernel_size": (2, 4), "padding": "same", "dilation": (1, 3)},
    {"kernel_size": 3, "padding": "valid"},
]
CONV1D_CASES = [{"kernel_size": 3, "stride": 2, "padding": 2}, {"kernel_size": 4, "padding": "same"}]


def check_conv(layer: SparseConv1d | SparseConv2d, execution: str, *x_shape: int) -> None:
    layer.execution = execution
    twin = layer.to_dense()
    check_same(layer, twin, torch.randn(*x_shape, dtype=torch.float64))
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, twin.bias.grad, **FP64_BUDGET)
    grad = twin.weight.grad.flatten(2).transpose(1, 2).flatten(1)  # tap-major
    torch.testing.assert_close(layer.values.grad, layer.topology.gather(grad), **FP64_BUDGET)
    torch.testing.assert_close(layer(torch.ones(x_shape[1:]).double()), twin(torch.ones(x_shape[1:]).double()))


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel:UserWarning")
@pytest.mark.parametrize("kwargs", CONV2D_CASES, ids=lambda kwargs: "-".join(map(str, kwargs.values())))
def test_conv2d_equals_dense(pattern: Block, execution: str, kwargs: dict) -> None:
    dense = nn.Conv2d(16, 32, dtype=torch.float64, **kwargs)
    layer = SparseConv2d.from_dense(dense, pattern=pattern, sparsity=0.5, generator=generator())
    kept = layer.dense_weight() != 0
    assert torch.equal(layer.dense_weight()[kept], dense.weight[kept])
    assert abs(kept.double().mean() - 0.5) < 0.1
    check_conv(layer, execution, 2, 16, 7, 9)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel:UserWarning")
@pytest.mark.parametrize("kwargs", CONV1D_CASES, ids=lambda kwargs: "-".join(map(str, kwargs.values())))
def test_conv1d_equals_dense(pattern: Block, execution: str, kwargs: dict) -> None:
    check_conv(SparseConv1d(16, 32, dtype=torch.float64, pattern=pattern, sparsity=0.5, **kwargs), execution, 2, 16, 9)


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_conv2d_full_and_empty(sparsity: float) -> None:
    layer = SparseConv2d(16, 32, 3, pattern="16x16", sparsity=sparsity, dtype=torch.float64)
    assert layer.topology.nnzb == (18 if sparsity == 0.0 else 0)
    check_conv(layer, "densified", 1, 16, 4, 4)


@pytest.mark.parametrize("name", ["reference", "densified"])
@pytest.mark.parametrize("sparsity", [0.5, 1.0])
def test_conv2d_of_an_empty_batch(name: str, sparsity: float) -> None:
    layer = SparseConv2d(8, 16, 3, padding=1, pattern="block:8x8", sparsity=sparsity)
    layer.execution = name
    x = torch.randn(0, 8, 5, 6, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 16, 5, 6) and x.grad is not None and x.grad.shape == x.shape
    assert layer.values.grad is not None and not layer.values.grad.any()


def test_conv2d_keeps_the_memory_format() -> None:
    layer = SparseConv2d(16, 32, 3, pattern="4x4", sparsity=0.5)
    x = torch.randn(2, 16, 5, 5).to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert layer(x.contiguous()).is_contiguous()


def test_conv_fresh_values_are_those_of_torch() -> None:
    torch.manual_seed(0)
    layer = SparseConv2d(64, 64, 3, pattern="16x16", sparsity=0.5)
    bound = nn.Conv2d(64, 64, 3).weight.abs().max()
    torch.testing.assert_close(layer.values.abs().max(), bound, rtol=1e-2, atol=0.0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"groups": 2}, "groups=2 is not served"), ({"padding_mode": "reflect"}, "padding_mode='reflect' is not served")],
)
def test_conv_rejects(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseConv2d(16, 32, 3, pattern="4x4", sparsity=0.5, **kwargs)
    with pytest.raises(ValueError, match=message):
        SparseConv2d.from_dense(nn.Conv2d(16, 32, 3, **kwargs), pattern="4x4", sparsity=0.5)


def test_conv_takes_images_of_its_own_rank() -> None:
    with pytest.raises(ValueError, match=r"4 dimensions \[N, 16, …\], or 3 without N; got \[16, 5\]"):
        SparseConv2d(16, 32, 3, pattern="4x4", sparsity=0.5)(torch.zeros(16, 5))


# What all layers share


def make(
    kind: str,
    dtype: torch.dtype = torch.float32,
    seed: int | None = 0,
    pattern: Block = Block(4, 4),  # noqa: B008 (frozen)
    width: int = 16,
) -> SparseLayer:
    drawn = None if seed is None else generator(seed)
    options = {"pattern": pattern, "sparsity": 0.5, "dtype": dtype, "generator": drawn}
    if kind == "linear":
        return SparseLinear(width, 32, **options)
    if kind == "conv1d":
        return SparseConv1d(width, 32, 3, padding=1, **options)
    if kind == "conv2d":
        return SparseConv2d(width, 32, 3, padding="same", **options)
    return SparseGRU(width, 32, batch_first=True, **options)


def example(kind: str, dtype: torch.dtype = torch.float32, width: int = 16) -> Tensor:
    shape = {"conv1d": (2, width, 5), "conv2d": (2, width, 5, 4)}.get(kind, (2, 5, width))
    return torch.randn(shape, dtype=dtype, generator=generator(9))


def first(output: object) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


KINDS = ["linear", "gru", "conv1d", "conv2d"]


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


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_linear_with_its_activation_is_a_linear_and_that_activation(activation: str) -> None:
    layer = SparseLinear(48, 32, pattern="block:16x16", sparsity=0.5, activation=activation)
    dense, x = layer.to_dense(), torch.randn(5, 48)
    assert isinstance(dense, nn.Sequential) and f"activation={activation}" in repr(layer)
    torch.testing.assert_close(layer(x), dense(x))
    again = SparseLinear.from_dense(dense[0], pattern="block:16x16", sparsity=0.0, activation=activation)
    torch.testing.assert_close(again(x), dense(x))
    with pytest.raises(ValueError, match="SparseLinear: activation must be None or one of relu"):
        SparseLinear(48, 32, pattern="block:16x16", sparsity=0.5, activation="swish")
