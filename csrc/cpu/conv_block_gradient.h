// dW[block] = dY' * gather(X) over packed slices (conv_gather.h) with the tiles of block_sddmm.h: the weight gradient
// of the block-CSR convolution. Included by csrc/cpu/kernels/conv_block.cpp only (see simd.h).
#pragma once

#include "cpu/conv_block_product.h"

namespace sk::SK_ISA {

// The weight gradient: dY and X packed by slices, X with its border; see block_sddmm.h for A and B.
struct ConvSddmmPlan {
    Gather gather;
    SlicePlan slices;  // of X
    bool thin, swapped;
    int64_t taps, columns, row_blocks;
    int64_t parts;                // threads with a gradient of their own, to be added up
    int64_t lines, dy_strip;      // grid rows of a slice at most; floats from one strip of dY to the next
    int64_t *strip_x, *strip_dy;  // [taps * columns], [row_blocks]: B's or A's place for each block
    float *partials, *x, *dy, *spare;
    int64_t *x_line, *dy_line;
    int64_t partial_floats, x_floats, dy_floats, spare_floats, line_count;
};

static ConvSddmmPlan plan_conv_sddmm(const BlockIndex& w, const ConvShape& c, int64_t threads, Arena& arena) {
    ConvSddmmPlan p;
    p.gather = gather_of(c, -1, -1);
    p.slices = plan_slices(p.gather, w.in, w.bw, w.nnzb * w.bh * w.bw, threads);
    p.thin = smaller(w.bh, w.bw) == 1 && larger(w.bh, w.bw) >= VLEN;
    p.swapped = p.thin ? w.bh == 1 : w.bw == 1;
    p.taps = c.kernel_h * c.kernel_w, p.columns = ceil_div(w.in, w.bw), p.row_blocks = ceil_div(w.out, w.bh);
    const int64_t copies = p.slices.shared ? 1 : threads;
    p.partial_floats = (w.nnzb * w.bh * w.bw + 15) / 16 * 16;
    p.parts = p.slices.shared ? 1 : smaller(threads, p.slices.image_parts * p.slices.row_parts);
    p.lines = p.slices.images * p.slices.rows;
    p.dy_strip = strip_size(p.lines * p.gather.w.grid, w.bh);
    p.strip_x = arena.take<int64_t>(p.taps * p.columns), p.strip_dy = arena.take<int64_t>(p.row_blocks);
    p.partials = arena.take<float>((larger(1, p.parts) - 1) * p.partial_floats);
    p.x_floats = p.slices.bytes / 4, p.dy_floats = p.row_blocks * p.dy_strip;
    p.x = arena.take<float>(copies * p.x_floats), p.dy = arena.take<float>(copies * p.dy_floats);
    p.line_count = (p.lines + 7) / 8 * 8;
    p.x_line = arena.take<int64_t>(copies * p.line_count), p.dy_line = arena.take<int64_t>(copies * p.line_count);
    p.spare_floats = (w.bh * w.bw + 15) / 16 * 16;
    p.spare = arena.take<float>(threads * p.spare_floats);
    return p;
}

static int64_t sddmm_workspace(const BlockIndex& w, const ConvShape& c, int64_t threads) {
    Arena arena = {nullptr, 0};
    plan_conv_sddmm(w, c, threads, arena);
    return arena.used;
}

// Blocks [begin, end) of the index that leads, for one packed slice.
static void conv_sddmm_blocks(const BlockIndex& w, const ConvSddmmPlan& p, const Slice& s, int64_t begin, int64_t end,
                              const float* x, const float* dy, const int64_t* x_line, const int64_t* dy_line,
                              float* out, bool accumulate, float* spare) {
    SddmmOperands o;
    o.ha = p.swapped ? w.bw : w.bh, o.hb = p.swapped ? w.bh : w.bw;
    o.ptr = p.swapped ? w.ccol : w.crow, o.idx = p.swapped ? w.row_t : w.col, o.slot = p.swapped ? w.slot_t : w.slot;
    o.out = out, o.strip_b = p.swapped ? p.strip_dy : p.strip_x, o.first = o.strip = 0;
    const int64_t columns = p.gather.w.grid, x_step = p.gather.w.step * w.bw;
    SddmmPositions at;
    at.lines = s.images * s.rows, at.length = columns;
    // The strips of a few lines, 16 to 24 KiB, stay in the first-level cache while a tile's other rows pass.
    at.chunk = larger(1, 128 / columns);
    at.a_line = p.swapped ? x_line : dy_line, at.b_line = p.swapped ? dy_line : x_line;
    at.a_step = p.swapped ? x_step : w.bh, at.b_step = p.swapped ? w.bh : x_step;
    const int64_t rows = p.swapped ? p.taps * p.columns : p.row_blocks;
    const float *a = p.swapped ? x : dy, *b = p.swapped ? dy : x;
    const int64_t* strip_a = p.swapped ? p.strip_x : p.strip_dy;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t e0 = larger(begin, o.ptr[r]), e1 = smaller(end, o.ptr[r + 1]);
        if (e0 < e1) sddmm_blocks(o, a + strip_a[r], b, e0, e1, at, accumulate, spare);
    }
}

