"""`linear`: `Y [P, out] = X [P, in] · Wᵀ + b` with a block-CSR `W`, and its gradients.

    dX = dY · W          dW[b] = dYᵀ · X at the active blocks          db = Σ_P dY

One dispatcher boundary forward, one backward; which backend runs is an argument of the op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..activations import ACTIVATIONS, check_activation
from ..backends import registry
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


def _rows(x: Tensor) -> Tensor:
    """`[..., F]` as `[P, F]` with rows of unit inner stride; a view wherever strides allow it."""
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    if rows.is_contiguous():
        return rows
    inner_is_dense = rows.stride(1) == 1 and (rows.shape[0] < 2 or rows.stride(0) >= rows.shape[1])
    return rows if inner_is_dense else rows.contiguous()


def _as(x: Tensor, rows: Tensor) -> Tensor:
    """`[P, F]` with the leading dimensions of `x`."""
    return rows if x.dim() == 2 else rows.reshape(*x.shape[:-1], rows.shape[1])


def _backend(name: str, x: Tensor, shape: Sequence[int]) -> registry.Backend:
    return registry.require(name, "linear", pattern=block(shape[3], shape[4]), dtype=x.dtype, device=x.device)


def _forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    score_tap: Tensor | None,
    index: Sequence[Tensor],
    shape: Sequence[int],
    backend: str,
) -> Tensor:
    y = _backend(backend, x, shape).spmm(_rows(x), values, WeightIndex.unpack(index, shape), bias)
    return _as(x, y)


def _forward_fake(
    x: Tensor, values: Tensor, bias: Any, score_tap: Any, index: Any, shape: Sequence[int], backend: str
) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


def _activated(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    score_tap: Tensor | None,
    index: Sequence[Tensor],
    shape: Sequence[int],
    activation: str,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    where = WeightIndex.unpack(index, shape)
    y, pre = _backend(backend, x, shape).product_forward(_rows(x), values, where, bias, activation, keep)
    return _as(x, y), _as(x, pre) if keep else pre


def _activated_fake(
    x: Tensor,
    values: Tensor,
    bias: Any,
    score_tap: Any,
    index: Any,
    shape: Sequence[int],
    activation: str,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape_y = [*x.shape[:-1], shape[0]]
    return x.new_empty(shape_y), empty(x, keep, shape_y)


def _backward(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    index: Sequence[Tensor],
    shape: Sequence[int],
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    where = WeightIndex.unpack(index, shape)
    rows_dy, rows_x = _rows(dy.to(x.dtype)), _rows(x)
    grads = _backend(backend, x, shape).product_backward(rows_dy, rows_x, values, where, needs)
    return returned(grads if grads.x is None or x.dim() == 2 else grads._replace(x=grads.x.reshape(x.shape)), x)


def _backward_fake(
    dy: Tensor, x: Tensor, values: Tensor, index: Any, shape: Sequence[int], needs: Sequence[bool], backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = score_dtype(x)
    grid = Block(shape[3], shape[4]).grid(shape[0], shape[1])
    return (
        empty(x, needs[0], list(x.shape)),
        empty(x, needs[1], list(values.shape), dtype),
        empty(x, needs[2], [shape[0]], dtype),
        empty(x, needs[3], list(grid), dtype),
    )


_linear = define(
    "linear(Tensor x, Tensor values, Tensor? bias, Tensor? score_tap, Tensor[] index, int[] shape, str backend)"
    " -> Tensor",
    _forward,
    _forward_fake,
)
_linear_activated = define(
    "linear_activated(Tensor x, Tensor values, Tensor? bias, Tensor? score_tap, Tensor[] index, int[] shape,"
    " str activation, bool keep, str backend) -> (Tensor, Tensor)",
    _activated,
    _activated_fake,
)
_linear_backward = define(
    "linear_backward(Tensor dy, Tensor x, Tensor values, Tensor[] index, int[] shape, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


register_autograd(_linear, lambda forward, *given: ProductAutograd.apply(forward, _linear_backward, *given))
register_autograd(
    _linear_activated, lambda forward, *given: ActivatedProductAutograd.apply(forward, _linear_backward, *given)
)
for _op in (_linear, _linear_activated):
    register_autocast(_op, "linear", lambda x, values, bias, tap, index, shape, *_: Block(shape[3], shape[4]))


def linear(
    x: Tensor,
    values: Tensor,
    topology: Topology,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    score_tap: Tensor | None = None,
    backend: str,
) -> Tensor:
    """Sparse linear map; equivalent to `F.linear(x, topology.scatter(values), bias)` and the activation on top.

    Args:
        x: `[..., in]`, floating point; its dtype is the compute dtype.
        values: `[nnzb, bh, bw]` contiguous, normally fp32. topology: the index set of the weight `[out, in]`.
        bias: `[out]` or None.
        activation: None, `"relu"`, `"silu"`, `"gelu"` or `"gelu_tanh"`, applied to the result while it is close, or
            by torch where that is quicker.
        score_tap: a zero leaf `[row_blocks, col_blocks]`; its gradient becomes the squared Frobenius norm of every
            block of the dense weight gradient (a growth score, not a derivative).
        backend: name of the backend that runs it.

    Returns:
        `[..., out]`, contiguous, in the dtype of `x`.

    Raises:
        ValueError: shapes or devices that do not match, an unknown activation. TypeError: not floating point.
        RuntimeError: the backend cannot run this.
    """
    check_activation("linear", activation)
    check_values("linear", x, values, topology)
    if x.dim() == 0 or x.shape[-1] != topology.in_:
        raise ValueError(
            f"linear: x must have {topology.in_} features in its last dimension to match weight "
            f"[{topology.out}, {topology.in_}]; got shape {list(x.shape)}."
        )
    check_bias("linear", x, bias, topology.out)
    check_tap("linear", score_tap, topology)
    where = topology.index(backend), topology.shape
    if activation is None:
        return call(_linear, x, values, bias, score_tap, *where, backend)
    if follows(activation, topology, x, values, bias, score_tap):
        return ACTIVATIONS[activation].forward(call(_linear, x, values, bias, score_tap, *where, backend))
    return call(_linear_activated, x, values, bias, score_tap, *where, activation, False, backend)[0]
