"""Bytes of a whole ChiroDiff's parameters, gradients, AdamW state, EMA and index, sparse against dense, after a step.

The milliseconds of a row stand for KiB; `speedup` is dense over sparse. Goals: within 10 % of density for blocks of 64
elements and more, 1.65 times density for unstructured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from bench.harness import Row, compare
from sparsediff.accounting import training_bytes
from sparsediff.presets import PRESETS
from sparsediff.train import Run, load_data


def run(quick: bool) -> Iterator[Row]:
    """S = 0.75 and 0.9 for block sides that matter, and unstructured."""
    settings = dataclasses.replace(PRESETS["chirodiff-kanjivg"], threads=torch.get_num_threads(), limit=500)
    data = load_data(settings)

    def measured(**changes: object) -> tuple[Run, dict[str, int]]:
        run = Run(dataclasses.replace(settings, **changes), data)  # type: ignore[arg-type]
        run.training_step()
        return run, training_bytes(run.model, run.optimizer, run.ema.model)

    whole, dense = measured(method="dense")
    total = sum(dense.values())
    for pattern in ("block:16x16",) if quick else ("block:8x8", "block:16x16", "block:32x32", "unstructured"):
        for sparsity in (0.75, 0.9):
            run, sparse = measured(method="rigl", pattern=pattern, sparsity=sparsity)
            used = sum(sparse.values())
            density = sum(p.numel() for p in run.parameters) / sum(p.numel() for p in whole.parameters)
            limit = 1.65 if pattern == "unstructured" else 1.1
            yield compare(
                "memory (KiB)",
                "kanjivg",
                pattern,
                sparsity,
                density,
                "dense",
                [used / 1024],
                [total / 1024],
                goal=round(1 / (density * limit), 3),
                **sparse,
            )
