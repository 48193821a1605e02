"""Regrow of a whole ChiroDiff (KanjiVG preset) beside one of its training steps.

The `speedup` of a row is step time over regrow time: above 1, a regrow costs less than a step.
"""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from typing import Any

import torch

from bench.harness import attempt
from bench.registry import Case, Ours, Prepared, Problem, Rival, Samples, Variant, register
from sparsediff.presets import PRESETS
from sparsediff.train import Run, load_data


def timings(run: Run, seconds: float) -> tuple[list[float], list[float]]:
    """Milliseconds of each regrow alone, and of each whole training step without one; at least three of each."""
    regrow_ms: list[float] = []
    step_ms: list[float] = []
    plain = run.method.step

    def timed() -> dict[str, Any] | None:
        start = time.perf_counter()
        done = plain()
        if done is not None:
            regrow_ms.append((time.perf_counter() - start) * 1e3)
        return done

    run.method.step = timed  # type: ignore[method-assign]
    run.training_step()  # the first step warms up
    end = time.perf_counter() + seconds
    while min(len(regrow_ms), len(step_ms)) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        if run.training_step() is None:
            step_ms.append((time.perf_counter() - start) * 1e3)
    return regrow_ms, step_ms


def density_of(run: Run) -> float:
    assert run.plan is not None
    return float(1 - run.plan["sparsity"])


def prepare(method: str, drop: float, variants: tuple[Variant, ...]) -> Prepared:
    """A step without growth against the regrow alone (`method.step()`), a growth every second step."""
    settings = dataclasses.replace(
        PRESETS["chirodiff-kanjivg"], threads=torch.get_num_threads(), limit=1000, method=method, every=2, drop=drop
    )
    data = load_data(settings)
    runs: dict[Variant, Run] = {}

    def build(variant: Variant) -> Ours:
        run = Run(dataclasses.replace(settings, pattern=variant.pattern, sparsity=variant.sparsity), data)
        runs[variant] = run
        return Ours(variant, density_of(run))

    def measure(seconds: float) -> Samples:
        samples: Samples = {}
        for variant, run in runs.items():
            regrow_ms, step_ms = timings(run, seconds / len(runs))
            samples[variant.name] = dict(enumerate(regrow_ms))
            samples[f"{variant.name} step"] = dict(enumerate(step_ms))
        return samples

    ours = {variant: attempt(partial(build, variant)) for variant in variants}
    return Prepared({}, (Rival("step", "one training step", ("step",)),), ours, measure)


register(
    Case(
        "regrow",
        "a regrow of a whole ChiroDiff against one training step",
        tuple(
            Problem(
                f"kanjivg {method} p={drop}",
                (Variant("block:16x16", 0.75, {"step": 1.0}), Variant("unstructured", 0.75, {"step": 1.0})),
                partial(prepare, method, drop),
                quick=drop == 0.05,
                timed=False,
                seconds=3.0,
            )
            for method in ("rigl", "magran")
            for drop in (0.05, 0.5)
        ),
    )
)
