"""The weight gradient `dYᵀ · gather(X)` of many blocks at a time: at the active ones, or the squared norm of each.

A program owns COLUMNS columns (tap, channel block) and the G block-rows of one row-group, and walks over a range of
positions: one tile of X of every column, one of dY, one product `[COLUMNS·bw, p] · [p, G·bh]`. X is on the side of
wgmma's 64 rows, so that blocks of 32 waste nothing. Columns come in the order of the row-group's entries (channel
block, then tap), so that neighbours read the same lines of X, from L1 where CACHE says so.

The positions may be split over programs; the partial sums go to a workspace of their own each and are added in order,
so that the bits never change.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .product import inside


@triton.jit
def gradient_tile(
    dy,  # [P, outputs], rows side by side
    x,
    first_p,
    last_p,
    out,  # [M] features of dy
    outputs,
    taps,  # [K] tap of each gathered feature
    features,  # [K] and its channel
    valid,  # [K]
    channels,
    x_height,
    x_width,
    x_image_stride,
    x_row_stride,
    x_pixel_stride,
    y_height: tl.constexpr,
    y_width: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    INNER: tl.constexpr,  # features that lie side by side in one column
    VEC: tl.constexpr,  # elements that divide every stride of x, and channels
    BLOCK_P: tl.constexpr,
    POINTWISE: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    CACHE: tl.constexpr,
):
    """`gather(X)ᵀ · dY` over the positions first_p … last_p - 1: fp32 `[K, M]`."""
    acc = tl.zeros((K, M), dtype=tl.float32)
    real = out < outputs
    if not EVEN:
        valid = valid & (features < channels)
    offset_h = taps // KERNEL_W * DIL_H - PAD_H
    offset_w = taps % KERNEL_W * DIL_W - PAD_W
    shift = features
    if not POINTWISE:
        shift += offset_h * x_row_stride + offset_w * x_pixel_stride
    # The features of a column share its tap and follow one another, which no analysis sees behind a load.
    shift = tl.max_contiguous(tl.multiple_of(shift, VEC), INNER)
    offset_h = tl.max_constancy(offset_h, INNER)
    offset_w = tl.max_constancy(offset_w, INNER)
    valid = tl.max_constancy(valid, VEC)
    lane = tl.arange(0, BLOCK_P)
    # Where every step lies in whole rows of one image, or in one row, what differs between positions is loop-invariant.
    WHOLE: tl.constexpr = y_height * y_width % BLOCK_P == 0 and (y_width % BLOCK_P == 0 or BLOCK_P % y_width == 0)
    lane_h = lane // y_width * STRIDE_H
    lane_w = lane % y_width * STRIDE_W
    lane_shift = (lane_h * x_row_stride + lane_w * x_pixel_stride)[None, :] + shift[:, None]  # [K, p]
    lane_h = lane_h[None, :] + offset_h[:, None]
    lane_w = lane_w[None, :] + offset_w[:, None]
    tile = dy + (first_p + lane).to(tl.int64)[:, None] * outputs + out[None, :]
    for begin in range(first_p, last_p, BLOCK_P):
        p = begin + lane
        live = p < last_p
        mask = valid[:, None]
        if POINTWISE:
            pixels = (x + p.to(tl.int64) * x_pixel_stride)[None, :] + shift[:, None]
            mask = mask & live[None, :]
        elif WHOLE:
            h = begin // y_width % y_height * STRIDE_H
            w = begin % y_width * STRIDE_W
            image = begin // (y_height * y_width)
            pixels = x + image.to(tl.int64) * x_image_stride + (h * x_row_stride + w * x_pixel_stride) + lane_shift
            mask = mask & inside(lane_h + h, x_height) & inside(lane_w + w, x_width)
        else:
            h = p // y_width % y_height * STRIDE_H
            w = p % y_width * STRIDE_W
            image = p // (y_height * y_width)
            pixels = x + image.to(tl.int64) * x_image_stride + (h * x_row_stride + w * x_pixel_stride)
            pixels = pixels[None, :] + shift[:, None]
            mask = mask & live[None, :]
            mask = mask & inside(offset_h[:, None] + h[None, :], x_height)
            mask = mask & inside(offset_w[:, None] + w[None, :], x_width)
        # Addressed as it is multiplied: behind a tl.trans the load would not be pipelined for sm_80.
        tile_x = tl.load(pixels, mask=mask, other=0.0, cache_modifier=CACHE)  # [K, p]
        tile_dy = tl.load(tile, mask=live[:, None] & real[None, :], other=0.0)  # [p, M]
        tile += BLOCK_P * outputs
        acc = tl.dot(tile_x, tile_dy, acc, input_precision=PRECISION)
    return acc


@triton.jit
def sddmm_kernel(
    dy,
    x,
    target,  # [splits, nnzb, bh, bw], fp32
    start,
    entry,
    slot,
    positions,
    per_split,  # positions, a multiple of BLOCK_P
    groups,
    column_tiles,
    outputs,
    channels,
    x_height,
    x_width,
    x_image,
    x_row,
    x_pixel,
    split_stride,  # nnzb·bh·bw
    y_height: tl.constexpr,
    y_width: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BLOCK_P: tl.constexpr,
    POINTWISE: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    EVEN: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
    CACHE: tl.constexpr,
):
    """`dW` at the active blocks: program (split, group, column tile) writes what is active of its blocks."""
    M: tl.constexpr = GROUP * BH
    K: tl.constexpr = COLUMNS * BW
    program = tl.program_id(0)
    group = program % groups
    column_tile = program // groups % column_tiles
    split = program // (groups * column_tiles)
    first = tl.load(start + group) + column_tile * COLUMNS
    last = tl.load(start + group + 1)
    if first >= last:
        return
    m = tl.arange(0, M)
    k = tl.arange(0, K)
    column = first + k // BW  # [K]
    valid = column < last
    where = tl.load(entry + column, mask=valid, other=0)
    first_p = split * per_split
    acc = gradient_tile(
        dy,
        x,
        first_p,
        tl.minimum(first_p + per_split, positions),
        group * M + m,
        outputs,
        where >> 16,
        (where & 65535) * BW + k % BW,
        valid,
        channels,
        x_height,
        x_width,
        x_image * VEC,
        x_row * VEC,
        x_pixel * VEC,
        y_height,
        y_width,
        M,
        K,
        BW,
        VEC,
        BLOCK_P,
        POINTWISE,
        KERNEL_H,
        KERNEL_W,
        STRIDE_H,
        STRIDE_W,
        PAD_H,
        PAD_W,
        DIL_H,
        DIL_W,
        EVEN,
        PRECISION,
        CACHE,
    )
    slots = tl.load(slot + column[:, None] * GROUP + (m // BH)[None, :], mask=valid[:, None], other=-1)  # [K, M]
    within = (m % BH)[None, :] * BW + (k % BW)[:, None]
    block = target + split.to(tl.int64) * split_stride + slots.to(tl.int64) * (BH * BW)
    tl.store(block + within, acc, mask=slots >= 0)


@triton.jit
def block_scores_kernel(
    dy,
    x,
    target,  # scores [row_blocks, col_blocks], or with PARTIAL [splits, row_blocks·bh, col_blocks·bw], fp32
    positions,
    per_split,
    row_tiles,
    column_tiles,
    row_blocks,
    col_blocks,
    cols_per_tap,
    outputs,
    channels,
    x_height,
    x_width,
    x_image,
    x_row,
    x_pixel,
    y_height: tl.constexpr,
    y_width: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PARTIAL: tl.constexpr,
    POINTWISE: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    EVEN: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
    CACHE: tl.constexpr,
):
    """Squared norm of every block, or with PARTIAL the gradient of one split of the positions, to be added first."""
    M: tl.constexpr = ROWS * BH
    K: tl.constexpr = COLUMNS * BW
    program = tl.program_id(0)
    row_tile = program % row_tiles
    column_tile = program // row_tiles % column_tiles
    split = program // (row_tiles * column_tiles)
    m = tl.arange(0, M)
    k = tl.arange(0, K)
    column = column_tile * COLUMNS + k // BW  # [K]
    tap = column // cols_per_tap
    first_p = split * per_split
    acc = gradient_tile(
        dy,
        x,
        first_p,
        tl.minimum(first_p + per_split, positions),
        row_tile * M + m,
        outputs,
        tap,
        (column - tap * cols_per_tap) * BW + k % BW,
        column < col_blocks,
        channels,
        x_height,
        x_width,
        x_image * VEC,
        x_row * VEC,
        x_pixel * VEC,
        y_height,
        y_width,
        M,
        K,
        BW,
        VEC,
        BLOCK_P,
        POINTWISE,
        KERNEL_H,
        KERNEL_W,
        STRIDE_H,
        STRIDE_W,
        PAD_H,
        PAD_W,
        DIL_H,
        DIL_W,
        EVEN,
        PRECISION,
        CACHE,
    )
    if PARTIAL:
        row = row_tile * M + m
        place = column_tile * K + k
        base = target + (split * row_blocks * BH).to(tl.int64) * (col_blocks * BW)
        real = (row < row_blocks * BH)[None, :] & (place < col_blocks * BW)[:, None]
        tl.store(base + row[None, :] * (col_blocks * BW) + place[:, None], acc, mask=real)
    else:
        squares = tl.reshape(acc * acc, (COLUMNS, BW, ROWS, BH))
        scores = tl.sum(tl.sum(squares, axis=3), axis=1)  # [COLUMNS, ROWS]
        row = row_tile * ROWS + tl.arange(0, ROWS)
        col = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        real = (row < row_blocks)[None, :] & (col < col_blocks)[:, None]
        tl.store(target + row[None, :] * col_blocks + col[:, None], scores, mask=real)
