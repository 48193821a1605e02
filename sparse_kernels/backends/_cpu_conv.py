"""What convolutions on the CPU share: the shapes and strides of csrc/api.h, pixels as rows, the dense gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._native import native
from .registry import ConvGeometry


def conv_shape(x: Tensor, conv: ConvGeometry) -> Any:
    """The `ConvShape` of csrc/api.h for an input like `x [N, C, H, W]`."""
    height, width = x.shape[2:]
    return native().ConvShape(
        x.shape[0],
        height,
        width,
        *conv.output_size(height, width),
        *conv.kernel,
        *conv.stride,
        *conv.padding,
        *conv.dilation,
    )


def image_strides(image: Tensor) -> Any:
    """The `ImageStrides` of csrc/api.h."""
    channels, columns = side_by_side(image)
    return native().ImageStrides(image.stride(0), channels, image.stride(2), columns)


def side_by_side(image: Tensor) -> tuple[int, int]:
    """Strides of the channels and of the columns; a single one lies side by side, whatever stride it has."""
    channels = 1 if image.shape[1] == 1 else image.stride(1)
    return channels, 1 if image.shape[3] == 1 and channels != 1 else image.stride(3)


def rows_of(x: Tensor, conv: ConvGeometry) -> Tensor | None:
    """The pixels of `x [N, C, H, W]` as rows `[N·H·W, C]` without a copy, where the convolution is linear on them."""
    n, c, h, w = x.shape
    if conv.kernel != (1, 1) or conv.stride != (1, 1) or conv.padding != (0, 0):
        return None
    pixel = x.stride(3)
    if x.stride(1) != 1 or pixel < c or x.stride(2) != w * pixel or x.stride(0) != h * w * pixel:
        return None
    return x.as_strided([n * h * w, c], [pixel, 1])


def images_of(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Rows `[N·H·W, C]` as channels_last images of `shape` `[N, C, H, W]`."""
    n, c, h, w = shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2)


def dense_grad(dy: Tensor, x: Tensor, conv: ConvGeometry) -> Tensor:
    """The dense weight gradient, tap-major: `[out, taps · in]`, by oneDNN, the fastest kernel where all of it is
    wanted."""
    out, in_ = dy.shape[1], x.shape[1]
    weight = x.new_empty(out, in_, *conv.kernel)  # only its shape is read
    _, grad, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0], 1, [False, True, False]
    )
    return grad.permute(0, 2, 3, 1).reshape(out, -1).contiguous()
