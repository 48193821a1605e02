"""The derived index of the `cuda` backend: each orientation of a weight cut into square sub-blocks, sorted by chunk.

A kernel of csrc/cuda/product.cuh holds `chunk` channels of its source on chip at a time and multiplies them with every
sub-block that reads them, all taps, before it goes on. So the entries of a row are sorted by (chunk, tap, column), and
`start` says where each chunk begins: a warp that owns the row walks them, and absent blocks cost nothing. The layout is
`CudaIndex` of csrc/api.h.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..index import WeightIndex
from ..topology import Topology

BUFFERS = ("start", "entry", "start_t", "entry_t")


def side_of(bh: int, bw: int) -> int:
    """Side of the sub-blocks that blocks `bh x bw` are cut into: 32, or 16 where a side of the block is 16."""
    return 16 if 16 in (bh, bw) else 32


class Orientation(NamedTuple):
    """Sizes of one orientation: `rows` of sub-blocks along the result, chunks along the source."""

    side: int
    rows: int
    columns: int  # of sub-blocks along the source, of one tap
    chunk: int  # channels
    chunks: int


def orientation(index: WeightIndex | Topology, transposed: bool) -> Orientation:
    """The sizes that follow from a weight's shape."""
    side = side_of(index.bh, index.bw)
    rows, columns = index.row_blocks * (index.bh // side), index.cols_per_tap * (index.bw // side)
    if transposed:
        rows, columns = columns, rows
    # Of a 3x3 convolution one chunk is nine blocks a row; with fewer taps a chunk must be longer, for the warps of a
    # block of threads meet once a chunk.
    wanted = 32 if index.taps >= 4 else 64 if index.taps >= 2 or side == 16 else 128
    chunk = max(32, side, min(wanted, 1 << (columns * side - 1).bit_length()))
    return Orientation(side, rows, columns, chunk, -(-columns * side // chunk))


@dataclass(frozen=True)
class ChunksDeriver:
    """Writes `start`, `entry` of both orientations."""

    name: str = "cuda"
    device_type: str = "cuda"

    def capacity(self, topology: Topology) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        found = {}
        for transposed, (start, entry) in ((False, BUFFERS[:2]), (True, BUFFERS[2:])):
            sizes = orientation(topology, transposed)
            entries = topology.nnzb * (topology.bh // sizes.side) * (topology.bw // sizes.side)
            found[start] = ((sizes.rows, sizes.chunks + 1), torch.int32)
            found[entry] = ((entries, 2), torch.int32)
        return found

    def fill(self, topology: Topology, buffers: Mapping[str, Tensor]) -> None:
        if topology.crow.is_meta:
            return
        side, device = side_of(topology.bh, topology.bw), topology.crow.device
        high, wide = topology.bh // side, topology.bw // side
        rows, cols = topology.coords()  # [nnzb]
        tap, column = cols // topology.cols_per_tap, cols % topology.cols_per_tap
        down = torch.arange(high, device=device)[None, :, None]
        along = torch.arange(wide, device=device)[None, None, :]
        shape = (topology.nnzb, high, wide)
        sub_row = (rows[:, None, None] * high + down).expand(shape).flatten()
        sub_column = (column[:, None, None] * wide + along).expand(shape).flatten()
        sub_tap = tap[:, None, None].expand(shape).flatten()
        slot = torch.arange(topology.nnzb, device=device)[:, None, None]
        # Where a sub-block begins in values, in units of 16 elements: int32 reaches 2^35 elements.
        place = (slot * topology.bh * topology.bw + down * side * topology.bw + along * side).flatten() // 16
        for transposed, (start, entry) in ((False, BUFFERS[:2]), (True, BUFFERS[2:])):
            sizes = orientation(topology, transposed)
            of_row, of_column = (sub_column, sub_row) if transposed else (sub_row, sub_column)
            per_chunk = sizes.chunk // side
            width = topology.taps * per_chunk  # of a chunk
            where = (of_column // per_chunk * topology.taps + sub_tap) * per_chunk + of_column % per_chunk
            keys, order = (of_row * (sizes.chunks * width) + where).sort()
            first = torch.arange(sizes.rows, device=device)[:, None] * sizes.chunks
            bounds = (first + torch.arange(sizes.chunks + 1, device=device)[None, :]) * width
            buffers[start].copy_(torch.searchsorted(keys, bounds))
            buffers[entry].copy_(torch.stack([where[order], place[order]], dim=1))
