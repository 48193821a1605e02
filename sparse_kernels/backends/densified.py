"""The `densified` backend: scatter the values into a scratch weight, run the dense library, gather the gradient.

It serves every device and dtype that torch serves, at dense speed; the plan names it wherever no sparse kernel runs, or
none that is faster. The scratch weight lives only during the call. On the CPU the copies are native, and fp32 linears
run on oneDNN, which reaches twice the rate of torch's default there on AMD; it needs no transposed copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _native, reference
from ..patterns import Block
from ..topology import WeightIndex
from . import _cpu_gru
from ._cpu_launch import check, native_index
from .reference import DenseWeightBackend, memory_format
from .registry import ConvGeometry, GruGrads, GruWeight, ProductGrads, register, score_dtype

_NATIVE_BYTES = (2, 4, 8)


def conv_weight(dense: Tensor, index: WeightIndex, conv: ConvGeometry) -> Tensor:
    """A tap-major `[out, taps * in]` as torch's `[out, in, R, S]`, without a copy (its layout is channels_last)."""
    return dense.view(index.out, *conv.kernel, index.in_).permute(0, 3, 1, 2)


def scatter(values: Tensor, index: WeightIndex, conv: ConvGeometry | None, format: torch.memory_format) -> Tensor:
    """The dense weight, `[out, in]` or `[out, in, R, S]`; for a convolution on the CPU in the given memory format."""
    if not _copies_natively(values):
        dense = index.scatter(values)
        return dense if conv is None else conv_weight(dense, index, conv)
    if conv is None:
        weight = values.new_empty(index.out, index.in_)
    else:
        weight = torch.empty(index.out, index.in_, *conv.kernel, dtype=values.dtype, memory_format=format, device="cpu")
    if weight.nbytes >= _cpu_gru.LARGE_BYTES:
        _native.native().advise_huge_pages(weight.data_ptr(), weight.nbytes)
    _copy("densify", index, weight, values.contiguous(), weight)
    return weight


def gather(weight: Tensor, index: WeightIndex) -> Tensor:
    """The active blocks of what `scatter` returns, or of its gradient: `[nnzb, bh, bw]`, padding zero."""
    if weight.dim() == 4 and 1 not in weight.shape[2:] and weight.stride(2) != weight.stride(3) * weight.shape[3]:
        weight = weight.contiguous()
    if not _copies_natively(weight):
        return index.gather(_tap_major(weight, index))
    values = weight.new_empty(index.nnzb, index.bh, index.bw)
    _copy("gather_blocks", index, weight, weight, values)
    return values


def _copy(launcher: str, index: WeightIndex, weight: Tensor, source: Tensor, target: Tensor) -> None:
    lib = _native.native()
    if weight.dim() == 2:
        tap_stride = index.in_  # of its only tap; what a row of taps would have
    else:
        tap_stride = weight.stride(3 if weight.shape[3] > 1 else 2)
    layout = lib.DenseLayout(index.taps, weight.stride(0), tap_stride, weight.stride(1))
    threads = torch.get_num_threads()
    where = native_index(index), layout, weight.element_size()
    check(getattr(lib, launcher)(*where, source.data_ptr(), target.data_ptr(), threads), launcher)


