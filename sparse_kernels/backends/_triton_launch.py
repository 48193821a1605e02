"""The launches of the Triton kernels: addresses, strides, grids. Which launch is a config's matter (`_triton_config`).

Every function takes its config and row-groups explicitly too, so that a benchmark can sweep them; left out, the config
comes from the table and the row-groups from the index's derived buffers.
"""

from __future__ import annotations

import contextlib
import functools
import os
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import row_groups
from ..activations import ACTIVATIONS
from ..index import WeightIndex
from ..row_groups import RowGroups
from . import _triton_config as configs
from . import _triton_tune as tune
from ._triton_config import GradientConfig, ProductConfig, Table
from .reference import memory_format
from .registry import ConvGeometry

# Of block_scores: the partial gradients and their sum.
SCORES_WORKSPACE_BYTES = 16 << 20

_POINT = ConvGeometry((1, 1))


def interpreting() -> bool:
    """Whether Triton interprets its kernels on the CPU, as the tests have it do."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


class Images(NamedTuple):
    """Activations as a kernel reads them: positions (n, h, w), channels side by side."""

    tensor: Tensor
    height: int
    width: int
    channels: int
    image_stride: int
    row_stride: int
    pixel_stride: int
    vector: int  # elements that divide the strides and the channels: what one copy may move

    def strides(self) -> tuple[int, int, int]:
        """Of images, rows and pixels, in vectors."""
        return self.image_stride // self.vector, self.row_stride // self.vector, self.pixel_stride // self.vector

    def cached(self, cache: str) -> Images:
        """The same, moved in the widest copies that go where `cache` says."""
        narrow = cache == ".ca" and _triton_version() < (3, 9)
        widest = (8 if narrow else 16) // self.tensor.element_size()
        return self._replace(vector=min(self.vector, widest))


def product(
    x: Tensor,
    values: Tensor,
    index: WeightIndex,
    bias: Tensor | None,
    conv: ConvGeometry | None,
    x_like: Tensor | None = None,
    *,
    transposed: bool = False,
    activation: str | None = None,
    keep: bool = False,
    config: ProductConfig | None = None,
    groups: RowGroups | None = None,
) -> tuple[Tensor, Tensor]:
    """`activation(gather(X) · Wᵀ + bias)`, or with `transposed` `scatter(X · W)` into the shape of `x_like`.

    Returns:
        The result and, where kept, what the activation was given (else a tensor of no elements), each `[P, outputs]`
        or images of the memory format of `x` (of `x_like`).
    """
    groups = groups or _groups(index, transposed, "linear" if conv is None else "conv")
    line, inner = (index.bw, index.bh) if transposed else (index.bh, index.bw)
    outputs = index.in_ if transposed else index.out
    images = _images(x, conv)
    values, bias = values.contiguous(), None if bias is None else bias.contiguous()
    if conv is None:
        size = None
        positions, height, width = x.shape[0], 1, 1
        y = x.new_empty(positions, outputs)
        form = None
    else:
        like = x if x_like is None else x_like
        height, width = like.shape[2:] if transposed else conv.output_size(x.shape[2], x.shape[3])
        positions, size = x.shape[0] * height * width, (x.shape[0], outputs, height, width)
        y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        form = memory_format(like)
    pre = torch.empty_like(y) if keep else y.new_empty(0)
    if positions:
        where = _POINT if conv is None else conv
        flat = conv is None or _is_flat(images, conv)
        if config is None:
            table, processors = _machine(x.device)
            sizes = positions, groups.count, groups.size * line, inner, x.element_size()
            config = configs.choose_product(table, processors, *sizes, where.kernel != (1, 1))
            if tune.enabled(x.device):
                again = functools.partial(
                    product, x, values, index, bias, conv, x_like, transposed=transposed, activation=activation,
                    keep=keep, groups=groups,
                )  # fmt: skip
                key = "product", x.dtype, transposed, index.nnzb, index.in_, index.out, height, width, where, sizes
                config = tune.best(key, tune.product_candidates(table, config), lambda c: again(config=c))
        images = images.cached(config.cache)
        # A tap that is divided by the stride is no single offset, and takes a step of its own.
        entries = 1 if transposed and where.stride != (1, 1) else config.entries
        tiles = -(-positions // config.block_p)
        kernel = _kernels().product_kernel
        with _on(x.device):
            kernel[(tiles * groups.count,)](
                images.tensor, values, values if bias is None else bias, pre if keep else y, y, *groups.tensors(),
                positions, tiles, groups.count, outputs, images.channels, images.height, images.width, height, width,
                *images.strides(),
                GROUP=groups.size, LINE=line, INNER=inner,
                LINE_STRIDE=1 if transposed else index.bw, INNER_STRIDE=index.bw if transposed else 1,
                BLOCK_P=config.block_p, BAND=config.band, ENTRIES=entries,
                TRANSPOSED=transposed, POINTWISE=flat, **_geometry(where),
                EVEN=images.channels % inner == 0, VEC=images.vector,
                HAS_BIAS=bias is not None, KEEP=keep,
                ACTIVATION=0 if activation is None else ACTIVATIONS[activation].code,
                PRECISION=_precision(x.dtype, conv), CACHE=config.cache,
                num_warps=config.warps, num_stages=config.stages,
                **({} if config.registers is None else {"maxnreg": config.registers}),
            )  # fmt: skip
    if form is None:
        return y, pre
    return y.contiguous(memory_format=form), pre.contiguous(memory_format=form) if keep else pre


def sddmm(
    dy: Tensor,
    x: Tensor,
    index: WeightIndex,
    conv: ConvGeometry | None,
    *,
    config: GradientConfig | None = None,
    groups: RowGroups | None = None,
) -> Tensor:
    """`dW [nnzb, bh, bw] = dYᵀ · gather(X)` at the active blocks, fp32."""
    groups = groups or _groups(index, False, "linear" if conv is None else "conv")
    images, rows = _images(x, conv), _rows(dy)
    positions, many = rows.shape[0], conv is not None and conv.kernel != (1, 1)
    if config is None:
        table, processors = _machine(x.device)
        config = configs.choose_gradient(table, processors, positions, index, groups.size, x.element_size(), many)
        if tune.enabled(x.device):
            key = "sddmm", x.dtype, index.nnzb, index.in_, index.out, tuple(x.shape), conv, groups.size, index.pattern
            candidates = tune.gradient_candidates(table.gradient, config)
            config = tune.best(key, candidates, lambda c: sddmm(dy, x, index, conv, config=c, groups=groups))
    splits, images = config.splits or 1, images.cached(config.cache)
    target = torch.empty(splits, index.nnzb, index.bh, index.bw, dtype=torch.float32, device=x.device)
    if index.nnzb == 0:
        return target[0]
    columns = max(1, config.width // index.bw)
    column_tiles = -(-index.col_blocks // columns)
    per_split = _per_split(positions, splits, config.block_p)
    with _on(x.device):
        _kernels().sddmm_kernel[(splits * groups.count * column_tiles,)](
            rows, images.tensor, target, groups.start, groups.entry, groups.slot,
            positions, per_split, groups.count, column_tiles, index.out, images.channels, images.height, images.width,
            *images.strides(), target.stride(0),
            GROUP=groups.size, COLUMNS=columns, BH=index.bh, BW=index.bw,
            **_gradient_constants(dy, x, conv, images, index, config),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return target[0] if splits == 1 else target.sum(0)


def block_scores(
    dy: Tensor, x: Tensor, index: WeightIndex, conv: ConvGeometry | None, *, config: GradientConfig | None = None
) -> Tensor:
    """Squared Frobenius norm of every block of `dYᵀ · gather(X)`: fp32 `[row_blocks, col_blocks]`."""
    images, rows = _images(x, conv), _rows(dy)
    positions = rows.shape[0]
    if config is None:
        table, processors = _machine(x.device)
        limit = SCORES_WORKSPACE_BYTES
        config = configs.choose_scores(table, processors, positions, index, x.element_size(), limit)
    splits, images = config.splits or 1, images.cached(config.cache)
    shape = index.row_blocks, index.bh, index.col_blocks, index.bw
    if splits == 1:
        target = torch.empty(index.row_blocks, index.col_blocks, dtype=torch.float32, device=x.device)
    else:
        target = torch.empty(splits, *shape, dtype=torch.float32, device=x.device)
    height, columns = max(1, config.height // index.bh), max(1, config.width // index.bw)
    row_tiles, column_tiles = -(-index.row_blocks // height), -(-index.col_blocks // columns)
    with _on(x.device):
        _kernels().block_scores_kernel[(splits * row_tiles * column_tiles,)](
            rows, images.tensor, target, positions, _per_split(positions, splits, config.block_p),
            row_tiles, column_tiles, index.row_blocks, index.col_blocks, index.cols_per_tap, index.out,
            images.channels, images.height, images.width, *images.strides(),
            ROWS=height, COLUMNS=columns, BH=index.bh, BW=index.bw, PARTIAL=splits > 1,
            **_gradient_constants(dy, x, conv, images, index, config),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return target if splits == 1 else target.sum(0).square_().sum(dim=(1, 3))


def _gradient_constants(
    dy: Tensor, x: Tensor, conv: ConvGeometry | None, images: Images, index: WeightIndex, config: GradientConfig
) -> dict[str, Any]:
    flat = conv is None or _is_flat(images, conv)
    height, width = (1, 1) if flat else dy.shape[2:]
    return {
        # Constants, because each step divides its positions by them.
        "y_height": height,
        "y_width": width,
        "BLOCK_P": config.block_p,
        "POINTWISE": flat,
        "EVEN": images.channels % index.bw == 0,
        "VEC": images.vector,
        "PRECISION": _precision(x.dtype, conv),
        "CACHE": config.cache,
        **_geometry(_POINT if conv is None else conv),
    }


def _geometry(conv: ConvGeometry) -> dict[str, int]:
    stride, padding, dilation = conv.stride, conv.padding, conv.dilation
    return {
        "KERNEL_H": conv.kernel[0],
        "KERNEL_W": conv.kernel[1],
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "PAD_H": padding[0],
        "PAD_W": padding[1],
        "DIL_H": dilation[0],
        "DIL_W": dilation[1],
    }


def _per_split(positions: int, splits: int, block_p: int) -> int:
    steps = -(-positions // (splits * block_p))
    return steps * block_p


def _groups(index: WeightIndex, transposed: bool, op: str) -> RowGroups:
    """The derived row-groups; made for this call where the topology has none attached (a weight that is no layer's)."""
    found = row_groups.derived(index, transposed)
    if found is None:
        found = row_groups.build(index, configs.group_sizes(op, index.pattern)[transposed], transposed)
    return found


def _images(x: Tensor, conv: ConvGeometry | None) -> Images:
    """`x [P, C]` or `[N, C, H, W]` with its channels side by side, copied only where they are not."""
    if conv is None:
        x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
        height, width, channels = 1, 1, x.shape[1]
        strides = [0, 0, x.stride(0)]
    else:
        if x.stride(1) != 1 and x.shape[1] > 1:
            x = x.contiguous(memory_format=torch.channels_last)
        channels, height, width = x.shape[1:]
        each = [stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True)]
        strides = [each[0], each[2], each[3]]
        if sum(abs(s) * (n - 1) for s, n in zip(strides[1:], (height, width), strict=True)) >= 1 << 31:
            raise ValueError(
                f"triton: an image may span 2^31 elements; got {list(x.shape)}; use execution='densified'."
            )
    widest = 16 // x.element_size()
    vector = widest if all(size % widest == 0 for size in (*strides, channels)) else 1
    return Images(x, height, width, channels, strides[0], strides[1], strides[2], vector)


