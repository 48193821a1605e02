"""`Y [P, lines·b] = Σ over the entries of a row-group of tile(X) [P, k] · W_block`, both orientations.

    forward      line = block-row,    k = bw, position (n, h', w') reads X at h'·stride - padding + r·dilation
    transposed   line = block-column, k = bh, position (n, h, w) reads dY at (h + padding - r·dilation) / stride

A program owns BLOCK_P positions and the G·b outputs of one row-group. Each step loads one activation tile and the
group's G weight blocks, absent ones as zeros without traffic, and multiplies once: an `if` around `tl.dot` would end
the software pipelining. What the zeros cost and what the shared tile saves is a matter of G (backends/_triton_config).

What an entry names is loaded one step before it is used, so that the tile's address never waits for memory: the loop
then pipelines as that of a dense product, tiles by 16-byte cp.async, products by wgmma or mma.sync. Entries rise by
channel block, then tap: with CACHE ".ca" (honoured from Triton 3.8 on) the nine tiles of a 3x3 come from L1 after the
first, as a halo tile would; with ".cg" each comes from L2.

Programs are numbered in bands of BAND position tiles; within a band, by group, longest first: those that run together
share weights and activations in L2, and the last to start are short.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, CODE: tl.constexpr):
    """The activations of `sparse_kernels.activations` by code, in fp32."""
    if CODE == 1:
        x = tl.where(x < 0, 0.0, x)  # NaN stays NaN
    elif CODE == 2:
        x = x * tl.sigmoid(x)
    elif CODE == 3:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif CODE == 4:
        # 0.5 (1 + tanh u) = sigmoid(2u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def product_kernel(
    x,  # activations, channels side by side
    values,  # [nnzb, bh, bw]
    bias,  # [lines·b] or unused
    pre,  # [P, lines·b] or unused: what the activation is given
    y,  # [P, outputs], rows side by side
    start,
    entry,
    slot,
    order,
    positions,  # P
    tiles,  # ceil(P / BLOCK_P)
    groups,
    outputs,  # features of y
    channels,  # features of x
    x_height,
    x_width,
    y_height,
    y_width,
    x_image,  # strides of x over VEC
    x_row,
    x_pixel,
    GROUP: tl.constexpr,
    LINE: tl.constexpr,  # side of a block along y's features
    INNER: tl.constexpr,  # and along x's
    LINE_STRIDE: tl.constexpr,  # of a block's elements
    INNER_STRIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BAND: tl.constexpr,
    UNROLL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    POINTWISE: tl.constexpr,  # every position reads its own pixel: linear
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    EVEN: tl.constexpr,  # channels is a multiple of INNER
    VEC: tl.constexpr,  # elements that divide every stride of x
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    CACHE: tl.constexpr,
):
    WIDTH: tl.constexpr = GROUP * LINE
    program = tl.program_id(0)
    band = program // (BAND * groups)
    in_band = tl.minimum(tiles - band * BAND, BAND)
    within = program - band * (BAND * groups)
    group = tl.load(order + within // in_band)
    tile = band * BAND + within % in_band

    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    k = tl.arange(0, INNER)
    n = tl.arange(0, WIDTH)
    live = p < positions
    x_row_stride = x_row * VEC
    x_pixel_stride = x_pixel * VEC
    h = p
    w = p
    if POINTWISE:
        rows = x + p.to(tl.int64) * x_pixel_stride
    else:
        image = p // (y_height * y_width)
        h = p // y_width % y_height
        w = p % y_width
        if TRANSPOSED:
            h += PAD_H
            w += PAD_W
        else:
            h = h * STRIDE_H - PAD_H
            w = w * STRIDE_W - PAD_W
        rows = x + image.to(tl.int64) * (x_image * VEC)

    first = tl.load(start + group)
    last = tl.load(start + group + 1)
    blocks = values + (n % LINE)[None, :] * LINE_STRIDE + k[:, None] * INNER_STRIDE
    member = n // LINE
    acc = tl.zeros((BLOCK_P, WIDTH), dtype=tl.float32)
    next_where = tl.load(entry + first)
    next_slots = tl.load(slot + first * GROUP + member)
    for i in tl.range(first, last, loop_unroll_factor=UNROLL):
        where = next_where
        slots = next_slots
        next_where = tl.load(entry + i + 1)
        next_slots = tl.load(slot + (i + 1) * GROUP + member)
        tap = where >> 16
        inner = where & 65535
        mask = live
        pixels = rows
        if not POINTWISE:
            r = tap // KERNEL_W
            s = tap - r * KERNEL_W
            if TRANSPOSED:
                ih = h - r * DIL_H
                iw = w - s * DIL_W
                if STRIDE_H != 1:
                    mask = mask & (ih % STRIDE_H == 0)
                    ih = ih // STRIDE_H
                if STRIDE_W != 1:
                    mask = mask & (iw % STRIDE_W == 0)
                    iw = iw // STRIDE_W
            else:
                ih = h + r * DIL_H
                iw = w + s * DIL_W
            mask = mask & (ih >= 0) & (ih < x_height) & (iw >= 0) & (iw < x_width)
            pixels = rows + (ih * x_row_stride + iw * x_pixel_stride)
        here = mask[:, None]
        if not EVEN:
            here = here & (inner * INNER + k < channels)[None, :]
        tile_x = tl.load(
            pixels[:, None] + (inner * INNER + k)[None, :], mask=here, other=0.0, cache_modifier=CACHE
        )  # [BLOCK_P, INNER]
        tile_w = tl.load(
            blocks + slots.to(tl.int64)[None, :] * (LINE * INNER), mask=slots[None, :] >= 0, other=0.0
        )  # [INNER, WIDTH]
        acc = tl.dot(tile_x, tile_w, acc, input_precision=PRECISION)

    out = group * WIDTH + n
    keep = live[:, None] & (out < outputs)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + out, mask=out < outputs, other=0.0).to(tl.float32)[None, :]
    target = p.to(tl.int64)[:, None] * outputs + out[None, :]
    if KEEP:
        tl.store(pre + target, acc.to(pre.dtype.element_ty), mask=keep)
    acc = activate(acc, ACTIVATION)
    tl.store(y + target, acc.to(y.dtype.element_ty), mask=keep)