def _copies_natively(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.element_size() in _NATIVE_BYTES and _native.why_unavailable() is None


def _tap_major(weight: Tensor, index: WeightIndex) -> Tensor:
    return weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1).reshape(index.out, index.taps * index.in_)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x · weightᵀ + bias` by the fastest dense library, any strides."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


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
        bias = None if bias is None else bias.to(x.dtype)
        if conv is None:
            return _linear(x, scatter(values.to(x.dtype), index, None, torch.contiguous_format), bias)
        format = memory_format(x)
        weight = scatter(values.to(x.dtype), index, conv, format)
        y = F.conv2d(x.contiguous(memory_format=format), weight, bias, conv.stride, conv.padding, conv.dilation)
        return y.contiguous(memory_format=memory_format(x))

    def product_backward(
        self,
        dy: Tensor,
        x: Tensor,
        values: Tensor,
        index: WeightIndex,
        needs: Sequence[bool],
        conv: ConvGeometry | None = None,
    ) -> ProductGrads:
        need_x, need_values, need_bias, need_scores = needs
        dtype = score_dtype(x)
        dx, dweight = self._gradients(dy, x, values, index, conv, need_x, need_values or need_scores)
        dbias = dy.sum(0 if conv is None else (0, 2, 3), dtype=dtype) if need_bias else None
        dvalues = scores = None
        if need_values and dweight is not None:
            dvalues = gather(dweight, index).to(dtype)
        if need_scores and dweight is not None:
            blocks = index.blocks(_tap_major(dweight, index).to(dtype))
            scores = reference.block_scores(blocks).view(index.row_blocks, index.col_blocks)
        return ProductGrads(dx, dvalues, dbias, scores)

    def spmm_t(
        self,
        dy: Tensor,
        values: Tensor,
        index: WeightIndex,
        conv: ConvGeometry | None = None,
        x_like: Tensor | None = None,
    ) -> Tensor:
        like = dy.new_empty(dy.shape[0], index.in_) if x_like is None else x_like
        dx, _ = self._gradients(dy, like, values, index, conv, True, False)
        assert dx is not None
        return dx

    def _dense_grad(self, dy: Tensor, x: Tensor, index: WeightIndex, conv: ConvGeometry | None) -> Tensor:
        _, dweight = self._gradients(dy, x, x, index, conv, False, True)
        assert dweight is not None
        return _tap_major(dweight, index)

    def _gradients(
        self,
        dy: Tensor,
        x: Tensor,
        values: Tensor,
        index: WeightIndex,
        conv: ConvGeometry | None,
        need_x: bool,
        need_weight: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of the input, and of the dense weight in torch's shape; `values` are read for the former only."""
        if not (need_x or need_weight):
            return None, None
        if conv is None:
            weight = scatter(values.to(dy.dtype), index, None, torch.contiguous_format) if need_x else None
            dx = None if weight is None else _linear(dy, weight.T)
            return dx, _linear(dy.T, x.T) if need_weight else None
        format = memory_format(x)
        if need_x:
            weight = scatter(values.to(dy.dtype), index, conv, format)
        else:  # only its shape and format are looked at
            shape = index.out, index.in_, *conv.kernel
            weight = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=format)
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            dy.contiguous(memory_format=format),
            x.contiguous(memory_format=format),
            weight,
            None,
            conv.stride,
            conv.padding,
            conv.dilation,
            False,
            (0, 0),
            1,
            (need_x, need_weight, False),
        )
        return dx.contiguous(memory_format=memory_format(x)) if need_x else None, dweight

    # torch's GRU would keep what its backward needs in an autograd graph, which cannot cross an op. Where the fused
    # native layer serves dense weights it is three times as fast, even though its forward runs again in the backward.

    def gru_forward(
        self,
        x: Tensor,
        h0: Tensor,
        lengths: Tensor | None,
        weights: Sequence[GruWeight],
        biases: Sequence[Tensor],
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not _runs_natively(x):
            return super().gru_forward(x, h0, lengths, weights, biases, save)
        y, h_n, _ = _cpu_gru.gru_forward(x, h0, lengths, _dense(weights), [b.to(x.dtype) for b in biases], False)
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
        if not _runs_natively(x):
            return super().gru_backward(dy, dh_n, x, h0, lengths, weights, biases, y, reserve, want_scores, need_dx)
        dense, biases = _dense(weights), [b.to(x.dtype) for b in biases]
        y, _, reserve = _cpu_gru.gru_forward(x, h0, lengths, dense, biases, True)
        unscored = [False] * len(dense)
        grads = _cpu_gru.gru_backward(
            dy, dh_n, x, h0, lengths, dense, biases, y, reserve, unscored, need_dx, self.block_scores
        )
        found, scores = [], []
        for weight, grad, wanted in zip(weights, grads.weights, want_scores, strict=True):
            index = weight.index
            found.append(grad if index is None else gather(grad, index))
            blocks = index.blocks(grad) if wanted and index is not None else None
            scores.append(
                None
                if blocks is None or index is None
                else reference.block_scores(blocks).view(index.row_blocks, index.col_blocks)
            )
        return GruGrads(grads.x, grads.h0, found, grads.biases, scores)


def _runs_natively(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and _native.why_unavailable() is None


def _dense(weights: Sequence[GruWeight]) -> list[GruWeight]:
    """The weights, all of them dense and fp32."""
    return [
        GruWeight(
            w.tensor.float() if w.index is None else scatter(w.tensor.float(), w.index, None, torch.contiguous_format),
            None,
        )
        for w in weights
    ]


register(DensifiedBackend())
