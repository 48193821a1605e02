"""The densified backend's copies between block values and dense weights, in every layout, against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_kernels import Block, SparseLinear, Topology, _native, testing
from sparse_kernels.backends import ConvGeometry, densified

SHAPES = [(64, 128, 1), (37, 50, 1), (33, 70, 6)]
FORMATS = [torch.contiguous_format, torch.channels_last]


def tap_major(weight: Tensor) -> Tensor:
    return weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1).flatten(1)


@pytest.mark.parametrize("name", testing.TOPOLOGIES)
@pytest.mark.parametrize("pattern", testing.PATTERNS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scatter_and_gather(name: str, pattern: Block, shape: tuple[int, int, int]) -> None:
    out, in_, taps = shape
    topology = testing.TOPOLOGIES[name](out, in_, pattern, taps)
    index, values = topology.weight_index(), testing.random_values(topology)
    conv = None if taps == 1 else ConvGeometry((2, 3))
    dense = torch.randn(out, taps * in_)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for memory_format in FORMATS:
                with testing.poisoned_buffers():
                    weight = densified.scatter(values.to(dtype), index, conv, memory_format)
                assert torch.equal(tap_major(weight), topology.scatter(values.to(dtype)))
                source = dense.to(dtype)
                if conv is not None:
                    assert weight.is_contiguous(memory_format=memory_format)
                    source = densified.conv_weight(source, index, conv).contiguous(memory_format=memory_format)
                with testing.poisoned_buffers():
                    gathered = densified.gather(source, index)
                assert torch.equal(gathered, topology.gather(dense.to(dtype)))


def test_without_the_native_module_the_copies_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    topology = Topology.random(37, 50, Block(8, 8), 20, taps=6)
    index, values, conv = topology.weight_index(), testing.random_values(topology), ConvGeometry((2, 3))
    expected = densified.scatter(values, index, conv, torch.channels_last)
    blocks = densified.gather(expected, index)
    monkeypatch.setattr(_native, "why_unavailable", lambda: "not built")
    assert torch.equal(densified.scatter(values, index, conv, torch.channels_last), expected)
    assert torch.equal(densified.gather(expected, index), blocks)
    assert torch.equal(densified.gather(expected.contiguous(), index), blocks)


def test_strided_rows_and_no_rows() -> None:
    layer = SparseLinear(48, 64, pattern="16x16", sparsity=0.5)
    layer.execution = "densified"
    x = torch.randn(6, 100)[:, 3:51].requires_grad_()
    expected = torch.nn.functional.linear(x, layer.dense_weight(), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    layer(x.new_empty(0, 48).requires_grad_()).sum().backward()
    assert not layer.values.grad.any()