def _rows(dy: Tensor) -> Tensor:
    """`dy` as dense rows `[P, outputs]`."""
    return dy.contiguous() if dy.dim() == 2 else dy.permute(0, 2, 3, 1).reshape(-1, dy.shape[1]).contiguous()


def _is_flat(images: Images, conv: ConvGeometry) -> bool:
    """Whether position p reads pixel p, pixels lying at equal distances."""
    if conv.kernel != (1, 1) or conv.stride != (1, 1) or conv.padding != (0, 0):
        return False
    x, pixel = images.tensor, images.pixel_stride
    n, h, w = x.shape[0], images.height, images.width
    if w == 1 and (h > 1 or n > 1):
        return False
    return (h == 1 or images.row_stride == w * pixel) and (n == 1 or images.image_stride == h * w * pixel)


def _precision(dtype: torch.dtype, conv: ConvGeometry | None) -> str:
    """Of fp32 products: tf32 where torch's own would take it."""
    if dtype != torch.float32:
        return "tf32"  # of no effect
    backends: Any = torch.backends  # whose stubs lack these
    own = backends.cuda.matmul.fp32_precision if conv is None else backends.cudnn.conv.fp32_precision
    if own == "none" and conv is not None:
        own = backends.cudnn.fp32_precision
    if own == "none":
        own = backends.fp32_precision
    return "tf32" if own == "tf32" and not interpreting() else "ieee"


def _machine(device: torch.device) -> tuple[Table, int]:
    """The table of the GPU and how many multiprocessors it has."""
    if device.type != "cuda":  # interpreted
        return configs.TABLES["sm90"], 1
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _gpu(ordinal: int) -> tuple[Table, int]:
    properties = torch.cuda.get_device_properties(ordinal)
    arch = configs.architecture((properties.major, properties.minor))
    return configs.TABLES[arch], properties.multi_processor_count


@functools.cache
def _triton_version() -> tuple[int, int]:
    major, minor = metadata.version("triton").split(".")[:2]
    return int(major), int(minor)


@functools.cache
def _kernels() -> Any:
    from ..triton_kernels import gradient, product

    class Kernels:
        product_kernel = product.product_kernel
        sddmm_kernel = gradient.sddmm_kernel
        block_scores_kernel = gradient.block_scores_kernel

    return Kernels


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device its arguments lie on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
