"""Row-groups: the index that lets several block-rows of a weight share every activation tile that they load.

A group is `G` consecutive *lines* of blocks: block-rows for `Y = gather(X) · Wᵀ`, the block-columns of one tap for
`dX = scatter(dY · W)`. Its entries are the union of what its lines multiply, each with the slot of every line or -1:

    start [groups + 1]     entries start[g] … start[g + 1] - 1 are group g's
    entry [capacity]       tap << 16 | inner: which tap and which channel block of the activation a tile is loaded from
    slot  [capacity, G]        slot of (line, tap, inner) for each line of the group; -1 where that block is absent
    order [groups]         the groups, longest first, so that what runs last is short

all int32. Entries rise by inner, then tap: the taps of one channel block, which read almost the same pixels, are
neighbours. The last SPARE entries are no group's, so that a kernel may fetch ahead.

At density d a group has 1-(1-d)^G entries a column in place of G·d: sharing saves activation traffic, and costs
products with absent blocks unless a kernel skips them. Everything here is torch on the index's own device without a
synchronisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .index import WeightIndex
from .topology import Topology

TAP_SHIFT = 16
INNER_MASK = (1 << TAP_SHIFT) - 1

# Entries after the last one that any topology fills.
SPARE = 4

# In the order of `RowGroups.tensors`.
FIELDS = ("start", "entry", "slot", "order")


@dataclass(frozen=True)
class RowGroups:
    """The index of one orientation, as the module's docstring draws it."""

    start: Tensor
    entry: Tensor
    slot: Tensor
    order: Tensor

    @property
    def size(self) -> int:
        """G: lines of a group."""
        return self.slot.shape[1]

    @property
    def count(self) -> int:
        """How many groups there are."""
        return self.order.shape[0]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order of `FIELDS`."""
        return self.start, self.entry, self.slot, self.order


def why_not(index: WeightIndex) -> str | None:
    """Why a weight of these sizes has no row-groups; None where it has."""
    if max(index.cols_per_tap, index.row_blocks) > INNER_MASK:
        return f"it has more than {INNER_MASK} block rows or block columns a tap"
    if index.taps > INNER_MASK // 2:
        return f"it has more than {INNER_MASK // 2} taps"
    return None


def shapes(index: WeightIndex, size: int, transposed: bool) -> dict[str, tuple[int, ...]]:
    """Shape of every field for groups of `size` lines; it follows from the weight's shape and nnzb alone.

    Raises:
        ValueError: where an entry cannot name every block of the weight.
    """
    reason = why_not(index)
    if reason is not None:
        raise ValueError(
            f"a weight [{index.out}, {index.taps}x{index.in_}] has no row-groups: {reason}; use larger blocks."
        )
    lines, inners = _extent(index, transposed)
    groups = -(-lines // size)
    capacity = min(index.nnzb, groups * inners * index.taps) + SPARE
    return {"start": (groups + 1,), "entry": (capacity,), "slot": (capacity, size), "order": (groups,)}


def build(index: WeightIndex, size: int, transposed: bool = False) -> RowGroups:
    """Row-groups of `size` lines in new tensors."""
    made = shapes(index, size, transposed)
    groups = RowGroups(**{k: torch.empty(made[k], dtype=torch.int32, device=index.crow.device) for k in FIELDS})
    fill(groups, index, transposed)
    return groups


def fill(groups: RowGroups, index: WeightIndex, transposed: bool) -> None:
    """Writes the row-groups of `index` in place."""
    size, count = groups.size, groups.count
    _, inners = _extent(index, transposed)
    rows, cols = index.coords()  # by slot
    tap, channel = cols // index.cols_per_tap, cols % index.cols_per_tap
    line, inner = (channel, rows) if transposed else (rows, channel)
    width = inners * index.taps
    keys, slot = ((line // size * inners + inner) * index.taps + tap).sort()
    first = torch.ones_like(keys)
    first[1:] = keys[1:] != keys[:-1]
    seen = first.cumsum(0)  # entries up to and including each block's
    where = seen - 1
    groups.entry.zero_().scatter_(0, where, (tap << TAP_SHIFT | inner).to(torch.int32)[slot])
    groups.slot.fill_(-1).view(-1).scatter_(0, where * size + (line % size)[slot], slot.to(torch.int32))
    bounds = torch.searchsorted(keys, torch.arange(count + 1, device=keys.device) * width)
    start = torch.cat([seen.new_zeros(1), seen])[bounds]
    groups.start.copy_(start)
    groups.order.copy_((start[1:] - start[:-1]).argsort(descending=True, stable=True))


def _extent(index: WeightIndex, transposed: bool) -> tuple[int, int]:
    """Number of lines, and of channel blocks that one tap of a line multiplies."""
    if transposed:
        return index.cols_per_tap, index.row_blocks
    return index.row_blocks, index.cols_per_tap


@dataclass(frozen=True)
class RowGroupsDeriver:
    """Keeps the row-groups of both orientations in a topology's buffers `{by_row, by_col}_{start, …}`.

    Args:
        name: whose they are. device_type: where.
        by_row: lines of a group of block-rows. by_col: of block-columns.
    """

    name: str
    device_type: str
    by_row: int
    by_col: int

    def capacity(self, topology: Topology) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        index = topology.weight_index()
        return {
            f"{side}_{field}": (shape, torch.int32)
            for side, size, transposed in (("by_row", self.by_row, False), ("by_col", self.by_col, True))
            for field, shape in shapes(index, size, transposed).items()
        }

    def fill(self, topology: Topology, buffers: Mapping[str, Tensor]) -> None:
        index = topology.weight_index()
        for side, transposed in (("by_row", False), ("by_col", True)):
            fill(RowGroups(**{field: buffers[f"{side}_{field}"] for field in FIELDS}), index, transposed)


def derived(index: WeightIndex, transposed: bool) -> RowGroups | None:
    """The row-groups that a `RowGroupsDeriver` keeps for this weight, if one does."""
    if len(index.derived) != 2 * len(FIELDS):
        return None
    first = len(FIELDS) if transposed else 0
    return RowGroups(*index.derived[first : first + len(FIELDS)])
