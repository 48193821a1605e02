"""`SparseConv2d`, stride 1, forward and backward, at the widths of the Latent Diffusion U-Net, batch 4.

    Y = conv(X, W)      dX = convᵀ(dY, W)      dW = X ⋆ dY at the active blocks          fp32

The rival is oneDNN under autograd with channels_last activations and weight, its quickest form. Ours gets what its
kernels are made for: channels_last for blocks, contiguous for unstructured; both formats are served.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import peers
from bench.harness import attempt, check_close, native
from bench.registry import Case, Ours, Prepared, Problem, Rival, Variant, register
from sparse_kernels import SparseConv2d
from sparse_kernels.topology import Topology

BATCH = 4
SHAPES = ((224, 64), (448, 32), (672, 16), (896, 8))  # channels, height = width
GOALS_3X3 = {
    "block:32x32": {0.5: 2.0, 0.75: 3.6, 0.9: 7.5},
    "block:16x16": {0.5: 1.7, 0.75: 3.0, 0.9: 6.5},
    "unstructured": {0.5: 1.2, 0.75: 2.2, 0.9: 4.5},
}
GOALS_1X1 = {"block:32x32": {0.5: 1.8, 0.75: 3.3, 0.9: 6.5}}


def kernel_of(weight: Tensor, topology: Topology, side: int) -> Tensor:
    """The matrix `[out, R·S·in]` as a convolution's weight `[out, in, R, S]`."""
    return weight.view(topology.out, side, side, topology.in_).permute(0, 3, 1, 2)


def matrix_of(kernel: Tensor) -> Tensor:
    """A convolution's weight `[out, in, R, S]` as the tap-major matrix `[out, R·S·in]`."""
    return kernel.permute(0, 2, 3, 1).reshape(kernel.shape[0], -1)


def products(x: Tensor, nonzeros: Sequence[int]) -> int:
    """Multiply-adds of one pass of a convolution of stride 1 with a square kernel of odd side k and padding k // 2.

        Σ over taps (r, s) of nonzeros[r·k + s] · n · (h − |r − k//2|) · (w − |s − k//2|)

    What a tap reads of the padding is not counted.

    Args:
        x: images `[n, c, h, w]`, or the rows `[n, c]` of a linear layer. nonzeros: weights of each of the k² taps.
    """
    n, h, w = (x.shape[0], *x.shape[2:]) if x.dim() == 4 else (x.shape[0], 1, 1)
    side = math.isqrt(len(nonzeros))
    assert side**2 == len(nonzeros) and side % 2 == 1
    rows, columns = ([max(0, size - abs(tap - side // 2)) for tap in range(side)] for size in (h, w))
    return sum(count * n * rows[tap // side] * columns[tap % side] for tap, count in enumerate(nonzeros))


def tap_nonzeros(topology: Topology) -> list[int]:
    """Present weights of each tap."""
    heights, widths = topology.weight_index().block_areas()
    rows, cols = topology.coords()
    counts = torch.zeros(topology.taps, dtype=torch.int64)
    return counts.index_add_(0, cols // topology.cols_per_tap, (heights[rows] * widths[cols]).long()).tolist()


def prepare(channels: int, side: int, kernel: int, with_peers: bool, variants: tuple[Variant, ...]) -> Prepared:
    generator = torch.Generator().manual_seed(0)
    last = torch.channels_last
    shape = (BATCH, channels, side, side)
    x = torch.randn(shape, generator=generator).contiguous(memory_format=last).requires_grad_()
    dy = torch.randn(shape, generator=generator).contiguous(memory_format=last)
    weight = torch.randn(channels, channels, kernel, kernel, generator=generator) / (channels * kernel**2) ** 0.5
    weight = weight.contiguous(memory_format=last).requires_grad_()

    def dense() -> None:
        x.grad = weight.grad = None
        F.conv2d(x, weight, padding=kernel // 2).backward(dy)

    named: dict[str, str] = {}

    def build(variant: Variant) -> Ours:
        layer = SparseConv2d(
            channels, channels, kernel, padding=kernel // 2, bias=False,
            pattern=variant.pattern, sparsity=variant.sparsity, generator=generator,
        )  # fmt: skip
        made = sparse_step(variant, native(layer), x.detach(), dy)
        if with_peers:
            sparse = layer.dense_weight().detach()
            job = peers.Job(variant.pattern, peers.TRAINING, sparse, x.detach(), dy, kernel // 2)
            made.peers, reasons = peers.contenders(job)
            named.update({f"{name}, {variant.name}": reason for name, reason in reasons.items()})
        return made

    ours = {variant: attempt(partial(build, variant)) for variant in variants}
    rivals = (Rival("D1", "D1 oneDNN channels_last", ("D1",)),)
    return Prepared({"D1": dense}, rivals, ours, named=named)


def sparse_step(variant: Variant, layer: SparseConv2d, x: Tensor, dy: Tensor) -> Ours:
    """Forward and backward through the public layer, in the memory format that suits its pattern."""
    unstructured = variant.pattern == "unstructured"
    form = torch.contiguous_format if unstructured else torch.channels_last
    x = x.contiguous(memory_format=form).clone(memory_format=form).requires_grad_()
    dy = dy.contiguous(memory_format=form)

    def run() -> Tensor:
        x.grad = layer.values.grad = None
        y = layer(x)
        y.backward(dy)
        return y

    def check() -> None:
        y = run()
        x_dense, weight = x.detach().requires_grad_(), layer.dense_weight().detach().requires_grad_()
        expected = F.conv2d(x_dense, weight, padding=layer.padding)
        dx, dw = torch.autograd.grad(expected, (x_dense, weight), dy)
        assert x.grad is not None and layer.values.grad is not None
        check_close(y.detach(), expected.detach(), "conv forward")
        check_close(x.grad, dx, "conv input gradient")
        check_close(layer.values.grad, layer.topology.gather(matrix_of(dw)), "conv weight gradient")

    return Ours(
        variant,
        layer.topology.density,
        run,
        check,
        flops=3 * 2.0 * products(x, tap_nonzeros(layer.topology)),
        # As for linear: x forward and for dW, dx; y, dy once; the values twice and their gradient. Not the gathered x.
        moved=3.0 * x.nbytes + 2 * dy.nbytes + 3 * layer.values.nbytes,
        footprint=2 * x.nbytes + 2 * dy.nbytes + 2 * layer.values.nbytes,
        note="ours contiguous" if unstructured else "",
    )


def variants_of(goals: dict[str, dict[float, float]]) -> tuple[Variant, ...]:
    return tuple(Variant(pattern, s, {"D1": goal}) for pattern, by_s in goals.items() for s, goal in by_s.items())


def problems(kernel: int, goals: dict[str, dict[float, float]]) -> tuple[Problem, ...]:
    """Every width with its image size; peers at two of the 3x3 ones."""
    variants = variants_of(goals)
    return tuple(
        Problem(
            f"{kernel}x{kernel} N={BATCH} C={channels} {side}x{side}",
            variants,
            partial(prepare, channels, side, kernel, kernel == 3 and side in (32, 8)),
            quick=(kernel, side) == (3, 8),
            seconds=10.0 if kernel == 3 else 4.0,
        )
        for channels, side in SHAPES
    )


register(
    Case(
        "conv",
        "SparseConv2d 3x3 and 1x1 against oneDNN channels_last",
        (*problems(3, GOALS_3X3), *problems(1, GOALS_1X1)),
        without_avx512=0.5,
    )
)
