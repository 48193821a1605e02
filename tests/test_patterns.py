"""Patterns: sides, grids, padding, text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_kernels import Block, Unstructured, parse_pattern
from sparse_kernels.patterns import MAX_PADDING, SIDES

sides = st.sampled_from(SIDES)
sizes = st.integers(1, 300)


@given(sides, sides)
def test_text_round_trip(bh: int, bw: int) -> None:
    pattern = Block(bh, bw)
    assert parse_pattern(str(pattern)) == pattern == parse_pattern(f"{bh}x{bw}")
    assert parse_pattern(pattern) is pattern and hash(pattern) == hash(Block(bh, bw))


def test_unstructured() -> None:
    assert Unstructured() == Block(1, 1) == parse_pattern("unstructured")
    assert str(Unstructured()) == "unstructured" and str(Block(16, 1)) == "block:16x1"
    assert Block(16, 4).area == 64


@pytest.mark.parametrize("text", ["", "block", "block:16", "block:16x", "2:4", "block:16 x 16", "rows", 16, None])
def test_other_text_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="pattern must be 'unstructured' or 'block:BHxBW'"):
        parse_pattern(text)


@pytest.mark.parametrize("side", [0, 2, 8 + 1, -16, 128, True, 16.0, 16.5])
def test_other_sides_are_refused(side: object) -> None:
    with pytest.raises(ValueError, match="sides must be one of 1, 4, "):
        Block(side, 16)
    with pytest.raises(ValueError, match="sides must be one of 1, 4, "):
        Block(16, side)


@given(sides, sides, sizes, sizes)
def test_grid_covers_the_weight_and_padding_counts_the_rest(bh: int, bw: int, out: int, in_: int) -> None:
    pattern = Block(bh, bw)
    rows, cols = pattern.grid(out, in_)
    assert (rows - 1) * bh < out <= rows * bh and (cols - 1) * bw < in_ <= cols * bw
    extra = rows * bh * cols * bw - out * in_
    assert pattern.padding(out, in_) == pytest.approx(extra / (out * in_), abs=1e-12)
    assert (pattern.why_not(out, in_) is None) == (extra <= MAX_PADDING * out * in_)


def test_the_reason_names_pattern_shape_and_limit() -> None:
    assert Block(16, 16).why_not(288, 13) is None  # 23 %
    assert Block(16, 16).why_not(3, 104) == "block:16x16 pads [3, 104] by 474% (more than 25%)"
    assert Unstructured().why_not(3, 3) is None


@pytest.mark.parametrize("shape", [(0, 16), (16, 0)], ids=str)
def test_weights_without_elements_are_not_cut(shape: tuple[int, int]) -> None:
    assert "has no elements" in str(Block(4, 4).why_not(*shape))
