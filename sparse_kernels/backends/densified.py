"""The `densified` backend: scatter the values into a scratch weight, run the dense library, gather the gradient.

It serves every device and dtype that torch serves, at dense speed; the plan names it wherever no sparse kernel runs, or
none that is faster. The scratch weight lives only during the call, so that nothing dense is kept. On the CPU the copies
are native, and the dense library is the fastest of those there are: for fp32 linears oneDNN, which reaches twice the
rate of torch's default there on AMD; for convolutions of few positions the block kernels (`_densified_tiles`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _native, reference
from ..patterns import Block
from ..topology import WeightIndex
from . import _cpu_conv, _cpu_conv_block, _cpu_gru, _densified_tiles
from ._cpu_launch import check, in_large_pages, native_index
from .reference import DenseWeightBackend, memory_format
from .registry import ConvGeometry, GruGrads, GruWeight, ProductGrads, register, score_dtype

_NATIVE_BYTES = (2, 4, 8)
# Multiply-adds from which oneDNN's rate outweighs its 20 us a call (Zen 5).
_ONEDNN_FROM = 1 << 20


def conv_weight(dense: Tensor, index: WeightIndex, conv: ConvGeometry) -> Tensor:
    """A tap-major `[out, taps * in]` as torch's `[out, in, R, S]`, without a copy (its layout is channels_last)."""
    return dense.view(index.out, *conv.kernel, index.in_).permute(0, 3, 1, 2)


