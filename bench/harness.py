"""How everything here is measured: interleaved rounds, medians, and rows that carry their machine.

A case builds callables that do the same work (its `check` shows that they agree), `interleave` times them in turn in
one process, and a `Row` sets ours beside a rival. Ratios are taken within a round, where both sides saw the same
machine, and their median is the speedup.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_kernels import _native
from sparsediff.doctor import cpu_name
from sparsediff.timing import interleave, ratios

__all__ = [
    "RESULTS",
    "Row",
    "check_close",
    "compare",
    "interleave",
    "machine",
    "peak_gflops",
    "ratios",
    "table",
    "write",
]

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass
class Row:
    """One measured line: ours beside one rival.

    `speedup` is the median of the rounds' ratios (`p20`, `p80` beside it); `efficiency` is density times speedup;
    `gflops` counts the nonzeros' FLOPs only; `roofline` is the speedup at which ours would run at the machine's
    measured peak, and `goal` what the project asks for.
    """

    case: str
    shape: str
    pattern: str
    sparsity: float
    density: float
    threads: int
    rival: str
    ours_ms: float
    rival_ms: float
    speedup: float
    speedup_p20: float
    speedup_p80: float
    efficiency: float
    gflops: float | None = None
    peak_gflops: float | None = None
    roofline: float | None = None
    goal: float | None = None
    met: bool | None = None
    note: str = ""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def compare(
    case: str,
    shape: str,
    pattern: str,
    sparsity: float,
    density: float,
    rival: str,
    ours_ms: list[float],
    rival_ms: list[float],
    *,
    nonzero_flops: float | None = None,
    goal: float | None = None,
    note: str = "",
    **extra: Any,
) -> Row:
    """The row of ours against one rival from the samples of `interleave`.

    Args:
        nonzero_flops: floating-point operations that ours cannot do without; gives GFLOP/s and the roofline.
    """
    speedups = ratios(rival_ms, ours_ms)
    speedup = statistics.median(speedups)
    ours, theirs = statistics.median(ours_ms), statistics.median(rival_ms)
    peak = peak_gflops(torch.get_num_threads()) if nonzero_flops else None
    roofline = theirs * 1e6 * peak / nonzero_flops if nonzero_flops and peak else None
    return Row(
        case,
        shape,
        pattern,
        sparsity,
        round(density, 4),
        torch.get_num_threads(),
        rival,
        round(ours, 4),
        round(theirs, 4),
        round(speedup, 3),
        round(float(np.quantile(speedups, 0.2)), 3),
        round(float(np.quantile(speedups, 0.8)), 3),
        round(density * speedup, 3),
        round(nonzero_flops / (ours * 1e6), 1) if nonzero_flops else None,
        peak,
        round(roofline, 2) if roofline else None,
        goal,
        None if goal is None else speedup >= goal,
        note,
        extra,
    )


_PEAKS: dict[int, float] = {}


def peak_gflops(threads: int) -> float:
    """The machine's fp32 FMA rate at this moment: the best of five short runs, measured once a process and thread
    count."""
    if threads not in _PEAKS:
        module = _native.native()
        _PEAKS[threads] = round(max(module.peak_fma_gflops(0.2, threads) for _ in range(5)), 1)
    return _PEAKS[threads]


def machine() -> dict[str, Any]:
    """What a row must say of where it was measured."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "isa": _native.native().isa_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write(rows: list[Row], path: Path) -> None:
    """Appends the rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = machine()
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps({**dataclasses.asdict(row), "machine": about}) + "\n")


_COLUMNS = ("case", "shape", "pattern", "S", "thr", "rival", "ours ms", "rival ms", "speedup", "p20-p80", "eff", "GF/s",
            "peak", "roof", "goal", "")  # fmt: skip


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    lines = [_COLUMNS]
    for r in rows:
        verdict = "" if r.met is None else ("met" if r.met else "MISSED")
        lines.append(
            (
                r.case,
                r.shape,
                r.pattern,
                f"{r.sparsity:g}",
                str(r.threads),
                r.rival,
                f"{r.ours_ms:.2f}",
                f"{r.rival_ms:.2f}",
                f"{r.speedup:.2f}x",
                f"{r.speedup_p20:.2f}-{r.speedup_p80:.2f}",
                f"{r.efficiency:.2f}",
                _or_dash(r.gflops, ".0f"),
                _or_dash(r.peak_gflops, ".0f"),
                _or_dash(r.roofline, ".1f"),
                _or_dash(r.goal, "g"),
                verdict,
            )
        )
    widths = [max(len(line[k]) for line in lines) for k in range(len(_COLUMNS))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _or_dash(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def check_close(actual: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = 1e-3) -> None:
    """Raises where ours is wrong: no speedup is reported for a wrong result."""
    scale = expected.abs().max().item() or 1.0
    error = (actual - expected).abs().max().item() / scale
    if not error <= tolerance:
        raise RuntimeError(f"{what} is wrong: relative error {error:.2g} against the dense result; nothing is timed.")
