"""The densified backend's copies between block values and dense weights, in every layout, against plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from sparse_kernels import Block, SparseConv2d, SparseLinear, Topology, _native, parse_pattern, testing
from sparse_kernels.backends import ConvGeometry, densified
from sparse_kernels.index import WeightIndex
from sparse_kernels.patterns import Unstructured

SHAPES = [(64, 128, 1), (37, 50, 1), (33, 70, 6)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float64),
]
FORMATS = [torch.contiguous_format, torch.channels_last]
native = pytest.mark.skipif(_native.why_unavailable() is not None, reason=str(_native.why_unavailable()))


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


@native
@pytest.mark.parametrize("name", testing.TOPOLOGIES)
@pytest.mark.parametrize("pattern", testing.PATTERNS, ids=str)
@pytest.mark.parametrize("shape", [(64, 128, 1), (61, 70, 6)], ids=str)
def test_tiles_are_the_values_of_a_full_weight(name: str, pattern: Block, shape: tuple[int, int, int]) -> None:
    out, in_, taps = shape
    topology = testing.TOPOLOGIES[name](out, in_, pattern, taps)
    index, values = topology.weight_index(), testing.random_values(topology)
    tiled = Topology.full(out, in_, Block(32, 32), taps=taps)
    with testing.poisoned_buffers():
        full, tiles = densified._tiles(values, index)
    assert all(torch.equal(a, b) for a, b in zip(tiled.index(), _tensors(full), strict=True))
    assert torch.equal(tiles, tiled.gather(topology.scatter(values)))
    source = tiled.gather(torch.randn(out, taps * in_))
    with testing.poisoned_buffers():
        gathered = values.new_empty(values.shape)
        densified._copy("gather_blocks", index, densified._tiled(index), source, gathered)
    assert torch.equal(gathered, topology.gather(tiled.scatter(source)))


@native
@pytest.mark.parametrize("values_dtype,dense_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sides", [(64, 64), (64, 8), (32, 32), (1, 1)], ids=str)
@pytest.mark.parametrize("out", [96, 70, 31])
def test_copies_stay_in_the_tiles(
    out: int, sides: tuple[int, int], values_dtype: torch.dtype, dense_dtype: torch.dtype
) -> None:
    """An odd number of tiles under blocks of two: nothing behind the tiles, or behind the values, is written."""
    topology = Topology.full(out, 40, Block(*sides) if sides != (1, 1) else Unstructured(), taps=3)
    index, values = topology.weight_index(), testing.random_values(topology).bfloat16().to(values_dtype)
    tiled = Topology.full(out, 40, Block(32, 32), taps=3)
    size = tiled.nnzb * 32 * 32
    for threads in (1, 2):
        torch.set_num_threads(threads)
        buffer = torch.full((size + 64 * 3 * 64,), -7.0, dtype=dense_dtype)
        densified._copy("densify", index, densified._tiled(index), values, buffer)
        tiles = buffer[:size].view(-1, 32, 32)
        assert torch.equal(tiles, tiled.gather(topology.scatter(values).to(dense_dtype)))
        assert (buffer[size:] == -7.0).all()
        gathered = torch.full((values.numel() + 64 * 64,), -7.0, dtype=values_dtype)
        densified._copy("gather_blocks", index, densified._tiled(index), tiles, gathered)
        assert torch.equal(gathered[: values.numel()].view(values.shape), values)
        assert (gathered[values.numel() :] == -7.0).all()


@native
def test_a_convolution_of_an_odd_number_of_tiles_under_blocks_of_two() -> None:
    layer = SparseConv2d(128, 160, 3, pattern="block:64x64", sparsity=0.5)
    layer.execution = "densified"
    x = torch.randn(1, 128, 8, 8).to(memory_format=torch.channels_last)
    expected = torch.nn.functional.conv2d(x, layer.dense_weight(), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def _tensors(index: WeightIndex) -> list[Tensor]:
    return [index.crow, index.col, index.slot, index.ccol, index.row_t, index.slot_t]


@pytest.mark.parametrize("pattern", ["unstructured", "block:16x16"])
def test_bf16_weights_are_rounded_as_torch_rounds(pattern: str) -> None:
    topology = Topology.random(64, 32, parse_pattern(pattern), 6 if "block" in pattern else 1500)
    index, values = topology.weight_index(), testing.random_values(topology)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.4e38, 1e-40, -0.0, 1.00390625, 1.01171875])
    values.view(-1)[:8] = special
    weight = densified.scatter(values, index, None, torch.contiguous_format, torch.bfloat16)
    torch.testing.assert_close(weight, topology.scatter(values.bfloat16()), rtol=0, atol=0, equal_nan=True)
    found = densified.gather(weight, index, torch.float32)
    torch.testing.assert_close(found, values.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


@native
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("batch", [1, 7])
def test_convolutions_of_few_and_of_many_positions(
    batch: int, kernel: tuple[int, int], form: torch.memory_format
) -> None:
    layer = SparseConv2d(61, 64, kernel, stride=1 if kernel == (1, 1) else 2, pattern="unstructured", sparsity=0.3)
    layer.execution = "densified"
    x = torch.randn(batch, 61, 19, 22).to(memory_format=form).requires_grad_()
    serves = densified._densified_tiles.serves(x, layer.topology.weight_index(), layer._geometry)
    assert serves == (batch == 1 and _native.native().isa_name() != "portable")
    exact = copy.deepcopy(layer).double()
    x64 = x.detach().double().requires_grad_()
    y, expected = layer(x), exact(x64)
    assert y.is_contiguous(memory_format=form)
    seed = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *layer.parameters()], seed)
    wanted = torch.autograd.grad(expected, [x64, *exact.parameters()], seed.double())
    for a, b in zip([y, *found], [expected, *wanted], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max()))


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
