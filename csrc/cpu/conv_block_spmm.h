// Y = gather(X) * W' over packed slices (conv_gather.h): the block-CSR convolution and its input gradient. Included by
// csrc/cpu/kernels/conv_block.cpp only (see simd.h).
//
// The tiles are those of block_spmm.h. A direct tile (wide, pair) has a pointer for every two positions, or for each
// where an image row has an odd number, so that they may lie in several image rows, and adds each block's distance to
// all of them. The panel and outer tiles read a panel of gathered rows [taps * channels][positions].
#pragma once

#include "cpu/activation.h"
#include "cpu/ahead.h"
#include "cpu/block_panel.h"
#include "cpu/block_spmm.h"
#include "cpu/conv_gather.h"

namespace sk::SK_ISA {

// One row block of a direct product, a chunk of its blocks.
struct ConvTile {
    const int64_t* distance;    // [taps * k_blocks]: of a gathered block from a position, floats
    const int32_t *idx, *slot;  // gathered block and slot of each; slot null: weights lie in order from `begin` on
    int64_t begin, end;
    const float* weights;
    int64_t block, ldw, kb;  // floats of a block, from one k (pair of k) to the next; k of a block
    const float* bias;       // of the row block, or null
    bool first;              // begins with the bias; else adds to y
    bool past_caches;        // y is written past the caches: aligned as streams() wants it
    int64_t n0, n1;          // outputs in either vector
    const float* x;          // packed
    int64_t step;            // floats from a position to the next one in its grid row
    element* y;
    const int64_t *x_at, *y_at;  // [positions]: where each position lies in x and y
    Ahead* next;
};

// Positions [q, q + MR), outputs [o, o + 2 VLEN) (wide) or all (pair) of the row block. SHARE neighbours have one
// pointer, so that the pointers of a large tile stay in registers.
template <int MR, int SHARE, bool PAIR, bool FETCH>
static void conv_tile(const ConvTile& t, int64_t q, int64_t o) {
    constexpr int kStep = PAIR ? 2 : 1, kBases = (MR + SHARE - 1) / SHARE;
    vfloat acc[MR][2];
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i) {
        element* y = t.y + t.y_at[q + i] + o;
        if (!t.past_caches) {
            __builtin_prefetch(y, 1);
            if (!PAIR) __builtin_prefetch(y + VLEN, 1);
        }
        if (PAIR) {
            acc[i][0] = acc[i][1] = zero();
        } else if (t.first) {
            acc[i][0] = t.bias ? load_first(t.bias + o, t.n0) : zero();
            acc[i][1] = t.bias && t.n1 ? load_first(t.bias + o + VLEN, t.n1) : zero();
        } else {
            acc[i][0] = read_first(y, t.n0);
            acc[i][1] = t.n1 ? read_first(y + VLEN, t.n1) : zero();
        }
    }
    const int64_t step = t.step, ldw = t.ldw;
    const float* x[kBases];
#pragma GCC unroll 14
    for (int b = 0; b < kBases; ++b) x[b] = t.x + t.x_at[q + b * SHARE];
    if (PAIR && MR == kLargest<PAIR>) ask(*t.next);
    for (int64_t e = t.begin; e < t.end; ++e) {
        const int64_t after = e + 1 < t.end ? e + 1 : t.begin;
        const float* w = t.weights + (t.slot ? t.slot[e] : e - t.begin) * t.block + o;
        const float* next_w = t.weights + (t.slot ? t.slot[after] : after - t.begin) * t.block + o;
        const float* next_x = x[0] + t.distance[t.idx[after]];
        int64_t here = t.distance[t.idx[e]];
        if (!PAIR && MR == kLargest<PAIR>) ask(*t.next);
        for (int64_t k = 0; k < t.kb; k += kStep, w += ldw, here += kStep) {
            if (FETCH) {
                // The first tile meets the weights far away, in blocks that no hardware prefetcher connects.
                __builtin_prefetch(next_w);
                __builtin_prefetch(next_w + VLEN);
                next_w += ldw;
            }
            if (k < MR * kStep) {
                __builtin_prefetch(next_x);
                if (!PAIR) __builtin_prefetch(next_x + VLEN);
                next_x += step;
            }
            const vfloat w0 = load(w), w1 = load(w + VLEN);
#pragma GCC unroll 14
            for (int i = 0; i < MR; ++i) {
                const float* at = x[i / SHARE] + (i % SHARE) * step + here;
                const vfloat xv = PAIR ? broadcast_pair(at) : spread(at);
                acc[i][0] = mac(xv, w0, acc[i][0]);
                acc[i][1] = mac(xv, w1, acc[i][1]);
            }
        }
    }
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i) {
        element* y = t.y + t.y_at[q + i] + o;
        if (PAIR) {
            const vfloat start = !t.first ? read_first(y, t.n0) : t.bias ? load_first(t.bias, t.n0) : zero();
            store_first(y, start + fold_pairs(acc[i][0], acc[i][1]), t.n0);
        } else if (t.past_caches) {
            stream(y, acc[i][0]), stream(y + VLEN, acc[i][1]);
        } else {
            store_first(y, acc[i][0], t.n0);
            if (t.n1) store_first(y + VLEN, acc[i][1], t.n1);
        }
    }
}

