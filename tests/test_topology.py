"""Topology: both orientations, slots, scatter and gather, in-place changes, validation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparse_kernels import Block, Topology
from sparse_kernels.patterns import SIDES

side = st.sampled_from(SIDES)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    pattern = Block(draw(side), draw(side))
    out, in_, taps = draw(st.integers(1, 90)), draw(st.integers(1, 90)), draw(st.sampled_from([1, 3, 9]))
    rows, cols = pattern.grid(out, in_)
    nnzb = draw(st.integers(0, rows * cols * taps))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return Topology.random(out, in_, pattern, nnzb, taps=taps, generator=generator)


def dense_mask(topology: Topology) -> Tensor:
    """Bool [out, taps * in] of the active elements, by loops."""
    mask = torch.zeros(topology.out, topology.taps, topology.in_, dtype=torch.bool)
    for row, col in zip(*(c.tolist() for c in topology.coords()), strict=True):
        tap, block = divmod(col, topology.cols_per_tap)
        top, left = row * topology.bh, block * topology.bw
        mask[top : top + topology.bh, tap, left : left + topology.bw] = True
    return mask.flatten(1)


@given(topologies())
def test_both_orientations_hold_the_same_blocks(topology: Topology) -> None:
    topology.validate()
    rows, cols = (c.tolist() for c in topology.coords())
    assert len(set(zip(rows, cols, strict=True))) == topology.nnzb
    crow, ccol = topology.crow.tolist(), topology.ccol.tolist()
    for row in range(topology.row_blocks):
        span = slice(crow[row], crow[row + 1])
        found = [(cols[slot], slot) for slot in topology.slot[span].tolist()]
        assert [col for col, _ in found] == topology.col[span].tolist() == sorted(c for c, _ in found)
        assert all(rows[slot] == row for _, slot in found)
    for col in range(topology.col_blocks):
        span = slice(ccol[col], ccol[col + 1])
        found = [(rows[slot], slot) for slot in topology.weight_index().slots_by_column()[span].tolist()]
        assert [row for row, _ in found] == topology.row_t[span].tolist() == sorted(r for r, _ in found)
        assert all(cols[slot] == col for _, slot in found)


@given(topologies())
def test_scatter_and_gather_are_inverse_on_the_active_elements(topology: Topology) -> None:
    dense = torch.randn(topology.out, topology.taps * topology.in_, dtype=torch.float64)
    mask = dense_mask(topology)
    values = topology.gather(dense)
    assert values.shape == (topology.nnzb, topology.bh, topology.bw)
    assert torch.equal(topology.scatter(values), dense * mask)
    assert values.abs().sum() == pytest.approx((dense * mask).abs().sum().item())  # the padding is zero
    assert topology.nnz == int(mask.sum())
    assert topology.density == pytest.approx(mask.double().mean().item()) == pytest.approx(1 - topology.sparsity)
    rows, cols = topology.coords()
    assert topology.mask()[rows, cols].all() and int(topology.mask().sum()) == topology.nnzb


@given(topologies())
def test_block_rms_counts_real_elements_only(topology: Topology) -> None:
    ones = torch.ones(topology.out, topology.taps * topology.in_)
    torch.testing.assert_close(topology.block_rms(topology.gather(ones)), torch.ones(topology.nnzb))


@given(topologies(), st.randoms(use_true_random=False))
def test_rewrite_moves_some_blocks_and_no_address(topology: Topology, random: Random) -> None:
    inactive = (~topology.mask()).nonzero()
    count = random.randint(0, min(topology.nnzb, len(inactive)))
    slots = torch.tensor(random.sample(range(topology.nnzb), count), dtype=torch.long)
    where = inactive[random.sample(range(len(inactive)), count)]
    addresses = [tensor.data_ptr() for tensor in topology.index()]
    rows, cols = topology.coords()
    topology.rewrite(slots, where[:, 0], where[:, 1])
    topology.validate()
    assert [tensor.data_ptr() for tensor in topology.index()] == addresses
    new_rows, new_cols = topology.coords()
    kept = torch.ones(topology.nnzb, dtype=torch.bool)
    kept[slots] = False
    assert torch.equal(new_rows[kept], rows[kept]) and torch.equal(new_cols[kept], cols[kept])
    assert torch.equal(new_rows[slots], where[:, 0]) and torch.equal(new_cols[slots], where[:, 1])


def test_scatter_is_differentiable() -> None:
    topology = Topology.random(20, 12, Block(4, 4), 7)
    values = torch.randn(7, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(topology.scatter, values)
    dense = torch.randn(20, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(topology.gather, dense)


def test_full_and_by_magnitude() -> None:
    full = Topology.full(18, 10, Block(4, 4), taps=2)
    assert full.nnzb == 5 * 3 * 2 and full.nnz == full.numel == 18 * 20 and full.density == 1.0
    weight = torch.zeros(8, 10)
    weight[4:8, 8:10] = 1.0  # an edge block of 8 real elements: largest RMS, not largest sum
    weight[0:4, 0:4] = 0.8
    assert Topology.by_magnitude(weight, 10, Block(4, 4), 1).mask().tolist() == [[False] * 3, [False, False, True]]


def test_random_is_reproducible_and_uniform() -> None:
    def draw(seed: int) -> Tensor:
        return Topology.random(32, 32, Block(4, 4), 16, generator=torch.Generator().manual_seed(seed)).mask()

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    share = torch.stack([draw(seed) for seed in range(400)]).double().mean(0)
    assert share.min() > 0.15 and share.max() < 0.36  # 0.25 ± 4 sigma


@pytest.mark.parametrize("count", [-1, 65])
def test_impossible_counts_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=r"nnzb must lie in 0\.\.64"):
        Topology.random(32, 32, Block(4, 4), count)


@pytest.mark.parametrize(
    ("rows", "cols", "message"),
    [
        ([0, 0], [1, 1], "sorted and unique"),
        ([0, 8], [1, 1], r"rows must lie in 0\.\.7 .* got 0\.\.8"),
        ([0, 1], [0, -1], r"cols must lie in 0\.\.7 .* got -1\.\.0"),
        ([0], [0, 1], "must both be"),
    ],
)
def test_wrong_coordinates_are_refused(rows: list[int], cols: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Topology(32, 32, Block(4, 4), torch.tensor(rows), torch.tensor(cols))


@pytest.mark.parametrize(
    ("array", "position", "value", "message"),
    [
        ("crow", 0, 1, "crow must rise"),
        ("crow", 3, 99, "crow must rise"),
        ("col", 0, -1, "col must lie in"),
        ("col", 1, 1000, "col must lie in"),
        ("slot", 0, 5, "slot must be a permutation"),
        ("ccol", 1, 7, "transposed view"),
        ("row_t", 0, 3, "transposed view"),
        ("slot_t", 2, 0, "transposed view"),
    ],
)
def test_validate_finds_every_corruption(array: str, position: int, value: int, message: str) -> None:
    topology = Topology.full(16, 16, Block(4, 4))
    buffer = getattr(topology, array)
    buffer[position] = value if buffer[position] != value else value + 1
    with pytest.raises(ValueError, match=message):
        topology.validate()


class Counting:
    """A deriver that notes how often it filled which buffers."""

    name = "counting"
    device_type = "cpu"

    def __init__(self) -> None:
        self.fills = 0

    def capacity(self, topology: Topology) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"rows": ((topology.nnzb,), torch.int32)}

    def fill(self, topology: Topology, buffers: Mapping[str, Tensor]) -> None:
        self.fills += 1
        buffers["rows"].copy_(topology.coords()[0])


def test_derived_buffers_follow_every_change() -> None:
    topology, deriver = Topology.random(32, 32, Block(4, 4), 20), Counting()
    topology.attach(deriver)
    topology.attach(deriver)
    assert deriver.fills == 1 and len(topology.index("counting")) == 7 and len(topology.index("other")) == 6
    derived = topology.index("counting")[-1]
    address = derived.data_ptr()
    free = (~topology.mask()).nonzero()[:3]
    topology.rewrite(torch.arange(3), free[:, 0], free[:, 1])
    assert deriver.fills == 2 and derived.data_ptr() == address
    assert torch.equal(derived.long(), topology.coords()[0])
    assert "counting_rows" not in topology.state_dict()
    topology.load_state_dict(Topology.random(32, 32, Block(4, 4), 20).state_dict())
    assert torch.equal(topology.index("counting")[-1].long(), topology.coords()[0])
    topology.release()
    assert len(topology.index("counting")) == 6 and "counting_rows" not in dict(topology.named_buffers())


def test_derived_buffers_stay_on_the_device_of_their_deriver() -> None:
    topology, deriver = Topology.random(32, 32, Block(4, 4), 20), Counting()
    topology.attach(deriver)
    topology.to("cpu")
    assert len(topology.index("counting")) == 7
    topology.to("meta")
    assert deriver.fills == 1 and len(topology.index("counting")) == 6
    with pytest.raises(ValueError, match="serves cpu, and this topology is on meta"):
        topology.attach(deriver)


def test_copies_are_independent() -> None:
    topology = Topology.random(32, 32, Block(4, 4), 20)
    for twin in (copy.deepcopy(topology), pickle.loads(pickle.dumps(topology))):
        assert all(torch.equal(a, b) for a, b in zip(topology.index(), twin.index(), strict=True))
        free = (~twin.mask()).nonzero()[:1]
        twin.rewrite(torch.tensor([0]), free[:, 0], free[:, 1])
        assert not torch.equal(topology.mask(), twin.mask())


def test_state_dict_is_the_row_view() -> None:
    topology, other = Topology.random(32, 32, Block(4, 4), 20), Topology.random(32, 32, Block(4, 4), 20)
    assert list(topology.state_dict()) == ["crow", "col", "slot"]
    other.load_state_dict(topology.state_dict())
    other.validate()
    assert all(torch.equal(a, b) for a, b in zip(topology.index(), other.index(), strict=True))


def test_dtype_casts_leave_the_index_alone() -> None:
    topology = Topology.random(32, 32, Block(4, 4), 20)
    for cast in (topology.half(), topology.type(torch.float64), topology.double()):
        assert all(tensor.dtype == torch.int32 for tensor in cast.index())
    topology.validate()
