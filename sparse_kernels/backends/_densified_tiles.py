"""A dense convolution by the block kernels: the `densified` backend's way where the weight outweighs the image.

oneDNN copies a dense weight into its own layout in the forward and again in the backward, and its gradient back. Of few
positions these copies are a third of its time (896 channels at 8x8, N=4: 91 ms, ours 55 ms for all of the weight, one
Zen 5 core). So the weight is scattered as the values of a full weight of 32 x 32 blocks, which the block kernels read
as they read any other.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _native
from ..patterns import MAX_PADDING, Block
from ..topology import WeightIndex
from . import _cpu_conv_block
from .registry import ConvGeometry

TILE = Block(32, 32)
# Up to so many positions, or with so many weights a position, the tiles are the faster way, copies included: with 256
# positions by 1.0 to 1.5, with 1024 and 4 million weights by 1.1; with 1024 and 0.6 million they are slower by 1.1.
FEW_POSITIONS = 512
MANY_WEIGHTS = 2048


def serves(x: Tensor, index: WeightIndex, conv: ConvGeometry) -> bool:
    """Whether the block kernels are the faster dense convolution for images `x`."""
    height, width = conv.output_size(x.shape[2], x.shape[3])
    positions = x.shape[0] * height * width
    return (
        (positions <= FEW_POSITIONS or index.out * index.taps * index.in_ >= MANY_WEIGHTS * positions)
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and TILE.padding(index.out, index.in_) <= MAX_PADDING
        and _native.why_unavailable() is None
        and _native.native().isa_name() != "portable"
    )


@functools.lru_cache(maxsize=256)
def full_index(out: int, in_: int, taps: int) -> WeightIndex:
    """The index of a weight that has all its tiles, slots in the order of rows: 20 bytes for 4096 of the weight."""
    rows, per_tap = TILE.grid(out, in_)
    cols = taps * per_tap
    slot = torch.arange(rows * cols, dtype=torch.int32, device="cpu").view(rows, cols)
    row, col = slot // cols, slot % cols
    crow, ccol = (torch.arange(a + 1, dtype=torch.int32, device="cpu") * b for a, b in ((rows, cols), (cols, rows)))
    row_t, slot_t = row.T.flatten(), slot.T.flatten()
    return WeightIndex(crow, col.flatten(), slot.flatten(), ccol, row_t, slot_t, (), out, in_, taps, TILE.bh, TILE.bw)


def backward(
    dy: Tensor, x: Tensor, tiles: Tensor, full: WeightIndex, need_x: bool, need_values: bool, conv: ConvGeometry
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input, and of the weight as tiles `[nnzb, 32, 32]`; None where it was not asked for."""
    if need_x and need_values:
        shared = _cpu_conv_block.backward(dy, x, tiles, full, False, conv)
        if shared is not None:
            return shared[0], shared[1]
    dx = _cpu_conv_block.spmm_t(dy, tiles, full, conv, x) if need_x else None
    return dx, _cpu_conv_block.sddmm(dy, x, full, conv) if need_values else None
