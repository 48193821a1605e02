"""`SparseGRU` against torch.nn.GRU: states, lengths, packing, weights by name."""

from __future__ import annotations

import pytest
import torch
from layers import FP64_BUDGET, check_same, each_execution, each_pattern, generator
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from sparse_kernels import Block, SparseGRU, _native, sparse_weights

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
@each_execution
@each_pattern
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


@pytest.mark.skipif(_native.why_unavailable() is not None, reason=str(_native.why_unavailable()))
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gru_computes_in_fp32_under_autocast(bidirectional: bool) -> None:
    gru = SparseGRU(32, 24, 2, batch_first=True, bidirectional=bidirectional, pattern="block:8x8", sparsity=0.5)
    gru.execution = "cpu"
    lengths = torch.tensor([7, 3, 0])
    x, h0 = torch.randn(3, 7, 32).bfloat16(), torch.randn(2 * (1 + bidirectional), 3, 24).bfloat16()
    results, grads = [], []
    for autocast in (True, False):
        given = (x.clone() if autocast else x.float()).requires_grad_()
        gru.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, h_n = gru(given, h0 if autocast else h0.float(), lengths=lengths)
        (y.square().sum() + h_n.square().sum()).backward()
        assert given.grad is not None and given.grad.dtype == given.dtype
        results.append((y, h_n))
        grads.append([given.grad.bfloat16(), *[parameter.grad for parameter in gru.parameters()]])
    for under, outside in zip(results[0] + tuple(grads[0]), results[1] + tuple(grads[1]), strict=True):
        torch.testing.assert_close(under, outside, rtol=0, atol=0)
