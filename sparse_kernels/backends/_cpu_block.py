"""The linear primitives of the `cpu` backend for blocks other than 1x1: calls of csrc/cpu/linear_block.cpp.

Activations are fp32 or, where `has_bf16`, bf16; weights, bias and weight gradients are fp32 either way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import native
from ..topology import WeightIndex
from ._cpu_launch import launch, native_index


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
    y = x.new_empty(positions, index.out)
    launch(
        _typed("block_spmm", x), (w, positions),
        w, values, x, x.stride(0), bias, activation, pre, y, y.stride(0), positions,
    )  # fmt: skip
    return y


def spmm_t(dy: Tensor, values: Tensor, index: WeightIndex) -> Tensor:
    """`dX [P, in] = dY [P, out] · W`."""
    w, positions = native_index(index), dy.shape[0]
    dx = dy.new_empty(positions, index.in_)
    launch(_typed("block_spmm_t", dy), (w, positions), w, values, dy, dy.stride(0), dx, dx.stride(0), positions)
    return dx


def sddmm(dy: Tensor, x: Tensor, index: WeightIndex) -> Tensor:
    """`dW [nnzb, bh, bw] = dYᵀ · X` at the active blocks, padding zero, fp32."""
    w, positions = native_index(index), x.shape[0]
    dvalues = x.new_empty(index.nnzb, index.bh, index.bw, dtype=torch.float32)
    launch(_typed("block_sddmm", x), (w, positions), w, dy, dy.stride(0), x, x.stride(0), dvalues, positions)
    return dvalues


def _typed(launcher: str, x: Tensor) -> str:
    return f"{launcher}_bf16" if x.dtype == torch.bfloat16 else launcher
