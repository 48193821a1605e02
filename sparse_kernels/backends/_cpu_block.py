"""The linear primitives of the `cpu` backend for blocks other than 1x1: calls of csrc/cpu/linear_block.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._native import native
from ..topology import WeightIndex


def spmm(x: Tensor, values: Tensor, index: WeightIndex, bias: Tensor | None = None) -> Tensor:
    """`Y [P, out] = X [P, in] · Wᵀ + bias`."""
    lib, w, threads = native(), native_index(index), torch.get_num_threads()
    positions = x.shape[0]
    y = x.new_empty(positions, index.out)
    space = workspace(lib.block_spmm_workspace_bytes(w, positions, threads))
    check(
        lib.block_spmm(
            w,
            values.data_ptr(),
            x.data_ptr(),
            x.stride(0),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            y.stride(0),
            positions,
            threads,
            space.data_ptr(),
        ),
        "block_spmm",
    )
    return y


def spmm_t(dy: Tensor, values: Tensor, index: WeightIndex) -> Tensor:
    """`dX [P, in] = dY [P, out] · W`."""
    lib, w, threads = native(), native_index(index), torch.get_num_threads()
    positions = dy.shape[0]
    dx = dy.new_empty(positions, index.in_)
    space = workspace(lib.block_spmm_t_workspace_bytes(w, positions, threads))
    check(
        lib.block_spmm_t(
            w,
            values.data_ptr(),
            dy.data_ptr(),
            dy.stride(0),
            dx.data_ptr(),
            dx.stride(0),
            positions,
            threads,
            space.data_ptr(),
        ),
        "block_spmm_t",
    )
    return dx


def sddmm(dy: Tensor, x: Tensor, index: WeightIndex) -> Tensor:
    """`dW [nnzb, bh, bw] = dYᵀ · X` at the active blocks, padding zero."""
    lib, w, threads = native(), native_index(index), torch.get_num_threads()
    positions = x.shape[0]
    dvalues = x.new_empty(index.nnzb, index.bh, index.bw)
    space = workspace(lib.block_sddmm_workspace_bytes(w, positions, threads))
    check(
        lib.block_sddmm(
            w,
            dy.data_ptr(),
            dy.stride(0),
            x.data_ptr(),
            x.stride(0),
            dvalues.data_ptr(),
            positions,
            threads,
            space.data_ptr(),
        ),
        "block_sddmm",
    )
    return dvalues


def native_index(index: WeightIndex) -> Any:
    """The `BlockIndex` of csrc/api.h: addresses of the index arrays, valid while `index` lives."""
    arrays = (index.crow, index.col, index.slot, index.ccol, index.row_t, index.slot_t)
    return native().BlockIndex(
        index.out, index.in_, index.bh, index.bw, index.nnzb, *(array.data_ptr() for array in arrays)
    )


def workspace(size_bytes: int) -> Tensor:
    """Scratch memory for one launch; torch's CPU allocator aligns it to 64 bytes."""
    return torch.empty(size_bytes, dtype=torch.uint8)


def check(status: int, launcher: str) -> None:
    """Raises where a launcher refuses arguments that the op above should have refused.

    Raises:
        RuntimeError: for any status but 0.
    """
    if status != 0:
        raise RuntimeError(f"{launcher}: the native launcher returned status {status} (see Status in csrc/api.h).")
