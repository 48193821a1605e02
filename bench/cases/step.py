"""A whole ChiroDiff training step of the KanjiVG preset: batch, loss, backward, clipping, AdamW, method, EMA.

Dense is torch's own GRU in the faster of its two forms; both sides run `sparsediff.train.Run.training_step`. That the
sparse model's gradients are right is what the cases `gru` and `linear` check; here the first losses must be finite.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import torch

from bench.harness import attempt
from bench.registry import Case, Ours, Prepared, Problem, Rival, Variant, Wrong, register
from sparsediff.presets import PRESETS, TrainConfig
from sparsediff.train import Run, StrokeData, load_data

PRESET = PRESETS["chirodiff-kanjivg"]
GOALS: dict[tuple[str, float], float | None] = {
    ("block:16x16", 0.5): None,
    ("block:16x16", 0.75): 4.0,
    ("block:16x16", 0.9): 6.0,
    ("unstructured", 0.75): None,
    ("unstructured", 0.9): 3.5,
}


def stepper(config: TrainConfig, data: StrokeData) -> tuple[Run, Callable[[], None]]:
    run = Run(config, data)

    def step() -> None:
        run.training_step()

    return run, step


def prepare(variants: tuple[Variant, ...]) -> Prepared:
    """RigL, ΔT as in the preset. Every run draws the same batches in the same order, so that a round compares steps on
    about the same data."""
    settings = dataclasses.replace(PRESET, threads=torch.get_num_threads())
    data = load_data(settings)
    dense = {
        form: stepper(dataclasses.replace(settings, method="dense", gru_form=form), data)[1]
        for form in ("packed", "padded")
    }

    def ours(variant: Variant) -> Ours:
        config = dataclasses.replace(settings, method="rigl", pattern=variant.pattern, sparsity=variant.sparsity)
        run, step = stepper(config, data)
        assert run.plan is not None

        def check() -> None:
            step()
            if not math.isfinite(run.mean_loss()):
                raise Wrong(f"the loss of a training step is {run.mean_loss()}")

        return Ours(
            variant,
            1 - run.plan["sparsity"],
            step,
            check,
            extra={"parameters": sum(p.numel() for p in run.parameters)},
        )

    rivals = (Rival("dense", "dense {}", ("packed", "padded")),)
    return Prepared(dense, rivals, {variant: attempt(partial(ours, variant)) for variant in variants})


VARIANTS = tuple(
    Variant(pattern, sparsity, {} if goal is None else {"dense": goal}) for (pattern, sparsity), goal in GOALS.items()
)

register(
    Case(
        "step",
        "a whole training step of the KanjiVG preset",
        (Problem(f"kanjivg B={PRESET.batch_size}", VARIANTS, prepare, quick=True, seconds=15.0),),
        row_name="chirodiff step",
        keeps_freed_memory=True,
    )
)
