"""Two measurements side by side: what became slower beyond noise.

A row's noise is the span from its 20th to its 80th percentile of speedups, taken within rounds. A regression is a
later span that lies entirely below the earlier one, by at least `LEAST`; it is none of ours where the rival's time
moved beyond its own noise and our time did not follow. Our time alone, longer beyond noise beside a rival that stayed,
is a regression too.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable
from pathlib import Path

from bench.rows import RESULTS, Key, Row, newest, read

LEAST = 0.02  # relative change of the medians: what repeats to the digit, such as bytes, has no span


@dataclasses.dataclass(frozen=True)
class Change:
    """One key measured twice; `kind` is "regression", "improvement", "rival changed" or "" (within noise)."""

    before: Row
    after: Row

    @property
    def ratio(self) -> float:
        return self.after.speedup / self.before.speedup

    @property
    def kind(self) -> str:
        a, b = self.before, self.after
        ratio = _shift((a.speedup_p20, a.speedup, a.speedup_p80), (b.speedup_p20, b.speedup, b.speedup_p80))
        ours = -_shift((a.ours_p20, a.ours_ms, a.ours_p80), (b.ours_p20, b.ours_ms, b.ours_p80))  # 1: quicker
        rival = _shift((a.rival_p20, a.rival_ms, a.rival_p80), (b.rival_p20, b.rival_ms, b.rival_p80))
        if ratio and rival and ours != ratio:
            return "rival changed"
        change = ratio or (0 if rival else ours)
        return {-1: "regression", 0: "", 1: "improvement"}[change]


Span = tuple[float | None, float, float | None]  # 20th percentile, median, 80th percentile


def _shift(before: Span, after: Span) -> int:
    """1 where the later span lies beyond noise above the earlier one, -1 below it, else 0; 0 for rows without spans."""
    (low, middle, high), (later_low, later_middle, later_high) = before, after
    if low is None or high is None or later_low is None or later_high is None:
        return 0
    if later_high < low and later_middle < middle * (1 - LEAST):
        return -1
    return int(later_low > high and later_middle > middle * (1 + LEAST))


def load(spec: str) -> dict[Key, Row]:
    """The newest rows of `FILE`, `COMMIT` (among all of bench/results) or `FILE@COMMIT`.

    Raises:
        ValueError: there is no such file, or no row of that commit.
    """
    name, _, commit = spec.rpartition("@") if "@" in spec else (spec, "", "")
    path = Path(name)
    if path.is_file():
        rows = read(path)
    elif "@" in spec or path.suffix:
        raise ValueError(f"compare: there is no row file {name!r}.")
    else:
        commit, rows = name, [row for file in sorted(RESULTS.glob("*.jsonl")) for row in read(file)]
    if commit:
        commits = sorted({str(row.machine.get("commit")) for row in rows})
        rows = [row for row in rows if str(row.machine.get("commit")).startswith(commit)]
        if not rows:
            raise ValueError(f"compare: {spec!r} is neither a row file nor a commit with rows ({', '.join(commits)}).")
    return newest(rows)


def changes(before: dict[Key, Row], after: dict[Key, Row]) -> list[Change]:
    """The keys that both have, in the order of `before`."""
    return [Change(row, after[key]) for key, row in before.items() if key in after]


def comparison(before: str, after: str, *, unchanged: bool = False) -> tuple[str, int]:
    """The comparison as text, and the number of regressions.

    Args:
        before, after: as for `load`. unchanged: list the rows within noise too.

    Raises:
        ValueError: the two have no row in common.
    """
    first, second = load(before), load(after)
    both = changes(first, second)
    if not both:
        raise ValueError("compare: the two have no row of the same case, shape, pattern, rival, threads and machine.")
    kinds = [change.kind for change in both]
    lines = [_line(change) for change, kind in zip(both, kinds, strict=True) if kind or unchanged]
    overall = statistics.geometric_mean(change.ratio for change in both)
    regressions = kinds.count("regression")
    lines.append(
        f"{len(both)} rows in common: {regressions} regressions and {kinds.count('improvement')} improvements beyond "
        f"noise, {kinds.count('rival changed')} where only the rival changed; geometric mean of the changes "
        f"{overall:.3f}x; only in A: {_only(first, second)}, only in B: {_only(second, first)}"
    )
    return "\n".join(lines), regressions


def _only(these: Iterable[Key], others: Iterable[Key]) -> int:
    return len(set(these) - set(others))


def _line(change: Change) -> str:
    a, b = change.before, change.after
    return (
        f"{change.kind or 'same':<13} {a.case} {a.shape} {a.pattern} S={a.sparsity:g} {a.dtype} thr={a.threads} vs "
        f"{a.rival}: {a.speedup:.2f}x [{a.speedup_p20:.2f}-{a.speedup_p80:.2f}] -> {b.speedup:.2f}x "
        f"[{b.speedup_p20:.2f}-{b.speedup_p80:.2f}], {change.ratio:.3f}x; ours {a.ours_ms:.2f} -> {b.ours_ms:.2f} "
        f"{b.unit}, rival {a.rival_ms:.2f} -> {b.rival_ms:.2f}"
    )
