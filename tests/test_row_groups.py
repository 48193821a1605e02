"""The row-groups of GPU kernels: every block once, in order, in buffers that a regrow rewrites in place."""

from __future__ import annotations

import pytest
import torch

from sparse_kernels import Block, Topology, row_groups, testing

SHAPES = [(96, 64, 1), (70, 33, 9), (16, 16, 1)]


def blocks_of(groups: row_groups.RowGroups, lines: int) -> dict[tuple[int, int, int], int]:
    """(line, tap, inner) → slot, as a kernel reads them; checks order and padding on the way."""
    start, entry, slot = groups.start.tolist(), groups.entry.tolist(), groups.slot.tolist()
    found = {}
    for group in range(groups.count):
        places = []
        for i in range(start[group], start[group + 1]):
            tap, inner = entry[i] >> row_groups.TAP_SHIFT, entry[i] & row_groups.INNER_MASK
            places.append((inner, tap))
            assert any(s >= 0 for s in slot[i]), "an entry that no line has"
            for member, s in enumerate(slot[i]):
                if s >= 0:
                    assert group * groups.size + member < lines
                    found[group * groups.size + member, tap, inner] = s
        assert places == sorted(set(places))
    assert start[0] == 0 and start[-1] + row_groups.SPARE <= len(entry)
    lengths = [start[g + 1] - start[g] for g in groups.order.tolist()]
    assert lengths == sorted(lengths, reverse=True)
    return found


def expected(topology: Topology, transposed: bool) -> dict[tuple[int, int, int], int]:
    made = {}
    for slot, (row, col) in enumerate(zip(*(c.tolist() for c in topology.coords()), strict=True)):
        tap, channel = divmod(col, topology.cols_per_tap)
        made[(channel, tap, row) if transposed else (row, tap, channel)] = slot
    return made


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", testing.TOPOLOGIES)
def test_holds_every_block_once(kind: str, shape: tuple[int, int, int], size: int, transposed: bool) -> None:
    topology = testing.TOPOLOGIES[kind](shape[0], shape[1], Block(16, 16), shape[2])
    groups = row_groups.build(topology.weight_index(), size, transposed)
    lines = topology.cols_per_tap if transposed else topology.row_blocks
    assert blocks_of(groups, lines) == expected(topology, transposed)


def test_a_regrow_rewrites_them_in_place() -> None:
    topology = testing.TOPOLOGIES["random"](96, 64, Block(16, 16), 9)
    topology.attach(row_groups.RowGroupsDeriver("test", "cpu", 2, 4))
    before = [tensor.data_ptr() for tensor in topology.index("test")]
    free = (~topology.mask()).nonzero()[:5]
    topology.rewrite(torch.arange(5), free[:, 0], free[:, 1])
    assert [tensor.data_ptr() for tensor in topology.index("test")] == before
    for transposed in (False, True):
        groups = row_groups.derived(topology.weight_index("test"), transposed)
        assert groups is not None and groups.size == (4 if transposed else 2)
        lines = topology.cols_per_tap if transposed else topology.row_blocks
        assert blocks_of(groups, lines) == expected(topology, transposed)


def test_other_derived_buffers_are_no_row_groups() -> None:
    topology = testing.TOPOLOGIES["random"](96, 64, Block(16, 16), 1)
    assert row_groups.derived(topology.weight_index(), False) is None


def test_says_what_does_not_fit() -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert row_groups.why_not(Topology(64, 64, Block(16, 16), none, none).weight_index()) is None
    wide = Topology(1, 1 << 20, Block(1, 16), none, none).weight_index()
    with pytest.raises(ValueError, match="more than 65535 block rows or block columns a tap; use larger blocks"):
        row_groups.build(wide, 1)
