"""The convolution of the `cpu` backend for blocks other than 1x1: calls of csrc/cpu/conv_block.cpp.

Images go to the kernels by address and strides, channels_last or contiguous, and their results have the memory format
that ops/conv.py promises. In bf16, where `has_bf16`, the products of channels_last images are native; the weight
gradient is the fp32 one. A 1x1 convolution of channels_last images that takes every pixel is `_cpu_block`'s linear,
unless `_by_slices`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .._native import native
from ..topology import WeightIndex
from . import _cpu_block
from ._cpu_conv import conv_shape, image_strides, images_of, rows_of, side_by_side
from ._cpu_launch import in_large_pages, launch, native_index
from .reference import memory_format
from .registry import ConvGeometry


def has_bf16(index: WeightIndex) -> bool:
    """Whether bf16 images have kernels here, for these blocks."""
    return _cpu_block.has_bf16(index)


def spmm(x: Tensor, values: Tensor, index: WeightIndex, bias: Tensor | None, conv: ConvGeometry) -> Tensor:
    """`Y [N, out, H', W'] = conv(X, W) + bias` in the memory format of `x`."""
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
    shape, form = [x.shape[0], index.out, *conv.output_size(x.shape[2], x.shape[3])], memory_format(x)
    x, conv = _taken(x, conv)
    rows = None if _by_slices(x, index) else rows_of(x, conv)
    if rows is not None and form == torch.channels_last:
        pre = x.new_empty([rows.shape[0], index.out] if keep else [0])
        y = _cpu_block.spmm(rows, values, index, bias, activation, pre if keep else None)
        return images_of(y, shape), images_of(pre, shape) if keep else pre
    x = _addressable(x)
    y = _output(x, shape, form)
    pre = _output(x, shape, form) if keep else x.new_empty(0)
    w, sizes = native_index(index), conv_shape(x, conv)
    launch(
        _typed("conv_block_spmm", x), (w, sizes),
        w, sizes, values, x, image_strides(x), bias, activation, pre if keep else None, y, image_strides(y),
    )  # fmt: skip
    return y.contiguous(memory_format=form), pre.contiguous(memory_format=form) if keep else pre


def spmm_t(dy: Tensor, values: Tensor, index: WeightIndex, conv: ConvGeometry, x_like: Tensor) -> Tensor:
    """The input gradient, in the shape and memory format of `x_like`."""
    shape, form = list(x_like.shape), memory_format(x_like)
    rows = None if _by_slices(dy, index) else rows_of(dy, conv)
    if rows is not None and form == torch.channels_last:
        return images_of(_cpu_block.spmm_t(rows, values, index), shape)
    dy = _addressable(dy)
    dx = _output(dy, shape, form)
    w, sizes = native_index(index), conv_shape(dx, conv)
    launch(_typed("conv_block_spmm_t", dy), (w, sizes), w, sizes, values, dy, image_strides(dy), dx, image_strides(dx))
    return dx.contiguous(memory_format=form)


def sddmm(dy: Tensor, x: Tensor, index: WeightIndex, conv: ConvGeometry) -> Tensor:
    """`dW [nnzb, bh, bw]`: the weight gradient at the active blocks, padding zero."""
    x, conv = _taken(x, conv)
    x_rows, dy_rows = rows_of(x, conv), rows_of(dy, conv)
    if x_rows is not None and dy_rows is not None:
        return _cpu_block.sddmm(dy_rows, x_rows, index)
    x, dy = _addressable(x.float()), _addressable(dy.float())
    dvalues = x.new_empty(index.nnzb, index.bh, index.bw)
    w, sizes = native_index(index), conv_shape(x, conv)
    launch("conv_block_sddmm", (w, sizes), w, sizes, dy, image_strides(dy), x, image_strides(x), dvalues)
    return dvalues


def backward(
    dy: Tensor, x: Tensor, values: Tensor, index: WeightIndex, want_bias: bool, conv: ConvGeometry
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """`spmm_t`, `sddmm` and the bias gradient `[out]` in one pass over dY; None where no kernel does that."""
    if x.dtype != torch.float32:
        return None
    w, sizes = native_index(index), conv_shape(x, conv)
    if not native().conv_block_backward_fuses(w, sizes):
        return None
    dx = _output(x, x.shape, memory_format(x))
    dvalues = x.new_empty(index.nnzb, index.bh, index.bw)
    dbias = x.new_empty(index.out) if want_bias else None
    x, dy = _addressable(x), _addressable(dy)
    images = dy, image_strides(dy), x, image_strides(x), dx, image_strides(dx)
    launch("conv_block_backward", (w, sizes), w, sizes, values, *images, dvalues, dbias)
    return dx, dvalues, dbias


def _taken(x: Tensor, conv: ConvGeometry) -> tuple[Tensor, ConvGeometry]:
    """The rows and columns of `x` that a kernel of one takes, so that none are packed in vain, and what is left of
    the stride."""
    if conv.stride == (1, 1):
        return x, conv
    stride = list(conv.stride)
    if conv.kernel[0] == 1 and conv.padding[0] == 0:
        x, stride[0] = x[:, :, :: stride[0]], 1
    if conv.kernel[1] == 1 and conv.padding[1] == 0 and x.stride(1) == 1:
        x, stride[1] = x[:, :, :, :: stride[1]], 1
    return x, replace(conv, stride=(stride[0], stride[1]))


def _addressable(x: Tensor) -> Tensor:
    """`x`, or a copy of it where neither its channels nor its columns lie side by side; in bf16 its channels must."""
    if x.numel() == 0:  # torch calls it contiguous whatever its strides are, such as those of an expanded gradient
        return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if x.dtype == torch.bfloat16:
        return x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)
    return x if 1 in side_by_side(x) else x.contiguous()


def _output(like: Tensor, shape: Sequence[int], form: torch.memory_format) -> Tensor:
    form = torch.channels_last if like.dtype == torch.bfloat16 else form
    return in_large_pages(torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=form))


def _typed(launcher: str, x: Tensor) -> str:
    return f"{launcher}_bf16" if x.dtype == torch.bfloat16 else launcher


def _by_slices(x: Tensor, index: WeightIndex) -> bool:
    """Whether the products of a 1x1 convolution are left to the kernels of this family. They pack images by slices, and
    take both gradients in one pass over dY: 1 to 30 and up to 20 % quicker for 4 x 896 x 8² to 4 x 224 x 64² (32x32
    blocks, S=.5 to .9, Zen 5, 2 threads)."""
    return x.dtype == torch.float32 and min(index.bh, index.bw) >= 16
