"""The linear primitives of the `cpu` backend for 1x1 blocks: calls of csrc/cpu/linear_unstructured.cpp."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .._native import native
from ..topology import Topology, WeightIndex
from ._cpu_launch import RUNS, check, launch, native_index, runs_of, workspace


class RunsDeriver:
    """The runs of nonzeros that share a row (a column) and a tile of columns (of rows), longest first in each tile.

    12 bytes a run of ten or more nonzeros on average, in the orientations `by_row` and `by_col`.
    """

    name = "cpu"
    device_type = "cpu"

    def capacity(self, topology: Topology) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        index = topology.weight_index()
        return {name: ((_runs_ints(index, name),), torch.int32) for name in RUNS}

    def fill(self, topology: Topology, buffers: Mapping[str, Tensor]) -> None:
        for name in RUNS:
            _derive(topology.weight_index(), name, buffers[name])


def has_bf16(index: WeightIndex) -> bool:
    """Whether bf16 activations have kernels: they are converted."""
    return False


def spmm(
    x: Tensor,
    values: Tensor,
    index: WeightIndex,
    bias: Tensor | None = None,
    activation: int = 0,
    pre: Tensor | None = None,
) -> Tensor:
    """`Y [P, out] = activation(X [P, in] · Wᵀ + bias)`; what the activation is given goes to `pre [P, out]`, if any."""
    w, positions, runs = native_index(index), x.shape[0], runs_of(index, "by_row", "linear")
    y = x.new_empty(positions, index.out)
    launch(
        "unstructured_spmm", (w, positions),
        w, runs, values, x, x.stride(0), bias, activation, pre, y, y.stride(0), positions,
    )  # fmt: skip
    return y


def spmm_t(dy: Tensor, values: Tensor, index: WeightIndex) -> Tensor:
    """`dX [P, in] = dY [P, out] · W`."""
    w, positions, runs = native_index(index, transposed=True), dy.shape[0], runs_of(index, "by_col", "linear")
    dx = dy.new_empty(positions, index.in_)
    launch("unstructured_spmm_t", (w, positions), w, runs, values, dy, dy.stride(0), dx, dx.stride(0), positions)
    return dx


def sddmm(dy: Tensor, x: Tensor, index: WeightIndex) -> Tensor:
    """`dW [nnz, 1, 1] = dYᵀ · X` at the active positions."""
    w, positions, runs = native_index(index), x.shape[0], runs_of(index, "by_row", "linear")
    dvalues = x.new_empty(index.nnzb, 1, 1)
    launch("unstructured_sddmm", (w, positions), w, runs, dy, dy.stride(0), x, x.stride(0), dvalues, positions)
    return dvalues


def _runs_ints(index: WeightIndex, name: str) -> int:
    size: int = native().unstructured_runs_ints(native_index(index), name == "by_col")
    return size


def _derive(index: WeightIndex, name: str, runs: Tensor) -> None:
    lib, w, transposed = native(), native_index(index), name == "by_col"
    space = workspace(lib.unstructured_derive_workspace_bytes(w, transposed))
    check(lib.unstructured_derive(w, transposed, runs.data_ptr(), space.data_ptr()), "unstructured_derive")
