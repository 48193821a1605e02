"""The fixed renderer: orientation, line width, caps, hostile drawings, grids, whole files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsediff.datasets import DataError
from sparsediff.rendering import LINE_WIDTH, MARGIN, RENDERER, grid, render, save_png

# Down 10, lift, then right 10 at the bottom: an L with y down.
CORNER = np.array([[0, 10, 1], [0, 0, 0], [10, 0, 1]], np.float32)


def test_orientation_margin_and_line_width() -> None:
    picture = render(CORNER, 64)
    assert picture.shape == (64, 64) and picture.dtype == np.uint8
    ink = 255 - picture.astype(int)
    rows, columns = np.flatnonzero(ink.sum(1)), np.flatnonzero(ink.sum(0))
    free, half = round(64 * MARGIN), round(32 * LINE_WIDTH)
    assert rows[[0, -1]].tolist() == pytest.approx([free - half, 63 - free + half], abs=1)
    assert columns[[0, -1]].tolist() == pytest.approx([free - half, 63 - free + half], abs=1)
    assert ink[:, 32:].sum(1).argmax() > 48  # the horizontal stroke lies at the bottom
    assert ink[20].sum() / 255 == pytest.approx(64 * LINE_WIDTH, rel=0.3)


def test_pen_up_moves_leave_no_ink_and_scale_does_not_matter() -> None:
    apart = np.array([[0, 10, 1], [10, 0, 0], [0, -10, 1]], np.float32)  # two verticals
    assert (render(apart)[:, 16:48] == 255).all()
    assert np.array_equal(render(CORNER), render(CORNER * [1e-3, 1e-3, 1]))
    assert np.array_equal(render(CORNER), render(CORNER - [0, 0, 0.3]))  # lifts of a model are real numbers


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_diverged_drawing_is_a_cross(value: float) -> None:
    picture = render(np.full((3, 3), value))
    assert picture[0, 0] < 128 and picture[0, 63] < 128 and picture[32, 32] < 128


@pytest.mark.parametrize("drawing", [np.zeros((0, 3)), np.zeros((1, 3)), np.zeros((4, 3))], ids=len)
def test_drawings_without_extent(drawing: np.ndarray) -> None:
    assert (render(drawing) < 255).any() == (len(drawing) > 0)


def test_grid_and_file(tmp_path: Path) -> None:
    sheet = grid([CORNER] * 5, columns=3, size=32, gap=2)
    assert sheet.size == (3 * 34 + 2, 2 * 34 + 2)
    assert np.array_equal(np.asarray(sheet)[36:68, 36:68], render(CORNER, 32))
    path = save_png(sheet, tmp_path / "a" / "b.png")
    with Image.open(path) as back:
        assert np.array_equal(np.asarray(back), np.asarray(sheet))
    assert [p.name for p in path.parent.iterdir()] == ["b.png"]
    with pytest.raises(DataError, match="at least one"):
        grid([])


def test_the_rule_is_fixed() -> None:
    # Scores on pictures depend on it: change RENDERER together with the picture. Versions of Pillow round differently.
    assert RENDERER.endswith("v1")
    assert int(render(CORNER).astype(int).sum()) == pytest.approx(986_324, rel=2e-3)
