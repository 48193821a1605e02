"""Bytes of a whole ChiroDiff's parameters, gradients, AdamW state, EMA and index, sparse against dense, after a step.

The unit of a row is KiB; `speedup` is dense over sparse. Goals: within 10 % of density for blocks of 64 elements and
more, 1.65 times density for unstructured.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import torch

from bench.harness import attempt
from bench.registry import Case, Ours, Prepared, Problem, Rival, Samples, Variant, register
from sparsediff.accounting import training_bytes
from sparsediff.presets import PRESETS
from sparsediff.train import Run, load_data

PATTERNS = ("block:8x8", "block:16x16", "block:32x32", "unstructured")


def prepare(variants: tuple[Variant, ...]) -> Prepared:
    """Whole runs, one step each."""
    settings = dataclasses.replace(PRESETS["chirodiff-kanjivg"], threads=torch.get_num_threads(), limit=500)
    data = load_data(settings)

    def measured(**changes: object) -> tuple[int, dict[str, int]]:
        run = Run(dataclasses.replace(settings, **changes), data)  # type: ignore[arg-type]
        run.training_step()
        return sum(p.numel() for p in run.parameters), training_bytes(run.model, run.optimizer, run.ema.model)

    whole, dense = measured(method="dense")
    samples: Samples = {"dense": {0: sum(dense.values()) / 1024}}

    def build(variant: Variant) -> Ours:
        stored, sparse = measured(method="rigl", pattern=variant.pattern, sparsity=variant.sparsity)
        density = stored / whole
        samples[variant.name] = {0: sum(sparse.values()) / 1024}
        limit = 1.65 if variant.pattern == "unstructured" else 1.1
        asked = dataclasses.replace(variant, goals={"dense": round(1 / (density * limit), 3)})
        return Ours(asked, density, extra=dict(sparse))

    ours = {variant: attempt(partial(build, variant)) for variant in variants}
    return Prepared({}, (Rival("dense", "dense", ("dense",)),), ours, lambda seconds: samples, unit="KiB")


register(
    Case(
        "memory",
        "parameters, gradients, AdamW, EMA and index of a whole ChiroDiff",
        (
            Problem(
                "kanjivg",
                tuple(Variant(pattern, sparsity) for pattern in PATTERNS for sparsity in (0.75, 0.9)),
                prepare,
                quick=True,
                timed=False,
            ),
        ),
        row_name="memory (KiB)",
    )
)
