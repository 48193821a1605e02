"""From polylines as a source has them to the rows a model trains on.

A drawing goes through, in this order: first point to the origin; division by the radius of the circle about it that
encloses the drawing; resampling of each stroke at equal arc length; Douglas-Peucker simplification (optional); dropping
of drawings with too many points; the enclosing radius made `scale`; differences. All drawings go through a step at
once, in flat float64 arrays.

Source: the preparation in ChiroDiff (Das et al., ICLR 2023) and the defaults of its published code: spacing 0.05,
radius 10, fewer than 300 points, 85 % of a set without splits of its own for training.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ._strokes import SPLITS, DataError, Float32, Float64, Int64, Strokes, gather_ragged, owner

# Real devices report a few thousand units; beyond this a coordinate is a parsing accident.
MAX_COORDINATE = 1e6


@dataclass(frozen=True)
class Preparation:
    """How drawings are prepared.

    Args:
        resample: distance between neighbouring points of a stroke, in units of the drawing's radius: a stroke of length
            L gets max(2, floor(L / resample)) points. None keeps the source's points.
        rdp: tolerance of the Douglas-Peucker simplification after resampling, in units of the drawing's radius; None:
            off.
        max_points: drawings of this many points or more are dropped.
        scale: the radius of a prepared drawing. None keeps the source's units; resample and rdp must then be None.
        split: fractions of train, valid and test, for sets without splits of their own. A drawing's split is a hash of
            its key: it does not change when drawings are added.
        limit: keep at most this many drawings, evenly spaced through the source; None: all.
        on_bad: what happens to an item that cannot be used: "error" raises DataError, "skip" leaves it out and counts
            it.

    Raises:
        DataError: an option is out of range.
    """

    resample: float | None = 0.05
    rdp: float | None = None
    max_points: int = 300
    scale: float | None = 10.0
    split: tuple[float, float, float] = (0.85, 0.075, 0.075)
    limit: int | None = None
    on_bad: str = "error"

    def __post_init__(self) -> None:
        object.__setattr__(self, "split", tuple(float(f) for f in self.split))
        for name in ("resample", "rdp", "scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:
                raise DataError(f"preparation: {name} must be None or a positive number; got {value!r}.")
        if self.scale is None and (self.resample is not None or self.rdp is not None):
            raise DataError(
                "preparation: resample and rdp are measured in radii of the drawing, so scale=None needs resample=None "
                f"and rdp=None; got resample={self.resample}, rdp={self.rdp}."
            )
        if self.max_points < 3:
            raise DataError(f"preparation: max_points must be at least 3; got {self.max_points}.")
        if self.limit is not None and self.limit < 1:
            raise DataError(f"preparation: limit must be None or at least 1; got {self.limit}.")
        if len(self.split) != 3 or min(self.split) < 0 or abs(sum(self.split) - 1) > 1e-6:
            raise DataError(
                f"preparation: split must be three fractions (train, valid, test) of sum 1; got {self.split}."
            )
        if self.on_bad not in ("error", "skip"):
            raise DataError(f"preparation: on_bad must be 'error' or 'skip'; got {self.on_bad!r}.")


class Complaints:
    """Unusable items: raises on the first one, or counts them by reason.

    Args:
        on_bad: "error" or "skip".
    """

    def __init__(self, on_bad: str) -> None:
        self.on_bad = on_bad
        self.counts: Counter[str] = Counter()

    def add(self, where: str, reason: str, detail: str) -> None:
        """Reports the item `where` (file and item); `reason` is what the count is kept under."""
        if self.on_bad == "error":
            raise DataError(
                f"{where}: {reason}: {detail} Repair it, or leave such items out with on_bad='skip' (--on-bad skip)."
            )
        self.counts[reason] += 1


@dataclass
class Drawings:
    """Drawings as a reader delivers them: absolute polylines, flat.

    Args:
        xy: `[P, 2]` float64 points, in the source's units, y down.
        strokes: `[S + 1]` int64 offsets of the strokes in `xy`.
        drawings: `[n + 1]` int64 offsets of the drawings in the strokes.
        labels: `[n]` strings.
        keys: `[n]` strings that decide the split: drawings of one key stay together. The labels where None.
        splits: `[n]` int8 indices into `SPLITS` where the source has its own splits, -1 where it has none; None: all
            -1.
        where: names drawing i for an error message.
    """

    xy: Float64
    strokes: Int64
    drawings: Int64
    labels: npt.NDArray[np.str_]
    keys: npt.NDArray[np.str_] | None = None
    splits: npt.NDArray[np.int8] | None = None
    where: Callable[[int], str] = field(default=lambda i: f"drawing {i}")

    def __len__(self) -> int:
        return len(self.drawings) - 1


def prepare(raw: Drawings, options: Preparation, complaints: Complaints) -> tuple[Strokes, Strokes, Strokes]:
    """Prepares all drawings and deals them out to train, valid and test.

    Args:
        raw: what a reader delivered.
        options: see Preparation.
        complaints: receives unusable drawings, and the counts of those dropped for their length.

    Raises:
        DataError: an unusable drawing under on_bad="error", or nothing is left.
    """
    chosen = evenly(len(raw), options.limit)
    strokes, drawings = gather_ragged(raw.drawings, chosen)
    starts, ends = raw.strokes[:-1][strokes], raw.strokes[1:][strokes]

    # A stroke of one point draws nothing and has no direction; ChiroDiff leaves it out, too.
    visible = ends - starts >= 2
    if not visible.all():
        complaints.counts["strokes of a single point"] += int((~visible).sum())
    per_drawing = np.add.reduceat(np.append(visible, False), drawings[:-1]) * (np.diff(drawings) > 0)
    usable = np.ones(len(chosen), bool)
    for i in np.flatnonzero(per_drawing == 0):
        complaints.add(raw.where(int(chosen[i])), "empty drawing", "expected at least one stroke of two points.")
        usable[i] = False
    keep = visible & usable[owner(drawings)]
    rows, offsets = gather_ragged(raw.strokes, strokes[keep])
    xy, of = raw.xy[rows], owner(drawings)[keep]  # of: [S] drawing of every stroke
    xy, radius, usable = _normalise(xy, offsets, of, usable, lambda i: raw.where(int(chosen[i])), complaints)
    if options.scale is not None:
        point_of = of[owner(offsets)]
        xy /= radius[point_of, None]
    keep = usable[of]
    rows, offsets = gather_ragged(offsets, np.flatnonzero(keep))
    xy, of = xy[rows], of[keep]

    if options.resample is not None:
        xy, offsets = resample(xy, offsets, options.resample)
    if options.rdp is not None:
        xy, offsets = simplify(xy, offsets, options.rdp)

    counts = np.bincount(of, weights=np.diff(offsets), minlength=len(chosen)).astype(np.int64)
    long = usable & (counts >= options.max_points)
    if long.any():
        complaints.counts[f"drawings of {options.max_points} points or more"] += int(long.sum())
    usable &= ~long
    keep = usable[of]
    rows, offsets = gather_ragged(offsets, np.flatnonzero(keep))
    xy, counts = xy[rows], counts[usable]
    if len(counts) == 0:
        raise DataError(f"no usable drawing is left of {len(chosen)}; dropped: {dict(complaints.counts)}.")
    if options.scale is not None:
        # Resampling and simplification may have cut the furthest point off (or, with a huge tolerance, all but a spot).
        radius = np.maximum.reduceat(np.hypot(xy[:, 0], xy[:, 1]), np.cumsum(counts) - counts)
        xy *= np.repeat(options.scale / np.where(radius > 0, radius, 1.0), counts)[:, None]
    points, offsets = _differences(xy, offsets, counts)

    kept = chosen[usable]
    prepared = Strokes(points, offsets, raw.labels[kept])
    keys = raw.labels if raw.keys is None else raw.keys
    part = hashed_split(keys[kept], options.split)
    if raw.splits is not None:
        own = raw.splits[kept]
        part = np.where(own >= 0, own, part)
    return tuple(prepared.select(np.flatnonzero(part == i)) for i in range(len(SPLITS)))  # type: ignore[return-value]


def evenly(n: int, limit: int | None) -> Int64:
    """Indices of at most `limit` of n things, evenly spaced."""
    if limit is None or limit >= n:
        return np.arange(n)
    return np.arange(limit) * n // limit


def hashed_split(keys: npt.NDArray[np.str_], fractions: tuple[float, float, float]) -> npt.NDArray[np.int8]:
    """`[n]` int8: the split of every key, by the first 8 bytes of its SHA-256 as a fraction of 2^64."""
    known: dict[str, float] = {}
    for key in np.unique(keys).tolist():
        known[key] = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2.0**64
    at = np.array([known[key] for key in keys.tolist()], dtype=np.float64)
    return ((at >= fractions[0]).astype(np.int8) + (at >= fractions[0] + fractions[1])).astype(np.int8)


def resample(xy: Float64, offsets: Int64, spacing: float) -> tuple[Float64, Int64]:
    """Points at equal arc length along every stroke; its two end points stay.

    Args:
        xy: `[P, 2]` float64.
        offsets: `[S + 1]` int64 offsets of the strokes; each has at least two points.
        spacing: a stroke of length L gets max(2, floor(L / spacing)) points, L / (count - 1) apart.

    Returns:
        (points `[Q, 2]` float64, offsets `[S + 1]` int64).
    """
    starts, ends = offsets[:-1], offsets[1:] - 1
    step = np.hypot(*np.diff(xy, axis=0).T)
    along = np.concatenate([[0.0], np.cumsum(step)])
    length = along[ends] - along[starts]
    count = np.maximum(2, np.floor(length / spacing + 1e-9)).astype(np.int64)
    new = np.concatenate([[0], np.cumsum(count)]).astype(np.int64)
    # One interpolation for all strokes: the arc length of the whole set, pen-up moves included, grows monotonically,
    # and each stroke asks only within its own stretch of it.
    within = (np.arange(new[-1]) - np.repeat(new[:-1], count)) / np.repeat(count - 1, count)
    at = np.repeat(along[starts], count) + within * np.repeat(length, count)
    out = np.stack([np.interp(at, along, xy[:, 0]), np.interp(at, along, xy[:, 1])], axis=1)
    out[new[:-1]] = xy[starts]
    out[new[1:] - 1] = xy[ends]
    return out, new


def simplify(xy: Float64, offsets: Int64, tolerance: float) -> tuple[Float64, Int64]:
    """Douglas-Peucker simplification of every stroke (shapely); its two end points stay.

    Args:
        xy: `[P, 2]` float64.
        offsets: `[S + 1]` int64 offsets of the strokes; each has at least two points.
        tolerance: no dropped point is further than this from the simplified stroke.

    Returns:
        (points `[Q, 2]` float64, offsets `[S + 1]` int64).
    """
    try:
        import shapely
    except ImportError as error:
        raise DataError("rdp needs shapely, which is not installed: pip install shapely.") from error
    count = len(offsets) - 1
    lines = shapely.linestrings(xy, indices=owner(offsets))
    points, of = shapely.get_coordinates(shapely.simplify(lines, tolerance, preserve_topology=False), return_index=True)
    kept = np.bincount(of, minlength=count)
    new = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
    # A stroke that never leaves one spot may come back with fewer than two points: it becomes its end points.
    lost = np.flatnonzero(kept < 2)
    if len(lost):
        parts = [points[new[i] : new[i + 1]] for i in range(count)]
        for i in lost:
            parts[i] = xy[[offsets[i], offsets[i + 1] - 1]]
        points = np.concatenate(parts)
        new = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)
    return points, new


def _normalise(
    xy: Float64,
    offsets: Int64,
    of: Int64,
    usable: npt.NDArray[np.bool_],
    where: Callable[[int], str],
    complaints: Complaints,
) -> tuple[Float64, Float64, npt.NDArray[np.bool_]]:
    """Moves first points to the origin; returns (xy, radius of every drawing, which drawings are usable)."""
    usable = usable.copy()
    radius = np.ones(len(usable))
    if len(of) == 0:
        return xy, radius, usable
    first = np.flatnonzero(np.concatenate([[True], of[1:] != of[:-1]]))  # first stroke of every drawing that has one
    begin = offsets[:-1][first]
    with np.errstate(invalid="ignore", over="ignore"):
        size = np.maximum.reduceat(np.abs(xy).max(axis=1), begin)
        xy = xy - np.repeat(xy[begin], np.diff(np.append(begin, len(xy))), axis=0)
        radius[of[first]] = np.maximum.reduceat(np.hypot(xy[:, 0], xy[:, 1]), begin)
    for i, largest in zip(of[first].tolist(), size.tolist(), strict=True):
        if not np.isfinite(largest):
            complaints.add(where(i), "value that is not finite", "expected finite coordinates; got NaN or infinity.")
        elif largest > MAX_COORDINATE:
            detail = f"expected coordinates of at most {MAX_COORDINATE:g}; got {largest:g}."
            complaints.add(where(i), "giant coordinate", detail)
        elif radius[i] == 0:
            complaints.add(where(i), "drawing without extent", "expected more than one position; all points coincide.")
        else:
            continue
        usable[i] = False
        radius[i] = 1.0
    return xy, radius, usable


def _differences(xy: Float64, strokes: Int64, counts: Int64) -> tuple[Float32, Int64]:
    """Rows (dx, dy, lift) of drawings of `counts` points each; the first point, the origin, is left out."""
    lift = np.zeros(len(xy))
    lift[strokes[1:] - 1] = 1.0
    delta = np.diff(xy, axis=0, prepend=np.zeros((1, 2)))
    rows = np.concatenate([delta, lift[:, None]], axis=1).astype(np.float32)
    first = np.concatenate([[0], np.cumsum(counts)])
    stays = np.ones(len(xy), bool)
    stays[first[:-1]] = False
    return rows[stays], (first - np.arange(len(first))).astype(np.int64)