// Whether the positions [q, q + count) are pairs of neighbours in a grid row.
SK_INLINE bool paired(const ConvTile& t, int64_t q, int64_t count) {
    bool yes = true;
    for (int64_t i = q; i + 1 < q + count; i += 2) yes &= t.x_at[i + 1] - t.x_at[i] == t.step;
    return yes;
}

template <int MR, bool PAIR>
static void conv_rows(const ConvTile& t, int64_t q, int64_t stop, int64_t o) {
    bool fetch = MR == kLargest<PAIR>;
    for (; q + MR <= stop; q += MR, fetch = false) {
        // Wide tiles alone: 16x16, S=.75 takes 1.04 of the time with shared pointers (Zen 5).
        if constexpr (!PAIR && MR == kLargest<PAIR>) {
            if (!paired(t, q, MR))
                conv_tile<MR, 1, PAIR, true>(t, q, o);
            else if (fetch)
                conv_tile<MR, 2, PAIR, true>(t, q, o);
            else
                conv_tile<MR, 2, PAIR, false>(t, q, o);
        } else if (fetch) {
            conv_tile<MR, 1, PAIR, MR == kLargest<PAIR>>(t, q, o);
        } else {
            conv_tile<MR, 1, PAIR, false>(t, q, o);
        }
    }
    if constexpr (MR > 1) {
        constexpr int kNext = MR > 8 ? 8 : MR > 4 ? 4 : MR / 2;
        if (q < stop) conv_rows<kNext, PAIR>(t, q, stop, o);
    }
}

// Everything about one product: forward, or one stride phase of the input gradient.
struct ConvProduct {
    Gather gather;
    SlicePlan slices;
    int64_t taps, n, k, nb, kb, n_blocks, k_blocks;  // k in channels, kb in units
    bool direct, outer, pack, early;  // pack: weights are transposed, `early`: all of them before the slices
    bool dense;                       // grid positions lie in y one stride after the other, channels side by side
    bool past_caches;                 // y is written past the caches, see streams()
    int64_t panel_width;
    int64_t chunk;  // blocks whose weights a direct product reads, or packs, at a time; all of a row where y is bf16
    // The gathered blocks of each row block, sorted by channels and then by tap, so that the taps meet the same pixels.
    int32_t *ptr, *idx, *slot;
    int32_t *ptr_k, *idx_k, *slot_k;  // outer: the row blocks of each gathered block
    int64_t* distance;
    const float *values, *weights;  // weights: packed early
    int64_t stride_n, stride_k;
    const element* src;
    ImageStrides src_strides;
    Epilogue<element> epilogue = {nullptr, kIdentity, nullptr};
    element* dst;
    ImageStrides dst_strides;  // of the grid
};

#if !defined(__AVX512BF16__)

// Results y [positions, ldy] of grid positions [q0, q1) to their places in the channel planes of an image.
static void store_planes(const ConvProduct& a, const Slice& s, const float* y, int64_t ldy, int64_t q0, int64_t q1,
                         int64_t channel, int64_t channels, float* image) {
    const ImageStrides& d = a.dst_strides;
    const int64_t columns = a.gather.w.grid;
    // Rows that follow each other in memory are one run.
    const int64_t run = d.w == 1 && d.h == columns ? s.rows * columns : columns;
    for (int64_t q = q0, end; q < q1; q = end) {
        end = smaller(q1, (q / run + 1) * run);
        const int64_t row = q / columns;
        float* to = image + (s.n + row / s.rows) * d.n + channel * d.c + (s.u + row % s.rows) * d.h + q % columns * d.w;
        const float* from = y + (q - q0) * ldy;
        if (d.w == 1) {
            transpose(from, ldy, to, d.c, end - q, channels);
        } else {
            for (int64_t p = 0; p < end - q; ++p)
                for (int64_t c = 0; c < channels; ++c) to[p * d.w + c * d.c] = from[p * ldy + c];
        }
    }
}

