"""The native block-CSR convolution against dense fp64, primitive by primitive, on every instruction set."""

from __future__ import annotations

import functools
import itertools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from sparse_kernels import SparseConv2d, _native, ops
from sparse_kernels.activations import ACTIVATIONS
from sparse_kernels.backends import ConvGeometry, get, registry
from sparse_kernels.patterns import Block, Unstructured
from sparse_kernels.topology import Topology, WeightIndex

pytestmark = pytest.mark.skipif(_native.why_unavailable() is not None, reason=str(_native.why_unavailable()))

SIDES = (1, 4, 8, 16, 32, 64)
BLOCKS = [Block(bh, bw) for bh, bw in itertools.product(SIDES, SIDES) if bh * bw > 1]
SOME = [Block(32, 32), Block(16, 16), Block(8, 8), Block(64, 16), Block(16, 1), Block(1, 16), Block(4, 64)]
LAST, FIRST = torch.channels_last, torch.contiguous_format

# (geometry, N, in, out, H, W): what breaks peers, the edges of tiles, and every kind of gather.
CASES = {
    "3x3": (ConvGeometry((3, 3), padding=(1, 1)), 2, 70, 40, 9, 7),
    "small image": (ConvGeometry((3, 3), padding=(1, 1)), 3, 32, 64, 8, 8),
    "stride 2": (ConvGeometry((3, 3), (2, 2), (1, 1)), 1, 20, 36, 9, 8),
    "uneven": (ConvGeometry((3, 2), (1, 3), (2, 0), (2, 1)), 2, 33, 17, 6, 11),
    "1x1": (ConvGeometry((1, 1)), 2, 40, 48, 5, 6),
    "1x1 stride 2": (ConvGeometry((1, 1), (2, 2)), 2, 40, 24, 5, 7),
    "kernel beyond image": (ConvGeometry((5, 7), padding=(3, 4)), 1, 5, 9, 2, 1),
    "padding beyond kernel": (ConvGeometry((1, 2), (1, 2), (2, 3)), 1, 3, 12, 3, 4),
    "one channel": (ConvGeometry((3, 3), padding=(1, 1)), 5, 1, 16, 5, 4),
    "one pixel": (ConvGeometry((3, 3), padding=(1, 1)), 3, 20, 20, 1, 1),
    "conv1d": (ConvGeometry((1, 5), (1, 2), (0, 2), (1, 2)), 2, 24, 16, 1, 37),
    "stride beyond kernel": (ConvGeometry((2, 1), (3, 2)), 1, 17, 8, 8, 5),
    "no images": (ConvGeometry((3, 3), padding=(1, 1)), 0, 16, 16, 4, 4),
}


def make(pattern: Block, out: int, in_: int, taps: int, density: float) -> tuple[Topology, Tensor]:
    """A random topology whose slots are shuffled, and its values."""
    rng = torch.Generator().manual_seed(0)
    rows, cols = pattern.grid(out, in_)
    cols *= taps
    flat = torch.randperm(rows * cols, generator=rng)[: round(density * rows * cols)]
    topology = Topology(out, in_, pattern, flat // cols, flat % cols, taps=taps)
    return topology, topology.gather(torch.randn(out, taps * in_, generator=rng)).contiguous()


def image(*shape: int, seed: int, memory_format: torch.memory_format = LAST) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=memory_format)


def weight_of(dense: Tensor, conv: ConvGeometry, in_: int) -> Tensor:
    """The tap-major `[out, taps · in]` as torch's `[out, in, R, S]`."""
    return dense.view(dense.shape[0], *conv.kernel, in_).permute(0, 3, 1, 2)


