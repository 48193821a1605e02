"""`conv2d`: a convolution with a block-CSR weight `[out, R·S·in]`, tap-major, and its gradients.

With `gather` the rows that each output position multiplies, it is `linear` on gathered rows:

    Y = gather(X) · Wᵀ + b          dX = scatter(dY · W)          dW[b] = dYᵀ · gather(X) at the active blocks
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..activations import ACTIVATIONS, check_activation
from ..backends import registry
from ..backends.reference import memory_format
from ..backends.registry import ConvGeometry
from ..patterns import Block, block
from ..topology import Topology, WeightIndex
from .common import (
    ActivatedProductAutograd,
    ProductAutograd,
    call,
    check_bias,
    check_tap,
    check_values,
    define,
    empty,
    follows,
    register_autocast,
    register_autograd,
    returned,
    score_dtype,
)


def _geometry(flat: Sequence[int]) -> ConvGeometry:
    return _geometry_of(*flat)


@functools.cache
def _geometry_of(
    r: int, s: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int, dil_h: int, dil_w: int
) -> ConvGeometry:
    return ConvGeometry((r, s), (stride_h, stride_w), (pad_h, pad_w), (dil_h, dil_w))


def _flatten(conv: ConvGeometry) -> list[int]:
    return [*conv.kernel, *conv.stride, *conv.padding, *conv.dilation]


def _backend(name: str, x: Tensor, shape: Sequence[int]) -> registry.Backend:
    return registry.require(name, "conv", pattern=block(shape[3], shape[4]), dtype=x.dtype, device=x.device)


def _like(x: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised tensor of `shape` in the memory format of `x`."""
    return torch.empty(list(shape), dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _in_format(y: Tensor, like: Tensor, shape: Sequence[int]) -> Tensor:
    """`y` with exactly the strides that the fake kernel promises for an input like `like`."""
    _, c, h, w = shape
    last = memory_format(like) == torch.channels_last
    strides = (h * w * c, 1, w * c, c) if last else (c * h * w, h * w, w, 1)
    return y if y.stride() == strides and y.numel() else _like(like, shape).copy_(y)


def _output_shape(x: Tensor, shape: Sequence[int], geometry: Sequence[int]) -> list[int]:
    return [x.shape[0], shape[0], *_geometry(geometry).output_size(x.shape[2], x.shape[3])]


def _forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    score_tap: Tensor | None,
    index: Sequence[Tensor],
    shape: Sequence[int],
    geometry: Sequence[int],
    backend: str,
) -> Tensor:
    run = _backend(backend, x, shape)
    y = run.spmm(x, values, WeightIndex.unpack(index, shape), bias, _geometry(geometry))
    return _in_format(y, x, _output_shape(x, shape, geometry))


def _forward_fake(
    x: Tensor,
    values: Tensor,
    bias: Any,
    score_tap: Any,
    index: Any,
    shape: Sequence[int],
    geometry: Sequence[int],
    backend: str,
) -> Tensor:
    return _like(x, _output_shape(x, shape, geometry))


