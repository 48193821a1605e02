"""Autotuning as an option: with SPARSE_KERNELS_TRITON_AUTOTUNE=1 each new shape times its candidates once a process.

Off by default, since what a timing decides need not be decided alike tomorrow; what it finds belongs in the tables of
`_triton_config`. A launch that does not compile or does not fit loses. Nothing is timed while a CUDA graph is captured.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from ._triton_config import GradientConfig, ProductConfig, Table

Config = TypeVar("Config", ProductConfig, GradientConfig)

_found: dict[Hashable, Any] = {}


def enabled(device: torch.device) -> bool:
    """Whether a launch without a config is to be tuned now."""
    wanted = os.environ.get("SPARSE_KERNELS_TRITON_AUTOTUNE", "0") not in ("", "0")
    return wanted and device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def product_candidates(table: Table, given: ProductConfig) -> list[ProductConfig]:
    """The launches to compare with `given`, which comes first."""
    more = [
        replace(given, block_p=base.block_p, warps=base.warps, stages=stages, entries=entries, cache=cache)
        for base, stages, entries, cache in itertools.product(table.product, (3, 4, 5), (1, 2), ("", ".ca"))
    ]
    return [given, *(config for config in more if config != given)]


def gradient_candidates(configs: Sequence[GradientConfig], given: GradientConfig) -> list[GradientConfig]:
    """Likewise, for the widths and heights of a table's rows and fewer or more splits."""
    splits = given.splits or 1
    more = [
        replace(base, height=given.height or base.height, cache=cache, splits=parts)
        for base, cache, parts in itertools.product(
            configs, ("", ".ca"), sorted({max(1, splits // 2), splits, 2 * splits} if splits > 1 else {1})
        )
    ]
    return [given, *(config for config in more if config != given)]


def milliseconds(launch: Callable[[], Any]) -> float:
    """The median time of a launch on the current GPU; infinite where it cannot be launched."""
    from triton import testing
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    try:
        return float(testing.do_bench(launch, warmup=5, rep=20, return_mode="median"))
    except (OutOfResources, CompilationError):
        return float("inf")


def best(
    key: Hashable,
    candidates: Sequence[Config],
    launch: Callable[[Config], Any],
    measure: Callable[[Callable[[], Any]], float] = milliseconds,
) -> Config:
    """The quickest candidate, measured the first time that `key` is asked for; of equals, the first."""
    if key not in _found:
        _found[key] = min(candidates, key=lambda config: measure(lambda: launch(config)))
    found: Config = _found[key]
    return found
