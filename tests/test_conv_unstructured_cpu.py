"""The native unstructured convolution against dense fp64, product by product, on every instruction set."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from sparse_kernels import _native
from sparse_kernels.backends import ConvGeometry, get
from sparse_kernels.ops.conv import conv2d
from sparse_kernels.patterns import Unstructured
from sparse_kernels.topology import Topology

pytestmark = pytest.mark.skipif(_native.why_unavailable() is not None, reason=str(_native.why_unavailable()))

PATTERN = Unstructured()
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Case(NamedTuple):
    """A convolution of `x [batch, in_, *size]`, the fraction of weights that it keeps, and the number of threads."""

    batch: int
    in_: int
    size: tuple[int, int]
    out: int
    conv: ConvGeometry
    density: float
    threads: int


def same(kernel: int) -> ConvGeometry:
    return ConvGeometry((kernel, kernel), padding=(kernel // 2, kernel // 2))


# Every height of panel with a rest, one tile and several, several kernel columns in a tile, strips that span images.
CASES = {
    "3x3": Case(2, 20, (7, 6), 24, same(3), 0.3, 1),
    "one pixel": Case(3, 5, (1, 1), 7, same(3), 0.5, 2),
    "one channel": Case(1, 1, (5, 5), 24, same(3), 0.5, 1),
    "three channels": Case(5, 3, (9, 17), 7, ConvGeometry((5, 4), (3, 2), (2, 3), (1, 2)), 0.4, 2),
    "wide": Case(1, 70, (16, 33), 33, same(3), 0.2, 3),
    "strided": Case(3, 16, (13, 10), 9, ConvGeometry((3, 3), (2, 2), (1, 1)), 0.3, 2),
    "patches": Case(2, 4, (13, 12), 7, ConvGeometry((4, 4), (4, 4)), 0.5, 2),
    "strided 1x1": Case(1, 130, (20, 20), 17, ConvGeometry((1, 1), (2, 2)), 0.2, 1),
    "1x1": Case(3, 20, (7, 6), 24, same(1), 0.3, 2),
    "1x1 of many pixels": Case(2, 20, (33, 34), 24, same(1), 0.3, 2),
    "dilated": Case(2, 5, (12, 12), 7, ConvGeometry((3, 3), (1, 1), (3, 3), (3, 3)), 0.5, 2),
    "larger than the image": Case(2, 5, (2, 2), 7, same(7), 0.5, 1),
    "conv1d": Case(3, 17, (1, 50), 9, ConvGeometry((1, 9), padding=(0, 4)), 0.4, 2),
    "vertical": Case(2, 6, (20, 3), 5, ConvGeometry((9, 1), padding=(4, 0)), 0.4, 1),
    "no image": Case(0, 6, (8, 8), 5, same(3), 0.5, 2),
    "full": Case(1, 66, (9, 9), 5, same(3), 1.0, 1),
    "empty": Case(1, 66, (9, 9), 5, same(3), 0.0, 2),
    "896 channels": Case(5, 896, (3, 3), 40, same(3), 0.02, 2),
}


def make(out: int, in_: int, taps: int, density: float) -> tuple[Topology, Tensor]:
    """A random topology with the derived index, and its values: the slots of the upper rows in order, as of a fresh
    weight, the others shuffled."""
    rng = torch.Generator().manual_seed(0)
    cols = taps * in_
    flat = torch.randperm(out * cols, generator=rng)[: round(density * out * cols)].sort().values
    lower = flat[flat.numel() // 2 :]
    lower.copy_(lower[torch.randperm(lower.numel(), generator=rng)])
    topology = Topology(out, in_, PATTERN, flat // cols, flat % cols, taps=taps)
    deriver = get("cpu").deriver("conv", PATTERN)
    assert deriver is not None
    topology.attach(deriver)
    return topology, torch.randn(topology.nnzb, 1, 1, generator=rng)


def dense(topology: Topology, values: Tensor, conv: ConvGeometry) -> Tensor:
    return topology.scatter(values).view(topology.out, *conv.kernel, topology.in_).permute(0, 3, 1, 2)


def sparse(topology: Topology, weight: Tensor) -> Tensor:
    return topology.gather(weight.permute(0, 2, 3, 1).reshape(topology.out, -1))


def products(
    topology: Topology, values: Tensor, x: Tensor, dy: Tensor, bias: Tensor | None, conv: ConvGeometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, input gradient and weight gradient of the backend."""
    cpu, index = get("cpu"), topology.weight_index("cpu")
    return cpu.spmm(x, values, index, bias, conv), cpu.spmm_t(dy, values, index, conv, x), cpu.sddmm(dy, x, index, conv)