def _activated(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    score_tap: Tensor | None,
    index: Sequence[Tensor],
    shape: Sequence[int],
    geometry: Sequence[int],
    activation: str,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    where, conv, size = WeightIndex.unpack(index, shape), _geometry(geometry), _output_shape(x, shape, geometry)
    y, pre = _backend(backend, x, shape).product_forward(x, values, where, bias, activation, keep, conv)
    return _in_format(y, x, size), _in_format(pre, x, size) if keep else pre


def _activated_fake(
    x: Tensor,
    values: Tensor,
    bias: Any,
    score_tap: Any,
    index: Any,
    shape: Sequence[int],
    geometry: Sequence[int],
    activation: str,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    size = _output_shape(x, shape, geometry)
    return _like(x, size), _like(x, size) if keep else x.new_empty([0])


def _backward(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    index: Sequence[Tensor],
    shape: Sequence[int],
    geometry: Sequence[int],
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    where, conv = WeightIndex.unpack(index, shape), _geometry(geometry)
    grads = _backend(backend, x, shape).product_backward(dy.to(x.dtype), x, values, where, needs, conv)
    return returned(grads if grads.x is None else grads._replace(x=_in_format(grads.x, x, x.shape)), x)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    index: Any,
    shape: Sequence[int],
    geometry: Sequence[int],
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = score_dtype(x)
    rows, cols_per_tap = Block(shape[3], shape[4]).grid(shape[0], shape[1])
    return (
        _like(x, x.shape) if needs[0] else x.new_empty([0]),
        empty(x, needs[1], list(values.shape), dtype),
        empty(x, needs[2], [shape[0]], dtype),
        empty(x, needs[3], [rows, shape[2] * cols_per_tap], dtype),
    )


_conv2d = define(
    "conv2d(Tensor x, Tensor values, Tensor? bias, Tensor? score_tap, Tensor[] index, int[] shape, int[] geometry,"
    " str backend) -> Tensor",
    _forward,
    _forward_fake,
)
_conv2d_activated = define(
    "conv2d_activated(Tensor x, Tensor values, Tensor? bias, Tensor? score_tap, Tensor[] index, int[] shape,"
    " int[] geometry, str activation, bool keep, str backend) -> (Tensor, Tensor)",
    _activated,
    _activated_fake,
)
_conv2d_backward = define(
    "conv2d_backward(Tensor dy, Tensor x, Tensor values, Tensor[] index, int[] shape, int[] geometry, bool[] needs,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


register_autograd(_conv2d, lambda forward, *given: ProductAutograd.apply(forward, _conv2d_backward, *given))
register_autograd(
    _conv2d_activated, lambda forward, *given: ActivatedProductAutograd.apply(forward, _conv2d_backward, *given)
)
for _op in (_conv2d, _conv2d_activated):
    register_autocast(_op, "conv", lambda x, values, bias, tap, index, shape, *_: Block(shape[3], shape[4]))


def conv2d(
    x: Tensor,
    values: Tensor,
    topology: Topology,
    bias: Tensor | None = None,
    *,
    conv: ConvGeometry,
    activation: str | None = None,
    score_tap: Tensor | None = None,
    backend: str,
) -> Tensor:
    """Sparse 2-D convolution; equivalent to `F.conv2d` with the scattered weight and the activation on top.

    `topology.scatter(values).view(out, R, S, in).permute(0, 3, 1, 2)` is that weight. A 1-D convolution is one of
    height 1.

    Args:
        x: `[N, in, H, W]`, floating point, any strides. values: `[nnzb, bh, bw]` contiguous.
        topology: the index set of the weight, `taps = R · S`. bias: `[out]` or None.
        conv: kernel, stride, padding and dilation. activation, score_tap, backend: as for `linear`.

    Returns:
        `[N, out, H', W']` in the memory format of `x` (channels_last in, channels_last out).

    Raises:
        ValueError: shapes or devices that do not match, an unknown activation. TypeError: not floating point.
        RuntimeError: the backend cannot run this.
    """
    check_activation("conv2d", activation)
    check_values("conv2d", x, values, topology)
    if x.dim() != 4 or x.shape[1] != topology.in_:
        raise ValueError(
            f"conv2d: x must be [N, {topology.in_}, H, W] to match weight "
            f"[{topology.out}, {topology.in_}, {conv.kernel[0]}, {conv.kernel[1]}]; got {list(x.shape)}."
        )
    if conv.kernel[0] * conv.kernel[1] != topology.taps:
        raise ValueError(
            f"conv2d: a {conv.kernel[0]}x{conv.kernel[1]} kernel needs a topology of "
            f"{conv.kernel[0] * conv.kernel[1]} taps; got {topology.taps}."
        )
    height, width = conv.output_size(x.shape[2], x.shape[3])
    if min(height, width) < 1:
        raise ValueError(f"conv2d: the kernel does not fit the input: {list(x.shape)} gives output {height}x{width}.")
    check_bias("conv2d", x, bias, topology.out)
    check_tap("conv2d", score_tap, topology)
    where = topology.index(backend), topology.shape, _flatten(conv)
    if activation is None:
        return call(_conv2d, x, values, bias, score_tap, *where, backend)
    if follows(activation, topology, x, values, bias, score_tap):
        return ACTIVATIONS[activation].forward(call(_conv2d, x, values, bias, score_tap, *where, backend))
    return call(_conv2d_activated, x, values, bias, score_tap, *where, activation, False, backend)[0]
