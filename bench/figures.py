"""The report's plots, as SVG: speedup against sparsity, and FLOPs saved against seconds saved."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from datetime import datetime
from statistics import geometric_mean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.rows import Row

# Colour and marker together, for readers who do not tell the colours apart.
STYLES = {
    "block:32x32": ("#1f5fa8", "s"),
    "block:16x16": ("#e4572e", "o"),
    "unstructured": ("#17826b", "^"),
    "block:8x8": ("#8a5fb5", "D"),
}
OTHER = ("#5b6675", "x")
GREY = "#5b6675"
TICKS = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)


def panel_of(row: Row) -> str:
    """Which plot a row belongs to: its case, with the kind of layer where a case has several ("conv 3x3")."""
    kind = re.match(r"((linear|conv|conv1d) )?(\d+x\d+ )?", row.shape)
    assert kind is not None  # it matches nothing at least
    return f"{row.case} {kind[0]}".strip()


def strongest(rows: Sequence[Row]) -> list[Row]:
    """Of each timed measurement the row against its strongest rival; peers and limits of memory are left out."""
    worst: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row.rival.startswith("peer ") or row.unit != "ms":
            continue
        where = tuple(str(row.machine.get(name)) for name in ("cpu", "cores", "isa"))
        what = (row.case, row.shape, row.pattern, row.sparsity, row.threads, row.dtype, row.passes, *where)
        if what not in worst or row.speedup < worst[what].speedup:
            worst[what] = row
    return list(worst.values())


def patterns_of(rows: Sequence[Row]) -> list[str]:
    """The rows' patterns in the order of `STYLES`, those without a style last."""
    order = list(STYLES)
    return sorted(
        {row.pattern for row in rows}, key=lambda name: (order.index(name) if name in order else len(order), name)
    )


def speedup_svg(title: str, rows: Sequence[Row]) -> str:
    """Speedup over the strongest dense rival against sparsity: by pattern the geometric mean over shapes, every shape
    as a point, beside 1/(1−S) and the goals."""
    figure = Figure(figsize=(4.6, 3.7), layout="constrained")
    axes = figure.subplots()
    reach = max((row.sparsity for row in rows), default=0.9)
    line = np.linspace(0, max(reach, 0.9), 200)
    axes.plot(line, 1 / (1 - line), color=GREY, linestyle="--", linewidth=1, label="1/(1−S)", zorder=1)
    axes.axhline(1, color="#1d2633", linewidth=0.8, zorder=1)
    axes.axhspan(0.01, 1, color="#e4572e", alpha=0.05, linewidth=0, zorder=0)
    for pattern in patterns_of(rows):
        colour, marker = STYLES.get(pattern, OTHER)
        mine = [row for row in rows if row.pattern == pattern]
        levels = sorted({row.sparsity for row in mine})
        means = [geometric_mean(row.speedup for row in mine if row.sparsity == level) for level in levels]
        axes.plot(levels, means, color=colour, marker=marker, markersize=5, linewidth=1.8, label=pattern, zorder=3)
        axes.scatter(
            [row.sparsity for row in mine], [row.speedup for row in mine], color=colour, marker=marker, s=9, alpha=0.4,
            linewidths=0.5, zorder=2,
        )  # fmt: skip
    goals = [row for row in rows if row.goal is not None]
    if goals:
        axes.scatter(
            [row.sparsity for row in goals], [row.goal or 0.0 for row in goals], marker="_", s=120, color="#1d2633",
            linewidths=1.3, label="goal", zorder=4,
        )  # fmt: skip
    axes.set_yscale("log", base=2)
    low = min([0.8, *(row.speedup for row in rows)])
    high = max([1 / (1 - reach), *(row.speedup for row in rows)])
    axes.set_ylim(low / 1.15, high * 1.2)
    axes.set_yticks([tick for tick in TICKS if low / 1.15 <= tick <= high * 1.2])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("sparsity S")
    axes.set_ylabel("speedup")
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(color="#e3e7ed", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5)
    return svg(figure)


def flops_saved(row: Row) -> float:
    """The share of the dense FLOPs that is saved: of a whole model by its plan's FLOP bound, else by the density."""
    bound = row.extra.get("flop_bound")
    return 1 - 1 / bound if bound else 1 - row.density


def saved_svg(title: str, rows: Sequence[Row]) -> str:
    """The share of FLOPs saved against the share of seconds saved; on the diagonal every saved FLOP saves its time."""
    figure = Figure(figsize=(4.6, 3.7), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="all the time of the FLOPs", zorder=1)
    axes.axhline(0, color="#1d2633", linewidth=0.8, zorder=1)
    lowest = -0.1 if all(row.speedup >= 0.95 for row in rows) else -1.0
    axes.axhspan(lowest, 0, color="#e4572e", alpha=0.05, linewidth=0, zorder=0)
    for pattern in patterns_of(rows):
        colour, marker = STYLES.get(pattern, OTHER)
        mine = [row for row in rows if row.pattern == pattern]
        saved = [1 - 1 / row.speedup for row in mine]
        axes.scatter(
            [flops_saved(row) for row in mine], [max(share, lowest * 0.97) for share in saved], color=colour,
            marker=marker, s=24, alpha=0.75, linewidths=0.5, label=pattern, zorder=3,
        )  # fmt: skip
    # What costs more than twice the dense time is drawn at the lower edge.
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(lowest, 1.03)
    percent = FuncFormatter(lambda value, _: f"{value:.0%}")
    axes.xaxis.set_major_formatter(percent)
    axes.yaxis.set_major_formatter(percent)
    axes.set_xlabel("FLOPs saved")
    axes.set_ylabel("seconds saved")
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(color="#e3e7ed", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5)
    return svg(figure)


def svg(figure: Figure) -> str:
    """A figure as SVG text, the same for the same figure."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "bench", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def day(row: Row) -> str:
    """The day on which a row was measured."""
    text = str(row.machine.get("date", ""))
    return datetime.fromisoformat(text).date().isoformat() if text else "unknown"
