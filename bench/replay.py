"""Timing on a GPU: CUDA graphs of several calls between CUDA events.

A function is called `calls` times, on other inputs each time if it rotates them, and captured into one graph: so launch
gaps and Python cost nothing on either side, and inputs come from memory and not from the cache of the call before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 3


class Replay:
    """`calls` calls of a function as one callable: as a CUDA graph or, where it cannot be captured, one by one.

    Args:
        reason: why it was not captured; empty where it was.
    """

    def __init__(self, function: Callable[[], Any], calls: int) -> None:
        self.function, self.calls = function, calls
        self.reason = ""
        self.graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP * calls):
                function()
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(self.graph):
                self._loop()
        # A peer that synchronises cannot be captured; it is timed as it can be.
        except Exception as error:
            self.graph, self.reason = None, f"{type(error).__name__}: {error}"
            torch.cuda.set_stream(stream)  # a capture that fails at its end leaves its own one current
            torch.cuda.synchronize()

    def _loop(self) -> None:
        for _ in range(self.calls):
            self.function()

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            self._loop()


def gpu_allocated_mib(function: Callable[[], Any]) -> float:
    """The largest rise in MiB of what torch has allocated on the GPU during a call, its results included."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
