"""SVG path data to cubic Bézier segments, for the commands that pen strokes consist of: M L H V C S Q T Z, either case.

Source: SVG 1.1, section 8.3. (Arcs, which no pen stroke needs, are refused by name.)
"""

from __future__ import annotations

import re
from array import array

import numpy as np

from ._strokes import DataError, Float64, Int64

_TOKEN = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[A-Za-z]|[^\s,]")
_ARGUMENTS = {"M": 2, "L": 2, "H": 1, "V": 1, "C": 6, "S": 4, "Q": 4, "T": 2, "Z": 0}


def segments(path: str, out: array[float]) -> list[int]:
    """Appends the segments of a path as cubics.

    Args:
        path: the `d` attribute.
        out: receives 8 numbers a segment: start, two control points, end.

    Returns:
        The number of segments of every subpath (a subpath that never leaves its start has none and is left out).

    Raises:
        DataError: not a path, or a command outside the list above.
    """
    tokens = _TOKEN.findall(path)
    counts: list[int] = []
    x = y = x0 = y0 = 0.0  # current point, start of the subpath
    px = py = 0.0  # control point that S and T reflect
    last = ""  # kind of the previous segment: C, Q or other
    count = 0
    i, n = 0, len(tokens)
    command = ""
    if tokens and tokens[0] not in "Mm":
        raise DataError(f"a path must begin with M or m; got {path[:40]!r}.")
    try:
        while i < n:
            if tokens[i].isalpha():
                command = tokens[i]
                i += 1
            elif command in "Zz":
                raise DataError(f"unexpected {tokens[i]!r} in path {path[:40]!r}.")
            kind, relative = command.upper(), command.islower()
            if kind not in _ARGUMENTS:
                raise DataError(f"command {command!r} is not among {' '.join(_ARGUMENTS)} in path {path[:40]!r}.")
            need = _ARGUMENTS[kind]
            a = [float(t) for t in tokens[i : i + need]]
            if len(a) < need:
                raise DataError(f"{command!r} needs {need} numbers; the path {path[:40]!r} ends after {len(a)}.")
            i += need
            if relative and kind not in "HVZ":
                a = [v + (y if k % 2 else x) for k, v in enumerate(a)]
            if kind == "M":
                if count:
                    counts.append(count)
                    count = 0
                x, y = x0, y0 = a
                # Further pairs after a moveto are linetos.
                command, last = ("l" if relative else "L"), ""
                continue
            if kind == "C":
                c = a
            elif kind == "S":
                c = [*((2 * x - px, 2 * y - py) if last == "C" else (x, y)), *a]
            elif kind in "QT":
                qx, qy = a[:2] if kind == "Q" else ((2 * x - px, 2 * y - py) if last == "Q" else (x, y))
                ex, ey = a[-2:]
                c = [x + (qx - x) / 1.5, y + (qy - y) / 1.5, ex + (qx - ex) / 1.5, ey + (qy - ey) / 1.5, ex, ey]
            else:
                if kind == "H":
                    ex, ey = a[0] + (x if relative else 0.0), y
                elif kind == "V":
                    ex, ey = x, a[0] + (y if relative else 0.0)
                elif kind == "Z":
                    ex, ey = x0, y0
                    if (ex, ey) == (x, y):
                        last = ""
                        continue
                else:
                    ex, ey = a
                c = [x + (ex - x) / 3, y + (ey - y) / 3, ex + (x - ex) / 3, ey + (y - ey) / 3, ex, ey]
            out.extend((x, y, *c))
            count += 1
            px, py = (qx, qy) if kind in "QT" else (c[2], c[3])
            last = "C" if kind in "CS" else "Q" if kind in "QT" else ""
            x, y = c[4], c[5]
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"expected numbers in path {path[:40]!r}; {error}.") from None
    if count:
        counts.append(count)
    return counts


def flatten(cubics: Float64, counts: Int64, chords: int = 16) -> tuple[Float64, Int64]:
    """Polylines of runs of cubic segments, each cut at `chords` equal steps of its parameter.

    Args:
        cubics: `[M, 4, 2]` float64 control points.
        counts: `[S]` int64, the number of segments of every stroke; their sum is M.
        chords: straight pieces a segment.

    Returns:
        (points `[S + M * chords, 2]` float64, offsets `[S + 1]` int64 of the strokes).
    """
    t = np.arange(1, chords + 1)[:, None] / chords
    # Bernstein polynomials of the points after the start, which belongs to the previous segment.
    basis = np.concatenate([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1)  # [chords, 4]
    offsets = np.concatenate([[0], np.cumsum(counts * chords + 1)]).astype(np.int64)
    points = np.empty((offsets[-1], 2))
    starts = offsets[:-1]
    first = np.cumsum(counts) - counts
    points[starts] = cubics[first, 0]
    inner = np.ones(len(points), bool)
    inner[starts] = False
    points[inner] = np.einsum("tk,mkd->mtd", basis, cubics).reshape(-1, 2)
    return points, offsets
