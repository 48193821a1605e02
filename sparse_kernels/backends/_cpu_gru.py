"""The fused GRU layer of the `cpu` backend: checks, allocation and addresses around `csrc/cpu/gru.cpp`.

One call runs a whole layer, both directions, for any mixture of block-sparse and dense weights. The native code sorts
the batch by length, so callers pass sequences in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._native import native
from ..topology import WeightIndex
from ._cpu_launch import check, in_large_pages, native_index
from .registry import GruGrads, GruWeight

BYTES = torch.empty(0, dtype=torch.uint8, device="cpu")

# `(dy [P, out], x [P, in], index) -> [row_blocks, col_blocks]`: a backend's `block_scores`.
BlockScores = Callable[[Tensor, Tensor, WeightIndex], Tensor]


def gru_reserve_shape(batch: int, steps: int, hidden: int, directions: int) -> list[int]:
    """Shape of the opaque `reserve` that `gru_forward(save=True)` returns."""
    return [native().gru_reserve_floats(batch, steps, hidden, directions)]


def gru_forward(
    x: Tensor,
    h0: Tensor,
    lengths: Tensor | None,
    weights: Sequence[GruWeight],
    biases: Sequence[Tensor],
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One GRU layer over whole sequences; equations, gate order and direction as in `torch.nn.GRU`.

    Args:
        x: fp32 `[B, T, F]`, any strides; what lies past a sequence's length is not read. h0: fp32 `[D, B, H]`.
        lengths: int32 `[B]` in `0..T`, or None for T everywhere.
        weights: `[ih, hh]` of each of the D directions, flattened: block values with their index, or dense `[3H, in]`.
        biases: `[3H]` each, in the order of the weights, or empty.
        save: whether a backward will follow.

    Returns:
        `y [B, T, D·H]`, zero past each length; `h_n [D, B, H]`, which is h0 where the length is 0; and `reserve`, the
        gates for the backward (empty unless `save`).

    Raises:
        RuntimeError: for a length outside `0..T`, which the op has refused.
    """
    x, h0, lengths = _rows(x), h0.contiguous(), _lengths(lengths)
    directions, batch, hidden = h0.shape
    steps = x.shape[1]
    y = _empty(x, batch, steps, directions * hidden)
    h_n = torch.empty_like(h0)
    reserve = _empty(x, *(gru_reserve_shape(batch, steps, hidden, directions) if save else [0]))
    held = _Held(x, weights, biases)
    layer = held.layer(x, h0, lengths, reserve if save else None)
    threads = torch.get_num_threads()
    workspace = _empty(BYTES, native().gru_forward_workspace_bytes(layer, threads))
    check(native().gru_forward(layer, y.data_ptr(), h_n.data_ptr(), workspace.data_ptr(), threads), "gru_forward")
    return y, h_n, reserve


