"""The linear primitives of the `cpu` backend for blocks other than 1x1: calls of csrc/cpu/linear_block.cpp.

Activations are fp32 or, where `has_bf16`, bf16; weights, bias and weight gradients are fp32 either way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import native
from ..topology import WeightIndex
from ._cpu_launch import in_large_pages, launch, native_index

# Of the gradient panels of block_scores, all threads together: with the copies that follow and a workspace of about
# 1 MiB a thread, 16 MiB at most.
SCORE_BYTES = 4 << 20
# Positions of one sum there, of two or more that are then added up: in a single long one the last digit is lost, and
# squares lose it twice.
POSITIONS = 1024
# Smallest sides of a panel's blocks: what the kernel is fastest with.
TILE = 32


def has_bf16(index: WeightIndex) -> bool:
    """Whether bf16 activations have kernels here, for these blocks."""
    return min(index.bh, index.bw) >= 16 and native().bf16_kernels()


def spmm(
    x: Tensor,
    values: Tensor,
    index: WeightIndex,
    bias: Tensor | None = None,
    activation: int = 0,
    pre: Tensor | None = None,
) -> Tensor:
    """`Y [P, out] = activation(X [P, in] · Wᵀ + bias)`; what the activation is given goes to `pre [P, out]`, if any."""
    w, positions = native_index(index), x.shape[0]
    y = in_large_pages(x.new_empty(positions, index.out))
    launch(
        _typed("block_spmm", x), (w, positions),
        w, values, x, x.stride(0), bias, activation, pre, y, y.stride(0), positions,
    )  # fmt: skip
    return y


def spmm_t(dy: Tensor, values: Tensor, index: WeightIndex) -> Tensor:
    """`dX [P, in] = dY [P, out] · W`."""
    w, positions = native_index(index), dy.shape[0]
    dx = in_large_pages(dy.new_empty(positions, index.in_))
    launch(_typed("block_spmm_t", dy), (w, positions), w, values, dy, dy.stride(0), dx, dx.stride(0), positions)
    return dx


def sddmm(dy: Tensor, x: Tensor, index: WeightIndex) -> Tensor:
    """`dW [nnzb, bh, bw] = dYᵀ · X` at the active blocks, padding zero, fp32."""
    w, positions = native_index(index), x.shape[0]
    dvalues = x.new_empty(index.nnzb, index.bh, index.bw, dtype=torch.float32)
    launch(_typed("block_sddmm", x), (w, positions), w, dy, dy.stride(0), x, x.stride(0), dvalues, positions)
    return dvalues


def block_scores(dy: Tensor, x: Tensor, index: WeightIndex) -> Tensor:
    """Squared Frobenius norm of every block of `dYᵀ · X`, of any pattern: `[row_blocks, col_blocks]`, fp32.

    Panels of the dense gradient come from `sddmm` with every block active: on a Zen 5 that is twice as fast as MKL's
    product and as fast as oneDNN's, which wants transposed copies. Scratch: see `SCORE_BYTES`.
    """
    if x.dtype == torch.bfloat16 and not native().bf16_kernels():
        dy, x = dy.float(), x.float()
    high, wide = max(index.bh, TILE), max(index.bw, TILE)
    columns = -(-index.in_ // wide)
    # Every thread sums a panel of its own.
    panel = max(1, SCORE_BYTES // (4 * columns * wide * high * torch.get_num_threads()))  # rows of tiles
    piece = max(1, -(-x.shape[0] // max(2, -(-x.shape[0] // POSITIONS))))
    scores = x.new_empty(index.row_blocks, index.col_blocks, dtype=torch.float32)
    for first in range(0, index.out, panel * high):
        out = min(panel * high, index.out - first)
        tiles = _full(out, index.in_, high, wide)
        grad = sddmm(dy[:piece, first : first + out], x[:piece], tiles)
        for at in range(piece, x.shape[0], piece):
            grad += sddmm(dy[at : at + piece, first : first + out], x[at : at + piece], tiles)
        grad.square_()
        parts = grad.view(-1, columns, high // index.bh, index.bh, wide // index.bw, index.bw).sum((3, 5))
        found = parts.transpose(1, 2).reshape(-1, columns * (wide // index.bw))  # [row blocks, column blocks], padded
        row = first // index.bh
        scores[row : row + found.shape[0]] = found[: index.row_blocks - row, : index.col_blocks]
    return scores


def _full(out: int, in_: int, bh: int, bw: int) -> WeightIndex:
    """The index of a weight `[out, in]` whose blocks are all active."""
    rows, cols = -(-out // bh), -(-in_ // bw)
    slot = torch.arange(rows * cols, dtype=torch.int32, device="cpu")
    slot_t = slot.view(rows, cols).T.flatten()
    crow, ccol = slot.new_empty(rows + 1), slot.new_empty(cols + 1)
    torch.arange(0, rows * cols + 1, cols, out=crow, device="cpu")
    torch.arange(0, rows * cols + 1, rows, out=ccol, device="cpu")
    return WeightIndex(crow, slot % cols, slot, ccol, slot_t // cols, slot_t, (), out, in_, 1, bh, bw)


def _typed(launcher: str, x: Tensor) -> str:
    return f"{launcher}_bf16" if x.dtype == torch.bfloat16 else launcher
