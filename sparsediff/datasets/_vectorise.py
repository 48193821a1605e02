"""Pen strokes from pictures of handwriting: enlarge, threshold, thin, trace, smooth.

A picture shows no order and no direction of writing, so both are chosen by rule: at a crossing the pen goes straight
on; a stroke begins at its upper (then left) end; the topmost stroke comes first, then always the one that begins or
ends nearest to the pen. The result looks like the picture; it is not a recording of a hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from ._strokes import Float64

# Chosen by eye on MNIST. Enlarging before thresholding uses the grey rims: the skeleton is less jagged.
ENLARGE = 2
THRESHOLD = 0.4
SPUR = 2.5  # pixels of the picture: shorter dead ends at a crossing come from thinning, not from the pen
SMOOTHING = 3  # passes of the kernel [1, 2, 1] / 4 along a stroke

UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]


def vectorise(images: UInt8, progress: Callable[[range], Iterator[int]] = iter) -> list[list[Float64]]:
    """Strokes of many pictures.

    Args:
        images: `[N, H, W]` uint8, ink bright on dark ground.
        progress: wraps the range of chunks, for a progress bar.

    Returns:
        For every picture its strokes, `[P, 2]` float64 (x, y) in pixels, y down; a picture without ink has none.
    """
    chunk = 500
    result: list[list[Float64]] = []
    for start in progress(range(0, len(images), chunk)):
        thin = skeletons(_enlarged(images[start : start + chunk]) > 255 * THRESHOLD)
        result += [_strokes_of(picture) for picture in thin]
    return result


def _enlarged(images: UInt8) -> npt.NDArray[np.float32]:
    """`[N, ENLARGE * H + 2, ENLARGE * W + 2]` float32: bilinear enlargement, with a dark rim of one pixel."""

    def weights(size: int) -> npt.NDArray[np.float32]:
        at = (np.arange(ENLARGE * size) + 0.5) / ENLARGE - 0.5
        return np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(size))).astype(np.float32)

    high, wide = images.shape[1:]
    large = weights(high) @ images.astype(np.float32) @ weights(wide).T
    return np.pad(large, ((0, 0), (1, 1), (1, 1)))


def _deletable() -> list[Bool]:
    """Guo and Hall's two tables: may a pixel go, given its 8 neighbours as bits N, NE, E, SE, S, SW, W, NW?

    Source: Guo and Hall, "Parallel thinning with two-subiteration algorithms", CACM 32(3), 1989, algorithm A1.
    """
    code = np.arange(256)
    n, ne, e, se, s, sw, w, nw = ((code >> k & 1).astype(bool) for k in range(8))
    crossings = sum((~a & (b | c)).astype(int) for a, b, c in ((n, ne, e), (e, se, s), (s, sw, w), (w, nw, n)))
    pairs1 = sum((a | b).astype(int) for a, b in ((nw, n), (ne, e), (se, s), (sw, w)))
    pairs2 = sum((a | b).astype(int) for a, b in ((n, ne), (e, se), (s, sw), (w, nw)))
    fewest = np.minimum(pairs1, pairs2)
    common = (crossings == 1) & (fewest >= 2) & (fewest <= 3)
    return [common & ~((n | ne | ~se) & e), common & ~((s | sw | ~nw) & w)]


_TABLES = _deletable()
_NEIGHBOURS = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))  # N, NE, E, SE, S, SW, W, NW


def skeletons(ink: Bool) -> Bool:
    """Lines of one pixel's width in the middle of the ink.

    Args:
        ink: `[N, H, W]` bool with an empty rim of one pixel.

    Returns:
        `[N, H, W]` bool, a subset of `ink` with the same connectivity.
    """
    wide = ink.shape[2]
    pixels = ink.astype(np.uint8).ravel()
    steps = [dy * wide + dx for dy, dx in _NEIGHBOURS]
    left = np.flatnonzero(pixels)  # only the ink is looked at: a seventh of a digit's picture
    changed = True
    while changed:
        changed = False
        for table in _TABLES:
            code = np.zeros(len(left), np.uint8)
            for bit, step in enumerate(steps):
                code |= pixels[left + step] << np.uint8(bit)
            goes = table[code]
            pixels[left[goes]] = 0
            left = left[~goes]
            changed |= bool(goes.any())
    return pixels.view(bool).reshape(ink.shape)


def _strokes_of(picture: Bool) -> list[Float64]:
    wide = picture.shape[1]
    graph = _Graph(np.flatnonzero(picture).tolist(), wide)
    strokes = []
    for line in _ordered(_joined(graph.edges)):
        points = np.array(line, dtype=np.float64)
        for _ in range(SMOOTHING):
            points[1:-1] = (points[:-2] + 2 * points[1:-1] + points[2:]) / 4
        # Pixel 1 of the enlarged picture, the first inside its rim, has its middle at 0.5 / ENLARGE - 0.5.
        strokes.append((points - 0.5) / ENLARGE - 0.5)
    return strokes


Point = tuple[float, float]


class _Graph:
    """The lines between the ends and crossings of a skeleton.

    `edges` holds (node, points, node): nodes are integers, -1 for an end that nothing else shares, and the points run
    from one node's place to the other's. A crossing of several neighbouring pixels is one node in their middle.
    """

    def __init__(self, pixels: list[int], wide: int) -> None:
        ink = set(pixels)
        links: dict[int, list[int]] = {}
        for p in pixels:
            near = [q for q in (p - wide, p + 1, p + wide, p - 1) if q in ink]
            for dy, dx in ((-wide, 1), (wide, 1), (wide, -1), (-wide, -1)):
                # A diagonal step is a link only where no pixel beside it makes the same way in two straight steps.
                if p + dy + dx in ink and p + dy not in ink and p + dx not in ink:
                    near.append(p + dy + dx)
            links[p] = near
        node_of: dict[int, int] = {}
        place: list[Point] = []
        for p in pixels:
            if len(links[p]) < 3 or p in node_of:
                continue
            members, todo = [], [p]
            node_of[p] = len(place)
            while todo:
                q = todo.pop()
                members.append(q)
                for r in links[q]:
                    if len(links[r]) >= 3 and r not in node_of:
                        node_of[r] = len(place)
                        todo.append(r)
            place.append(
                (sum(q % wide for q in members) / len(members), sum(q // wide for q in members) / len(members))
            )

        self.edges: list[tuple[int, list[Point], int]] = []
        seen: set[int] = set()

        def walk(begin: int, first: int) -> None:
            """Follows the line from `begin` over `first` to the next crossing or end."""
            path, back, here = [], begin, first
            while here not in node_of:
                path.append(here)
                seen.add(here)
                onward = [q for q in links[here] if q != back]
                if not onward or onward[0] == path[0]:
                    break
                back, here = here, onward[0]
            points = [(float(q % wide), float(q // wide)) for q in path]
            a, b = node_of.get(begin, -1), node_of.get(here, -1)
            if a < 0 and begin != first:
                points.insert(0, (float(begin % wide), float(begin // wide)))
                seen.add(begin)
            if a >= 0:
                points.insert(0, place[a])
            if b >= 0:
                points.append(place[b])
            dead_end = (a < 0) != (b < 0)
            around = a == b >= 0
            if len(points) > 1 and not ((dead_end or around) and len(path) < SPUR * ENLARGE):
                self.edges.append((a, points, b))

        for p in pixels:
            if p in node_of:
                for q in links[p]:
                    if q not in node_of and q not in seen:
                        walk(p, q)
        for p in pixels:
            if p not in seen and p not in node_of and len(links[p]) == 1:
                walk(p, links[p][0])
        for p in pixels:
            if p not in seen and p not in node_of and len(links[p]) == 2:
                walk(p, links[p][0])  # a ring; it closes below
                a, points, b = self.edges[-1]
                self.edges[-1] = (a, [*points, points[0]], b)


def _joined(edges: list[tuple[int, list[Point], int]]) -> list[list[Point]]:
    """Joins lines that go straight on over a crossing."""
    ends: dict[int, list[tuple[int, int]]] = {}  # node → (edge, which end)
    for i, (a, _, b) in enumerate(edges):
        for node, end in ((a, 0), (b, 1)):
            if node >= 0:
                ends.setdefault(node, []).append((i, end))

    def direction(i: int, end: int) -> Point:
        points = edges[i][1] if end == 0 else edges[i][1][::-1]
        (x0, y0), (x1, y1) = points[0], points[min(len(points) - 1, 3 * ENLARGE)]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5 or 1.0
        return (x1 - x0) / length, (y1 - y0) / length

    partner: dict[tuple[int, int], tuple[int, int]] = {}
    for group in ends.values():
        away = {e: direction(*e) for e in group}
        pairs = sorted(
            (away[e][0] * away[f][0] + away[e][1] * away[f][1], e, f)
            for k, e in enumerate(group)
            for f in group[k + 1 :]
        )
        for cosine, e, f in pairs:
            # Two lines alone at a crossing (the third was a spur) are one, whatever their angle.
            if e not in partner and f not in partner and (cosine < -0.3 or len(group) == 2):
                partner[e], partner[f] = f, e

    lines: list[list[Point]] = []
    used: set[int] = set()
    starts = [(i, end) for i in range(len(edges)) for end in (0, 1) if (i, end) not in partner]
    for start in [*starts, *((i, 0) for i in range(len(edges)))]:
        if start[0] in used:
            continue
        line: list[Point] = []
        at: tuple[int, int] | None = start
        while at is not None and at[0] not in used:
            i, end = at
            used.add(i)
            points = edges[i][1] if end == 0 else edges[i][1][::-1]
            line += points[1:] if line else points
            at = partner.get((i, 1 - end))
        lines.append(line)
    return lines


def _ordered(lines: list[list[Point]]) -> list[list[Point]]:
    """Chooses the order and the direction of the strokes."""
    left: list[list[Point]] = []
    for line in lines:
        if line[0] == line[-1]:  # a ring begins at its top
            top = min(range(len(line) - 1), key=lambda k: (line[k][1], line[k][0]))
            left.append([*line[top:-1], *line[: top + 1]])
        else:
            left.append(line if (line[0][1], line[0][0]) <= (line[-1][1], line[-1][0]) else line[::-1])
    done: list[list[Point]] = []
    while left:
        if not done:
            k = min(range(len(left)), key=lambda k: (left[k][0][1], left[k][0][0]))
        else:
            x, y = done[-1][-1]
            k = min(range(len(left)), key=lambda k: (left[k][0][0] - x) ** 2 + (left[k][0][1] - y) ** 2)
        done.append(left.pop(k))
    return done
