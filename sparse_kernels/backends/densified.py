"""The `densified` backend: scatter the values into a scratch weight, run the dense library, gather the gradient.

It serves every device and dtype that torch serves, at dense speed; the plan names it wherever no sparse kernel runs.
The scratch weight lives only during the call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from ..patterns import Block
from ..topology import WeightIndex
from .reference import DenseWeightBackend, memory_format
from .registry import ConvGeometry, register


def conv_weight(dense: Tensor, index: WeightIndex, conv: ConvGeometry) -> Tensor:
    """A tap-major `[out, taps * in]` as torch's `[out, in, R, S]`, without a copy (its layout is channels_last)."""
    return dense.view(index.out, *conv.kernel, index.in_).permute(0, 3, 1, 2)


class DensifiedBackend(DenseWeightBackend):
    """cuBLAS, cuDNN, MKL or oneDNN behind torch's own ops."""

    name = "densified"

    def why_unsupported(self, op: str, *, pattern: Block, dtype: torch.dtype, device: torch.device) -> str | None:
        return None if dtype.is_floating_point else f"{dtype} is not a floating-point type"

    def spmm(
        self,
        x: Tensor,
        values: Tensor,
        index: WeightIndex,
        bias: Tensor | None = None,
        conv: ConvGeometry | None = None,
    ) -> Tensor:
        weight = index.scatter(values.to(x.dtype))
        bias = None if bias is None else bias.to(x.dtype)
        if conv is None:
            return F.linear(x, weight, bias)
        y = F.conv2d(x, conv_weight(weight, index, conv), bias, conv.stride, conv.padding, conv.dilation)
        return y.contiguous(memory_format=memory_format(x))

    def spmm_t(
        self,
        dy: Tensor,
        values: Tensor,
        index: WeightIndex,
        conv: ConvGeometry | None = None,
        x_like: Tensor | None = None,
    ) -> Tensor:
        weight = index.scatter(values.to(dy.dtype))
        if conv is None or x_like is None:
            return dy @ weight
        dx = conv2d_input(
            list(x_like.shape), conv_weight(weight, index, conv), dy, conv.stride, conv.padding, conv.dilation
        )
        return dx.contiguous(memory_format=memory_format(x_like))

    def _dense_grad(self, dy: Tensor, x: Tensor, index: WeightIndex, conv: ConvGeometry | None) -> Tensor:
        if conv is None:
            return dy.T @ x
        shape = [index.out, index.in_, *conv.kernel]
        grad = conv2d_weight(x, shape, dy, conv.stride, conv.padding, conv.dilation)
        return grad.permute(0, 2, 3, 1).reshape(index.out, index.taps * index.in_)


register(DensifiedBackend())
