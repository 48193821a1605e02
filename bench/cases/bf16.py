"""bf16, forward: `SparseLinear` and `SparseConv2d` with fp32 master values, activations in bf16, against torch in bf16.

The rival is `F.linear` or channels_last `F.conv2d` with weights that are in bf16 already, for linear the quicker of
that and oneDNN; ours reads its fp32 masters and converts them within the timed call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases.conv import BATCH, SHAPES, products, tap_nonzeros
from bench.harness import attempt, check_close, native
from bench.registry import Case, Ours, Prepared, Problem, Rival, Variant, register
from sparse_kernels import SparseConv2d, SparseLinear

GOALS = {0.5: 1.9, 0.75: 3.8, 0.9: 7.5}
VARIANTS = tuple(Variant("block:32x32", sparsity, {"D1": goal}) for sparsity, goal in GOALS.items())
TOLERANCE = 1e-2  # of the largest element: two roundings to 8 bits


def prepare_linear(positions: int, size: int, variants: tuple[Variant, ...]) -> Prepared:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(size, size, generator=generator) / size**0.5).bfloat16()
    x = torch.randn(positions, size, generator=generator).bfloat16()
    dense: dict[str, Callable[[], Tensor]] = {
        "F.linear": lambda: F.linear(x, weight),
        "oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""),
    }

    def ours(variant: Variant) -> Ours:
        layer = SparseLinear(
            size, size, bias=False, pattern=variant.pattern, sparsity=variant.sparsity, generator=generator
        )
        return _ours(variant, layer, x, lambda w: F.linear(x.float(), w))

    rivals = (Rival("D1", "D1 torch bf16", tuple(dense), "F.linear or oneDNN, the quicker"),)
    return Prepared(dense, rivals, {variant: attempt(partial(ours, variant)) for variant in variants})


def prepare_conv(channels: int, side: int, kernel: int, variants: tuple[Variant, ...]) -> Prepared:
    generator = torch.Generator().manual_seed(0)
    last, pad = torch.channels_last, kernel // 2
    x = torch.randn(BATCH, channels, side, side, generator=generator).bfloat16().contiguous(memory_format=last)
    weight = torch.randn(channels, channels, kernel, kernel, generator=generator) / (channels * kernel**2) ** 0.5
    weight = weight.bfloat16().contiguous(memory_format=last)

    def ours(variant: Variant) -> Ours:
        layer = SparseConv2d(
            channels, channels, kernel, padding=pad, bias=False,
            pattern=variant.pattern, sparsity=variant.sparsity, generator=generator,
        )  # fmt: skip
        return _ours(variant, layer, x, lambda w: F.conv2d(x.float(), w, padding=pad))

    rivals = (Rival("D1", "D1 torch bf16", ("conv",), "oneDNN channels_last"),)
    built = {variant: attempt(partial(ours, variant)) for variant in variants}
    return Prepared({"conv": lambda: F.conv2d(x, weight, padding=pad)}, rivals, built)


def _ours(
    variant: Variant,
    layer: SparseLinear | SparseConv2d,
    x: Tensor,
    dense: Callable[[Tensor], Tensor],
) -> Ours:
    """`dense` computes the forward in fp32 from a dense weight."""
    native(layer).requires_grad_(False)

    def run() -> Tensor:
        return layer(x)

    def check() -> None:
        y = run()
        if y.dtype != torch.bfloat16:
            raise TypeError(f"the result has dtype {y.dtype}")
        check_close(y, dense(layer.dense_weight().bfloat16().float()), "bf16 forward", TOLERANCE)

    return Ours(
        variant,
        layer.topology.density,
        run,
        check,
        flops=2.0 * products(x, tap_nonzeros(layer.topology)),
        moved=2.0 * x.nbytes + layer.values.nbytes,
    )


def problems() -> tuple[Problem, ...]:
    """Linear layers and the convolutions of case `conv`."""
    made = [
        Problem(f"linear P={positions} K={size}", VARIANTS, partial(prepare_linear, positions, size),
                quick=size == 1024 and positions == 1024, seconds=1.5, dtype="bfloat16", passes="forward")
        for positions, size in ((1024, 1024), (4096, 1024), (2048, 2048))
    ]  # fmt: skip
    made += [
        Problem(f"conv 3x3 N={BATCH} C={channels} {side}x{side}", VARIANTS, partial(prepare_conv, channels, side, 3),
                quick=side == 8, seconds=2.0, dtype="bfloat16", passes="forward")
        for channels, side in SHAPES
    ]  # fmt: skip
    return tuple(made)


register(
    Case(
        "bf16", "forward in bf16 of SparseLinear and SparseConv2d against torch in bf16", problems(), without_avx512=0.5
    )
)
