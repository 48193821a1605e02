"""The convolution primitives of the `cpu` backend for 1x1 blocks: calls of csrc/cpu/conv_unstructured.cpp."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .._native import native
from ..topology import Topology, WeightIndex
from ._cpu_conv import conv_shape, dense_grad, image_strides
from ._cpu_launch import check, launch, native_index, workspace
from .reference import memory_format
from .registry import ConvGeometry

BUFFERS = ("by_row", "by_col")


class RunsDeriver:
    """The runs of nonzeros that share a row (a column) and a tile, longest first in each tile, and where their parts
    lie in the sorted index.

    16 bytes a run and 4 for each of its taps, in the orientations `by_row` and `by_col`; a run has nonzeros of some 60
    channels and, for a square kernel, one column of its taps.
    """

    name = "cpu"
    device_type = "cpu"

    def capacity(self, topology: Topology) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        w, taps = native_index(topology.weight_index()), topology.taps
        return {
            name: ((native().conv_unstructured_runs_ints(w, taps, name == "by_col"),), torch.int32) for name in BUFFERS
        }

    def fill(self, topology: Topology, buffers: Mapping[str, Tensor]) -> None:
        lib, w, taps = native(), native_index(topology.weight_index()), topology.taps
        for name in BUFFERS:
            transposed = name == "by_col"
            space = workspace(lib.conv_unstructured_derive_workspace_bytes(w, taps, transposed))
            status = lib.conv_unstructured_derive(w, taps, transposed, buffers[name].data_ptr(), space.data_ptr())
            check(status, "conv_unstructured_derive")


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
    w, shape, runs = native_index(index), conv_shape(x, conv), _runs(index, "by_row")
    size = [x.shape[0], index.out, *conv.output_size(x.shape[2], x.shape[3])]
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    pre = torch.empty_like(y) if keep else x.new_empty(0)
    launch(
        "conv_unstructured_spmm", (w, shape),
        w, runs, values, shape, x, image_strides(x), bias, activation, pre if keep else None, y, image_strides(y),
    )  # fmt: skip
    return y, pre


def spmm_t(dy: Tensor, values: Tensor, index: WeightIndex, conv: ConvGeometry, x_like: Tensor) -> Tensor:
    """`dX = scatter(dY · W)` in the shape and memory format of `x_like`."""
    w, shape, runs = native_index(index, transposed=True), conv_shape(x_like, conv), _runs(index, "by_col")
    dx = torch.empty_like(x_like, memory_format=memory_format(x_like))
    launch("conv_unstructured_spmm_t", (w, shape), w, runs, values, shape, dy, image_strides(dy), dx, image_strides(dx))
    return dx


def sddmm(dy: Tensor, x: Tensor, index: WeightIndex, conv: ConvGeometry) -> Tensor:
    """`dW [nnz, 1, 1] = dYᵀ · gather(X)` at the active positions."""
    w, shape, runs = native_index(index), conv_shape(x, conv), _runs(index, "by_row")
    dvalues = x.new_empty(index.nnzb, 1, 1)
    launch("conv_unstructured_sddmm", (w, shape), w, runs, shape, dy, image_strides(dy), x, image_strides(x), dvalues)
    return dvalues


def block_scores(dy: Tensor, x: Tensor, index: WeightIndex, conv: ConvGeometry) -> Tensor:
    """Squares of all elements of `dYᵀ · gather(X)`, `[out, taps * in]`."""
    return dense_grad(dy, x, conv).square_()


def _runs(index: WeightIndex, name: str) -> Tensor:
    """One orientation of the derived index.

    Raises:
        ValueError: where the topology has none: a forward never derives.
    """
    if not index.derived:
        raise ValueError(
            "conv2d: backend 'cpu' reads a derived index that this unstructured topology does not have; call "
            "topology.attach(backends.get('cpu').deriver('conv', pattern)) once, as layers do."
        )
    return index.derived[BUFFERS.index(name)]