// The epilogue of results y [positions, ldy] that are not at their places yet: finishes them and stores them there.
static void finish_planes(const ConvProduct& a, const Slice& s, float* y, int64_t ldy, int64_t q0, int64_t q1,
                          int64_t channel, int64_t channels) {
    const Epilogue<element>& e = a.epilogue;
    if (e.activation != kIdentity) {
        if (e.pre) store_planes(a, s, y, ldy, q0, q1, channel, channels, e.pre);
        activate(e.activation, y, nullptr, ldy, q1 - q0, channels);
    }
    store_planes(a, s, y, ldy, q0, q1, channel, channels, a.dst);
}

#endif

// The epilogue of results at their places, their channels side by side.
static void finish_rows(const ConvProduct& a, const int64_t* y_at, int64_t q0, int64_t q1, int64_t channel,
                        int64_t channels) {
    const Epilogue<element>& e = a.epilogue;
    if (e.activation == kIdentity) return;
    const int64_t run = a.dense ? q1 : a.gather.w.grid;
    for (int64_t q = q0, end; q < q1; q = end) {
        end = smaller(q1, (q / run + 1) * run);
        const int64_t at = y_at[q] + channel;
        activate(e.activation, a.dst + at, e.pre ? e.pre + at : nullptr, a.dst_strides.w, end - q, channels);
    }
}

// Where the positions of a slice's grid rows [first, stop) lie in the packed source and in y: the output itself, or
// rows of nb floats where it has planes.
static void place_rows(const ConvProduct& a, const Slice& s, int64_t first, int64_t stop, int64_t* x_at,
                       int64_t* y_at) {
    const int64_t columns = a.gather.w.grid;
    for (int64_t row = first; row < stop; ++row) {
        const int64_t i = row / s.rows, u = row % s.rows, start = row_start(a.gather, a.slices, i, u);
        const int64_t y = (s.n + i) * a.dst_strides.n + (s.u + u) * a.dst_strides.h;
        for (int64_t v = 0; v < columns; ++v) {
            const int64_t q = row * columns + v;
            x_at[q] = start + v * a.gather.w.step * a.slices.side;
            y_at[q] = a.dst_strides.c == 1 ? y + v * a.dst_strides.w : q * a.nb;
        }
    }
}

// Row block r at positions [q0, q1) of a slice; scratch holds a chunk of packed weights, planes y where the output has
// planes, which bf16 outputs have not.
static void direct_product(const ConvProduct& a, [[maybe_unused]] const Slice& s, const float* packed,
                           const int64_t* x_at, const int64_t* y_at, int64_t r, int64_t q0, int64_t q1, float* scratch,
                           [[maybe_unused]] float* planes, Ahead& next) {
    const bool pair = a.nb == VLEN;
    const int64_t block = a.nb * a.kb, real = smaller(a.nb, a.n - r * a.nb);
    ConvTile t;
    t.distance = a.distance, t.idx = a.idx, t.block = block, t.kb = a.kb, t.ldw = pair ? 2 * VLEN : a.nb;
    t.bias = a.epilogue.bias ? a.epilogue.bias + r * a.nb : nullptr;
    t.x = packed, t.x_at = x_at, t.y_at = y_at, t.y = a.dst + r * a.nb;
    t.step = a.gather.w.step * a.slices.side, t.next = &next;
#if !defined(__AVX512BF16__)
    const bool rows = a.dst_strides.c == 1;
    if (!rows) t.y = planes;
#endif
    const int64_t end = a.ptr[r + 1];
    t.begin = a.ptr[r];
    const bool whole = end - t.begin <= a.chunk;
    do {
        t.end = smaller(t.begin + a.chunk, end), t.first = t.begin == a.ptr[r];
        if (!a.pack) {
            t.weights = a.values, t.slot = a.slot;
        } else {
            t.slot = nullptr, t.weights = a.early ? a.weights + t.begin * block : scratch;
            for (int64_t e = t.begin; e < t.end && !a.early; ++e)
                pack_weights(a.values + a.slot[e] * block * kUnit, a.stride_n, a.stride_k, a.nb, a.kb * kUnit,
                             scratch + (e - t.begin) * block);
        }
        for (int64_t o = 0; o < real; o += pair ? VLEN : 2 * VLEN) {
            t.n0 = smaller(VLEN, real - o), t.n1 = pair ? 0 : larger(0, smaller(VLEN, real - o - VLEN));
            t.past_caches = a.past_caches && whole && t.n1 == VLEN;
            if (pair)
                conv_rows<kLargest<true>, true>(t, q0, q1, o);
            else
                conv_rows<kLargest<false>, false>(t, q0, q1, o);
        }
        t.begin = t.end;
    } while (t.begin < end);
#if !defined(__AVX512BF16__)
    if (!rows) return finish_planes(a, s, planes + q0 * a.nb, a.nb, q0, q1, r * a.nb, real);
#endif
    finish_rows(a, y_at, q0, q1, r * a.nb, real);
}

