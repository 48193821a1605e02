"""The linear primitives of the `cpu` backend for blocks other than 1x1: calls of csrc/cpu/linear_block.cpp."""

from __future__ import annotations

from torch import Tensor

from ..topology import WeightIndex
from ._cpu_launch import launch, native_index


def spmm(x: Tensor, values: Tensor, index: WeightIndex, bias: Tensor | None = None) -> Tensor:
    """`Y [P, out] = X [P, in] · Wᵀ + bias`."""
    w, positions = native_index(index), x.shape[0]
    y = x.new_empty(positions, index.out)
    launch("block_spmm", (w, positions), w, values, x, x.stride(0), bias, y, y.stride(0), positions)
    return y


def spmm_t(dy: Tensor, values: Tensor, index: WeightIndex) -> Tensor:
    """`dX [P, in] = dY [P, out] · W`."""
    w, positions = native_index(index), dy.shape[0]
    dx = dy.new_empty(positions, index.in_)
    launch("block_spmm_t", (w, positions), w, values, dy, dy.stride(0), dx, dx.stride(0), positions)
    return dx


def sddmm(dy: Tensor, x: Tensor, index: WeightIndex) -> Tensor:
    """`dW [nnzb, bh, bw] = dYᵀ · X` at the active blocks, padding zero."""
    w, positions = native_index(index), x.shape[0]
    dvalues = x.new_empty(index.nnzb, index.bh, index.bw)
    launch("block_sddmm", (w, positions), w, dy, dy.stride(0), x, x.stride(0), dvalues, positions)
    return dvalues
