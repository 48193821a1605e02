"""A whole ChiroDiff training step of the KanjiVG preset: batch, loss, backward, clipping, AdamW, method, EMA.

Dense is torch's own GRU in the faster of its two forms; both sides run `sparsediff.train.Run.training_step`.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator

import torch

from bench.harness import Row, compare, interleave
from sparsediff.presets import PRESETS, TrainConfig
from sparsediff.train import Run, load_data

GOALS = {
    ("block:16x16", 0.5): None,
    ("block:16x16", 0.75): 4.0,
    ("block:16x16", 0.9): 6.0,
    ("unstructured", 0.75): None,
    ("unstructured", 0.9): 3.5,
}


def run(quick: bool) -> Iterator[Row]:
    """RigL at every sparsity of the goals, ΔT as in the preset."""
    preset = PRESETS["chirodiff-kanjivg"]
    settings = dataclasses.replace(preset, threads=torch.get_num_threads(), limit=1000 if quick else None)
    data = load_data(settings)

    def stepper(config: TrainConfig) -> tuple[Run, Callable[[], None]]:
        run = Run(config, data)

        def step() -> None:
            run.training_step()

        return run, step

    functions = {}
    for form in ("packed", "padded"):
        _, functions[form] = stepper(dataclasses.replace(settings, method="dense", gru_form=form))
    runs = {}
    for pattern, sparsity in GOALS:
        name = f"{pattern} {sparsity}"
        config = dataclasses.replace(settings, method="rigl", pattern=pattern, sparsity=sparsity)
        runs[name], functions[name] = stepper(config)
    # Every run draws the same batches in the same order, so a round compares steps on the same data.
    samples = interleave(functions, rounds=4 if quick else 15, warmup=1, shortest_ms=0)
    rival = min(("packed", "padded"), key=lambda form: statistics.median(samples[form]))
    for (pattern, sparsity), goal in GOALS.items():
        name = f"{pattern} {sparsity}"
        stored = sum(p.numel() for p in runs[name].parameters)
        density = 1 - runs[name].plan["sparsity"]
        yield compare(
            "chirodiff step",
            f"kanjivg B={settings.batch_size}",
            pattern,
            sparsity,
            density,
            f"dense {rival}",
            samples[name],
            samples[rival],
            goal=goal,
            parameters=stored,
        )
