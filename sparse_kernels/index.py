"""`WeightIndex`: the index arrays of one weight as an op hands them to a backend, and what follows from them alone.

For the arrays and their order see `sparse_kernels.topology`, which owns and rewrites them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .patterns import Block, block

INDEX_TENSORS = 6


@dataclass(frozen=True)
class WeightIndex:
    """The index arrays and scalar shape of one weight, as an op hands them to a backend."""

    crow: Tensor
    col: Tensor
    slot: Tensor
    ccol: Tensor
    row_t: Tensor
    slot_t: Tensor
    derived: tuple[Tensor, ...]
    out: int
    in_: int
    taps: int
    bh: int
    bw: int

    @classmethod
    def unpack(cls, tensors: Sequence[Tensor], shape: Sequence[int]) -> WeightIndex:
        """From the flat form that crosses the dispatcher: `[crow, col, slot, ccol, row_t, slot_t, *derived]` and
        `[out, in, taps, bh, bw]`."""
        crow, col, slot, ccol, row_t, slot_t = tensors[:INDEX_TENSORS]
        out, in_, taps, bh, bw = shape
        derived = tuple(tensors[INDEX_TENSORS:])
        return cls(crow, col, slot, ccol, row_t, slot_t, derived, out, in_, taps, bh, bw)

    @property
    def nnzb(self) -> int:
        return self.col.shape[0]

    @property
    def pattern(self) -> Block:
        return block(self.bh, self.bw)

    @property
    def unstructured(self) -> bool:
        """Whether every block is a weight on its own."""
        return self.bh == self.bw == 1

    @property
    def row_blocks(self) -> int:
        return -(-self.out // self.bh)

    @property
    def cols_per_tap(self) -> int:
        return -(-self.in_ // self.bw)

    @property
    def col_blocks(self) -> int:
        return self.taps * self.cols_per_tap

    @property
    def has_slot_t(self) -> bool:
        """Whether `slot_t` is stored; unstructured weights leave it to `slots_by_column`, for 4 bytes a nonzero."""
        return self.slot_t.shape == self.slot.shape

    def slots_by_column(self) -> Tensor:
        """`slot_t`, or what it would hold: the slot of every block in column order, int32 `[nnzb]`."""
        if self.has_slot_t:
            return self.slot_t
        rows, cols = self.coords()
        return (cols * self.row_blocks + rows).argsort().to(torch.int32)

    def coords(self) -> tuple[Tensor, Tensor]:
        """Block row and block column of every slot: two int64 tensors `[nnzb]`, on the index's device."""
        counts = (self.crow[1:] - self.crow[:-1]).long()
        ids = torch.arange(self.row_blocks, device=self.crow.device)
        sorted_rows = torch.repeat_interleave(ids, counts, output_size=self.nnzb)
        slot = self.slot.long()
        rows = torch.empty_like(sorted_rows).scatter_(0, slot, sorted_rows)
        cols = torch.empty_like(sorted_rows).scatter_(0, slot, self.col.long())
        return rows, cols

    def scatter(self, values: Tensor) -> Tensor:
        """The dense weight `[out, taps * in]` of `values [nnzb, bh, bw]`; differentiable."""
        rows, cols = self.coords()
        flat = values.new_zeros(self.row_blocks * self.col_blocks, self.bh * self.bw)
        flat = flat.index_copy(0, rows * self.col_blocks + cols, values.reshape(self.nnzb, self.bh * self.bw))
        grid = flat.view(self.row_blocks, self.taps, self.cols_per_tap, self.bh, self.bw).permute(0, 3, 1, 2, 4)
        padded = grid.reshape(self.row_blocks * self.bh, self.taps, self.cols_per_tap * self.bw)
        return padded[: self.out, :, : self.in_].reshape(self.out, self.taps * self.in_)

    def blocks(self, dense: Tensor) -> Tensor:
        """All blocks of a dense `[out, taps * in]`, zero-padded: `[row_blocks * col_blocks, bh, bw]`."""
        weight = dense.reshape(self.out, self.taps, self.in_)
        pad_out, pad_in = self.row_blocks * self.bh - self.out, self.cols_per_tap * self.bw - self.in_
        if pad_out or pad_in:  # without, padding would still be a copy
            weight = F.pad(weight, (0, pad_in, 0, 0, 0, pad_out))
        grid = weight.view(self.row_blocks, self.bh, self.taps, self.cols_per_tap, self.bw).permute(0, 2, 3, 1, 4)
        return grid.reshape(self.row_blocks * self.col_blocks, self.bh, self.bw)

    def gather(self, dense: Tensor) -> Tensor:
        """The active blocks of a dense `[out, taps * in]`, by slot, padding zero: `[nnzb, bh, bw]`; differentiable."""
        rows, cols = self.coords()
        return self.blocks(dense).index_select(0, rows * self.col_blocks + cols)

    def block_areas(self) -> tuple[Tensor, Tensor]:
        """Real rows of each block row `[row_blocks]` and real columns of each block column `[col_blocks]`, int64."""
        device = self.crow.device
        heights = (self.out - torch.arange(self.row_blocks, device=device) * self.bh).clamp(max=self.bh)
        widths = (self.in_ - torch.arange(self.cols_per_tap, device=device) * self.bw).clamp(max=self.bw)
        return heights, widths.repeat(self.taps)
