"""The `reference` backend: the definitions of `sparse_kernels.reference`, for every op, pattern, dtype and device.

It is the specification that other backends are tested against, not a fast path.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..patterns import Block
from ..topology import WeightIndex
from .registry import Backend, ConvGeometry, GruGrads, GruWeight, register, score_dtype


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last for an `[N, C, H, W]` tensor whose strides rise in the order C, W, H, N; else contiguous.

    Only strides and sizes are looked at, as torch's own convolutions do, so that C=1 and H=W=1 keep their format.
    """
    if 1 not in x.shape:  # the sizes leave no stride open, and torch has looked at them already
        if x.is_contiguous():
            return torch.contiguous_format
        if x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
    lowest = 0
    for dim in (1, 3, 2, 0):
        stride, size = x.stride(dim), x.shape[dim]
        # N at the stride of C means that the strides do not tell the formats apart: contiguous.
        if size == 0 or stride < lowest or (dim == 0 and lowest == x.stride(1)):
            return torch.contiguous_format
        lowest = stride * max(size, 1)
    return torch.channels_last


class DenseWeightBackend(Backend):
    """What backends that materialise the dense weight have in common: the GRU and the scores."""

    def _dense_grad(self, dy: Tensor, x: Tensor, index: WeightIndex, conv: ConvGeometry | None) -> Tensor:
        """`dYᵀ · gather(X)`: `[out, taps * in]`."""
        raise self._missing("dense weight gradient")

    def sddmm(self, dy: Tensor, x: Tensor, index: WeightIndex, conv: ConvGeometry | None = None) -> Tensor:
        return index.gather(self._dense_grad(dy, x, index, conv)).to(score_dtype(x))

    def block_scores(self, dy: Tensor, x: Tensor, index: WeightIndex, conv: ConvGeometry | None = None) -> Tensor:
        blocks = index.blocks(self._dense_grad(dy, x, index, conv).to(score_dtype(x)))
        return reference.block_scores(blocks).view(index.row_blocks, index.col_blocks)

    def gru_forward(
        self,
        x: Tensor,
        h0: Tensor,
        lengths: Tensor | None,
        weights: Sequence[GruWeight],
        biases: Sequence[Tensor],
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, h_n = reference.gru(x, h0, lengths, [_dense(w, x.dtype) for w in weights], [b.to(x.dtype) for b in biases])
        return y, h_n, x.new_empty(0)

    def gru_backward(
        self,
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
    ) -> GruGrads:
        dense = [_dense(w, x.dtype) for w in weights]
        small = [b.to(x.dtype) for b in biases]
        dx, dh0, dense_grads, bias_grads = reference.gru_grad(dy, dh_n, x, h0, lengths, dense, small)
        dtype = score_dtype(x)
        dense_grads = [g.to(dtype) for g in dense_grads]
        scores: list[Tensor | None] = []
        for weight, grad, wanted in zip(weights, dense_grads, want_scores, strict=True):
            index = weight.index
            if not wanted or index is None:
                scores.append(None)
                continue
            scores.append(reference.block_scores(index.blocks(grad)).view(index.row_blocks, index.col_blocks))
        weight_grads = [g if w.index is None else w.index.gather(g) for w, g in zip(weights, dense_grads, strict=True)]
        return GruGrads(dx, dh0, weight_grads, [g.to(dtype) for g in bias_grads], scores)

    def gru_reserve_shape(self, batch: int, steps: int, hidden: int, directions: int) -> list[int]:
        return [0]


def _dense(weight: GruWeight, dtype: torch.dtype) -> Tensor:
    tensor = weight.tensor.to(dtype)
    return tensor if weight.index is None else weight.index.scatter(tensor)


class ReferenceBackend(DenseWeightBackend):
    """Gather, one dense product, scatter."""

    name = "reference"

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
            return reference.linear(x, weight, bias)
        rows = reference.gather(x, conv.kernel, conv.stride, conv.padding, conv.dilation)
        height, width = conv.output_size(x.shape[2], x.shape[3])
        y = reference.linear(rows, weight, bias).view(x.shape[0], height, width, index.out).permute(0, 3, 1, 2)
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
        rows = dy.permute(0, 2, 3, 1).reshape(-1, index.out) @ weight
        dx = reference.scatter(rows, x_like.shape, conv.kernel, conv.stride, conv.padding, conv.dilation)
        return dx.contiguous(memory_format=memory_format(x_like))

    def _dense_grad(self, dy: Tensor, x: Tensor, index: WeightIndex, conv: ConvGeometry | None) -> Tensor:
        if conv is None:
            return reference.weight_grad(dy, x)
        rows = reference.gather(x, conv.kernel, conv.stride, conv.padding, conv.dilation)
        return reference.weight_grad(dy.permute(0, 2, 3, 1).reshape(-1, index.out), rows)


register(ReferenceBackend())
