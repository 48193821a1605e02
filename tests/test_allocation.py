"""Allocation: the formulas, saturation, exact totals, groups, errors."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sparse_kernels import Block, Unstructured, allocate
from sparse_kernels.allocation import METHODS, WeightShape, block_count, densities

LINEAR = WeightShape("linear", 256, 512)
SMALL = WeightShape("small", 32, 32)
CONV = WeightShape("conv", 64, 64, (3, 3))
POINT = WeightShape("point", 64, 64, (1, 1))

shapes = st.builds(
    lambda out, in_, kernel, dense, positions: (out, in_, kernel, dense, positions),
    st.integers(1, 200),
    st.integers(1, 200),
    st.sampled_from([(), (1, 1), (3, 3), (5,)]),
    st.booleans(),
    st.integers(1, 1000),
)


def weights_of(drawn: list[tuple]) -> list[WeightShape]:
    return [WeightShape(f"w{k}", *shape[:3], dense=shape[3], positions=shape[4]) for k, shape in enumerate(drawn)]


def test_erk_is_the_published_formula() -> None:
    linear, conv, point = densities([LINEAR, CONV, POINT], 0.9, "erk")
    assert linear / conv == pytest.approx(((256 + 512) / (256 * 512)) / ((64 + 64 + 3 + 3) / (64 * 64 * 9)))
    assert point / conv == pytest.approx(((64 + 64 + 1 + 1) / (64 * 64)) / ((64 + 64 + 3 + 3) / (64 * 64 * 9)))
    total = sum(w.numel for w in (LINEAR, CONV, POINT))
    present = sum(d * w.numel for d, w in zip((linear, conv, point), (LINEAR, CONV, POINT), strict=True))
    assert present == pytest.approx(0.1 * total)


def test_uniform_gives_one_density_and_makes_up_for_dense_weights() -> None:
    assert densities([LINEAR, CONV], 0.75, "uniform") == pytest.approx([0.25, 0.25])
    dense = WeightShape("first", 64, 64, dense=True)
    first, rest = densities([dense, LINEAR], 0.5, "uniform")
    assert first == 1.0 and rest == pytest.approx((0.5 * (4096 + 131072) - 4096) / 131072)


def test_flops_divides_erk_by_the_work() -> None:
    often = WeightShape("often", 64, 64, positions=1000)
    seldom = WeightShape("seldom", 64, 64, positions=100)
    a, b = densities([often, seldom], 0.8, "flops")
    assert b / a == pytest.approx(10.0)


def test_saturated_weights_leave_the_sum() -> None:
    small, linear = densities([SMALL, LINEAR], 0.5, "erk")
    assert small == 1.0 and linear == pytest.approx((0.5 * (1024 + 131072) - 1024) / 131072)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [Unstructured(), Block(4, 4), Block(16, 16), Block(1, 64)], ids=str)
@given(st.lists(shapes, min_size=1, max_size=8), st.floats(0.0, 1.0))
def test_totals_are_met_within_one_block(method: str, pattern: Block, drawn: list[tuple], sparsity: float) -> None:
    weights = weights_of(drawn)
    total = sum(weight.numel for weight in weights)
    stuck = sum(w.numel for w in weights if w.dense or pattern.why_not(w.out, w.in_))
    assume(stuck <= (1 - sparsity) * total)
    counts = allocate(weights, sparsity, pattern, method)
    present = 0.0
    for weight, count in zip(weights, counts, strict=True):
        blocks = weight.blocks(pattern)
        assert 0 <= count <= blocks
        if weight.dense or pattern.why_not(weight.out, weight.in_):
            assert count == blocks
        present += count * weight.numel / blocks
    assert abs(present - (1 - sparsity) * total) <= pattern.area * (1 + 1e-9)


@given(st.lists(shapes, min_size=1, max_size=6))
def test_the_ends_are_reached(drawn: list[tuple]) -> None:
    weights = [WeightShape(w.name, w.out, w.in_, w.kernel) for w in weights_of(drawn)]
    assert allocate(weights, 0.0, Unstructured()) == [w.numel for w in weights]
    assert allocate(weights, 1.0, Unstructured()) == [0] * len(weights)


def test_more_sparsity_never_adds_blocks() -> None:
    weights = [LINEAR, SMALL, CONV, POINT]
    before = allocate(weights, 0.0, Block(4, 4))
    for percent in range(5, 100, 5):
        after = allocate(weights, percent / 100, Block(4, 4))
        assert all(a <= b + 1 for a, b in zip(after, before, strict=True))
        before = after


def test_a_group_is_one_stacked_tensor() -> None:
    three = [WeightShape(f"to_{name}", 64, 64, group="attn") for name in "qkv"]
    stacked = WeightShape("qkv", 192, 64)
    apart = allocate([*three, LINEAR], 0.9, Unstructured())
    together = allocate([stacked, LINEAR], 0.9, Unstructured())
    assert abs(sum(apart[:3]) - together[0]) <= 1 and max(apart[:3]) - min(apart[:3]) <= 1
    grouped_query = [WeightShape("to_q", 64, 64, group="a"), WeightShape("to_k", 16, 64, group="a")]
    q, k, _ = allocate([*grouped_query, LINEAR], 0.9, Unstructured())
    assert q / k == pytest.approx(4.0, rel=0.01)


def test_a_group_needs_one_input() -> None:
    with pytest.raises(ValueError, match="'a' has 64 inputs and 'b' has 32"):
        allocate([WeightShape("a", 8, 64, group="g"), WeightShape("b", 8, 32, group="g")], 0.5, Unstructured())


def test_unreachable_names_the_lowest_total_and_the_remedy() -> None:
    weights = [WeightShape("embed", 100, 100, dense=True), WeightShape("body", 100, 100)]
    assert allocate(weights, 0.5, Unstructured()) == [10000, 0]
    with pytest.raises(ValueError, match=r"must stay dense \(embed\).*lowest reachable total is 10000 \(sparsity 0.5"):
        allocate(weights, 0.51, Unstructured())
    with pytest.raises(ValueError, match="exclude weights"):
        allocate([WeightShape("narrow", 3, 3)], 0.5, Block(16, 16))


def test_flops_without_positions_names_the_remedy() -> None:
    with pytest.raises(ValueError, match="for 'linear' it does not; pass example_inputs="):
        allocate([LINEAR], 0.5, Unstructured(), "flops")
    unused = WeightShape("unused", 64, 64, positions=0)
    with pytest.raises(ValueError, match="no forward uses 'unused'"):
        allocate([WeightShape("often", 64, 64, positions=1000), unused], 0.5, Unstructured(), "flops")


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="one of erk, uniform, flops; got 'er'"):
        allocate([LINEAR], 0.5, Unstructured(), "er")
    for sparsity in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            allocate([LINEAR], sparsity, Unstructured())
    with pytest.raises(ValueError, match="names must be unique; got 'linear' twice"):
        allocate([LINEAR, LINEAR], 0.5, Unstructured())


@given(st.integers(0, 10_000), st.floats(0.0, 1.0))
def test_block_count_rounds(blocks: int, sparsity: float) -> None:
    count = block_count(blocks, sparsity)
    assert 0 <= count <= blocks and abs(count - (1 - sparsity) * blocks) <= 0.5 + 1e-6
    for exact in (0, blocks // 3, blocks):  # a count survives the way through a sparsity
        if blocks:
            assert block_count(blocks, 1.0 - exact / blocks) == exact


def test_block_count_rounds_halves_up() -> None:
    assert [block_count(blocks, 0.5) for blocks in (1, 2, 3, 5)] == [1, 1, 2, 3]
