// One product over gathered images: its plan, workspace and lists of blocks, and how slices and row blocks are dealt to
// threads. Included by csrc/cpu/kernels/conv_block.cpp only (see simd.h).
#pragma once

#include "cpu/conv_block_spmm.h"
#include "cpu/parallel.h"

namespace sk::SK_ISA {

// Packed weights that stay in the second-level cache while the positions pass.
constexpr int64_t kWeightBytes = 256 << 10;

// Regions of a workspace, one after the other; the base may be null to measure.
struct Arena {
    char* base;
    int64_t used;

    template <class T>
    T* take(int64_t count) {
        T* at = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += whole_lines(count * static_cast<int64_t>(sizeof(T)));
        return at;
    }
};

struct ProductSpace {
    float *weights, *packed, *thread;
    int64_t *x_at, *y_at;
    int64_t packed_floats, place_floats, thread_floats;  // of one thread
};

// Floats of the packed weights at the start of a thread's scratch.
static int64_t packed_chunk(const ConvProduct& a) { return a.pack && !a.early ? a.chunk * a.nb * a.kb : 0; }

// The plan of a product and its workspace; false where it has no positions.
static bool plan_product(const BlockIndex& w, const ConvShape& c, bool transposed, int64_t phase_h, int64_t phase_w,
                         int64_t threads, Arena& arena, ConvProduct& a, ProductSpace& space) {
    a.gather = gather_of(c, phase_h, phase_w);
    if (!a.gather.h.grid || !a.gather.w.grid || !c.batch) return false;
    a.taps = c.kernel_h * c.kernel_w;
    a.n = transposed ? w.in : w.out, a.k = transposed ? w.out : w.in;
    const int64_t kb = transposed ? w.bh : w.bw;
    a.nb = transposed ? w.bw : w.bh, a.kb = units(kb);
    a.n_blocks = ceil_div(a.n, a.nb), a.k_blocks = ceil_div(a.k, kb);
    a.direct = kUnit > 1 || (a.nb >= VLEN && kb >= 8);
    a.outer = a.nb == 1;
    a.pack = a.direct && (kUnit > 1 || !transposed || a.nb == VLEN);
    a.panel_width = (a.outer ? kOuterVectors : a.nb >= kWideOutputs ? 3 : 6) * VLEN;
    a.chunk = kUnit > 1 ? a.taps * a.k_blocks : larger(1, kWeightBytes / (4 * a.nb * a.kb));
    a.stride_n = transposed ? 1 : w.bw, a.stride_k = transposed ? w.bw : 1;
    a.slices = plan_slices(a.gather, a.k, a.direct ? a.kb : larger(a.kb, 32), w.nnzb * w.bh * w.bw, threads);
    a.early = a.pack && !a.slices.shared;
    a.ptr = arena.take<int32_t>(a.n_blocks + 1);
    a.idx = arena.take<int32_t>(w.nnzb), a.slot = arena.take<int32_t>(w.nnzb);
    const int64_t outer = a.outer ? 1 : 0;
    a.ptr_k = arena.take<int32_t>(outer * (a.taps * a.k_blocks + 1));
    a.idx_k = arena.take<int32_t>(outer * w.nnzb), a.slot_k = arena.take<int32_t>(outer * w.nnzb);
    a.distance = arena.take<int64_t>(a.taps * a.k_blocks);
    space.weights = arena.take<float>(a.early ? w.nnzb * w.bh * w.bw / kUnit : 0);
    const int64_t positions = a.slices.images * a.slices.rows * a.gather.w.grid;
    const int64_t copies = a.slices.shared ? 1 : threads;
    space.packed_floats = a.slices.bytes / 4, space.place_floats = (positions + 15) / 16 * 16;
    space.packed = arena.take<float>(copies * space.packed_floats);
    space.x_at = arena.take<int64_t>(copies * space.place_floats);
    space.y_at = arena.take<int64_t>(copies * space.place_floats);
    // Either packed weights and y in planes, or a panel, its outputs and y.
    space.thread_floats = a.direct
                              ? packed_chunk(a) + (kUnit > 1 ? 0 : positions * a.nb)
                              : (a.taps * a.k_blocks * a.kb + (a.outer ? a.n : kPanelOutputs) + a.n) * a.panel_width;
    space.thread_floats = (space.thread_floats + 15) / 16 * 16;
    space.thread = arena.take<float>(threads * space.thread_floats);
    return true;
}

// The lists of the gathered blocks, in counting order; cursor: ptr itself, shifted by one while it is filled.
static void list_blocks(const BlockIndex& w, bool transposed, const ConvProduct& a) {
    const int64_t columns = ceil_div(w.in, w.bw), row_blocks = ceil_div(w.out, w.bh);
    const auto append = [](int32_t* ptr, int32_t* idx, int32_t* slot, int64_t row, int64_t what, int32_t where) {
        const int32_t at = ptr[row + 1]++;
        idx[at] = static_cast<int32_t>(what), slot[at] = where;
    };
    // ptr[r + 1] is the place of the next block of row r: where row r starts, and in the end where r + 1 does.
    a.ptr[0] = 0;
    if (!transposed) {
        for (int64_t r = 0; r < row_blocks; ++r) a.ptr[r + 1] = w.crow[r];
        for (int64_t c = 0; c < columns; ++c)
            for (int64_t tap = 0; tap < a.taps; ++tap)
                for (int64_t e = w.ccol[tap * columns + c]; e < w.ccol[tap * columns + c + 1]; ++e)
                    append(a.ptr, a.idx, a.slot, w.row_t[e], tap * columns + c, w.slot_t[e]);
        if (!a.outer) return;
        for (int64_t c = 0; c <= a.taps * columns; ++c) a.ptr_k[c] = w.ccol[c];
        for (int64_t e = 0; e < w.nnzb; ++e) a.idx_k[e] = w.row_t[e], a.slot_k[e] = w.slot_t[e];
        return;
    }
    // Rows are column blocks of W, over all taps of the phase; a gathered block is a tap and a row block of W.
    for (int64_t c = 0; c < columns; ++c) {
        int32_t count = 0;
        for (int64_t tap = 0; tap < a.taps && c + 1 < columns; ++tap)
            if (has_tap(a.gather, tap)) count += w.ccol[tap * columns + c + 1] - w.ccol[tap * columns + c];
        if (!c) a.ptr[1] = 0;
        if (c + 1 < columns) a.ptr[c + 2] = a.ptr[c + 1] + count;
    }
    for (int64_t r = 0; r < row_blocks; ++r)
        for (int64_t e = w.crow[r]; e < w.crow[r + 1]; ++e) {
            const int64_t tap = w.col[e] / columns, c = w.col[e] % columns;
            if (has_tap(a.gather, tap)) append(a.ptr, a.idx, a.slot, c, tap * row_blocks + r, w.slot[e]);
        }
    if (!a.outer) return;
    int32_t count = 0;
    a.ptr_k[0] = 0;
    for (int64_t tap = 0; tap < a.taps; ++tap)
        for (int64_t r = 0; r < row_blocks; ++r) {
            for (int64_t e = w.crow[r]; e < w.crow[r + 1] && has_tap(a.gather, tap); ++e)
                if (w.col[e] / columns == tap) {
                    a.idx_k[count] = static_cast<int32_t>(w.col[e] % columns);
                    a.slot_k[count++] = w.slot[e];
                }
            a.ptr_k[tap * row_blocks + r + 1] = count;
        }
}

// The share of one of `threads` threads in a direct product over a shared slice: row blocks weigh as many blocks as
// they have, and where a share begins or ends inside one, its positions are divided.
static void direct_share(const ConvProduct& a, const Slice& s, const ProductSpace& space, int64_t positions,
                         int64_t thread, int64_t threads, float* scratch, float* planes) {
    const int64_t tile = a.nb == VLEN ? kLargest<true> : kLargest<false>;
    const int64_t tiles = ceil_div(positions, tile), total = (a.ptr[a.n_blocks] + a.n_blocks) * tiles;
    Ahead none;
    const int64_t from = total * thread / threads, to = total * (thread + 1) / threads;
    for (int64_t r = 0; r < a.n_blocks; ++r) {
        const int64_t weight = a.ptr[r + 1] - a.ptr[r] + 1, start = (a.ptr[r] + r) * tiles;
        const int64_t first = smaller(tiles, ceil_div(larger(0, from - start), weight));
        const int64_t stop = smaller(tiles, ceil_div(larger(0, to - start), weight));
        if (first < stop)
            direct_product(a, s, space.packed, space.x_at, space.y_at, r, first * tile, smaller(positions, stop * tile),
                           scratch, planes, none);
    }
}

// The lists, distances and output layout that a planned product reads.
static void prepare_product(const BlockIndex& w, bool transposed, ConvProduct& a, const ProductSpace& space) {
    const SlicePlan& p = a.slices;
    list_blocks(w, transposed, a);
    for (int64_t tap = 0; tap < a.taps; ++tap)
        for (int64_t j = 0; j < a.k_blocks && has_tap(a.gather, tap); ++j)
            a.distance[tap * a.k_blocks + j] = j * p.strip + tap_distance(a.gather, p, tap);
    a.weights = space.weights;
    const ImageStrides& d = a.dst_strides;
    a.dense = d.c == 1 && d.h == a.gather.w.grid * d.w && d.n == a.gather.h.grid * d.h;
    // An activation reads y again at once.
    a.past_caches = a.dense && a.epilogue.activation == kIdentity &&
                    streams(a.dst, d.w, a.gather.images * a.gather.h.grid * a.gather.w.grid, a.n);
}

// The source of slice i, to be asked for while the one before is computed; nothing where its channels are planes.
static Ahead source_of(const ConvProduct& a, int64_t i, int64_t slices) {
    const GatherAxis& h = a.gather.h;
    const ImageStrides& s = a.src_strides;
    if (i >= slices || !a.direct || s.c != 1) return {};
    const Slice next = slice_at(a.gather, a.slices, i);
    const int64_t first = larger(0, next.u * h.step + h.low);
    const int64_t rows = smaller(h.source, next.u * h.step + h.low + source_rows(h, next.rows)) - first;
    if (rows <= 0 || (next.images > 1 && s.n != h.source * s.h)) return {};
    const bool all = next.images > 1;  // whole images
    Ahead ahead = ahead_of(a.src + next.n * s.n + (all ? 0 : first * s.h), s.h, all ? next.images * h.source : rows,
                           (a.gather.w.source - 1) * s.w + a.k);
    const int64_t positions = next.images * next.rows * a.gather.w.grid;
    const bool pair = a.nb == VLEN;
    const int64_t tiles = positions / (pair ? kLargest<true> : kLargest<false>);
    // With every tile of a row block, or every block of a wide tile, as conv_tile asks.
    spread_over(ahead, tiles * (pair ? a.n_blocks : a.ptr[a.n_blocks] * ceil_div(a.nb, 2 * VLEN)));
    const int64_t steps = tiles * a.ptr[a.n_blocks] * a.kb * a.nb / (2 * VLEN);
    // Where a line comes to less than 4 steps, what is asked for arrives no sooner than packing would fetch it.
    if (ahead.rows * ceil_div(ahead.bytes, 64) * 4 > steps) ahead.rows = 0;
    return ahead;
}

// Every row of source images of a slice.
static void pack_slice(const Gather& g, const SlicePlan& p, const Slice& s, const element* src, const ImageStrides& at,
                       int64_t channels, float* packed) {
    const int64_t rows = source_rows(g.h, s.rows);
    for (int64_t n = 0; n < s.images; ++n)
        for (int64_t row = 0; row < rows; ++row) pack_row(g, p, s, n, row, src, at, channels, packed);
}

// All packed weights; called by every thread of a team.
static void pack_early(const ConvProduct& a, float* packed) {
    const int64_t block = a.nb * a.kb, blocks = a.ptr[a.n_blocks];
#pragma omp for schedule(static)
    for (int64_t e = 0; e < blocks; ++e)
        pack_weights(a.values + a.slot[e] * block * kUnit, a.stride_n, a.stride_k, a.nb, a.kb * kUnit,
                     packed + e * block);
}

static void run_product(const BlockIndex& w, bool transposed, ConvProduct& a, const ProductSpace& space,
                        [[maybe_unused]] int64_t threads) {
    const SlicePlan& p = a.slices;
    const int64_t columns = a.gather.w.grid;
    prepare_product(w, transposed, a, space);
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        const int64_t me = omp_get_thread_num();
        float* scratch = space.thread + me * space.thread_floats;
        float* planes = scratch + packed_chunk(a);
        if (a.early) pack_early(a, space.weights);
        if (p.shared) {
            const Slice s = slice_at(a.gather, p, 0);
            const int64_t positions = s.images * s.rows * columns;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < s.images * p.source_rows; ++i)
                pack_row(a.gather, p, s, i / p.source_rows, i % p.source_rows, a.src, a.src_strides, a.k, space.packed);
#pragma omp for schedule(static)
            for (int64_t row = 0; row < s.images * s.rows; ++row)
                place_rows(a, s, row, row + 1, space.x_at, space.y_at);
            if (a.direct) {
                direct_share(a, s, space, positions, me, omp_get_num_threads(), scratch, planes);
            }
#if !defined(__AVX512BF16__)
            else {
#pragma omp for schedule(static)
                for (int64_t q = 0; q < ceil_div(positions, a.panel_width); ++q)
                    panel_positions(a, s, space.packed, space.x_at, space.y_at, q * a.panel_width,
                                    smaller(positions, (q + 1) * a.panel_width), scratch);
            }
#endif
        } else {
            float* packed = space.packed + me * space.packed_floats;
            int64_t *x_at = space.x_at + me * space.place_floats, *y_at = space.y_at + me * space.place_floats;
            const int64_t slices = p.image_parts * p.row_parts, team = omp_get_num_threads();
            const int64_t stop = slices * (me + 1) / team;
            for (int64_t i = slices * me / team; i < stop; ++i) {
                const Slice s = slice_at(a.gather, p, i);
                Ahead next = source_of(a, i + 1, stop);
                const int64_t positions = s.images * s.rows * columns;
                pack_slice(a.gather, p, s, a.src, a.src_strides, a.k, packed);
                place_rows(a, s, 0, s.images * s.rows, x_at, y_at);
                if (a.direct) {
                    for (int64_t r = 0; r < a.n_blocks; ++r)
                        direct_product(a, s, packed, x_at, y_at, r, 0, positions, scratch, planes, next);
                }
#if !defined(__AVX512BF16__)
                else {
                    for (int64_t q = 0; q < positions; q += a.panel_width)
                        panel_positions(a, s, packed, x_at, y_at, q, smaller(positions, q + a.panel_width), scratch);
                }
#endif
            }
        }
        if (a.past_caches) end_stream();
    }
}

}  // namespace sk::SK_ISA
