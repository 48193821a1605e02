"""Linear layers on a GPU, bf16: 4096³, the U-Net's projections at batch 12, and the weight gradient of many positions.

Goals are efficiencies (density × speedup) over cuBLAS, other ones for each backend; see `bench.gpu_products`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from bench.cases.gpu_conv import SCORED, variants
from bench.gpu_products import FORWARD, INPUT, SCORES, WEIGHT, Product, prepare
from bench.registry import Case, Problem, register

# Positions and width; the last three are attention projections at 32x32, 16x16 and 8x8.
SHAPES = ((4096, 4096), (16384, 1024), (12288, 448), (3072, 672), (768, 896))
LOW = (0.55, 0.40, 0.28)
EFFICIENCY: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "triton": {FORWARD: LOW, INPUT: LOW, WEIGHT: LOW},
    "cuda": {FORWARD: (0.75, 0.55, 0.40), INPUT: (0.75, 0.55, 0.40), WEIGHT: LOW},
}


def problems(backend: str) -> tuple[Problem, ...]:
    """Every shape and product; the goal of the weight gradient holds from 16384 positions."""
    made = []
    for passes in (FORWARD, INPUT, WEIGHT, SCORES):
        for positions, width in SHAPES:
            product = Product(positions, width, 1, 0, passes)
            chosen = SCORED if passes == SCORES else variants(EFFICIENCY[backend][passes])
            if passes == WEIGHT and positions < 16384:
                chosen = tuple(type(one)(one.pattern, one.sparsity) for one in chosen)
            name, build = f"P={positions} K={width} {passes}", partial(prepare, product, backend)
            quick = width == 448
            made.append(Problem(name, chosen, build, quick=quick, seconds=1.0, dtype="bfloat16", passes=passes))
    return tuple(made)


for _backend in EFFICIENCY:
    _about = f"linear layers of backend {_backend!r} against cuBLAS, bf16"
    register(Case(f"gpu-linear-{_backend}", _about, problems(_backend), device="cuda"))
