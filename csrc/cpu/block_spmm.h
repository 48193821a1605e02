// Y[P, n] = X[P, k] * W' for a block-CSR W' [n, k] with blocks [nb, kb]: the forward product and, through the
// transposed index, the input gradient. Included by csrc/cpu/kernels/linear_block.cpp only (see simd.h).
//
// Three register tilings, chosen by the block's sides:
//
//   wide (nb >= 2 VLEN, kb >= 8)   lanes = outputs; W' packed [kb][nb]; 14 rows x 2 vectors; x broadcast
//   pair (nb == VLEN, kb >= 8)     lanes = VLEN / 2 outputs x 2 neighbours in k, W' packed [kb / 2][nb][2], so that a
//                                  broadcast of two x feeds two vectors here, too; even and odd k meet at the end
//   panel (all others, nb > 1)   lanes = positions; X transposed to panels [k][NV * VLEN], W' broadcast
//   outer (nb == 1)               as panel, but block by block of k into a panel of Y: an output alone has too little
//                                 to do with an x it loads
//
// wide and pair are `direct`: they read rows of X, packed a slice at a time; panel and outer are in block_panel.h. An
// output's sum runs over its row's blocks in index order, whatever the tile, the tail or the thread.
#pragma once

#include "cpu/ahead.h"
#include "cpu/bf16.h"

