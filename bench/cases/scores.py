"""The score tap of a convolution or linear layer beside the dense weight gradient that RigL otherwise needs.

    scores[b] = ‖dYᵀ · gather(X)‖²_F of every block b, without ever storing the dense gradient

Ours is the backward of an op whose tap alone wants a gradient; dense is the weight gradient alone, without its norms:
oneDNN channels_last, or the quicker of MKL and oneDNN for a linear layer. Rows in MiB hold what that backward
allocates, the scores included, against the 16 MiB that a whole model may use; scores of unstructured weights are as
large as the weight and have no such limit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.cases.conv import BATCH, SHAPES, matrix_of, products
from bench.cases.linear import dense_products, quicker
from bench.harness import attempt, check_close, native
from bench.registry import Case, Ours, Prepared, Problem, Rival, Variant, register
from sparse_kernels import SparseConv2d, SparseLinear
from sparse_kernels.nn.weights import sparse_weights

LIMIT_MIB = 16.0
GOAL = {"dW": round(1 / 1.1, 3)}  # at most 1.1 times the dense weight gradient's time
VARIANTS = (Variant("block:32x32", 0.75, GOAL), Variant("block:16x16", 0.75, GOAL), Variant("unstructured", 0.75))

Layer = SparseConv2d | SparseLinear


def prepare_conv(channels: int, side: int, kernel: int, variants: tuple[Variant, ...]) -> Prepared:
    generator = torch.Generator().manual_seed(0)
    last, pad = torch.channels_last, kernel // 2
    x, dy = (
        torch.randn(BATCH, channels, side, side, generator=generator).contiguous(memory_format=last) for _ in range(2)
    )
    weight = torch.empty(channels, channels, kernel, kernel).contiguous(memory_format=last)

    def dense() -> Tensor:
        geometry = ([1, 1], [pad, pad], [1, 1], False, [0, 0], 1)
        return torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, [False, True, False])[1]

    def build(variant: Variant) -> Layer:
        return SparseConv2d(
            channels, channels, kernel, padding=pad, bias=False, pattern=variant.pattern, sparsity=variant.sparsity
        )

    expected = matrix_of(dense())
    ours = {variant: attempt(partial(_ours, variant, build, x, dy, expected)) for variant in variants}
    return Prepared({"dW": dense}, (Rival("dW", "dense dW", ("dW",), "oneDNN channels_last"),), ours)


def prepare_linear(positions: int, size: int, variants: tuple[Variant, ...]) -> Prepared:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(positions, size, generator=generator) for _ in range(2))
    ways = dense_products(x, torch.empty(size, size), dy)["dw"]
    library = quicker(ways)
    expected = dy.T @ x

    def build(variant: Variant) -> Layer:
        return SparseLinear(size, size, bias=False, pattern=variant.pattern, sparsity=variant.sparsity)

    ours = {variant: attempt(partial(_ours, variant, build, x, dy, expected)) for variant in variants}
    return Prepared({"dW": ways[library]}, (Rival("dW", "dense dW", ("dW",), library),), ours)


def _ours(variant: Variant, build: Callable[[Variant], Layer], x: Tensor, dy: Tensor, gradient: Tensor) -> Ours:
    """The backward that forms the scores alone; `gradient [out, R·S·in]` is the dense one."""
    layer = native(build(variant))
    if variant.pattern == "unstructured" and x.dim() == 4:
        x, dy = x.contiguous(), dy.contiguous()
    layer.requires_grad_(False)
    topology = layer.topology
    tap = sparse_weights(layer)[0].open_tap()
    y = layer(x)

    def run() -> Tensor:
        return torch.autograd.grad(y, tap, dy, retain_graph=True)[0]

    def check() -> None:
        blocks = topology.weight_index().blocks(gradient)
        check_close(run(), blocks.square().sum((1, 2)).view_as(tap), "scores")

    return Ours(
        variant,
        1.0,  # every block is formed
        run,
        check,
        flops=2.0 * products(x, [topology.out * topology.in_] * topology.taps),
        moved=float(x.nbytes + dy.nbytes + 4 * tap.numel()),
        limit_mib=None if variant.pattern == "unstructured" else LIMIT_MIB,
    )


def problems() -> tuple[Problem, ...]:
    """The convolutions of case `conv`, and a linear layer."""
    made = [
        Problem(f"conv {kernel}x{kernel} N={BATCH} C={channels} {side}x{side}", VARIANTS,
                partial(prepare_conv, channels, side, kernel), quick=(kernel, side) == (1, 8), seconds=2.0,
                passes="scores")
        for kernel, shapes in ((3, SHAPES), (1, SHAPES[-1:]))
        for channels, side in shapes
    ]  # fmt: skip
    linear = [
        Problem(f"linear P={positions} K={size}", VARIANTS, partial(prepare_linear, positions, size),
                quick=size == 512, seconds=1.5, passes="scores")
        for positions, size in ((1024, 512), (4096, 1024))
    ]  # fmt: skip
    return (*made, *linear)


register(Case("scores", "the score tap against the dense weight gradient", problems(), without_avx512=0.5))
