"""The report's sentences and pictures: losses as plainly as wins, nothing that breaks on an empty curve."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsediff import report
from sparsediff.report import BLOCK_COLOURS, Change, Curve

SUMMARY: dict[str, Any] = {
    "cpu": "A <CPU>",
    "threads": 2,
    "sparsity_reached": 0.75,
    "method": "rigl",
    "pattern": "block:16x16",
    "sparse_step_ms": 10.0,
    "dense_step_ms": 40.0,
    "speedup": 4.0,
    "memory_sparse": {"total": 25},
    "memory_dense": {"total": 100},
    "final_loss": 0.3,
    "final_loss_dense": 0.2,
    "steps": 5,
    "steps_dense": 4,
    "seconds": {"sparse": 10.0, "dense": 10.0},
}


def test_verdict_says_a_loss_as_it_says_a_win() -> None:
    assert "4.00x faster" in report.verdict(SUMMARY) and "higher than the dense model" in report.verdict(SUMMARY)
    other = report.verdict({**SUMMARY, "speedup": 0.5, "final_loss": 0.1})
    assert "2.00x slower" in other and "lower than the dense model" in other
    assert "A &lt;CPU&gt;" in other


def test_verdict_is_silent_about_losses_before_training() -> None:
    assert "validation loss" not in report.verdict({**SUMMARY, "steps": 0})


@pytest.mark.parametrize("over", ["seconds", "steps"])
@pytest.mark.parametrize("steps", [0, 1, 3, 300])
def test_curves_of_any_length_are_drawn(over: str, steps: int) -> None:
    seconds = [0.1 * (i + 1) for i in range(steps)]
    losses = [1 / (i + 1) for i in range(steps)]
    curve = Curve(list(range(1, steps + 1)), seconds, losses, [(0, 0.0, 1.0), (steps, 0.1 * steps, 0.5)], [(2, 0.2)])
    picture = Image.open(
        io.BytesIO(report.curve_png({"dense": curve, "sparse": Curve(validation=[(0, 0.0, 1.0)])}, over))
    )
    assert picture.width > 500


def test_smooth_is_a_running_mean() -> None:
    values = np.arange(12.0)
    assert report.smooth(values).tolist() == pytest.approx(np.arange(2.0, 10.0).tolist())
    assert report.smooth(values[:0]).size == 0 and report.smooth(values[:1]).tolist() == [0.0]


def test_change_shows_what_was_dropped_and_grown() -> None:
    before = np.array([[True, True, False]])
    after = np.array([[True, False, True]])
    side = 4
    pixels = np.asarray(Image.open(io.BytesIO(report.change_png(Change("w", before, after), side))))
    absent, kept, dropped, grown = BLOCK_COLOURS.tolist()
    assert [pixels[0, i * side].tolist() for i in range(3)] == [kept, dropped, absent]
    right = pixels[:, -3 * side :]
    assert [right[0, i * side].tolist() for i in range(3)] == [kept, absent, grown]
    assert pixels.shape == (side, 6 * side + 12, 3)


def test_a_large_unstructured_weight_stays_a_small_picture() -> None:
    mask = np.ones((2688, 192), bool)
    assert Image.open(io.BytesIO(report.change_png(Change("w", mask, mask)))).size == (2 * 192 + 12, 2688)
