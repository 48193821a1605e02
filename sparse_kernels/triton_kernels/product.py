"""`Y [P, lines·b] = Σ over the entries of a row-group of tile(X) [P, k] · W_block`, both orientations.

    forward      line = block-row,    k = bw, position (n, h', w') reads X at h'·stride - padding + r·dilation
    transposed   line = block-column, k = bh, position (n, h, w) reads dY at (h + padding - r·dilation) / stride

A program owns BLOCK_P positions and the G·b outputs of one row-group. Each step loads one activation tile and the
group's G weight blocks, absent ones as zeros without traffic, and multiplies once: an `if` around `tl.dot` would end
the software pipelining. What the zeros cost and what the shared tile saves is a matter of G (backends/_triton_config).

What an entry names is loaded one step before it is used, so that the tile's address never waits for memory: the loop
then pipelines as that of a dense product, tiles by cp.async, products by wgmma or mma.sync. Blocks of 16 go two entries
a step, because a step of 16 is one instruction deep. Entries rise by channel block, then tap: with CACHE ".ca" the nine
tiles of a 3x3 come from L1 after the first, as those of a halo tile on chip would; with ".cg" each comes from L2.

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
def inside(i, size):
    """0 <= i < size in one comparison; an unsigned side makes both unsigned."""
    return i.to(tl.uint32, bitcast=True) < size


@triton.jit
def slots_of(slot, i, GROUP: tl.constexpr):
    """The slots of entry i as four scalars, of which GROUP are its own: a vector would change its layout each step."""
    s0 = tl.load(slot + i * GROUP)
    s1 = s0
    s2 = s0
    s3 = s0
    if GROUP > 1:
        s1 = tl.load(slot + i * GROUP + 1)
    if GROUP > 2:
        s2 = tl.load(slot + i * GROUP + 2)
        s3 = tl.load(slot + i * GROUP + 3)
    return s0, s1, s2, s3


@triton.jit
def spread(s0, s1, s2, s3, member, GROUP: tl.constexpr):
    """The slot of each output's line."""
    if GROUP == 1:
        return tl.where(member == 0, s0, -1)
    if GROUP == 2:
        return tl.where(member == 0, s0, s1)
    return tl.where(member < 2, tl.where(member == 0, s0, s1), tl.where(member == 2, s2, s3))


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
    ENTRIES: tl.constexpr,  # of a step: 1, or 2 where a tap is one offset
    TRANSPOSED: tl.constexpr,
    POINTWISE: tl.constexpr,  # every position reads its own pixel: linear
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    EVEN: tl.constexpr,  # channels is a multiple of INNER
    VEC: tl.constexpr,  # elements that divide every stride of x: what one copy moves
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
    n = tl.arange(0, WIDTH)
    live = p < positions
    x_row_stride = x_row * VEC
    x_pixel_stride = x_pixel * VEC
    # A tap is one offset for all positions, unless it must be divided by the stride; whether it is inside the image
    # is a bit of each position's, where a word holds them.
    DIVIDES: tl.constexpr = TRANSPOSED and (STRIDE_H > 1 or STRIDE_W > 1)
    BITS: tl.constexpr = not POINTWISE and not DIVIDES and KERNEL_H * KERNEL_W <= 32
    SIGN: tl.constexpr = -1 if TRANSPOSED else 1
    h = p
    w = p
    bits = p
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
        if not DIVIDES:
            rows += h * x_row_stride + w * x_pixel_stride
    if BITS:
        bits = tl.zeros((BLOCK_P,), dtype=tl.int32)
        for kh in tl.static_range(KERNEL_H):
            row_inside = live & inside(h + SIGN * kh * DIL_H, x_height)
            for kw in tl.static_range(KERNEL_W):
                pixel_inside = row_inside & inside(w + SIGN * kw * DIL_W, x_width)
                bits |= pixel_inside.to(tl.int32) << (kh * KERNEL_W + kw)

    first = tl.load(start + group)
    last = tl.load(start + group + 1)
    K: tl.constexpr = ENTRIES * INNER
    k = tl.arange(0, K)
    second = (k // INNER) == 1
    within = k % INNER
    member = n // LINE
    blocks = values + (n % LINE)[None, :] * LINE_STRIDE + within[:, None] * INNER_STRIDE
    acc = tl.zeros((BLOCK_P, WIDTH), dtype=tl.float32)
    next_where = tl.load(entry + first)
    n0, n1, n2, n3 = slots_of(slot, first, GROUP)
    also_where = next_where
    a0, a1, a2, a3 = n0, n1, n2, n3
    if ENTRIES == 2:
        also_where = tl.load(entry + first + 1)
        a0, a1, a2, a3 = slots_of(slot, first + 1, GROUP)
    for i in range(first, last, ENTRIES):
        where = next_where
        slots = spread(n0, n1, n2, n3, member, GROUP)[None, :]  # [1, WIDTH]
        next_where = tl.load(entry + i + ENTRIES)
        n0, n1, n2, n3 = slots_of(slot, i + ENTRIES, GROUP)
        tap = where >> 16
        r = tap // KERNEL_W
        s = tap - r * KERNEL_W
        inner = where & 65535
        mask = live
        pixels = rows
        shift = inner * INNER
        if DIVIDES:
            ih = h - r * DIL_H
            iw = w - s * DIL_W
            mask = mask & (ih % STRIDE_H == 0) & (iw % STRIDE_W == 0)
            ih = ih // STRIDE_H
            iw = iw // STRIDE_W
            mask = mask & inside(ih, x_height) & inside(iw, x_width)
            pixels = rows + (ih * x_row_stride + iw * x_pixel_stride)
        elif not POINTWISE:
            shift += SIGN * (r * DIL_H * x_row_stride + s * DIL_W * x_pixel_stride)
            if BITS:
                mask = (bits >> tap & 1) != 0
            else:
                mask = mask & inside(h + SIGN * r * DIL_H, x_height) & inside(w + SIGN * s * DIL_W, x_width)
        mask = mask[:, None]  # [BLOCK_P, 1]
        shifts = within + shift
        features = within + inner * INNER
        if ENTRIES == 2:
            here = last - i > 1
            tap = also_where >> 16
            inner = also_where & 65535
            also_slots = tl.where(here, spread(a0, a1, a2, a3, member, GROUP), -1)
            slots = tl.where(second[:, None], also_slots[None, :], slots)  # [K, WIDTH]
            also_where = tl.load(entry + i + 3)
            a0, a1, a2, a3 = slots_of(slot, i + 3, GROUP)
            shift = inner * INNER
            also = live
            if not POINTWISE:
                r = tap // KERNEL_W
                s = tap - r * KERNEL_W
                shift += SIGN * (r * DIL_H * x_row_stride + s * DIL_W * x_pixel_stride)
                if BITS:
                    also = (bits >> tap & 1) != 0
                else:
                    also = also & inside(h + SIGN * r * DIL_H, x_height) & inside(w + SIGN * s * DIL_W, x_width)
            also = tl.where(here, also, tl.zeros_like(also))
            mask = tl.where(second[None, :], also[:, None], mask)  # [BLOCK_P, K]
            shifts = tl.where(second, within + shift, shifts)
            features = tl.where(second, within + inner * INNER, features)
        if not EVEN:
            mask = mask & (features < channels)[None, :]
        # Side by side as far as VEC says and no further: see Images.cached.
        address = tl.max_contiguous(pixels[:, None] + shifts[None, :], [1, VEC])
        tile_x = tl.load(address, mask=mask, other=0.0, cache_modifier=CACHE)  # [BLOCK_P, K]
        tile_w = tl.load(blocks + slots.to(tl.int64) * (LINE * INNER), mask=slots >= 0, other=0.0)  # [K, WIDTH]
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
