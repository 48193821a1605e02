"""Regrow of a whole ChiroDiff (KanjiVG preset) beside one of its training steps.

The `speedup` of a row is step time over regrow time: above 1, a regrow costs less than a step.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import torch

from bench.harness import Row, compare
from sparsediff.presets import PRESETS
from sparsediff.train import Run, load_data


def timings(run: Run, steps: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each regrow alone, and of each whole training step without one."""
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
    for turn in range(steps):
        start = time.perf_counter()
        grew = run.training_step() is not None
        if not grew and turn:
            step_ms.append((time.perf_counter() - start) * 1e3)
    return regrow_ms, step_ms


def run(quick: bool) -> Iterator[Row]:
    """RigL and MagRan, p = 0.05 and 0.5; a step without growth against the regrow alone (`method.step()`)."""
    settings = dataclasses.replace(PRESETS["chirodiff-kanjivg"], threads=torch.get_num_threads(), limit=1000)
    data = load_data(settings)
    for pattern in ("block:16x16", "unstructured"):
        for method in ("rigl", "magran"):
            for drop in (0.05,) if quick else (0.05, 0.5):
                config = dataclasses.replace(
                    settings, method=method, pattern=pattern, sparsity=0.75, every=2, drop=drop
                )
                run = Run(config, data)
                regrow_ms, step_ms = timings(run, 8 if quick else 24)
                count = min(len(step_ms), len(regrow_ms))
                yield compare(
                    "regrow",
                    f"kanjivg {method} p={drop}",
                    pattern,
                    0.75,
                    1 - run.plan["sparsity"],
                    "one training step",
                    regrow_ms[-count:],
                    step_ms[-count:],
                    goal=1.0,
                )