def gru_backward(
    dy: Tensor,
    dh_n: Tensor,
    x: Tensor,
    h0: Tensor,
    lengths: Tensor | None,
    weights: Sequence[GruWeight],
    biases: Sequence[Tensor],
    y: Tensor,
    reserve: Tensor,
    want_scores: Sequence[bool],
    need_dx: bool,
    block_scores: BlockScores,
) -> GruGrads:
    """Gradients of `gru_forward` with respect to x, h0, every weight and every bias.

    Args:
        dy: `[B, T, D·H]`, not read past a sequence's length. dh_n: `[D, B, H]`. y, reserve: of the forward.
        want_scores: for each weight, whether to return the squared norm of every block of its dense gradient.
        need_dx: whether to compute the gradient of x; without it `GruGrads.x` is empty.
        block_scores: computes the scores of one weight from its gates' gradients and inputs.

    Returns:
        Gradients shaped like the inputs, padding of edge blocks zero; `scores [row_blocks, col_blocks]` or None.
    """
    x, h0, y, dy, dh_n = _rows(x), h0.contiguous(), y.contiguous(), _rows(dy), dh_n.contiguous()
    lengths = _lengths(lengths)
    directions, batch, hidden = h0.shape
    steps = x.shape[1]
    scored = [wanted and w.index is not None for wanted, w in zip(want_scores, weights, strict=True)]
    dx = _empty(x, *(x.shape if need_dx else [0]))
    dh0 = torch.empty_like(h0)
    # What the native code leaves out are positions past a sequence's length.
    dgates = [x.new_zeros(directions, batch, steps, 3 * hidden) for _ in range(2)] if any(scored) else []
    held = _Held(x, weights, biases, grads=True)
    layer = held.layer(x, h0, lengths, reserve)
    threads = torch.get_num_threads()
    workspace = _empty(BYTES, native().gru_backward_workspace_bytes(layer, threads))
    status = native().gru_backward(
        layer,
        y.data_ptr(),
        dy.data_ptr(),
        dy.stride(0),
        dy.stride(1),
        dh_n.data_ptr(),
        dx.data_ptr() if need_dx else 0,
        dh0.data_ptr(),
        *([g.data_ptr() for g in dgates] or [0, 0]),
        workspace.data_ptr(),
        threads,
    )
    check(status, "gru_backward")
    scores: list[Tensor | None] = [None] * len(weights)
    if dgates:
        inside = _inside(lengths, batch, steps)
        for k, weight in enumerate(weights):
            if scored[k] and weight.index is not None:
                inputs = _previous(y, h0, lengths, k // 2) if k % 2 else x
                inputs = torch.where(inside, inputs, inputs.new_zeros(()))
                rows = inputs.flatten(0, 1).contiguous()  # where() keeps the strides of an x of another layout
                scores[k] = block_scores(dgates[k % 2][k // 2].flatten(0, 1), rows, weight.index)
    return GruGrads(dx, dh0, held.weight_grads, held.bias_grads, scores)


class _Held:
    """The tensors behind one native layer: contiguous weights and biases, and the gradients to be written."""

    def __init__(self, x: Tensor, weights: Sequence[GruWeight], biases: Sequence[Tensor], grads: bool = False) -> None:
        self.weights = [w.tensor.contiguous() for w in weights]
        self.biases = [b.contiguous() for b in biases]
        self.weight_grads = [torch.empty_like(w) for w in self.weights] if grads else []
        self.bias_grads = [torch.empty_like(b) for b in self.biases] if grads else []
        in_sizes = (x.shape[2], weights[1].index.in_ if weights[1].index else weights[1].tensor.shape[1])
        # The backward multiplies by the transposed weights.
        self.indices = [_block_index(weight, in_sizes[k % 2], transposed=grads) for k, weight in enumerate(weights)]
        self.native = [
            native().GruWeight(
                self.indices[k],
                self.weights[k].data_ptr(),
                self.biases[k].data_ptr() if self.biases else 0,
                self.weight_grads[k].data_ptr() if grads else 0,
                self.bias_grads[k].data_ptr() if grads and self.biases else 0,
            )
            for k in range(len(weights))
        ]

    def layer(self, x: Tensor, h0: Tensor, lengths: Tensor | None, reserve: Tensor | None) -> Any:
        """The native layer; it holds addresses, so `self` and the arguments must outlive it."""
        return native().GruLayer(
            x.shape[0],
            x.shape[1],
            x.shape[2],
            h0.shape[2],
            h0.shape[0],
            x.data_ptr(),
            x.stride(0),
            x.stride(1),
            h0.data_ptr(),
            0 if lengths is None else lengths.data_ptr(),
            self.native,
            0 if reserve is None else reserve.data_ptr(),
        )


def _block_index(weight: GruWeight, in_: int, *, transposed: bool) -> Any:
    if weight.index is None:
        return native().BlockIndex(weight.tensor.shape[0], in_, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    return native_index(weight.index, transposed=transposed)


def _rows(x: Tensor) -> Tensor:
    """`x` itself where its inner stride is 1, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _lengths(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths.to(torch.int32).contiguous()


def _empty(like: Tensor, *shape: int) -> Tensor:
    """`like.new_empty(shape)`, in large pages where it is large."""
    return in_large_pages(like.new_empty(shape))


def _inside(lengths: Tensor | None, batch: int, steps: int) -> Tensor:
    """Which positions lie within their sequence: bool `[B, T, 1]`."""
    if lengths is None:
        return torch.ones(batch, steps, 1, dtype=torch.bool, device="cpu")
    return (torch.arange(steps, device="cpu")[None, :] < lengths[:, None])[..., None]


def _previous(y: Tensor, h0: Tensor, lengths: Tensor | None, direction: int) -> Tensor:
    """The state before each step, in time order: `[B, T, H]`; arbitrary past a sequence's length."""
    hidden, steps = h0.shape[2], y.shape[1]
    states, first = y[..., direction * hidden : (direction + 1) * hidden], h0[direction][:, None]
    if direction == 0:
        return torch.cat([first, states[:, : steps - 1]], dim=1)[:, :steps]
    before = torch.cat([states[:, 1:], first], dim=1)[:, :steps]
    if lengths is None:
        return before
    last = torch.arange(steps, device="cpu")[None, :] == lengths[:, None] - 1
    return torch.where(last[..., None], first, before)