def dense_products(
    topology: Topology, values: Tensor, x: Tensor, dy: Tensor, bias: Tensor | None, conv: ConvGeometry
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in dense fp64."""
    x, dy, bias = x.double(), dy.double(), None if bias is None else bias.double()
    weight, how = dense(topology, values.double(), conv), (conv.stride, conv.padding, conv.dilation)
    grad = torch.zeros_like(weight) if x.numel() == 0 else conv2d_weight(x, list(weight.shape), dy, *how)
    return F.conv2d(x, weight, bias, *how), conv2d_input(list(x.shape), weight, dy, *how), sparse(topology, grad)


@functools.lru_cache(maxsize=len(CASES))
def problem(name: str) -> dict[str, Any]:
    """Operands of one case, its exact products and the sums of their absolute terms, shared by the instruction sets."""
    case, rng = CASES[name], torch.Generator().manual_seed(1)
    topology, values = make(case.out, case.in_, case.conv.kernel[0] * case.conv.kernel[1], case.density)
    x = torch.randn(case.batch, case.in_, *case.size, generator=rng)
    dy = torch.randn(case.batch, case.out, *case.conv.output_size(*case.size), generator=rng)
    bias = torch.randn(case.out, generator=rng)
    operands = (topology, values, x, dy, bias, case.conv)
    absolute = (topology, values.abs(), x.abs(), dy.abs(), bias.abs(), case.conv)
    return {"operands": operands, "exact": dense_products(*operands), "terms": dense_products(*absolute)}


def assert_close(got: Tensor, exact: Tensor, terms: Tensor) -> None:
    """|got - exact| within the rounding of dot products whose absolute terms sum to `terms`."""
    assert got.shape == exact.shape and got.dtype == torch.float32
    assert torch.isfinite(got).all(), "an output was not written, or memory outside the operands was read"
    assert ((got - exact).abs() <= 1e-6 * terms + 1e-30).all()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_products_match_dense(isa: str, name: str, layout: str) -> None:
    exact = problem(name)
    topology, values, x, dy, bias, conv = exact["operands"]
    # A gradient comes in any format, whatever that of the input.
    x, dy = x.contiguous(memory_format=FORMATS[layout]), dy if name == "3x3" else dy.to(memory_format=FORMATS[layout])
    torch.set_num_threads(CASES[name].threads)
    results, again = (products(topology, values, x, dy, bias, conv) for _ in range(2))
    for got, exactly, terms, repeated in zip(results, exact["exact"], exact["terms"], again, strict=True):
        assert_close(got, exactly, terms)
        assert torch.equal(got, repeated)
    if case_is_told_apart(x):
        assert all(t.is_contiguous(memory_format=FORMATS[layout]) for t in results[:2])


def case_is_told_apart(x: Tensor) -> bool:
    """Whether the strides of `x` say which memory format it has."""
    return x.numel() > 0 and x.shape[1] > 1 and x.shape[2] * x.shape[3] > 1


def test_any_strides_are_read_in_place(isa: str) -> None:
    topology, values = make(6, 10, 9, 0.4)
    conv = same(3)
    views = {
        "offset": torch.randn(2, 11, 8, 12)[:, 1:, 1:, 2:9],
        "channels_last offset": torch.randn(2, 9, 14, 13).permute(0, 3, 1, 2)[:, 2:12, 1:, 1:],
        "transposed": torch.randn(2, 10, 7, 9).transpose(2, 3),
        "expanded": torch.randn(1, 1, 7, 1).expand(3, 10, 7, 5),
    }
    for x in views.values():
        dy = torch.randn(1, 1, 1, 1).expand(x.shape[0], 6, *x.shape[2:])
        got, exact = products(topology, values, x, dy, None, conv), dense_products(topology, values, x, dy, None, conv)
        for ours, theirs in zip(got, exact, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", FORMATS)
def test_nan_and_inf_reach_the_active_weights_and_nothing_else(isa: str, bad: float, layout: str) -> None:
    topology, values = make(20, 30, 9, 0.3)
    conv, mask = same(3), dense(topology, torch.ones_like(values), same(3))
    x, dy = (torch.randn(1, c, 9, 21).to(memory_format=FORMATS[layout]) for c in (30, 20))
    x[0, 17, 8, 20], dy[0, 4, 8, 3] = bad, bad  # below the last whole panel
    y, dx, dw = products(topology, values, x, dy, None, conv)
    hit_x, hit_dy = torch.zeros_like(x), torch.zeros_like(dy)
    hit_x[0, 17, 8, 20], hit_dy[0, 4, 8, 3] = 1, 1
    assert torch.equal(~torch.isfinite(y), F.conv2d(hit_x, mask, padding=1) > 0)
    assert torch.equal(~torch.isfinite(dx), conv2d_input(list(x.shape), mask, hit_dy, padding=1) > 0)
    ones = conv2d_weight(hit_x, list(mask.shape), torch.ones_like(dy), padding=1)
    # A zero of the padding times inf is NaN, here as in the dense products of gathered rows.
    ones[4] = 1
    assert torch.equal(~torch.isfinite(dw), sparse(topology, ones) > 0)


def test_scores_are_the_squared_dense_gradient() -> None:
    for name in ("strided", "dilated", "conv1d"):
        topology, _, x, dy, _, conv = problem(name)["operands"]
        shape = [topology.out, topology.in_, *conv.kernel]
        grad = conv2d_weight(x.double(), shape, dy.double(), conv.stride, conv.padding, conv.dilation)
        scores = get("cpu").block_scores(dy, x, topology.weight_index("cpu"), conv)
        expected = grad.square().permute(0, 2, 3, 1).reshape(topology.out, -1)
        torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_rewritten_topology_keeps_the_buffers_and_their_addresses() -> None:
    topology, values = make(32, 70, 9, 0.2)
    before = [t.data_ptr() for t in topology.weight_index("cpu").derived]
    free = (~topology.mask()).nonzero()[::7][:500]
    topology.rewrite(torch.arange(free.shape[0]), free[:, 0], free[:, 1])
    topology.validate()
    assert [t.data_ptr() for t in topology.weight_index("cpu").derived] == before and len(before) == 2
    x, dy = torch.randn(2, 70, 6, 6), torch.randn(2, 32, 6, 6)
    got, exact = (f(topology, values, x, dy, None, same(3)) for f in (products, dense_products))
    for ours, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)


def test_the_capacity_depends_on_the_shape_and_the_count_alone() -> None:
    deriver = get("cpu").deriver("conv", PATTERN)
    assert deriver is not None
    together = Topology(100, 60, PATTERN, torch.arange(200) // 100, torch.arange(200) % 100, taps=9)
    spread = Topology.random(100, 60, PATTERN, 200, taps=9)
    assert dict(deriver.capacity(together)) == dict(deriver.capacity(spread))


def test_two_python_threads_at_once() -> None:
    torch.set_num_threads(2)
    topology, values = make(48, 40, 9, 0.3)
    inputs = [(torch.randn(2, 40, 12, 12), torch.randn(2, 48, 12, 12)) for _ in range(2)]
    expected = [products(topology, values, x, dy, None, same(3)) for x, dy in inputs]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            futures = [pool.submit(products, topology, values, x, dy, None, same(3)) for x, dy in inputs]
            for future, wanted in zip(futures, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(future.result(), wanted, strict=True))


@pytest.mark.parametrize("kernel,size", [(3, 5), (1, 5), (1, 32)], ids=["3x3", "1x1", "1x1 as linear"])
def test_the_op_asks_for_its_derived_index(kernel: int, size: int) -> None:
    torch.set_num_threads(1)
    topology = Topology.random(8, 4, PATTERN, 20, taps=kernel * kernel)
    x = torch.randn(1, 4, size, size).to(memory_format=torch.channels_last)
    values = torch.randn(20, 1, 1)
    with pytest.raises(ValueError, match=r"^conv: .* derived index .* topology\.attach\(.*deriver\('conv'"):
        conv2d(x, values, topology, conv=same(kernel), backend="cpu")
    deriver = get("cpu").deriver("conv", PATTERN)
    assert deriver is not None
    topology.attach(deriver)
    assert conv2d(x, values, topology, conv=same(kernel), backend="cpu").isfinite().all()


def test_launchers_refuse_what_they_cannot_run() -> None:
    native = _native.native()
    good = (1, 8, 8, 8, 8, 3, 3, 1, 1, 1, 1, 1, 1)
    strides = native.ImageStrides(0, 0, 0, 0)
    too_far = (1, 8, 8, 9, 8, 3, 3, 1, 1, 1, 1, 1, 1)
    no_stride = (1, 8, 8, 8, 8, 3, 3, 0, 1, 1, 1, 1, 1)
    for out, bh, shape, threads in [(64, 8, good, 1), (0, 1, good, 1), (64, 1, good, 0), (64, 1, too_far, 1),
                                    (64, 1, no_stride, 1)]:  # fmt: skip
        index, conv = native.BlockIndex(out, 64, bh, 1, 0, 0, 0, 0, 0, 0, 0), native.ConvShape(*shape)
        assert native.conv_unstructured_spmm(index, 0, 0, conv, 0, strides, 0, 0, 0, 0, strides, threads, 0) != 0
        assert native.conv_unstructured_spmm_t(index, 0, 0, conv, 0, strides, 0, strides, threads, 0) != 0
        assert native.conv_unstructured_sddmm(index, 0, conv, 0, strides, 0, strides, 0, threads, 0) != 0
        assert native.conv_unstructured_spmm_workspace_bytes(index, conv, threads) == 0
    assert native.conv_unstructured_derive(native.BlockIndex(64, 64, 8, 8, 0, 0, 0, 0, 0, 0, 0), 9, False, 0, 0) != 0
