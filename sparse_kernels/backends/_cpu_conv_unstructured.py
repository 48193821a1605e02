"""The convolution primitives of the `cpu` backend for 1x1 blocks: calls of csrc/cpu/conv_unstructured.cpp.

A 1x1 convolution of many channels_last pixels is linear on them: csrc/cpu/linear_unstructured.cpp is faster there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .._native import native
from ..topology import Topology, WeightIndex
from . import _cpu_unstructured
from ._cpu_conv import conv_shape, dense_grad, image_strides, images_of, rows_of
from ._cpu_launch import RUNS, check, in_large_pages, launch, native_index, runs_of, workspace
from .reference import memory_format
from .registry import ConvGeometry

# From so many pixels a thread on, their rows beat images: 448 channels of 32x32, N=4, S=.9 take 7.5 ms instead of 9.4
# for the three products on one thread of Zen 5; 896 channels of 8x8 would take 2.33 instead of 2.21.
LINEAR_PIXELS = 1024


class RunsDeriver:
    """The runs of nonzeros that share a row (a column) and a tile, longest first in each tile, and where their parts
    lie in the sorted index.

    16 bytes a run and 4 for each of its taps, in the orientations `by_row` and `by_col`; a run has nonzeros of some 60
    channels and, for a square kernel, one column of its taps. A kernel of one tap has the runs of the linear weight as
    well.
    """

    name = "cpu"
    device_type = "cpu"

    def capacity(self, topology: Topology) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        w, taps = native_index(topology.weight_index()), topology.taps
        made: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            name: ((native().conv_unstructured_runs_ints(w, taps, name == "by_col"),), torch.int32) for name in RUNS
        }
        linear = _cpu_unstructured.RunsDeriver().capacity(topology) if taps == 1 else {}
        return made | {f"linear_{name}": size for name, size in linear.items()}

    def fill(self, topology: Topology, buffers: Mapping[str, Tensor]) -> None:
        lib, w, taps = native(), native_index(topology.weight_index()), topology.taps
        for name in RUNS:
            transposed = name == "by_col"
            space = workspace(lib.conv_unstructured_derive_workspace_bytes(w, taps, transposed))
            status = lib.conv_unstructured_derive(w, taps, transposed, buffers[name].data_ptr(), space.data_ptr())
            check(status, "conv_unstructured_derive")
        if taps == 1:
            linear = {name: buffers[f"linear_{name}"] for name in RUNS}
            _cpu_unstructured.RunsDeriver().fill(topology, linear)


def has_bf16(index: WeightIndex) -> bool:
    """Whether bf16 images have kernels: they are converted."""
    return False


def spmm(x: Tensor, values: Tensor, index: WeightIndex, bias: Tensor | None, conv: ConvGeometry) -> Tensor:
    """`Y [N, out, H', W'] = gather(X) · Wᵀ + bias`, in the memory format of x."""
    return activated(x, values, index, bias, conv, 0, False)[0]


def activated(
    x: Tensor,
    values: Tensor,
    index: WeightIndex,
    bias: Tensor | None,
    conv: ConvGeometry,
    activation: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """`activation(spmm(…))` and, where kept, what the activation is given, in the same form; else an empty second."""
    size = [x.shape[0], index.out, *conv.output_size(x.shape[2], x.shape[3])]
    rows = _rows(x, conv)
    if rows is not None and memory_format(x) == torch.channels_last:
        kept = x.new_empty([rows.shape[0], index.out] if keep else [0])
        out = _cpu_unstructured.spmm(rows, values, _linear(index), bias, activation, kept if keep else None)
        return images_of(out, size), images_of(kept, size) if keep else kept
    w, shape, runs = native_index(index), conv_shape(x, conv), runs_of(index, "by_row", "conv")
    y = in_large_pages(torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x)))
    pre = in_large_pages(torch.empty_like(y)) if keep else x.new_empty(0)
    launch(
        "conv_unstructured_spmm", (w, shape),
        w, runs, values, shape, x, image_strides(x), bias, activation, pre if keep else None, y, image_strides(y),
    )  # fmt: skip
    return y, pre


def spmm_t(dy: Tensor, values: Tensor, index: WeightIndex, conv: ConvGeometry, x_like: Tensor) -> Tensor:
    """`dX = scatter(dY · W)` in the shape and memory format of `x_like`."""
    rows = _rows(dy, conv)
    if rows is not None and memory_format(x_like) == torch.channels_last:
        return images_of(_cpu_unstructured.spmm_t(rows, values, _linear(index)), x_like.shape)
    w, shape, runs = native_index(index, transposed=True), conv_shape(x_like, conv), runs_of(index, "by_col", "conv")
    dx = in_large_pages(torch.empty_like(x_like, memory_format=memory_format(x_like)))
    launch("conv_unstructured_spmm_t", (w, shape), w, runs, values, shape, dy, image_strides(dy), dx, image_strides(dx))
    return dx


def sddmm(dy: Tensor, x: Tensor, index: WeightIndex, conv: ConvGeometry) -> Tensor:
    """`dW [nnz, 1, 1] = dYᵀ · gather(X)` at the active positions."""
    dy_rows, x_rows = _rows(dy, conv), _rows(x, conv)
    if dy_rows is not None and x_rows is not None:
        return _cpu_unstructured.sddmm(dy_rows, x_rows, _linear(index))
    w, shape, runs = native_index(index), conv_shape(x, conv), runs_of(index, "by_row", "conv")
    dvalues = in_large_pages(x.new_empty(index.nnzb, 1, 1))
    launch("conv_unstructured_sddmm", (w, shape), w, runs, shape, dy, image_strides(dy), x, image_strides(x), dvalues)
    return dvalues


def block_scores(dy: Tensor, x: Tensor, index: WeightIndex, conv: ConvGeometry) -> Tensor:
    """Squares of all elements of `dYᵀ · gather(X)`, `[out, taps * in]`."""
    return dense_grad(dy, x, conv).square_()


def _rows(x: Tensor, conv: ConvGeometry) -> Tensor | None:
    """The pixels of `x [N, C, H, W]` as rows `[N·H·W, C]`, where the linear kernels shall have them."""
    rows = rows_of(x, conv)
    return rows if rows is not None and rows.shape[0] >= LINEAR_PIXELS * torch.get_num_threads() else None


def _linear(index: WeightIndex) -> WeightIndex:
    """The index of the linear weight that a kernel of one tap is.

    Raises:
        ValueError: where the topology has no derived index.
    """
    runs_of(index, "by_row", "conv")  # or the linear kernels would ask for the index of their own op
    return replace(index, derived=index.derived[len(RUNS) :])
