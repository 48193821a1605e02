"""The `cpu` backend: native fp32 and bf16 kernels behind run-time ISA dispatch, with torch's number of threads.

Activations in bf16 whose kernels are fp32 alone (no AVX512-BF16, small blocks) are converted: the weights are rounded
to bf16, sums are fp32, results are bf16, as where they are not.

Each family of kernels has its module: `_cpu_block` the block-CSR linear, `_cpu_unstructured` that of 1x1 blocks,
`_cpu_conv_block` and `_cpu_conv_unstructured` the convolutions, `_cpu_gru` the fused GRU. This file says what is served
and calls them.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import _native
from ..activations import ACTIVATIONS
from ..patterns import Block, Unstructured
from ..topology import Deriver, WeightIndex
from . import _cpu_block, _cpu_conv, _cpu_conv_block, _cpu_conv_unstructured, _cpu_gru, _cpu_unstructured
from ._cpu_conv import dense_grad
from ._cpu_launch import check
from .registry import Backend, ConvGeometry, GruGrads, GruWeight, ProductGrads, register

# Of the gradient panel of a convolution in block_scores, at most: oneDNN and what calls it hold seven of its size,
# and the limit is 16 MiB.
SCORE_PANEL_BYTES = 2 << 20


class CpuBackend(Backend):
    """Sparse kernels for AVX-512, AVX2 and any other CPU."""

    name = "cpu"

    def why_unavailable(self) -> str | None:
        return _native.why_unavailable()

    def why_unsupported(self, op: str, *, pattern: Block, dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device.type}"
        served = [torch.float32] if op == "gru" else [torch.float32, torch.bfloat16]
        if dtype not in served:
            names = " and ".join(str(d).removeprefix("torch.") for d in served)
            return f"its {op} kernels are {names}, not {str(dtype).removeprefix('torch.')}"
        return None

    def deriver(self, op: str, pattern: Block) -> Deriver | None:
        if pattern != Unstructured() or op == "gru":
            return None
        return _cpu_conv_unstructured.RunsDeriver() if op == "conv" else _cpu_unstructured.RunsDeriver()

    def spmm(
        self,
        x: Tensor,
        values: Tensor,
        index: WeightIndex,
        bias: Tensor | None = None,
        conv: ConvGeometry | None = None,
    ) -> Tensor:
        if _converts(x, index, conv):
            return self.spmm(x.float(), _rounded(values), index, bias, conv).to(x.dtype)
        values, bias = values.float(), None if bias is None else bias.float()
        if conv is not None:
            return _conv(index).spmm(x, values, index, bias, conv)
        return _linear(index).spmm(x, values, index, bias)

    def spmm_t(
        self,
        dy: Tensor,
        values: Tensor,
        index: WeightIndex,
        conv: ConvGeometry | None = None,
        x_like: Tensor | None = None,
    ) -> Tensor:
        if _converts(dy, index, conv):
            x_like = None if x_like is None else x_like.float()
            return self.spmm_t(dy.float(), _rounded(values), index, conv, x_like).to(dy.dtype)
        if conv is not None and x_like is not None:
            return _conv(index).spmm_t(dy, values.float(), index, conv, x_like)
        return _linear(index).spmm_t(dy, values.float(), index)

    def sddmm(self, dy: Tensor, x: Tensor, index: WeightIndex, conv: ConvGeometry | None = None) -> Tensor:
        if _converts(x, index, conv):
            return self.sddmm(dy.float(), x.float(), index, conv)
        if conv is not None:
            return _conv(index).sddmm(dy, x, index, conv)
        return _linear(index).sddmm(dy, x, index)

    def product_forward(
        self,
        x: Tensor,
        values: Tensor,
        index: WeightIndex,
        bias: Tensor | None,
        activation: str,
        keep: bool,
        conv: ConvGeometry | None = None,
    ) -> tuple[Tensor, Tensor]:
        if _converts(x, index, conv):
            return super().product_forward(x, values, index, bias, activation, keep, conv)
        offset, code = None if bias is None else bias.float(), ACTIVATIONS[activation].code
        if conv is not None:
            return _conv(index).activated(x, values.float(), index, offset, conv, code, keep)
        pre = x.new_empty([x.shape[0], index.out] if keep else [0])
        return _linear(index).spmm(x, values.float(), index, offset, code, pre if keep else None), pre

    def block_scores(self, dy: Tensor, x: Tensor, index: WeightIndex, conv: ConvGeometry | None = None) -> Tensor:
        if conv is None:
            return _cpu_block.block_scores(dy, x, index)
        if index.unstructured:
            return _cpu_conv_unstructured.block_scores(dy.float(), x.float(), index, conv)
        rows = _cpu_conv.rows_of(dy, conv), _cpu_conv.rows_of(x, conv)
        if rows[0] is not None and rows[1] is not None and torch.get_num_threads() == 1:
            # One thread of oneDNN takes a kernel of half the speed here.
            return _cpu_block.block_scores(rows[0], rows[1], index)
        # Every block is wanted, so the dense library's gradients of row panels are the fastest kernel there is.
        lib, threads = _native.native(), torch.get_num_threads()
        limit = SCORE_PANEL_BYTES if index.taps > 1 else 2 * SCORE_PANEL_BYTES  # whose gradient needs no reordering
        panel = max(1, limit // (4 * index.taps * index.in_ * index.bh)) * index.bh  # rows
        scores = x.new_empty(index.row_blocks, index.col_blocks, dtype=torch.float32)
        x = x.float()  # sums in fp32, as everywhere
        for first in range(0, index.out, panel):
            grad = dense_grad(dy[:, first : first + panel].float(), x, conv)
            sizes, norms = (grad.shape[0], index.taps, index.in_, index.bh, index.bw), scores[first // index.bh :]
            check(lib.block_norms(grad.data_ptr(), *sizes, norms.data_ptr(), threads), "block_norms")
        return scores

    def product_backward(
        self,
        dy: Tensor,
        x: Tensor,
        values: Tensor,
        index: WeightIndex,
        needs: Sequence[bool],
        conv: ConvGeometry | None = None,
    ) -> ProductGrads:
        if _converts(x, index, conv):
            grads = self.product_backward(dy.float(), x.float(), _rounded(values), index, needs, conv)
            return grads if grads.x is None else grads._replace(x=grads.x.to(x.dtype))
        need_x, need_values, need_bias, need_scores = needs
        if conv is not None and not index.unstructured and need_x and need_values:
            shared = _cpu_conv_block.backward(dy, x, values.float(), index, need_bias, conv)
            if shared is not None:
                return ProductGrads(*shared, self.block_scores(dy, x, index, conv) if need_scores else None)
        return super().product_backward(dy, x, values, index, needs, conv)

    def gru_forward(
        self,
        x: Tensor,
        h0: Tensor,
        lengths: Tensor | None,
        weights: Sequence[GruWeight],
        biases: Sequence[Tensor],
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights, biases = _cast(weights, biases, x.dtype)
        return _cpu_gru.gru_forward(x, h0, lengths, weights, biases, save)

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
        weights, biases = _cast(weights, biases, x.dtype)
        return _cpu_gru.gru_backward(
            dy, dh_n, x, h0, lengths, weights, biases, y, reserve, want_scores, need_dx, self.block_scores
        )

    def gru_reserve_shape(self, batch: int, steps: int, hidden: int, directions: int) -> list[int]:
        return _cpu_gru.gru_reserve_shape(batch, steps, hidden, directions)


def _linear(index: WeightIndex) -> ModuleType:
    return _cpu_unstructured if index.unstructured else _cpu_block


def _conv(index: WeightIndex) -> ModuleType:
    return _cpu_conv_unstructured if index.unstructured else _cpu_conv_block


def _converts(x: Tensor, index: WeightIndex, conv: ConvGeometry | None) -> bool:
    """Whether these activations are converted to fp32 for the kernels."""
    if x.dtype != torch.bfloat16:
        return False
    return not (_linear(index) if conv is None else _conv(index)).has_bf16(index)


def _rounded(weights: Tensor) -> Tensor:
    """fp32 weights as a bf16 kernel would see them."""
    return weights.to(torch.bfloat16).float()


def _cast(
    weights: Sequence[GruWeight], biases: Sequence[Tensor], dtype: torch.dtype
) -> tuple[list[GruWeight], list[Tensor]]:
    """Weights and biases in the compute dtype: kernels read addresses and cannot tell what is stored there."""
    return [GruWeight(w.tensor.to(dtype), w.index) for w in weights], [bias.to(dtype) for bias in biases]


register(CpuBackend())