#if !defined(__AVX512BF16__)

// The rows that positions [q0, q1) multiply, transposed: [taps * k_blocks * kb][panel_width].
static void gather_panel(const ConvProduct& a, const float* packed, const int64_t* x_at, int64_t q0, int64_t q1,
                         float* panel) {
    const SlicePlan& p = a.slices;
    const int64_t columns = a.gather.w.grid, depth = a.k_blocks * a.kb;
    for (int64_t tap = 0; tap < a.taps; ++tap) {
        if (!has_tap(a.gather, tap)) continue;
        const float* from = packed + tap_distance(a.gather, p, tap);
        float* to = panel + tap * depth * a.panel_width;
        for (int64_t strip = 0; strip < p.strips; ++strip)
            for (int64_t q = q0, end; q < q1; q = end) {
                end = smaller(q1, (q / columns + 1) * columns);
                transpose(from + strip * p.strip + x_at[q], a.gather.w.step * p.side,
                          to + strip * p.side * a.panel_width + q - q0, a.panel_width, end - q,
                          smaller(p.side, depth - strip * p.side));
            }
    }
}

template <int NO, int NV>
static void panel_product(const SpmmOperands& a, const float* panel, float* out, float* y, int64_t rows) {
    panel_tiles<NO, NV>(a, panel, out, y, rows, 0, ceil_div(a.n, a.nb));
}

// All outputs at positions [q0, q1) <= panel_width of a slice; scratch: panel, outputs of a tile, y [panel_width][n].
static void panel_positions(const ConvProduct& a, const Slice& s, const float* packed, const int64_t* x_at,
                            const int64_t* y_at, int64_t q0, int64_t q1, float* scratch) {
    SpmmOperands b;
    b.n = a.n, b.k = a.taps * a.k_blocks * a.kb, b.nb = a.nb, b.kb = a.kb;
    b.ptr = a.ptr, b.idx = a.idx, b.slot = a.slot, b.ptr_k = a.ptr_k, b.idx_k = a.idx_k, b.slot_k = a.slot_k;
    b.weights = a.values, b.stride_n = a.stride_n, b.stride_k = a.stride_k, b.bias = a.epilogue.bias;
    float* panel = scratch;
    float* out = panel + b.k * a.panel_width;
    float* rows = out + (a.outer ? a.n : kPanelOutputs) * a.panel_width;
    gather_panel(a, packed, x_at, q0, q1, panel);
    b.ldy = a.dense ? a.dst_strides.w : a.n;
    float* y = a.dense ? a.dst + y_at[q0] : rows;
    if (a.outer)
        outer_tiles(b, panel, out, y, q1 - q0);
    else if (a.nb >= kWideOutputs)
        panel_product<kWideOutputs, 3>(b, panel, out, y, q1 - q0);
    else
        panel_product<4, 6>(b, panel, out, y, q1 - q0);
    if (a.dst_strides.c != 1) return finish_planes(a, s, rows, a.n, q0, q1, 0, a.n);
    for (int64_t q = q0; q < q1 && !a.dense; ++q)
        for (int64_t c = 0; c < a.n; ++c) a.dst[y_at[q] + c] = rows[(q - q0) * a.n + c];
    finish_rows(a, y_at, q0, q1, 0, a.n);
}

#endif

}  // namespace sk::SK_ISA
