"""3x3 convolutions on a GPU, bf16, at the widths of the Latent Diffusion U-Net, batch 12: one case for each backend.

Goals are efficiencies (density × speedup) over cuDNN with channels_last and `cudnn.benchmark`; what is timed stands in
`bench.gpu_products`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from bench.cases.conv import SHAPES
from bench.gpu_products import FORWARD, INPUT, SCORES, WEIGHT, Product, prepare
from bench.registry import Case, Problem, Variant, register

BATCH = 12
SPARSITIES = (0.5, 0.75, 0.9)
SMALL_AND_LARGE = 0.6  # of the goals: what blocks of 16 and 64 may lose against 32

# Efficiency at S = .5, .75, .9 with blocks of 32; the input gradient within 5 % of the forward.
EFFICIENCY: Mapping[str, tuple[float, ...]] = {
    FORWARD: (0.80, 0.75, 0.60),
    INPUT: (0.76, 0.7125, 0.57),
    WEIGHT: (0.70, 0.60, 0.45),
}


def variants(efficiencies: tuple[float, ...]) -> tuple[Variant, ...]:
    """Blocks of 32, 16, 64 and 64x32 at every sparsity, with goals as speedups."""
    made = []
    for pattern, share in (("block:32x32", 1.0), ("block:16x16", SMALL_AND_LARGE), ("block:64x64", SMALL_AND_LARGE),
                           ("block:64x32", SMALL_AND_LARGE)):  # fmt: skip
        for sparsity, efficiency in zip(SPARSITIES, efficiencies, strict=True):
            made.append(Variant(pattern, sparsity, {"D1": round(share * efficiency / (1 - sparsity), 3)}))
    return tuple(made)


SCORED = (Variant("block:32x32", 0.75, {"D1": round(1 / 1.1, 3)}),)  # at most 1.1 times the dense weight gradient


def problems(backend: str) -> tuple[Problem, ...]:
    """Every width and product."""
    made = []
    for passes in (*EFFICIENCY, SCORES):
        for channels, side in SHAPES:
            product = Product(BATCH, channels, side, 3, passes)
            chosen = variants(EFFICIENCY[passes]) if passes in EFFICIENCY else SCORED
            name = f"3x3 N={BATCH} C={channels} {side}x{side} {passes}"
            build = partial(prepare, product, backend)
            made.append(Problem(name, chosen, build, quick=side == 32, seconds=1.5, dtype="bfloat16", passes=passes))
    return tuple(made)


for _backend in ("triton", "cuda"):
    _about = f"3x3 convolutions of backend {_backend!r} against cuDNN channels_last, bf16"
    register(Case(f"gpu-conv-{_backend}", _about, problems(_backend), device="cuda"))