// Adds the gradients of the parts to that of the first; called by every thread of a team.
static void add_partials(const ConvSddmmPlan& p, int64_t size, float* dvalues) {
    if (p.parts <= 1) return;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < size; i += VLEN) {
        const int64_t n = smaller(VLEN, size - i);
        vfloat sum = load_first(dvalues + i, n);
        for (int64_t part = 1; part < p.parts; ++part)
            sum += load_first(p.partials + (part - 1) * p.partial_floats + i, n);
        store_first(dvalues + i, sum, n);
    }
}

// Where the taps of X and the strips of dY lie in packed slices.
static void place_strips(const ConvSddmmPlan& p) {
    for (int64_t tap = 0; tap < p.taps; ++tap)
        for (int64_t j = 0; j < p.columns; ++j)
            p.strip_x[tap * p.columns + j] = j * p.slices.strip + tap_distance(p.gather, p.slices, tap);
    for (int64_t r = 0; r < p.row_blocks; ++r) p.strip_dy[r] = r * p.dy_strip;
}

// Grid row `line` of a slice of dY into its strips, and where it lies in those of X and dY.
static void pack_line(const BlockIndex& w, const ConvSddmmPlan& p, const Slice& s, int64_t line, const float* dy,
                      const ImageStrides& d, float* packed, int64_t* x_line, int64_t* dy_line) {
    const int64_t n = line / s.rows, u = line % s.rows;
    x_line[line] = row_start(p.gather, p.slices, n, u), dy_line[line] = line * p.gather.w.grid * w.bh;
    pack_pixels(dy + (s.n + n) * d.n + (s.u + u) * d.h, d, p.gather.w.grid, w.out, w.bh, packed + dy_line[line],
                p.dy_strip);
}

static void sddmm(const BlockIndex& w, const ConvShape& c, const float* dy, const ImageStrides& dy_strides,
                  const float* x, const ImageStrides& x_strides, float* dvalues, int64_t threads, void* workspace) {
    Arena arena = {static_cast<char*>(workspace), 0};
    const ConvSddmmPlan p = plan_conv_sddmm(w, c, threads, arena);
    const int64_t size = w.nnzb * w.bh * w.bw;
    if (!c.batch) {
        for (int64_t i = 0; i < size; ++i) dvalues[i] = 0;
        return;
    }
    place_strips(p);
    const int64_t slices = p.slices.image_parts * p.slices.row_parts;
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
        float* spare = p.spare + me * p.spare_floats;
        if (p.slices.shared) {
            const Slice s = slice_at(p.gather, p.slices, 0);
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < s.images * p.slices.source_rows; ++i)
                pack_row(p.gather, p.slices, s, i / p.slices.source_rows, i % p.slices.source_rows, x, x_strides, w.in,
                         p.x);
#pragma omp for schedule(static)
            for (int64_t line = 0; line < s.images * s.rows; ++line)
                pack_line(w, p, s, line, dy, dy_strides, p.dy, p.x_line, p.dy_line);
            conv_sddmm_blocks(w, p, s, w.nnzb * me / team, w.nnzb * (me + 1) / team, p.x, p.dy, p.x_line, p.dy_line,
                              dvalues, false, spare);
        } else {
#pragma omp for schedule(static, 1)
            for (int64_t part = 0; part < p.parts; ++part) {
                float* out = part ? p.partials + (part - 1) * p.partial_floats : dvalues;
                float *x_packed = p.x + me * p.x_floats, *dy_packed = p.dy + me * p.dy_floats;
                int64_t *x_line = p.x_line + me * p.line_count, *dy_line = p.dy_line + me * p.line_count;
                const int64_t first = slices * part / p.parts;
                for (int64_t i = first; i < slices * (part + 1) / p.parts; ++i) {
                    const Slice s = slice_at(p.gather, p.slices, i);
                    pack_slice(p.gather, p.slices, s, x, x_strides, w.in, x_packed);
                    for (int64_t line = 0; line < s.images * s.rows; ++line)
                        pack_line(w, p, s, line, dy, dy_strides, dy_packed, x_line, dy_line);
                    conv_sddmm_blocks(w, p, s, 0, w.nnzb, x_packed, dy_packed, x_line, dy_line, out, i > first, spare);
                }
            }
            add_partials(p, size, dvalues);
        }
    }
    clear_padding(w, p.taps, dvalues);
}

}  // namespace sk::SK_ISA
