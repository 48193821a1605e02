"""Stroke data in memory: many pen drawings of different lengths in one flat array.

A drawing of T points is `[T, 3]` float32 rows (dx, dy, lift): dx, dy lead from the previous point to this one, lift is
1 at the last point of a stroke and 0 elsewhere. The pen starts down at the origin, which is not stored: row 0 draws a
line from (0, 0) to (dx, dy). The y axis points down, as in SVG and on screens.

    points  [N, 3]   float32   all drawings, one after another
    offsets [n + 1]  int64     drawing i is points[offsets[i]:offsets[i + 1]]
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

SPLITS = ("train", "valid", "test")

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


class DataError(ValueError):
    """A data file or an item of it cannot be used; the message says what, expected, got and the remedy."""


@dataclass(frozen=True)
class Strokes:
    """A list of drawings.

    Args:
        points: `[N, 3]` float32 rows (dx, dy, lift).
        offsets: `[n + 1]` int64, from 0 to N, strictly increasing.
        labels: `[n]` strings that name the drawings (file name, digit, key); empty strings where a source has none.

    Raises:
        DataError: shapes, dtypes, offsets or values are not as above.
    """

    points: Float32
    offsets: Int64
    labels: npt.NDArray[np.str_]

    def __post_init__(self) -> None:
        check_flat(self.points, self.offsets, "strokes")
        if self.points.dtype != np.float32:
            raise DataError(f"strokes: points must be float32; got {self.points.dtype}.")
        if self.labels.shape != (len(self),):
            raise DataError(f"strokes: labels must have shape ({len(self)},); got {self.labels.shape}.")

    @classmethod
    def from_list(cls, drawings: Sequence[npt.ArrayLike], labels: Sequence[str] | None = None) -> Strokes:
        """Strokes from a list of `[T, 3]` arrays."""
        arrays = [np.asarray(d, dtype=np.float32).reshape(-1, 3) for d in drawings]
        offsets = np.concatenate([[0], np.cumsum([len(a) for a in arrays])]).astype(np.int64)
        points = np.concatenate(arrays) if arrays else np.zeros((0, 3), np.float32)
        names = np.array(labels if labels is not None else [""] * len(arrays), dtype=np.str_)
        return cls(points, offsets, names)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Float32:
        """Drawing `index` as a `[T, 3]` view."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"strokes: index must be in [{-len(self)}, {len(self)}); got {index}.")
        index %= len(self)
        return self.points[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[Float32]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """`[n]` int32, the number of points of every drawing."""
        return np.diff(self.offsets).astype(np.int32)

    def select(self, indices: npt.ArrayLike) -> Strokes:
        """The drawings `indices` (integers or a boolean mask), in that order, as a copy."""
        chosen = np.arange(len(self))[np.asarray(indices)]
        rows, offsets = gather_ragged(self.offsets, chosen)
        return Strokes(self.points[rows], offsets, self.labels[chosen])

    def fingerprint(self) -> dict[str, int | str]:
        """What identifies these drawings: their number, their points and a digest of the content (JSON-able)."""
        digest = hashlib.sha256(self.points.tobytes())
        digest.update(self.offsets.tobytes())
        return {"drawings": len(self), "points": len(self.points), "sha256": digest.hexdigest()[:20]}

    def length_histogram(self) -> Int64:
        """`[T_max + 1]` int64: entry t is the number of drawings of exactly t points.

        This is the empirical length distribution that generation draws from and a checkpoint carries.
        """
        return np.bincount(self.lengths).astype(np.int64)


@dataclass(frozen=True)
class StrokeData:
    """A data set, split into train, valid and test.

    Args:
        name: the registered name of the data set.
        train, valid, test: the drawings.
        scale: the radius of the circle about the first point that encloses a drawing; None where drawings were not
            scaled.
        provenance: JSON-able: where the drawings come from (source, version, licence), the options they were prepared
            with, how many were read, and how many were dropped for which reason.
    """

    name: str
    train: Strokes
    valid: Strokes
    test: Strokes
    scale: float | None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def split(self, name: str) -> Strokes:
        """The split called `name`."""
        if name not in SPLITS:
            raise DataError(f"{self.name}: split must be one of {', '.join(SPLITS)}; got {name!r}.")
        strokes: Strokes = getattr(self, name)
        return strokes

    def summary(self) -> str:
        """One line a person can read: counts, lengths, origin."""
        counts = " / ".join(f"{len(self.split(s)):,} {s}" for s in SPLITS)
        lengths = self.train.lengths
        text = f"{self.name}: {counts} drawings"
        if len(lengths):
            text += (
                f", {lengths.mean():.1f} points on average (median {np.median(lengths):.0f}, at most {lengths.max()})"
            )
        return f"{text}; {self.provenance.get('source', 'unknown source')}"


def check_flat(points: npt.NDArray[Any], offsets: npt.NDArray[Any], where: str) -> None:
    """Raises DataError, naming `where` and the item, unless (points, offsets) is a valid flat list of drawings."""
    if points.ndim != 2 or points.shape[1] != 3:
        raise DataError(f"{where}: points must have shape (N, 3) [dx, dy, lift]; got {points.shape}.")
    if offsets.ndim != 1 or len(offsets) < 1 or offsets.dtype.kind not in "iu":
        raise DataError(f"{where}: offsets must be integers of shape (n + 1,); got {offsets.dtype} {offsets.shape}.")
    steps = np.diff(offsets.astype(np.int64))
    if len(steps) and steps.min() < 0:
        item = int(np.argmax(steps < 0))
        raise DataError(
            f"{where}: offsets must not decrease; item {item} runs from {offsets[item]} to {offsets[item + 1]}. "
            "The file is damaged: fetch it again."
        )
    if len(steps) and steps.min() == 0:
        raise DataError(f"{where}: item {int(np.argmax(steps == 0))} is empty; expected at least one point.")
    if offsets[0] != 0 or offsets[-1] != len(points):
        raise DataError(
            f"{where}: offsets must run from 0 to the number of points, {len(points)}; got {offsets[0]} to "
            f"{offsets[-1]}. The file is damaged or truncated: fetch it again."
        )
    if points.dtype.kind == "f" and not np.isfinite(points).all():
        row = int(np.argmin(np.isfinite(points).all(axis=1)))
        item = int(np.searchsorted(offsets, row, side="right")) - 1
        raise DataError(f"{where}: item {item} holds a value that is not finite: {points[row].tolist()}.")


def owner(offsets: npt.NDArray[np.integer]) -> Int64:
    """`[offsets[-1]]` int64: for every flat row the list it belongs to."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def gather_ragged(offsets: npt.NDArray[np.integer], chosen: npt.NDArray[np.integer]) -> tuple[Int64, Int64]:
    """Rows of the lists `chosen`, one after another, and the offsets of the result.

    Returns:
        (rows `[M]` int64 into the flat array, offsets `[len(chosen) + 1]` int64).
    """
    lengths = np.diff(offsets)[chosen].astype(np.int64)
    new = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = np.arange(new[-1]) + np.repeat(offsets[:-1][chosen].astype(np.int64) - new[:-1], lengths)
    return rows, new


def positions(drawing: npt.ArrayLike) -> Float32:
    """Absolute positions of one drawing: the running sum of its deltas.

    Equivalent to `np.cumsum(drawing[:, :2], axis=0)`.

    Args:
        drawing: `[T, 3]` or `[T, 2]`.

    Returns:
        `[T, 2]` float32. The origin, where the pen starts, is not among them.
    """
    xy = np.asarray(drawing, dtype=np.float64)[:, :2]
    return np.cumsum(xy, axis=0).astype(np.float32)


def polylines(drawing: npt.ArrayLike, threshold: float = 0.5) -> list[Float32]:
    """The strokes of one drawing as absolute polylines, the origin included.

    Args:
        drawing: `[T, 3]` (dx, dy, lift); lift may be any real number, as a diffusion model produces it.
        threshold: the pen is lifted after points whose lift exceeds this.

    Returns:
        A list of `[P_k, 2]` float32 arrays. A stroke of one point (the pen lifted twice in a row) has P_k = 1.
    """
    array = np.asarray(drawing, dtype=np.float32)
    if array.ndim != 2 or array.shape[1] != 3:
        raise DataError(f"polylines: drawing must have shape (T, 3); got {array.shape}.")
    xy = np.concatenate([np.zeros((1, 2), np.float32), positions(array)])
    ends = np.flatnonzero(array[:, 2] > threshold) + 2
    return [part for part in np.split(xy, ends) if len(part)]