def scatter(
    values: Tensor,
    index: WeightIndex,
    conv: ConvGeometry | None,
    format: torch.memory_format,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The dense weight in `dtype`, `[out, in]` or `[out, in, R, S]`; of a convolution on the CPU in the given memory
    format."""
    dtype = dtype or values.dtype
    if not _copies_natively(values):
        dense = index.scatter(values.to(dtype))
        return dense if conv is None else conv_weight(dense, index, conv)
    if conv is None:
        weight = values.new_empty(index.out, index.in_, dtype=dtype)
    else:
        weight = torch.empty(index.out, index.in_, *conv.kernel, dtype=dtype, memory_format=format, device="cpu")
    source = values if _converts(index, values.dtype, dtype) else values.to(dtype)
    _copy("densify", index, _layout(weight, index), source.contiguous(), weight)
    return weight


def gather(weight: Tensor, index: WeightIndex, dtype: torch.dtype | None = None) -> Tensor:
    """The active blocks of what `scatter` returns, or of its gradient, in `dtype`: `[nnzb, bh, bw]`, padding zero."""
    dtype = dtype or weight.dtype
    if weight.dim() == 4 and 1 not in weight.shape[2:] and weight.stride(2) != weight.stride(3) * weight.shape[3]:
        weight = weight.contiguous()
    if not _copies_natively(weight):
        return index.gather(_tap_major(weight, index)).to(dtype)
    copied = dtype if _converts(index, dtype, weight.dtype) else weight.dtype
    values = weight.new_empty(index.nnzb, index.bh, index.bw, dtype=copied)
    _copy("gather_blocks", index, _layout(weight, index), weight, values)
    return values.to(dtype)


def _copy(launcher: str, index: WeightIndex, layout: Any, source: Tensor, target: Tensor) -> None:
    values, dense = (source, target) if launcher == "densify" else (target, source)
    lib = _native.native()
    in_large_pages(target)
    where = native_index(index), layout, values.element_size(), dense.element_size()
    check(getattr(lib, launcher)(*where, source.data_ptr(), target.data_ptr(), torch.get_num_threads()), launcher)


def _layout(weight: Tensor, index: WeightIndex) -> Any:
    """The `DenseLayout` of csrc/api.h."""
    if weight.dim() == 2:
        tap_stride = index.in_  # of its only tap; what a row of taps would have
    else:
        tap_stride = weight.stride(3 if weight.shape[3] > 1 else 2)
    return _native.native().DenseLayout(index.taps, weight.stride(0), tap_stride, weight.stride(1))


def _tiled(index: WeightIndex) -> Any:
    """The `DenseLayout` of `_densified_tiles`."""
    return _native.native().DenseLayout(index.taps, 0, 0, 0, _densified_tiles.TILE.bh)


def _converts(index: WeightIndex, values: torch.dtype, dense: torch.dtype) -> bool:
    """Whether one native copy goes between values and a dense weight of these dtypes. Single elements are converted on
    the way; torch converts rows of them faster, by vectors."""
    return values == dense or (index.bw == 1 and (values, dense) == (torch.float32, torch.bfloat16))


def _copies_natively(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.element_size() in _NATIVE_BYTES and _native.why_unavailable() is None


def _tap_major(weight: Tensor, index: WeightIndex) -> Tensor:
    return weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1).reshape(index.out, index.taps * index.in_)


@functools.cache
def _onednn_is_faster() -> bool:
    """Whether oneDNN's linear is there, and vectorised; without AVX2 it takes twice the time of MKL's."""
    return torch._C._has_mkldnn and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x · weightᵀ + bias` by the fastest dense library, any strides."""
    large = x.numel() * weight.shape[0] >= _ONEDNN_FROM
    if large and x.dtype == torch.float32 and x.device.type == "cpu" and _onednn_is_faster():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _rows(x: Tensor, conv: ConvGeometry) -> Tensor | None:
    """The pixels of channels_last `x` as rows, where the convolution is linear on them and the CPU's library for that
    is the faster one."""
    return _cpu_conv.rows_of(x, conv) if x.device.type == "cpu" else None


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
        bias = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
        rows = x if conv is None else _rows(x, conv)
        if rows is not None:
            y = _linear(rows, scatter(values, index, None, torch.contiguous_format, x.dtype), bias)
            return y if conv is None else _cpu_conv.images_of(y, [x.shape[0], index.out, *x.shape[2:]])
        assert conv is not None
        if _densified_tiles.serves(x, index, conv):
            full, tiles = _tiles(values, index)
            return _cpu_conv_block.spmm(x, tiles, full, bias, conv)
        format = memory_format(x)
        weight = scatter(values, index, conv, format, x.dtype)
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
        if conv is not None and not need_scores and _densified_tiles.serves(x, index, conv) and _rows(x, conv) is None:
            full, tiles = _tiles(values, index)
            dx, dtiles = _densified_tiles.backward(dy, x, tiles, full, need_x, need_values, conv)
            dbias = dy.sum((0, 2, 3), dtype=dtype) if need_bias else None
            dvalues = None
            if dtiles is not None:
                dvalues = values.new_empty(values.shape, dtype=dtype)
                _copy("gather_blocks", index, _tiled(index), dtiles, dvalues)
            return ProductGrads(dx, dvalues, dbias, None)
        wanted = need_x, need_values or need_scores, need_bias
        dx, dweight, dbias = self._gradients(dy, x, values, index, conv, wanted)
        dbias = None if dbias is None else dbias.to(dtype)
        dvalues = scores = None
        if need_values and dweight is not None:
            dvalues = gather(dweight, index, dtype)
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
        dx, _, _ = self._gradients(dy, like, values, index, conv, (True, False, False))
        assert dx is not None
        return dx

    def _dense_grad(self, dy: Tensor, x: Tensor, index: WeightIndex, conv: ConvGeometry | None) -> Tensor:
        _, dweight, _ = self._gradients(dy, x, x, index, conv, (False, True, False))
        assert dweight is not None
        return _tap_major(dweight, index)

    def _gradients(
        self,
        dy: Tensor,
        x: Tensor,
        values: Tensor,
        index: WeightIndex,
        conv: ConvGeometry | None,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of the input, of the dense weight in torch's shape, and of the bias, those that are wanted; `values` are read
        for the first only. They have the dtype of `dy`, as those of the dense twin: torch adds in fp32, and to a bias
        in bf16 four times as fast as to one in fp32."""
        need_x, need_weight, need_bias = wanted
        if not any(wanted):
            return None, None, None
        rows, dy_rows = (x, dy) if conv is None else (_rows(x, conv), _rows(dy, conv))
        if rows is not None and dy_rows is not None:
            weight = scatter(values, index, None, torch.contiguous_format, dy.dtype) if need_x else None
            dx = None if weight is None else _linear(dy_rows, weight.T)
            if dx is not None and conv is not None:
                dx = _cpu_conv.images_of(dx, x.shape)
            return dx, _linear(dy_rows.T, rows.T) if need_weight else None, dy_rows.sum(0) if need_bias else None
        assert conv is not None
        format = memory_format(x)
        if need_x:
            weight = scatter(values, index, conv, format, dy.dtype)
        else:  # only its shape and format are looked at
            shape = index.out, index.in_, *conv.kernel
            weight = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=format)
        dx, dweight, dbias = torch.ops.aten.convolution_backward(
            dy.contiguous(memory_format=format),
            x.contiguous(memory_format=format),
            weight,
            [index.out],
            conv.stride,
            conv.padding,
            conv.dilation,
            False,
            (0, 0),
            1,
            wanted,
        )
        return dx.contiguous(memory_format=memory_format(x)) if need_x else None, dweight, dbias

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


def _tiles(values: Tensor, index: WeightIndex) -> tuple[WeightIndex, Tensor]:
    """The weight as fp32 values `[nnzb, 32, 32]` of a full index, and that index."""
    full = _densified_tiles.full_index(index.out, index.in_, index.taps)
    tiles = values.new_empty(full.nnzb, full.bh, full.bw, dtype=torch.float32)
    _copy("densify", index, _tiled(index), values.float().contiguous(), tiles)
    return full, tiles


def _runs_natively(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and _native.why_unavailable() is None


def _dense(weights: Sequence[GruWeight]) -> list[GruWeight]:
    """The weights, all of them dense and fp32."""
    return [
        GruWeight(
            w.tensor.float()
            if w.index is None
            else scatter(w.tensor, w.index, None, torch.contiguous_format, torch.float32),
            None,
        )
        for w in weights
    ]


register(DensifiedBackend())
