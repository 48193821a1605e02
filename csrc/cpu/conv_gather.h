// How a convolution's products gather their source images: which source pixel a grid position meets under a tap, and
// slices of zero-bordered images packed in strips of channels. Included by csrc/cpu/kernels/conv_*.cpp only (see
// simd.h).
//
// A product runs over a grid of positions (the output pixels, or the input pixels of one stride phase). Position u of
// an axis meets source coordinate u * step + offset(tap). A slice holds the source pixels of some grid rows as
//     [strips of channels][images][source_rows][width][side]
// with zeros outside the image, so that a tap is one distance for every position.
#pragma once

#include "cpu/bf16.h"
#include "cpu/block_sddmm.h"

namespace sk::SK_ISA {

// Half of the smallest second-level cache that matters: what one thread's slice may take.
constexpr int64_t kConvSliceBytes = 512 << 10;
// A second-level cache.
constexpr int64_t kConvL2Bytes = 1 << 20;
// Images that fit into this, a part of the third-level cache, are one slice that all threads share.
constexpr int64_t kConvSharedBytes = 4 << 20;
// Positions of a slice, unless one row has more: bounds its tables.
constexpr int64_t kConvPositions = 4096;

// One axis of the gather.
struct GatherAxis {
    int64_t grid, source, step;                    // grid positions, source pixels, source pixels a grid step
    int64_t kernel, stride, pad, dilation, phase;  // phase < 0: forward; else grid position u is u * stride + phase
    int64_t low, high;                             // of the offsets of all taps
};

// The offset of tap r; false where no position of this phase meets it.
static bool tap_offset(const GatherAxis& a, int64_t r, int64_t* offset) {
    if (a.phase < 0) {
        *offset = r * a.dilation - a.pad;
        return true;
    }
    const int64_t distance = a.phase + a.pad - r * a.dilation;
    *offset = distance / a.stride;
    return distance % a.stride == 0;
}

static GatherAxis gather_axis(int64_t size, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation,
                              int64_t phase) {
    GatherAxis a = {out, size, stride, kernel, stride, pad, dilation, phase, 0, -1};
    if (phase >= 0) a.grid = size > phase ? ceil_div(size - phase, stride) : 0, a.source = out, a.step = 1;
    bool any = false;
    for (int64_t r = 0, offset; r < kernel; ++r)
        if (tap_offset(a, r, &offset)) {
            a.low = any ? smaller(a.low, offset) : offset;
            a.high = any ? larger(a.high, offset) : offset;
            any = true;
        }
    return a;
}

struct Gather {
    GatherAxis h, w;
    int64_t images;
};

// The gather of the forward product and the weight gradient (phases -1), or of the input gradient's phase.
static Gather gather_of(const ConvShape& c, int64_t phase_h, int64_t phase_w) {
    Gather g = {gather_axis(c.height, c.out_height, c.kernel_h, c.stride_h, c.pad_h, c.dilation_h, phase_h),
                gather_axis(c.width, c.out_width, c.kernel_w, c.stride_w, c.pad_w, c.dilation_w, phase_w), c.batch};
    // Without a tap along one axis there is none at all, and nothing to pack.
    if (g.w.high < g.w.low) g.h.low = 0, g.h.high = -1;
    return g;
}

// Workspace regions start on cache lines.
SK_INLINE int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct SlicePlan {
    bool shared;                     // one slice for everybody
    int64_t side, strips;            // units a strip (see bf16.h: channels, or pairs of them), strips
    int64_t images, rows;            // at most, of a slice: either one image or whole ones
    int64_t image_parts, row_parts;  // slices
    int64_t source_rows, width;      // packed rows of an image, packed columns
    int64_t strip;                   // floats from one strip to the next
    int64_t bytes;                   // of a packed slice
};

// Source rows under `rows` grid rows; none where no tap exists.
static int64_t source_rows(const GatherAxis& h, int64_t rows) {
    return h.high < h.low || !rows ? 0 : (rows - 1) * h.step + h.high - h.low + 1;
}

static SlicePlan plan_slices(const Gather& g, int64_t channels, int64_t side, int64_t weight_floats, int64_t threads) {
    SlicePlan p;
    p.side = side, p.strips = ceil_div(units(channels), side);
    p.width = larger(1, (g.w.grid - 1) * g.w.step + g.w.high - g.w.low + 1);
    const int64_t row_bytes = 4 * p.strips * side * p.width;
    const int64_t image_bytes = larger(1, source_rows(g.h, g.h.grid)) * row_bytes;
    const int64_t pixels = g.h.grid * g.w.grid;
    // A kernel of one meets a pixel once a row block: where images that no second-level cache holds outweigh the
    // weights, every thread reads its part of them and all weights (672 channels, 16 x 16, S=.9: 1.2 instead of 1.5
    // ms).
    const bool few = g.h.kernel * g.w.kernel == 1 && g.images * image_bytes > larger(4 * weight_floats, kConvL2Bytes);
    // Slices are cut between grid rows: of fewer rows than threads some would have none.
    const bool narrow = g.images * g.h.grid < threads;
    p.shared = narrow || (!few && g.images * image_bytes <= kConvSharedBytes && g.images * pixels <= kConvPositions);
    p.images = g.images, p.rows = g.h.grid;
    if (!p.shared) {
        const int64_t limit = smaller(kConvSliceBytes / image_bytes, kConvPositions / larger(1, pixels));
        p.images = larger(1, limit);
        if (limit < 1) {
            int64_t rows = 1;
            while (rows < g.h.grid && source_rows(g.h, rows + 1) * row_bytes <= kConvSliceBytes &&
                   (rows + 1) * g.w.grid <= kConvPositions)
                ++rows;
            p.rows = rows;
        }
        // Work for every thread, in equal parts.
        while (p.images > 1 && ceil_div(g.images, p.images) < threads) p.images = ceil_div(p.images, 2);
        while (p.rows > 1 && ceil_div(g.images, p.images) * ceil_div(g.h.grid, p.rows) < threads)
            p.rows = ceil_div(p.rows, 2);
        p.images = ceil_div(g.images, ceil_div(g.images, p.images));
        p.rows = ceil_div(g.h.grid, ceil_div(g.h.grid, p.rows));
    }
    p.image_parts = p.images ? ceil_div(g.images, p.images) : 0;
    p.row_parts = p.rows ? ceil_div(g.h.grid, p.rows) : 0;
    p.source_rows = source_rows(g.h, p.rows);
    // One cache line more than it holds, lest all strips start in the same sets.
    p.strip = (p.images * p.source_rows * p.width * side + 15) / 16 * 16 + 16;
    p.bytes = whole_lines(4 * p.strips * p.strip);
    return p;
}

// Where a tap lies in a slice, floats behind the position's own place; only for taps that exist.
static int64_t tap_distance(const Gather& g, const SlicePlan& p, int64_t tap) {
    int64_t dh = 0, dw = 0;
    tap_offset(g.h, tap / g.w.kernel, &dh), tap_offset(g.w, tap % g.w.kernel, &dw);
    return ((dh - g.h.low) * p.width + dw - g.w.low) * p.side;
}

static bool has_tap(const Gather& g, int64_t tap) {
    int64_t offset;
    return tap_offset(g.h, tap / g.w.kernel, &offset) && tap_offset(g.w, tap % g.w.kernel, &offset);
}

// One slice: images [n, n + images) x grid rows [u, u + rows).
struct Slice {
    int64_t n, images, u, rows;
};

static Slice slice_at(const Gather& g, const SlicePlan& p, int64_t i) {
    const int64_t n = i / p.row_parts * p.images, u = i % p.row_parts * p.rows;
    return {n, smaller(p.images, g.images - n), u, smaller(p.rows, g.h.grid - u)};
}

// Where grid row (image i, row u) of a slice starts in its strips.
static int64_t row_start(const Gather& g, const SlicePlan& p, int64_t i, int64_t u) {
    return (i * p.source_rows + u * g.h.step) * p.width * p.side;
}

static void zero_pixels(float* dst, int64_t strip, int64_t strips, int64_t floats) {
    for (int64_t s = 0; s < strips; ++s, dst += strip) {
        int64_t j = 0;
        for (; j + VLEN <= floats; j += VLEN) store(dst + j, zero());
        for (; j < floats; ++j) dst[j] = 0;
    }
}

// Pixels [0, count) of one source row into strips at dst.
#if defined(__AVX512BF16__)

static void pack_pixels(const element* src, const ImageStrides& s, int64_t count, int64_t channels, int64_t side,
                        float* dst, int64_t strip) {
    for (int64_t p = 0; p < count; ++p, src += s.w, dst += side) {
        float* to = dst;
        for (int64_t c = 0; c < channels; c += kUnit * side, to += strip) {
            const int64_t real = smaller(kUnit * side, channels - c);
            pack_row(src + c, to, real);
            for (int64_t j = units(real); j < side; ++j) to[j] = 0;
        }
    }
}

#else

static void pack_pixels(const float* src, const ImageStrides& s, int64_t count, int64_t channels, int64_t side,
                        float* dst, int64_t strip) {
    if (s.c == 1) return pack_strips(src, s.w, count, channels, side, dst, strip);
    for (int64_t c = 0; c < channels; c += side, dst += strip) {
        const int64_t real = smaller(side, channels - c);
        transpose(src + c * s.c, s.c, dst, side, real, count);
        if (real < side)
            for (int64_t p = 0; p < count; ++p)
                for (int64_t j = real; j < side; ++j) dst[p * side + j] = 0;
    }
}

#endif

// Packed row `row` of image i of a slice.
static void pack_row(const Gather& g, const SlicePlan& p, const Slice& slice, int64_t i, int64_t row,
                     const element* src, const ImageStrides& s, int64_t channels, float* packed) {
    float* dst = packed + (i * p.source_rows + row) * p.width * p.side;
    const int64_t h = slice.u * g.h.step + g.h.low + row;
    if (h < 0 || h >= g.h.source) return zero_pixels(dst, p.strip, p.strips, p.width * p.side);
    const int64_t left = smaller(p.width, larger(0, -g.w.low));
    const int64_t stop = larger(left, smaller(p.width, g.w.source - g.w.low));
    if (left) zero_pixels(dst, p.strip, p.strips, left * p.side);
    if (stop > left)
        pack_pixels(src + (slice.n + i) * s.n + h * s.h + (left + g.w.low) * s.w, s, stop - left, channels, p.side,
                    dst + left * p.side, p.strip);
    if (stop < p.width) zero_pixels(dst + stop * p.side, p.strip, p.strips, (p.width - stop) * p.side);
}

}  // namespace sk::SK_ISA
