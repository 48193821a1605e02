"""`gru`: one layer of a gated recurrent unit over whole sequences, all directions, as one op.

    r = σ(W_ir x + b_ir + W_hr h + b_hr)      n  = tanh(W_in x + b_in + r ⊙ (W_hn h + b_hn))
    z = σ(W_iz x + b_iz + W_hz h + b_hz)      h' = (1 - z) ⊙ n + z ⊙ h

The gates r, z, n share one tensor each, `W_i [3H, F]` and `W_h [3H, H]`, either of which is block-CSR or dense.
Sequences are padded; lengths stay on the device, and the reverse direction starts at each sequence's own end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import registry
from ..backends.registry import GruWeight
from ..patterns import Block, Unstructured
from ..topology import Topology, WeightIndex
from .common import (
    check_bias,
    check_floating,
    check_tap,
    check_values,
    define,
    empty,
    register_autocast,
    register_autograd,
    score_dtype,
)

# Scalars a weight brings across the dispatcher: its number of index tensors (0: dense) and [out, in, taps, bh, bw].
_META = 6


def _patterns(meta: Sequence[int]) -> list[Block]:
    patterns = [Block(meta[k + 4], meta[k + 5]) for k in range(0, len(meta), _META) if meta[k]]
    return patterns or [Unstructured()]


def _backend(name: str, x: Tensor, meta: Sequence[int]) -> registry.Backend:
    for pattern in _patterns(meta):
        backend = registry.require(name, "gru", pattern=pattern, dtype=x.dtype, device=x.device)
    return backend


def _unpack(weights: Sequence[Tensor], index: Sequence[Tensor], meta: Sequence[int]) -> list[GruWeight]:
    unpacked, start = [], 0
    for k, tensor in enumerate(weights):
        count, *shape = meta[k * _META : (k + 1) * _META]
        where = WeightIndex.unpack(index[start : start + count], shape) if count else None
        unpacked.append(GruWeight(tensor, where))
        start += count
    return unpacked


def _forward(
    x: Tensor,
    h0: Tensor,
    lengths: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    score_taps: Sequence[Tensor],
    tapped: Sequence[bool],
    index: Sequence[Tensor],
    meta: Sequence[int],
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if lengths is not None and lengths.device.type == "cpu" and lengths.numel():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > x.shape[1]:
            raise ValueError(f"gru: lengths must lie in 0..{x.shape[1]} (the padded steps of x); got {low}..{high}.")
    run = _backend(backend, x, meta)
    return run.gru_forward(x, h0.to(x.dtype), lengths, _unpack(weights, index, meta), biases, save)


def _forward_fake(
    x: Tensor,
    h0: Tensor,
    lengths: Any,
    weights: Sequence[Tensor],
    biases: Any,
    score_taps: Any,
    tapped: Any,
    index: Any,
    meta: Sequence[int],
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, steps, _ = x.shape
    directions, _, hidden = h0.shape
    reserve = registry.get(backend).gru_reserve_shape(batch, steps, hidden, directions) if save else [0]
    return x.new_empty(batch, steps, directions * hidden), x.new_empty(h0.shape), x.new_empty(reserve)


def _backward(
    dy: Tensor,
    dh_n: Tensor,
    x: Tensor,
    h0: Tensor,
    lengths: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    y: Tensor,
    reserve: Tensor,
    tapped: Sequence[bool],
    index: Sequence[Tensor],
    meta: Sequence[int],
    need_dx: bool,
    backend: str,
) -> list[Tensor]:
    run = _backend(backend, x, meta)
    sparse = _unpack(weights, index, meta)
    grads = run.gru_backward(
        dy.to(x.dtype), dh_n.to(x.dtype), x, h0.to(x.dtype), lengths, sparse, biases, y, reserve, tapped, need_dx
    )
    dx = grads.x if need_dx else empty(x, False, [])
    return [dx, grads.h0, *grads.weights, *grads.biases, *[s for s in grads.scores if s is not None]]


def _backward_fake(
    dy: Tensor,
    dh_n: Tensor,
    x: Tensor,
    h0: Tensor,
    lengths: Any,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    y: Tensor,
    reserve: Tensor,
    tapped: Sequence[bool],
    index: Any,
    meta: Sequence[int],
    need_dx: bool,
    backend: str,
) -> list[Tensor]:
    dtype = score_dtype(x)
    grids = [
        Block(meta[k * _META + 4], meta[k * _META + 5]).grid(meta[k * _META + 1], meta[k * _META + 2])
        for k, wanted in enumerate(tapped)
        if wanted
    ]
    return [
        empty(x, need_dx, list(x.shape)),
        x.new_empty(h0.shape),
        *[x.new_empty(w.shape, dtype=dtype) for w in weights],
        *[x.new_empty(b.shape, dtype=dtype) for b in biases],
        *[x.new_empty(grid, dtype=dtype) for grid in grids],
    ]


_gru = define(
    "gru(Tensor x, Tensor h0, Tensor? lengths, Tensor[] weights, Tensor[] biases, Tensor[] score_taps, bool[] tapped,"
    " Tensor[] index, int[] meta, bool save, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_gru_backward = define(
    "gru_backward(Tensor dy, Tensor dh_n, Tensor x, Tensor h0, Tensor? lengths, Tensor[] weights, Tensor[] biases,"
    " Tensor y, Tensor reserve, bool[] tapped, Tensor[] index, int[] meta, bool need_dx, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)


class _Autograd(torch.autograd.Function):
    # Weights, biases and taps come flattened: autograd does not look into lists.
    @staticmethod
    def forward(
        ctx: Any, forward: Any, x: Tensor, h0: Tensor, lengths: Any, rest: Any, counts: Any, *flat: Tensor
    ) -> Any:
        weights, biases, taps = _split(flat, counts)
        y, h_n, reserve = forward(x, h0, lengths, weights, biases, taps, *rest)
        ctx.mark_non_differentiable(reserve)
        ctx.set_materialize_grads(False)  # or every backward would fill zeros of the reserve's size, several times y's
        ctx.save_for_backward(x, h0, lengths, y, reserve, *weights, *biases)
        ctx.rest, ctx.counts = rest, counts
        ctx.dtypes = [h0.dtype, *[tensor.dtype for tensor in flat]]
        return y, h_n, reserve

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, _: Any) -> tuple[Any, ...]:
        x, h0, lengths, y, reserve, *flat = ctx.saved_tensors
        dy = torch.zeros_like(y) if dy is None else dy
        dh_n = torch.zeros_like(h0) if dh_n is None else dh_n
        weights, biases, _ = _split(flat, (ctx.counts[0], ctx.counts[1], 0))
        tapped, index, meta, _, backend = ctx.rest
        need_dx = ctx.needs_input_grad[1]
        dx, *others = _gru_backward(
            dy, dh_n, x, h0, lengths, weights, biases, y, reserve, tapped, index, meta, need_dx, backend
        )
        dh0, *grads = [grad.to(dtype) for grad, dtype in zip(others, ctx.dtypes, strict=True)]
        return None, dx if need_dx else None, dh0, None, None, None, *grads


def _split(flat: Sequence[Tensor], counts: Sequence[int]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    first, second = counts[0], counts[0] + counts[1]
    return list(flat[:first]), list(flat[first:second]), list(flat[second:])


def _apply(
    forward: Any, x: Tensor, h0: Tensor, lengths: Any, weights: Any, biases: Any, taps: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    counts = len(weights), len(biases), len(taps)
    return _Autograd.apply(forward, x, h0, lengths, rest, counts, *weights, *biases, *taps)


register_autograd(_gru, _apply)
register_autocast(
    _gru,
    "gru",
    lambda x, h0, lengths, weights, biases, taps, tapped, index, meta, save, backend: _patterns(meta)[0],
)


def gru(
    x: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    topologies: Sequence[Topology | None],
    biases: Sequence[Tensor],
    *,
    lengths: Tensor | None = None,
    score_taps: Sequence[Tensor | None] | None = None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """One GRU layer with sparse weights; equivalent to one layer of `torch.nn.GRU(batch_first=True)`.

    Args:
        x: `[B, T, F]`, padded; what lies past a sequence's length is never read.
        h0: `[D, B, H]`, D = 1 or 2 directions.
        weights: `[ih, hh]` of each direction, flattened (2·D): values `[nnzb, bh, bw]` where `topologies[k]` is a
            Topology, dense `[3H, F]` or `[3H, H]` where it is None. Gates in the order r, z, n.
        biases: `[3H]` each, in the same order, or an empty list.
        lengths: int32 `[B]` on the device of `x`, each 0..T; None means T.
        score_taps: for each weight None or a zero leaf `[row_blocks, col_blocks]`; see `linear`.
        backend: name of the backend that runs it.

    Returns:
        `y [B, T, D·H]`, zero past each length; `h_n [D, B, H]`, the state at each sequence's end (h0 for length 0).

    Raises:
        ValueError: shapes, lengths or devices that do not match. TypeError: wrong dtypes.
        RuntimeError: the backend cannot run this.
    """
    check_floating("gru", "x", x)
    check_floating("gru", "h0", h0)
    if x.dim() != 3:
        raise ValueError(f"gru: x must be [B, T, F]; got {list(x.shape)}.")
    if h0.dim() != 3 or h0.shape[1] != x.shape[0] or h0.shape[0] not in (1, 2) or h0.device != x.device:
        raise ValueError(
            f"gru: h0 must be [D, {x.shape[0]}, H] with D = 1 or 2 on {x.device}; got {list(h0.shape)} on {h0.device}."
        )
    directions, batch, hidden = h0.shape
    if len(weights) != 2 * directions or len(topologies) != len(weights) or len(biases) not in (0, len(weights)):
        raise ValueError(
            f"gru: {directions} direction(s) need {2 * directions} weights, as many topologies and as many biases or "
            f"none; got {len(weights)}, {len(topologies)} and {len(biases)}."
        )
    if lengths is not None and (
        lengths.dtype != torch.int32 or list(lengths.shape) != [batch] or lengths.device != x.device
    ):
        raise ValueError(
            f"gru: lengths must be int32 [{batch}] on {x.device}; got {lengths.dtype} {list(lengths.shape)} on "
            f"{lengths.device}; convert with lengths.to({str(x.device)!r}, torch.int32)."
        )
    index: list[Tensor] = []
    meta: list[int] = []
    for k, (tensor, topology) in enumerate(zip(weights, topologies, strict=True)):
        expected = [3 * hidden, hidden if k % 2 else x.shape[2]]
        if topology is None:
            check_floating("gru", f"dense weight {k}", tensor)
            if list(tensor.shape) != expected or tensor.device != x.device:
                raise ValueError(
                    f"gru: dense weight {k} must be {expected} on {x.device}; got {list(tensor.shape)} on "
                    f"{tensor.device}."
                )
            meta += [0] * _META
            continue
        check_values("gru", x, tensor, topology)
        if [topology.out, topology.in_] != expected:
            raise ValueError(f"gru: topology {k} must be of a weight {expected}; got [{topology.out}, {topology.in_}].")
        tensors = topology.index(backend)
        index += tensors
        meta += [len(tensors), *topology.shape]
    for bias in biases:
        check_bias("gru", x, bias, 3 * hidden)
    taps: list[Tensor] = []
    tapped: list[bool] = []
    for tap, topology in zip(score_taps or [None] * len(weights), topologies, strict=True):
        tapped.append(tap is not None and topology is not None)
        if tap is not None and topology is not None:
            check_tap("gru", tap, topology)
            taps.append(tap)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, h0, *weights, *biases, *taps))
    y, h_n, _ = _gru(x, h0, lengths, list(weights), list(biases), taps, tapped, index, meta, save, backend)
    return y, h_n