def rows_of(weight: Tensor) -> Tensor:
    """The inverse of `weight_of`."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def exact(conv: ConvGeometry, weight: Tensor, x: Tensor, dy: Tensor, topology: Topology) -> dict[str, Tensor]:
    """All three products, dense, at the precision given."""
    where = conv.stride, conv.padding, conv.dilation
    dx, dw = x, torch.zeros_like(weight)
    if x.shape[0]:
        dx = conv2d_input(list(x.shape), weight, dy, *where)
        dw = conv2d_weight(x, list(weight.shape), dy, *where)
    y, dw = F.conv2d(x, weight, None, *where), topology.gather(rows_of(dw))
    return {"y": y, "dx": dx, "dw": dw, "dx at once": dx, "dw at once": dw, "db at once": dy.sum((0, 2, 3))}


@functools.lru_cache(maxsize=len(CASES) * len(BLOCKS))
def problem(pattern: Block, name: str, density: float = 0.4) -> dict[str, Any]:
    """Operands of one case, its exact products and the sums of their absolute terms, shared by the instruction sets."""
    conv, n, in_, out, h, w = CASES[name]
    topology, values = make(pattern, out, in_, conv.kernel[0] * conv.kernel[1], density)
    x, dy = image(n, in_, h, w, seed=1), image(n, out, *conv.output_size(h, w), seed=2)
    bias = torch.randn(out, generator=torch.Generator().manual_seed(3))
    weight = weight_of(topology.scatter(values).double(), conv, in_)
    want = exact(conv, weight, x.double(), dy.double(), topology)
    terms = exact(conv, weight.abs(), x.double().abs(), dy.double().abs(), topology)
    want["y"] = want["y"] + bias.double()[:, None, None]
    terms["y"] = terms["y"] + bias.double().abs()[:, None, None]
    return {"operands": (topology.weight_index(), values, x, dy, bias, conv), "want": want, "terms": terms}


def run(
    index: WeightIndex, values: Tensor, x: Tensor, dy: Tensor, bias: Tensor | None, conv: ConvGeometry
) -> dict[str, Tensor]:
    cpu = get("cpu")
    grads = cpu.product_backward(dy, x, values, index, (True, True, True, False), conv)
    assert grads.x is not None and grads.values is not None and grads.bias is not None
    return {
        "y": cpu.spmm(x, values, index, bias, conv),
        "dx": cpu.spmm_t(dy, values, index, conv, x),
        "dw": cpu.sddmm(dy, x, index, conv),
        "dx at once": grads.x,
        "dw at once": grads.values,
        "db at once": grads.bias,
    }


def assert_close(got: dict[str, Tensor], case: dict[str, Any]) -> None:
    """|got - want| <= 2 n eps sum|terms| for n-term dot products, far below what a missing or doubled term costs."""
    for what, result in got.items():
        want, budget = case["want"][what], 1e-6 * case["terms"][what] + 1e-30
        assert result.shape == want.shape and result.dtype == torch.float32, what
        assert torch.isfinite(result).all(), f"{what}: not all written, or memory outside the operands was read"
        assert ((result - want).abs() <= budget).all(), what


@pytest.mark.parametrize(
    "name,pattern",
    [(name, pattern) for name in CASES for pattern in (BLOCKS if name in ("3x3", "stride 2") else SOME)],
    ids=str,
)
def test_products_match_dense(isa: str, name: str, pattern: Block) -> None:
    case = problem(pattern, name)
    index, values, x, dy, bias, conv = case["operands"]
    torch.set_num_threads(1 + len(name) % 2)
    assert_close(run(index, values, x, dy, bias, conv), case)
    planes = run(index, values, x.contiguous(), dy.contiguous(), bias, conv)
    assert_close(planes, case)
    if x.numel() > x.shape[0] * x.shape[1] > x.shape[0]:
        assert planes["y"].is_contiguous() and planes["dx"].is_contiguous()


@pytest.mark.parametrize("pattern", SOME, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_empty_rows_and_full_topologies(isa: str, pattern: Block, density: float) -> None:
    case = problem(pattern, "3x3", density)
    assert_close(run(*case["operands"]), case)


# More than a shared slice holds: slices of rows, of images, one row that threads share, and a thread's own gradient.
@pytest.mark.parametrize("shape", [(2, 96, 64, 70, 62), (40, 70, 32, 19, 20), (1, 40, 32, 1, 4600)], ids=str)
@pytest.mark.parametrize("geometry", ["3x3", "stride 2", "1x1"])
@pytest.mark.parametrize("pattern", [Block(32, 32), Block(16, 16), Block(8, 8), Block(1, 16)], ids=str)
def test_slices(isa: str, pattern: Block, geometry: str, shape: tuple[int, int, int, int, int]) -> None:
    conv, (n, in_, out, h, w) = CASES[geometry][0], shape
    taps = conv.kernel[0] * conv.kernel[1]
    topology, values = make(pattern, out, in_, taps, 0.45 / taps)
    index, x = topology.weight_index(), image(n, in_, h, w, seed=1)
    dy = image(n, out, *conv.output_size(h, w), seed=2)
    weight = weight_of(topology.scatter(values), conv, in_)
    want = exact(conv, weight, x, dy, topology)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        got, again = run(index, values, x, dy, None, conv), run(index, values, x, dy, None, conv)
        assert all(torch.equal(got[what], again[what]) for what in got)
        results.append(got)
    torch.set_num_threads(1)
    for got in results:
        assert all(torch.equal(got[what], results[0][what]) for what in ("y", "dx", "dx at once"))
        for what in got:
            assert torch.isfinite(got[what]).all()
            torch.testing.assert_close(got[what], want[what], rtol=1e-3, atol=1e-4 * float(want[what].abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 33, 259), (1, 130, 132)], ids=str)
@pytest.mark.parametrize("out", [128, 136])
def test_large_results_past_the_caches(isa: str, out: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Of 4 MiB and more: image rows of odd and even lengths, whole row blocks and a ragged last one."""
    conv, (n, h, w) = ConvGeometry((3, 3), padding=(1, 1)), shape
    topology, values = make(Block(32, 32), out, 32, 9, 0.3)
    x = image(n, 32, h, w, seed=1).to(dtype)
    bias = torch.randn(out, generator=torch.Generator().manual_seed(3))
    reason = registry.why_not("cpu", "conv", pattern=topology.pattern, dtype=dtype, device=x.device)
    if reason is not None:
        pytest.skip(reason)
    y = ops.conv2d(x, values, topology, bias, conv=conv, backend="cpu")
    assert y.nbytes >= 4 << 20
    weight = weight_of(topology.scatter(values), conv, 32).to(dtype)
    want = F.conv2d(x.float(), weight.float(), bias, conv.stride, conv.padding)
    torch.testing.assert_close(
        y.float(), want, **({"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-2})
    )


@pytest.mark.parametrize("pattern", SOME, ids=str)
def test_views_of_any_strides(isa: str, pattern: Block) -> None:
    case = problem(pattern, "3x3")
    index, values, x, dy, bias, conv = case["operands"]
    n, c, h, w = x.shape
    padded = torch.full((n, h + 1, w + 2, c + 3), float("nan"))
    padded[:, 1:, 2:, 3:] = x.permute(0, 2, 3, 1)
    last = padded[:, 1:, 2:, 3:].permute(0, 3, 1, 2)
    planes = torch.full((n, c + 1, h + 1, w + 2), float("nan"))
    planes[:, 1:, 1:, 2:] = x
    neither = x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    wide = torch.full((n, dy.shape[1] * 2, *dy.shape[2:]), float("nan"))
    wide[:, ::2] = dy
    for view in (last, planes[:, 1:, 1:, 2:], neither):
        assert_close(run(index, values, view, wide[:, ::2], bias, conv), case)


# One of each way to y: tiles in rows and in planes, panels that lie dense in y and that do not, slices, linear's rows.
@pytest.mark.parametrize("keep", [False, True], ids=["", "keep"])
@pytest.mark.parametrize("name", ["3x3", "stride 2", "1x1", "slices"])
@pytest.mark.parametrize("pattern", [*SOME, Unstructured()], ids=str)
def test_epilogues(isa: str, pattern: Block, name: str, keep: bool) -> None:
    conv, n, in_, out, h, w = (*CASES["3x3"][:1], 2, 96, 40, 70, 62) if name == "slices" else CASES[name]
    topology, values = make(pattern, out, in_, conv.kernel[0] * conv.kernel[1], 0.1)
    if deriver := get("cpu").deriver("conv", pattern):
        topology.attach(deriver)
    index, bias, x = (
        WeightIndex.unpack(topology.index("cpu"), topology.shape),
        torch.randn(out),
        image(n, in_, h, w, seed=1),
    )
    room = torch.full((n, h + 1, w + 2, in_ + 3), float("nan"))
    room[:, 1:, 2:, 3:] = x.permute(0, 2, 3, 1)
    torch.set_num_threads(1 + keep)
    for given in (x, x.contiguous(), room[:, 1:, 2:, 3:].permute(0, 3, 1, 2)):
        product = get("cpu").spmm(given, values, index, bias, conv)
        for activation in ACTIVATIONS:
            y, pre = get("cpu").product_forward(given, values, index, bias, activation, keep, conv)
            assert torch.equal(pre, product) if keep else not pre.numel()
            assert y.stride() == product.stride()
            torch.testing.assert_close(y, ACTIVATIONS[activation].forward(product), rtol=1e-5, atol=1e-5)
    torch.set_num_threads(1)


@pytest.mark.parametrize("pattern", SOME, ids=str)
def test_images_one_column_wide_whose_stride_says_nothing(pattern: Block) -> None:
    conv, n, in_, out, h = ConvGeometry((3, 1), padding=(1, 0)), 2, 32, 32, 9
    topology, values = make(pattern, out, in_, 3, 0.4)
    x, dy = (torch.randn(n, channels, 1, h).transpose(2, 3) for channels in (in_, out))
    assert x.stride(1) != 1 and x.stride(3) != 1 and x.is_contiguous()
    got = run(topology.weight_index(), values, x, dy, None, conv)
    usual = [image.flatten().view(image.shape) for image in (x, dy)]
    want = run(topology.weight_index(), values, *usual, None, conv)
    for what in got:
        torch.testing.assert_close(got[what], want[what])


@pytest.mark.parametrize("pattern", ["block:16x16", "unstructured"])
@pytest.mark.parametrize("execution", ["cpu", "densified"])
def test_no_images_with_an_expanded_gradient(pattern: str, execution: str) -> None:
    layer = SparseConv2d(32, 32, 3, pattern=pattern, sparsity=0.5)
    layer.execution = execution
    x = torch.empty(0, 32, 5, 5, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape and not layer.values.grad.any() and not layer.bias.grad.any()


def test_an_empty_image_with_wide_padding() -> None:
    topology, values = make(Block(32, 32), 32, 32, 9, 1.0)
    x = torch.empty(2, 32, 0, 5, requires_grad=True)
    weight = values.clone().requires_grad_()
    y = ops.conv2d(x, weight, topology, conv=ConvGeometry((3, 3), padding=(2, 2)), backend="cpu")
    y.sum().backward()
    assert y.shape == (2, 32, 2, 7) and not y.detach().any()
    assert x.grad is not None and x.grad.shape == x.shape
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("pattern", [Block(32, 32), Block(16, 16), Block(64, 16), Block(8, 32)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_bf16_products_match_dense(isa: str, name: str, pattern: Block) -> None:
    conv, n, in_, out, h, w = CASES[name]
    topology, values = make(pattern, out, in_, conv.kernel[0] * conv.kernel[1], 0.4)
    index, half = topology.weight_index(), torch.bfloat16
    x, dy = image(n, in_, h, w, seed=1).to(half), image(n, out, *conv.output_size(h, w), seed=2).to(half)
    weight = weight_of(topology.scatter(values.to(half).double()), conv, in_)
    want = exact(conv, weight, x.double(), dy.double(), topology)
    terms = exact(conv, weight.abs(), x.double().abs(), dy.double().abs(), topology)
    for one, other in ((x, dy), (x.contiguous(), dy.contiguous())):
        for what, got in run(index, values, one, other, None, conv).items():
            rounding = torch.finfo(half).eps / 2 if what.startswith(("y", "dx")) else 0.0
            assert got.dtype == (half if rounding else torch.float32) and torch.isfinite(got).all(), what
            budget = 1.01 * rounding * want[what].abs() + 2e-6 * terms[what] + 1e-30
            assert ((got - want[what]).abs() <= budget).all(), what


@pytest.mark.parametrize("threads", [1, 2])
def test_bf16_slices(threads: int) -> None:
    conv, (n, in_, out, h, w) = CASES["3x3"][0], (2, 160, 64, 90, 62)
    topology, values = make(Block(32, 32), out, in_, 9, 0.05)
    index, half = topology.weight_index(), torch.bfloat16
    x, dy = image(n, in_, h, w, seed=1).to(half), image(n, out, h, w, seed=2).to(half)
    weight = weight_of(topology.scatter(values.to(half).float()), conv, in_)
    want = exact(conv, weight, x.float(), dy.float(), topology)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    got = run(index, values, x, dy, None, conv)
    torch.set_num_threads(before)
    for what in ("y", "dx"):
        scale = float(want[what].abs().max())
        torch.testing.assert_close(got[what].float(), want[what], rtol=1e-2, atol=1e-3 * scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("pattern", SOME, ids=str)
def test_nan_and_inf_reach_what_they_touch_and_nothing_else(isa: str, pattern: Block, bad: float) -> None:
    conv, n, in_, out, h, w = CASES["3x3"]
    topology, values = make(pattern, out, in_, 9, 0.4)
    index, cpu = topology.weight_index(), get("cpu")
    reach = weight_of(topology.scatter(topology.gather(torch.ones(out, 9 * in_))), conv, in_)
    x, dy = image(n, in_, h, w, seed=1), image(n, out, h, w, seed=2)
    at_x, at_dy = torch.zeros_like(x), torch.zeros_like(dy)
    at_x[1, in_ - 1, 0, 0] = at_dy[0, out - 1, h - 1, w - 1] = 1
    x[at_x.bool()], dy[at_dy.bool()] = bad, bad
    y = cpu.spmm(x, values, index, None, conv)
    assert torch.equal(~torch.isfinite(y), F.conv2d(at_x, reach, None, padding=1) > 0)
    dx = cpu.spmm_t(dy, values, index, conv, x)
    assert torch.equal(~torch.isfinite(dx), conv2d_input(list(x.shape), reach, at_dy, padding=1) > 0)
    dw = cpu.sddmm(dy, torch.ones_like(x), index, conv)
    hit = conv2d_weight(torch.ones_like(x), list(reach.shape), at_dy, padding=1) > 0
    # The border is zero, and zero times infinity is NaN: a tap that meets it may be hit as well.
    assert (~torch.isfinite(dw))[topology.gather(rows_of(hit.float())) > 0].all()
    assert (dw[topology.gather(torch.ones(out, 9 * in_)) == 0] == 0).all(), "padding must stay zero"


@pytest.mark.parametrize("pattern", [Block(32, 32), Block(16, 1), Block(8, 8)], ids=str)
@pytest.mark.parametrize("name", ["3x3", "stride 2", "1x1", "uneven"])
def test_block_scores_are_the_squared_norms_of_every_block(pattern: Block, name: str) -> None:
    case = problem(pattern, name)
    index, _, x, dy, _, conv = case["operands"]
    shape = [index.out, index.in_, *conv.kernel]
    grad = conv2d_weight(x.double(), shape, dy.double(), conv.stride, conv.padding, conv.dilation)
    want = index.blocks(rows_of(grad)).square().sum(dim=(1, 2)).view(index.row_blocks, index.col_blocks)
    before = torch.get_num_threads()
    for threads in (1, 2):  # a 1x1 goes other ways
        torch.set_num_threads(threads)
        for one, other in ((x, dy), (x.contiguous(), dy.contiguous())):
            got = get("cpu").block_scores(other, one, index, conv)
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    torch.set_num_threads(before)


@pytest.mark.parametrize("sides", [(1, 64), (32, 32), (64, 4), (8, 1)], ids=str)
def test_norms_of_blocks_that_stick_out(sides: tuple[int, int]) -> None:
    (bh, bw), rows, taps, in_ = sides, 75, 3, 270
    index = Topology.full(rows, in_, Block(bh, bw), taps=taps).weight_index()
    dense = torch.randn(rows, taps * in_)
    norms = torch.full((index.row_blocks, index.col_blocks), float("nan"))
    for threads in (1, 3):
        status = _native.native().block_norms(dense.data_ptr(), rows, taps, in_, bh, bw, norms.data_ptr(), threads)
        assert status == 0
        torch.testing.assert_close(norms.flatten(), index.blocks(dense).square().sum((1, 2)))
    assert _native.native().block_norms(0, rows, taps, in_, 5, bw, 0, 1) != 0


def test_two_python_threads_at_once() -> None:
    case = problem(Block(32, 32), "small image")
    alone = run(*case["operands"])
    results: list[dict[str, Tensor]] = []
    threads = [threading.Thread(target=lambda: results.extend(run(*case["operands"]) for _ in range(20))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 40
    assert all(torch.equal(result[what], alone[what]) for result in results for what in alone)


def test_launchers_refuse_what_they_cannot_run() -> None:
    native = _native.native()
    index = native.BlockIndex(64, 64, 8, 8, 0, *[0] * 6)
    strides, broken = native.ImageStrides(64, 1, 64, 64), native.ImageStrides(64, 2, 64, 64)
    good = native.ConvShape(1, 4, 4, 4, 4, 3, 3, 1, 1, 1, 1, 1, 1)
    wrong = native.ConvShape(1, 4, 4, 5, 4, 3, 3, 1, 1, 1, 1, 1, 1)
    odd = native.BlockIndex(64, 64, 5, 8, 0, *[0] * 6)
    for w, shape, layout, threads in [
        (odd, good, strides, 1),
        (index, wrong, strides, 1),
        (index, good, broken, 1),
        (index, good, strides, 0),
    ]:
        assert native.conv_block_spmm(w, shape, 0, 0, layout, 0, 0, 0, 0, layout, threads, 0) != 0
        assert native.conv_block_spmm_t(w, shape, 0, 0, layout, 0, layout, threads, 0) != 0
        assert native.conv_block_sddmm(w, shape, 0, layout, 0, layout, 0, threads, 0) != 0
    for unknown in (-1, 5):
        assert native.conv_block_spmm(index, good, 0, 0, strides, 0, unknown, 0, 0, strides, 1, 0) != 0