namespace sk::SK_ISA {

// Rows of a direct tile: as many as leave room for one row of W' and a broadcast. Wide tiles of AVX-512 spare two more
// (bf16, S=.5, Zen 5: 475 GFLOP/s instead of 455); pair tiles spill them.
constexpr int kRows = SK_VLEN == 16 ? 12 : 6, kWideRows = SK_VLEN == 16 ? 14 : 6;
template <bool PAIR>
constexpr int kLargest = PAIR ? kRows : kWideRows;
// Outputs of a panel tile with 3 vectors of positions.
constexpr int kWideOutputs = SK_VLEN == 16 ? 8 : 4;
// Outputs that a panel collects before it transposes them into y, so that y is written by whole cache lines.
constexpr int64_t kPanelOutputs = 64;
// Positions of an outer panel, and blocks that share its x.
constexpr int kOuterVectors = 4, kOuterBlocks = SK_VLEN == 16 ? 4 : 2;

// One orientation of a block-CSR product, what the tiles read.
struct SpmmOperands {
    int64_t n, k, nb, kb;                   // W' [n, k] in blocks [nb, kb]
    const int32_t *ptr, *idx, *slot;        // row pointers, column blocks; slot null: weights lie in index order
    const int32_t *ptr_k, *idx_k, *slot_k;  // the other orientation: pointers of the column blocks, row blocks
    const float* weights;                   // panel: element (i, k) of a block at i * stride_n + k * stride_k
    int64_t stride_n, stride_k;
    const float* bias;  // [n] or null
    const element* x;   // [P, k], row stride ldx
    int64_t ldx;
    element* y;  // [P, n], row stride ldy
    int64_t ldy;
    bool past_caches = false;  // y is written past the caches: aligned as streams() wants it
};

// Whether a matrix of `rows` rows of `cols` is better written past the caches: it is several times the second-level
// one, so that its lines would be fetched from far away, only to be overwritten, and pushed out again. With the next
// pass over it, 1024 x 1024 fp32 at S=.9 then takes 0.96 of the time and 4096 x 1024 0.85 (Zen 5); half of that
// size, 1.1.
[[maybe_unused]] static bool streams(const element* y, int64_t ld, int64_t rows, int64_t cols) {
    constexpr int64_t kSize = sizeof(element), kLine = 64;
    const bool aligned = reinterpret_cast<uintptr_t>(y) % kLine == 0 && ld * kSize % kLine == 0;
    return SK_VLEN >= 8 && aligned && rows * cols * kSize >= int64_t{4} << 20;
}

// Stores a whole vector past the caches.
SK_INLINE void stream(element* p, vfloat v) {
#if defined(__AVX512BF16__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(v));
#elif defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, (__m256)v);
#else
    store(p, v);
#endif
}

// Lets other threads see what this one has streamed.
SK_INLINE void end_stream() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

typedef int64_t vlong __attribute__((vector_size(4 * SK_VLEN), may_alias));
typedef int64_t long_u __attribute__((aligned(4), may_alias));

// Neighbouring floats x[0], x[1] in every pair of lanes.
SK_INLINE vfloat broadcast_pair(const float* x) {
    return reinterpret_cast<vfloat>(vlong{} + *reinterpret_cast<const long_u*>(x));
}

// How far ahead in floats a pair tile asks for its weights, which it reads as one stream: 1.4 times as fast where they
// come from the third-level cache (16x16, K=2048, S=.5, Zen 5).
constexpr int64_t kStream = 2048;

// acc += x[MR rows, kb] * w[kb, 2 vectors], in steps of one k (wide) or two (pair).
template <int MR, bool PAIR, bool FETCH>
SK_INLINE void direct_block(vfloat (&acc)[MR][2], const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t kb,
                            const float* next) {
    constexpr int kStep = PAIR ? 2 : 1;
    // Three rows share a base register: base, base + ldx, base + 2 * ldx are addressing modes. One step an iteration:
    // an unrolled loop needs a register for each offset of each row.
    constexpr int kBases = (MR + 2) / 3;
    const float* base[kBases];
#pragma GCC unroll 5
    for (int b = 0; b < kBases; ++b) base[b] = x + 3 * b * ldx;
    for (int64_t k = 0; k < kb; k += kStep, w += ldw) {
        if (PAIR) {
            __builtin_prefetch(w + kStream);
            __builtin_prefetch(w + kStream + VLEN);
        }
        if (FETCH) {
            __builtin_prefetch(next + k * ldw);
            __builtin_prefetch(next + k * ldw + VLEN);
        }
        const vfloat w0 = load(w), w1 = load(w + VLEN);
#pragma GCC unroll 14
        for (int i = 0; i < MR; ++i) {
            const float* at = base[i / 3] + (i % 3) * ldx + k;
            const vfloat xv = PAIR ? broadcast_pair(at) : spread(at);
            acc[i][0] = mac(xv, w0, acc[i][0]);
            acc[i][1] = mac(xv, w1, acc[i][1]);
        }
    }
}

// The sums of neighbouring lanes of a and b.
SK_INLINE vfloat fold_pairs(vfloat a, vfloat b) {
#if SK_VLEN == 16
#define SK_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define SK_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif SK_VLEN == 8
#define SK_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define SK_ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define SK_EVEN 0, 2, 4, 6
#define SK_ODD 1, 3, 5, 7
#endif
    return __builtin_shufflevector(a, b, SK_EVEN) + __builtin_shufflevector(a, b, SK_ODD);
#undef SK_EVEN
#undef SK_ODD
}

// MR positions x the outputs [o, o + 2 VLEN) (wide) or all outputs (pair) of row block r. The largest tiles ask for
// what comes next: wide ones with every block, pair ones, which have no register to spare in there, once.
template <int MR, bool PAIR, bool FETCH>
static void direct_tile(const SpmmOperands& a, const float* x, int64_t ldx, element* y, int64_t r, int64_t o,
                        Ahead& next) {
    if (PAIR && MR == kLargest<PAIR>) ask(next);
    const int64_t first = r * a.nb + o;
    const int64_t n0 = smaller(a.n - first, VLEN), n1 = PAIR ? 0 : larger(0, smaller(a.n - first - VLEN, VLEN));
    if (n0 <= 0) return;
    const vfloat bias0 = a.bias ? load_first(a.bias + first, n0) : zero();
    const vfloat bias1 = a.bias && n1 ? load_first(a.bias + first + VLEN, n1) : zero();
    // The lines of y come from far away, too: asked for now, they are there when the sums are (K=1024, S=.9: 165 GF/s
    // instead of 134).
    for (int i = 0; i < MR && !a.past_caches; ++i) {
        __builtin_prefetch(y + first + i * a.ldy, 1);
        if (!PAIR) __builtin_prefetch(y + first + VLEN + i * a.ldy, 1);
    }
    vfloat acc[MR][2];
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i) acc[i][0] = PAIR ? zero() : bias0, acc[i][1] = PAIR ? zero() : bias1;
    const int64_t block = a.nb * a.kb, ldw = PAIR ? 2 * VLEN : a.nb;
    const int64_t begin = a.ptr[r], end = a.ptr[r + 1];
    // Only the last block of a sorted row can stick out of W'.
    const bool ragged = begin < end && (a.idx[end - 1] + 1) * a.kb > a.k;
    for (int64_t e = begin; e < end - ragged; ++e) {
        const float* w = a.weights + (a.slot ? a.slot[e] : e) * block + o;
        const int64_t after = e + 1 < end ? e + 1 : begin;
        const float* w_after = a.weights + (a.slot ? a.slot[after] : after) * block + o;
        if (!PAIR && MR == kLargest<PAIR>) ask(next);
        direct_block<MR, PAIR, FETCH>(acc, x + a.idx[e] * a.kb, ldx, w, ldw, a.kb, w_after);
    }
    if (ragged) {
        const int64_t e = end - 1, k = a.idx[e] * a.kb, kb = a.k - k, whole = PAIR ? kb & ~1 : kb;
        const float* w = a.weights + (a.slot ? a.slot[e] : e) * block + o;
        direct_block<MR, PAIR, false>(acc, x + k, ldx, w, ldw, whole, w);
        if (whole < kb) {
#pragma GCC unroll 14
            for (int i = 0; i < MR; ++i) {
                // The second of this pair lies behind the row.
                const float last[2] = {x[i * ldx + a.k - 1], 0.0f};
                acc[i][0] = mac(broadcast_pair(last), load(w + whole * VLEN), acc[i][0]);
                acc[i][1] = mac(broadcast_pair(last), load(w + whole * VLEN + VLEN), acc[i][1]);
            }
        }
    }
    y += first;
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i, y += a.ldy) {
        const vfloat y0 = PAIR ? fold_pairs(acc[i][0], acc[i][1]) + bias0 : acc[i][0];
        if (n0 + n1 < (PAIR ? VLEN : 2 * VLEN)) {
            store_first(y, y0, n0);
            if (!PAIR) store_first(y + VLEN, acc[i][1], n1);
        } else if (a.past_caches) {
            stream(y, y0);
            if (!PAIR) stream(y + VLEN, acc[i][1]);
        } else {
            store(y, y0);
            if (!PAIR) store(y + VLEN, acc[i][1]);
        }
    }
}

