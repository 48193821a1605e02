"""Pen drawings to pictures, and pictures to sheets.

The renderer is part of every score that is computed on pictures, so it is fixed: each stroke is a polyline of
`LINE_WIDTH` times the side of the picture with round caps and joins, black on white, drawn with Pillow at
`OVERSAMPLING` times the size and averaged down; the drawing is scaled to fit and centred, with `MARGIN` of the side
free all around. The y axis points down. `RENDERER` names this rule; record it beside a score.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from .datasets import DataError, polylines
from .files import replaced

LINE_WIDTH = 1 / 32
MARGIN = 1 / 16
OVERSAMPLING = 4
RENDERER = "pillow-polyline width=1/32 margin=1/16 oversampling=4 v1"

UInt8 = npt.NDArray[np.uint8]


def render(drawing: npt.ArrayLike, size: int = 64, *, threshold: float = 0.5) -> UInt8:
    """One drawing as a grey picture.

    Args:
        drawing: `[T, 3]` rows (dx, dy, lift); T = 0 gives an empty picture.
        size: side of the picture in pixels.
        threshold: the pen is lifted after points whose lift exceeds this.

    Returns:
        `[size, size]` uint8, 0 is ink and 255 paper. A drawing with a value that is not finite (a model that diverged)
        is shown as a cross over the whole picture.
    """
    if size < 1:
        raise DataError(f"render: size must be at least 1 pixel; got {size}.")
    array = np.asarray(drawing, dtype=np.float64).reshape(-1, 3) if np.size(drawing) else np.zeros((0, 3))
    side = size * OVERSAMPLING
    canvas = Image.new("L", (side, side), 255)
    pen = ImageDraw.Draw(canvas)
    width = LINE_WIDTH * side
    if not np.isfinite(array).all() or np.abs(array).sum() > 1e30:
        _stroke(pen, np.array([[0, 0], [side, side]], dtype=np.float64), width)
        _stroke(pen, np.array([[side, 0], [0, side]], dtype=np.float64), width)
    elif len(array):
        lines = polylines(array, threshold)
        everything = np.concatenate(lines).astype(np.float64)
        low, high = everything.min(axis=0), everything.max(axis=0)
        extent = float((high - low).max())
        factor = (1 - 2 * MARGIN) * side / extent if extent > 0 else 0.0
        for line in lines:
            _stroke(pen, (line - (low + high) / 2) * factor + side / 2, width)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))


def _stroke(pen: ImageDraw.ImageDraw, line: npt.NDArray[np.float64], width: float) -> None:
    points = [(float(x), float(y)) for x, y in line]
    pen.line(points, fill=0, width=max(1, round(width)), joint="curve")
    radius = width / 2
    for x, y in (points[0], points[-1]):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=0)


def grid(
    drawings: Iterable[npt.ArrayLike],
    *,
    columns: int | None = None,
    size: int = 96,
    gap: int = 4,
    threshold: float = 0.5,
) -> Image.Image:
    """Drawings side by side, row by row.

    Args:
        drawings: `[T_i, 3]` arrays; at least one.
        columns: None: about as many as rows.
        size: side of a cell in pixels.
        gap: grey pixels between the cells.
        threshold: see `render`.

    Returns:
        A grey Pillow image.
    """
    return _sheet([render(d, size, threshold=threshold) for d in drawings], columns, gap)


def image_grid(images: npt.NDArray[np.uint8], *, columns: int | None = None, gap: int = 2) -> Image.Image:
    """Images side by side, row by row; small ones enlarged by a whole factor to 64 pixels or more.

    Args:
        images: `[n, H, W, 3]` uint8; at least one.
        columns: None: about as many as rows.
        gap: grey pixels between the cells.

    Returns:
        An RGB Pillow image.
    """
    factor = max(1, -(-64 // images.shape[1]))
    return _sheet([image.repeat(factor, axis=0).repeat(factor, axis=1) for image in images], columns, gap)


def _sheet(cells: list[UInt8], columns: int | None, gap: int) -> Image.Image:
    """Square pictures of one size, grey or RGB, in rows."""
    if not cells:
        raise DataError("grid: needs at least one drawing; got none.")
    wide = columns if columns is not None else math.ceil(math.sqrt(len(cells)))
    if wide < 1:
        raise DataError(f"grid: columns must be at least 1; got {columns}.")
    high = -(-len(cells) // wide)
    size, *channels = cells[0].shape[1:]
    step = size + gap
    sheet = np.full((high * step + gap, wide * step + gap, *channels), 208, np.uint8)
    for i, cell in enumerate(cells):
        row, column = divmod(i, wide)
        sheet[gap + row * step :, gap + column * step :][:size, :size] = cell
    return Image.fromarray(sheet)


def save_png(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Writes a PNG whole or not at all, creating its folder; returns the path."""
    target = Path(path)
    with replaced(target) as temporary:
        image.save(temporary, format="PNG")
    return target
