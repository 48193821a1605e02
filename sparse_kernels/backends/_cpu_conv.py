"""What the convolutions of the `cpu` backend share: the shapes and strides of csrc/api.h, and the dense gradient."""

from __future__ import annotations

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


def dense_grad(dy: Tensor, x: Tensor, conv: ConvGeometry) -> Tensor:
    """The dense weight gradient, tap-major: `[out, taps · in]`, by oneDNN, the fastest kernel where all of it is
    wanted."""
    out, in_ = dy.shape[1], x.shape[1]
    weight = x.new_empty(out, in_, *conv.kernel)  # only its shape is read
    _, grad, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0], 1, [False, True, False]
    )
    return grad.permute(0, 2, 3, 1).reshape(out, -1).contiguous()
