"""Timing that holds on a machine with other guests: everything that is compared runs in turn, in one process.

A ratio is taken within a round, where both sides saw the same machine; the median of the rounds is what is reported.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any


def interleave(
    functions: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 2, shortest_ms: float = 4.0
) -> dict[str, list[float]]:
    """Times every function once a round, in rotating order.

    Args:
        functions: by name; a quick one is repeated within a round until it takes `shortest_ms`.
        rounds: samples of each. warmup: untimed rounds before.

    Returns:
        Milliseconds of one call, by name, in the order of the rounds.
    """
    repeats = {}
    for name, function in functions.items():
        for _ in range(warmup):
            function()
        start = time.perf_counter()
        function()
        once_ms = (time.perf_counter() - start) * 1e3
        repeats[name] = max(1, int(shortest_ms / max(once_ms, 1e-6)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                function, count = functions[name], repeats[name]
                start = time.perf_counter()
                for _ in range(count):
                    function()
                samples[name].append((time.perf_counter() - start) * 1e3 / count)
    finally:
        if collecting:
            gc.enable()
    return samples


def ratios(rival: list[float], ours: list[float]) -> list[float]:
    """Speedup of ours over the rival, round by round."""
    return [r / o for r, o in zip(rival, ours, strict=True)]