// All of `rows` positions, the largest tile first.
template <int MR, bool PAIR>
static void direct_rows(const SpmmOperands& a, const float* x, int64_t ldx, element* y, int64_t rows, int64_t r,
                        int64_t o, Ahead& next) {
    // The first tile of a slice meets the weights far away, in blocks that no hardware prefetcher connects.
    constexpr bool kFetch = !PAIR && MR == kLargest<PAIR>;
    if (kFetch && rows >= MR) {
        direct_tile<MR, PAIR, kFetch>(a, x, ldx, y, r, o, next);
        rows -= MR, x += MR * ldx, y += MR * a.ldy;
    }
    for (; rows >= MR; rows -= MR, x += MR * ldx, y += MR * a.ldy)
        direct_tile<MR, PAIR, false>(a, x, ldx, y, r, o, next);
    if constexpr (MR > 1) {
        constexpr int kNext = MR > 8 ? 8 : MR > 4 ? 4 : MR / 2;
        if (rows) direct_rows<kNext, PAIR>(a, x, ldx, y, rows, r, o, next);
    }
}

// Row blocks [r0, r1) for `rows` positions, while `next` is asked for.
[[maybe_unused]] static void direct_tiles(const SpmmOperands& a, const float* x, int64_t ldx, element* y, int64_t rows,
                                          int64_t r0, int64_t r1, Ahead next) {
    const bool pair = a.nb == VLEN;
    const int64_t blocks = a.ptr[r1] - a.ptr[r0], tiles = rows / (pair ? kLargest<true> : kLargest<false>);
    spread_over(next, tiles * (pair ? r1 - r0 : blocks * a.nb / (2 * VLEN)));
    // Where a line comes to less than 4 steps, what is asked for arrives no sooner than packing would fetch it.
    const int64_t steps = tiles * blocks * a.kb * a.nb / (2 * VLEN);
    if (next.rows * next.bytes / 64 * 4 > steps) next.rows = 0;
    for (int64_t r = r0; r < r1; ++r) {
        if (a.nb == VLEN)
            direct_rows<kLargest<true>, true>(a, x, ldx, y, rows, r, 0, next);
        else
            for (int64_t o = 0; o < a.nb; o += 2 * VLEN)
                direct_rows<kLargest<false>, false>(a, x, ldx, y, rows, r, o, next);
    }
}

// One block w [nb, kb], element (i, k) at i * stride_n + k * stride_k, one of them 1, in the order direct_block reads.
static void pack_block(const float* w, int64_t stride_n, int64_t stride_k, int64_t nb, int64_t kb, float* packed) {
    if (nb != VLEN) return transpose(w, stride_n, packed, nb, nb, kb);
    if (stride_k == 1) {
        transpose_pairs(w, stride_n, packed, 2 * VLEN, nb, kb);
    } else {
        for (int64_t k = 0; k < kb; k += 2) {
            const vfloat a = load(w + k * stride_k), b = load(w + (k + 1) * stride_k);
            store(packed + k * VLEN, interleave_low(a, b));
            store(packed + k * VLEN + VLEN, interleave_high(a, b));
        }
    }
}

#if defined(__AVX512BF16__)

// A block of fp32 weights as pack_block wants them, in units along k; sides are multiples of VLEN.
[[maybe_unused]] static void pack_weights(const float* w, int64_t stride_n, int64_t stride_k, int64_t nb, int64_t kb,
                                          float* packed) {
    float rounded[64 * 32];  // [nb][kb / 2] or [kb / 2][nb]
    if (stride_k == 1) {
        for (int64_t i = 0; i < nb; ++i)
            for (int64_t k = 0; k < kb; k += VLEN)
                store(reinterpret_cast<element*>(rounded + i * kb / 2) + k, load(w + i * stride_n + k));
        return pack_block(rounded, kb / 2, 1, nb, kb / 2, packed);
    }
    float* to = nb == VLEN ? rounded : packed;
    for (int64_t k = 0; k < kb; k += 2)
        for (int64_t i = 0; i < nb; i += VLEN)
            store(to + k / 2 * nb + i,
                  zip(narrow(load(w + k * stride_k + i)), narrow(load(w + (k + 1) * stride_k + i))));
    if (nb == VLEN) pack_block(rounded, 1, nb, nb, kb / 2, packed);
}

#else

[[maybe_unused]] static void pack_weights(const float* w, int64_t stride_n, int64_t stride_k, int64_t nb, int64_t kb,
                                          float* packed) {
    pack_block(w, stride_n, stride_k, nb, kb, packed);
}

#endif

}  // namespace sk::SK_ISA
