"""The stroke-3 format of sketch-rnn: rows (dx, dy, lift), as lists of arrays in an `.npz` or as one flat array.

Two conventions for row 0 are in use. Where drawings had their first point moved to the origin and left out, it is the
first line ("line": KanjiVG's file, whose strokes then equal those of its SVG files). Where it holds the absolute
position of the first point, it draws nothing ("move": the simplified drawings of Quick, Draw!). "auto" decides for a
whole file: positions on a canvas are never negative, while drawings relative to their first point go left of it or
above it sooner or later.

Source: Ha and Eck, "A Neural Representation of Sketch Drawings", 2017; magenta's sketch_rnn/utils.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ._preparation import MAX_COORDINATE, Complaints, Drawings
from ._strokes import SPLITS, DataError, Int64, check_flat, gather_ragged, owner


def from_npz(path: Path, arrays: Mapping[str, npt.NDArray[Any]], start: str, complaints: Complaints) -> Drawings:
    """Drawings of a sketch-rnn `.npz`: keys train, valid, test, each a list of `(n, 3)` arrays.

    Args:
        path: for messages.
        arrays: its content.
        start: "auto", "move" or "line": what row 0 means.
        complaints: receives items that are no `(n, 3)` arrays of numbers.

    Raises:
        DataError: there is no key train.
    """
    if "train" not in arrays:
        raise DataError(
            f"{path}: expected the keys train, valid, test of a sketch-rnn file; got {', '.join(arrays) or 'none'}. "
            "Give a sketch-rnn .npz file."
        )
    parts = [part for part in SPLITS if part in arrays]
    items: list[npt.NDArray[Any]] = []
    names: list[str] = []
    splits: list[int] = []
    for part in parts:
        for i, item in enumerate(arrays[part]):
            rows = np.asarray(item)
            if rows.dtype.kind not in "biuf" or rows.ndim != 2 or rows.shape[1] != 3:
                complaints.add(
                    f"{path}: item {i} of {part!r}", "not a list of (dx, dy, lift)",
                    f"expected an (n, 3) array of numbers; got {rows.dtype} {rows.shape}.",
                )  # fmt: skip
                continue
            items.append(rows)
            names.append(f"{part}/{i}")
            # A file with training drawings only is split like a set without splits.
            splits.append(SPLITS.index(part) if len(parts) > 1 else -1)
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in items])]).astype(np.int64)
    points = np.concatenate(items).astype(np.float64) if items else np.zeros((0, 3))
    return from_flat(
        points, offsets, names, np.array(splits, np.int8), lambda i: f"{path}: item {names[i]}", start, complaints
    )


def from_flat(
    points: npt.NDArray[Any],
    offsets: Int64,
    labels: Sequence[str],
    splits: npt.NDArray[np.int8] | None,
    where: Callable[[int], str],
    start: str,
    complaints: Complaints,
) -> Drawings:
    """Drawings of flat stroke-3 rows.

    Args:
        points: `[N, 3]` numbers.
        offsets: `[n + 1]` int64.
        labels: n names.
        splits: see `Drawings`.
        where: names drawing i for messages.
        start: "auto", "move" or "line": what row 0 means.
        complaints: receives empty drawings and impossible values.
    """
    points = points.astype(np.float64)
    of = owner(offsets)
    good = np.ones(len(offsets) - 1, bool)
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(points).all(axis=1)
        small = ~(np.abs(points[:, :2]).max(axis=1, initial=0.0) > MAX_COORDINATE)
        binary = (points[:, 2] == 0) | (points[:, 2] == 1)
    checks = (
        (finite, "value that is not finite", "expected finite numbers; got {}."),
        (small, "giant coordinate", f"expected steps of at most {MAX_COORDINATE:g}; got {{}}."),
        (binary, "lift is neither 0 nor 1", "expected rows (dx, dy, lift); got {}."),
    )
    for i in np.flatnonzero(np.diff(offsets) == 0).tolist():
        complaints.add(where(i), "empty drawing", "expected at least one row.")
        good[i] = False
    for fine, reason, detail in checks:
        for row in np.flatnonzero(~fine).tolist():
            if good[of[row]]:
                complaints.add(where(int(of[row])), reason, detail.format(points[row].tolist()))
                good[of[row]] = False
    chosen = np.flatnonzero(good)
    rows, new = gather_ragged(offsets, chosen)
    points = points[rows]

    total = np.cumsum(points[:, :2], axis=0)
    before = np.concatenate([np.zeros((1, 2)), total])[new[:-1]]
    xy = total - np.repeat(before, np.diff(new), axis=0)
    last = points[:, 2] == 1
    last[new[1:] - 1] = True
    if start == "auto":
        lowest = np.minimum.reduceat(xy, new[:-1]).min(axis=1) if len(xy) else np.zeros(1)
        start = "move" if (lowest >= 0).mean() >= 0.99 else "line"
    if start == "line":
        xy = np.insert(xy, new[:-1], 0.0, axis=0)
        last = np.insert(last, new[:-1], False)
        new = new + np.arange(len(new))
    ends = np.flatnonzero(last) + 1
    return Drawings(
        xy,
        np.concatenate([[0], ends]).astype(np.int64),
        np.concatenate([[0], np.cumsum(last)])[new].astype(np.int64),
        np.array(labels, dtype=np.str_)[chosen],
        splits=None if splits is None else splits[chosen],
        where=lambda i: where(int(chosen[i])),
    )


def flat_category(
    path: Path, arrays: Mapping[str, npt.NDArray[Any]], category: str, complaints: Complaints
) -> Drawings:
    """Drawings of one category of a flat file: points (N, 3), offsets (n + 1), label (n), categories (k)[, key_id (n)].

    Raises:
        DataError: keys are missing, offsets are damaged, or there is no such category.
    """
    needed = ("points", "offsets", "label", "categories")
    missing = [key for key in needed if key not in arrays]
    if missing:
        raise DataError(
            f"{path}: expected the keys {', '.join(needed)}; {', '.join(missing)} missing. Get the file again."
        )
    points, offsets, label = arrays["points"], arrays["offsets"], arrays["label"]
    # Values that are not finite are an item's fault, offsets are the file's.
    check_flat(np.zeros(points.shape, np.int8), offsets, str(path))
    names = [str(c) for c in arrays["categories"]]
    if category not in names:
        import difflib

        near = ", ".join(difflib.get_close_matches(category, names, 3, 0.4)) or ", ".join(names[:5]) + ", …"
        raise DataError(f"{path}: category must be one of its {len(names)}; got {category!r}. Near it: {near}.")
    if label.shape != (len(offsets) - 1,):
        raise DataError(
            f"{path}: expected one label a drawing, ({len(offsets) - 1},); got {label.shape}. Get it again."
        )
    chosen = np.flatnonzero(label == names.index(category))
    rows, new = gather_ragged(offsets.astype(np.int64), chosen)
    keys = arrays["key_id"][chosen].tolist() if "key_id" in arrays else [f"{category}/{i}" for i in chosen]
    return from_flat(points[rows], new, keys, None, lambda i: f"{path}: drawing {int(chosen[i])}", "move", complaints)
