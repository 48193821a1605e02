"""The linear primitives of the `cpu` backend for 1x1 blocks: calls of csrc/cpu/linear_unstructured.cpp."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .._native import native
from ..topology import Topology, WeightIndex
from ._cpu_block import check, native_index, workspace

BUFFERS = ("by_row", "by_col")


class RunsDeriver:
    """The runs of nonzeros that share a row (a column) and a tile of columns (of rows), longest first in each tile.

    12 bytes a run of ten or more nonzeros on average, in the orientations `by_row` and `by_col`.
    """

    name = "cpu"

    def capacity(self, topology: Topology) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        index = topology.weight_index()
        return {name: ((_runs_ints(index, name),), torch.int32) for name in BUFFERS}

    def fill(self, topology: Topology, buffers: Mapping[str, Tensor]) -> None:
        for name in BUFFERS:
            _derive(topology.weight_index(), name, buffers[name])


def spmm(x: Tensor, values: Tensor, index: WeightIndex, bias: Tensor | None = None) -> Tensor:
    """`Y [P, out] = X [P, in] · Wᵀ + bias`."""
    lib, w, threads = native(), native_index(index), torch.get_num_threads()
    positions, runs = x.shape[0], _runs(index, "by_row")
    y = x.new_empty(positions, index.out)
    space = workspace(lib.unstructured_spmm_workspace_bytes(w, positions, threads))
    check(
        lib.unstructured_spmm(
            w,
            runs.data_ptr(),
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
        "unstructured_spmm",
    )
    return y


def spmm_t(dy: Tensor, values: Tensor, index: WeightIndex) -> Tensor:
    """`dX [P, in] = dY [P, out] · W`."""
    lib, w, threads = native(), native_index(index), torch.get_num_threads()
    positions, runs = dy.shape[0], _runs(index, "by_col")
    dx = dy.new_empty(positions, index.in_)
    space = workspace(lib.unstructured_spmm_t_workspace_bytes(w, positions, threads))
    check(
        lib.unstructured_spmm_t(
            w,
            runs.data_ptr(),
            values.data_ptr(),
            dy.data_ptr(),
            dy.stride(0),
            dx.data_ptr(),
            dx.stride(0),
            positions,
            threads,
            space.data_ptr(),
        ),
        "unstructured_spmm_t",
    )
    return dx


def sddmm(dy: Tensor, x: Tensor, index: WeightIndex) -> Tensor:
    """`dW [nnz, 1, 1] = dYᵀ · X` at the active positions."""
    lib, w, threads = native(), native_index(index), torch.get_num_threads()
    positions, runs = x.shape[0], _runs(index, "by_row")
    dvalues = x.new_empty(index.nnzb, 1, 1)
    space = workspace(lib.unstructured_sddmm_workspace_bytes(w, positions, threads))
    check(
        lib.unstructured_sddmm(
            w,
            runs.data_ptr(),
            dy.data_ptr(),
            dy.stride(0),
            x.data_ptr(),
            x.stride(0),
            dvalues.data_ptr(),
            positions,
            threads,
            space.data_ptr(),
        ),
        "unstructured_sddmm",
    )
    return dvalues


def _runs(index: WeightIndex, name: str) -> Tensor:
    """One orientation of the derived index; derived for this call where the topology has none."""
    if index.derived:
        return index.derived[BUFFERS.index(name)]
    runs = index.crow.new_empty(_runs_ints(index, name))
    _derive(index, name, runs)
    return runs


def _runs_ints(index: WeightIndex, name: str) -> int:
    size: int = native().unstructured_runs_ints(native_index(index), name == "by_col")
    return size


def _derive(index: WeightIndex, name: str, runs: Tensor) -> None:
    lib, w, transposed = native(), native_index(index), name == "by_col"
    space = workspace(lib.unstructured_derive_workspace_bytes(w, transposed))
    check(lib.unstructured_derive(w, transposed, runs.data_ptr(), space.data_ptr()), "unstructured_derive")
