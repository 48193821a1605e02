"""Calls of the native launchers of csrc/api.h: addresses, torch's number of threads, a workspace, a checked status."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._native import native
from ..topology import WeightIndex

# Buffers from this size on ask for large pages: the C library returns buffers of this kind to the system when they are
# freed, so without it every step would fault all of them in anew, 4 KiB at a time (measured: half a GRU's step at S=.9,
# 3 to 6 % of that of a 1x1 convolution).
LARGE_BYTES = 2 << 20

# The derived buffers of unstructured weights: the runs of nonzeros in each orientation.
RUNS = ("by_row", "by_col")


def native_index(index: WeightIndex, *, transposed: bool = False) -> Any:
    """The `BlockIndex` of csrc/api.h: addresses of the index arrays, valid while `index` and the result live.

    Args:
        transposed: whether the launcher multiplies by the transposed weight, which takes `slot_t`: unstructured weights
            do not store it, and it is then written to scratch memory (0.7 ns a nonzero, shared by the threads).
    """
    arrays = (index.crow, index.col, index.slot, index.ccol, index.row_t)
    sizes = (index.out, index.in_, index.bh, index.bw, index.nnzb)
    stored = index.slot_t.data_ptr() if index.has_slot_t else 0
    w = native().BlockIndex(*sizes, *(array.data_ptr() for array in arrays), stored)
    if not transposed or index.has_slot_t:
        return w
    slot_t = in_large_pages(torch.empty_like(index.slot))
    launch("transposed_slots", (w, index.col_blocks), w, index.col_blocks, slot_t)
    w = native().BlockIndex(*sizes, *(array.data_ptr() for array in arrays), slot_t.data_ptr())
    w.scratch = slot_t
    return w


def runs_of(index: WeightIndex, name: str, op: str) -> Tensor:
    """One of `RUNS`, as the deriver of `op` ("linear", "conv") made it.

    Raises:
        ValueError: where the topology has none: a forward never derives.
    """
    if not index.derived:
        raise ValueError(
            f"{op}: backend 'cpu' reads a derived index that this unstructured topology does not have; call "
            f"topology.attach(backends.get('cpu').deriver('{op}', pattern)) once, as layers do."
        )
    return index.derived[RUNS.index(name)]


def launch(launcher: str, sizes: Sequence[Any], *arguments: Any) -> None:
    """Calls `launcher(*arguments, threads, workspace)` with `launcher_workspace_bytes(*sizes, threads)` of scratch.

    Args:
        sizes: what the workspace depends on. arguments: tensors go as addresses, None as a null pointer, everything
            else (an index, a size, a stride) as it is.

    Raises:
        RuntimeError: where the launcher refuses arguments that the op above should have refused.
    """
    (run, workspace_bytes), threads = _launcher(launcher), torch.get_num_threads()
    space = workspace(workspace_bytes(*sizes, threads))
    addresses = [x.data_ptr() if isinstance(x, Tensor) else 0 if x is None else x for x in arguments]
    check(run(*addresses, threads, space.data_ptr()), launcher)


@functools.cache
def _launcher(name: str) -> tuple[Any, Any]:
    """The launcher of that name and what says how much scratch it wants."""
    return getattr(native(), name), getattr(native(), f"{name}_workspace_bytes")


def workspace(size_bytes: int) -> Tensor:
    """Scratch memory for one launch; torch's CPU allocator aligns it to 64 bytes."""
    return in_large_pages(torch.empty(size_bytes, dtype=torch.uint8, device="cpu"))


def in_large_pages(buffer: Tensor) -> Tensor:
    """`buffer`, still unwritten, which the system is asked to back by large pages where it is large."""
    if buffer.nbytes >= LARGE_BYTES:
        native().advise_huge_pages(buffer.data_ptr(), buffer.nbytes)
    return buffer


def check(status: int, launcher: str) -> None:
    """Raises where a launcher refuses arguments that the op above should have refused.

    Raises:
        RuntimeError: for any status but 0.
    """
    if status != 0:
        raise RuntimeError(f"{launcher}: the native launcher returned status {status} (see Status in csrc/api.h).")
