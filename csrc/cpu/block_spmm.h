// Y[P, n] = X[P, k] * W' for a block-CSR W' [n, k] with blocks [nb, kb]: the forward product and, through the
// transposed index, the input gradient. Included by csrc/cpu/kernels/linear_block.cpp only (see simd.h).
//
// Two register tilings, chosen by the block's sides:
//
//   direct (nb >= VLEN, kb >= 8)            panel (everything else)
//     lanes = outputs of one block            lanes = positions
//     12 rows x 2 vectors, or 24 x 1          X transposed to panels [k][NV * VLEN]
//     x broadcast, W' vectors [kb][nb]        W' broadcast, x vectors; up to 8 outputs x 3 vectors
//
// An output's sum runs over its row's blocks in index order, whatever the tile, the tail or the thread.
#pragma once

#include "cpu/transpose.h"

namespace sk::SK_ISA {

SK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
SK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
SK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of a register tile: as many as leave room for one row of W' and a broadcast.
constexpr int kRows2 = SK_VLEN == 16 ? 12 : 6;
constexpr int kRows1 = 2 * kRows2;
// Outputs of a panel tile with 3 vectors of positions.
constexpr int kWideOutputs = SK_VLEN == 16 ? 8 : 4;

// One orientation of a block-CSR product, what the tiles read.
struct SpmmOperands {
    int64_t n, k, nb, kb;             // W' [n, k] in blocks [nb, kb]
    const int32_t *ptr, *idx, *slot;  // row pointers, column blocks; slot null: weights lie in index order
    const float* weights;             // element (i, k) of a block at i * stride_n + k * stride_k
    int64_t stride_n, stride_k;
    const float* bias;  // [n] or null
    const float* x;     // [P, k], row stride ldx
    int64_t ldx;
    float* y;  // [P, n], row stride ldy
    int64_t ldy;
};

// acc += x[MR rows, kb] * w[kb, NV vectors]
template <int MR, int NV, int UNROLL>
SK_INLINE void direct_block(vfloat (&acc)[MR][NV], const float* x, int64_t ldx, const float* w, int64_t ldw,
                            int64_t kb) {
    // Three rows share a base register: base, base + ldx, base + 2 * ldx are addressing modes.
    constexpr int kBases = (MR + 2) / 3;
    const float* base[kBases];
#pragma GCC unroll 8
    for (int b = 0; b < kBases; ++b) base[b] = x + 3 * b * ldx;
    for (int64_t k0 = 0; k0 < kb; k0 += UNROLL) {
#pragma GCC unroll 8
        for (int k = 0; k < UNROLL; ++k) {
            vfloat wv[NV];
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v) wv[v] = load(w + k * ldw + v * VLEN);
#pragma GCC unroll 24
            for (int i = 0; i < MR; ++i) {
                const vfloat xv = broadcast(base[i / 3][(i % 3) * ldx + k]);
#pragma GCC unroll 2
                for (int v = 0; v < NV; ++v) acc[i][v] = fma(xv, wv[v], acc[i][v]);
            }
        }
#pragma GCC unroll 8
        for (int b = 0; b < kBases; ++b) base[b] += UNROLL;
        w += UNROLL * ldw;
    }
}

// MR positions x NV vectors of outputs of row block r, from output o of the block on.
template <int MR, int NV>
static void direct_tile(const SpmmOperands& a, const float* x, int64_t ldx, float* y, int64_t r, int64_t o) {
    const int64_t first = r * a.nb + o, outputs = smaller(a.n - first, NV * VLEN);
    if (outputs <= 0) return;
    vfloat acc[MR][NV];
    for (int v = 0; v < NV; ++v) {
        const int64_t lanes = larger(0, smaller(VLEN, outputs - v * VLEN));
        const vfloat start = a.bias ? load_first(a.bias + first + v * VLEN, lanes) : zero();
#pragma GCC unroll 24
        for (int i = 0; i < MR; ++i) acc[i][v] = start;
    }
    const int64_t block = a.nb * a.kb;
    const int64_t begin = a.ptr[r], end = a.ptr[r + 1];
    // Only the last block of a sorted row can stick out of W'.
    const bool ragged = begin < end && (a.idx[end - 1] + 1) * a.kb > a.k;
    for (int64_t e = begin; e < end - ragged; ++e) {
        const float* w = a.weights + (a.slot ? a.slot[e] : e) * block + o;
        direct_block<MR, NV, 4>(acc, x + a.idx[e] * a.kb, ldx, w, a.nb, a.kb);
    }
    if (ragged) {
        const int64_t e = end - 1, k = a.idx[e] * a.kb;
        const float* w = a.weights + (a.slot ? a.slot[e] : e) * block + o;
        direct_block<MR, NV, 1>(acc, x + k, ldx, w, a.nb, a.k - k);
    }
    y += first;
    if (outputs == NV * VLEN) {
#pragma GCC unroll 24
        for (int i = 0; i < MR; ++i)
            for (int v = 0; v < NV; ++v) store(y + i * a.ldy + v * VLEN, acc[i][v]);
    } else {
#pragma GCC unroll 24
        for (int i = 0; i < MR; ++i)
            for (int v = 0; v < NV; ++v)
                store_first(y + i * a.ldy + v * VLEN, acc[i][v], larger(0, smaller(VLEN, outputs - v * VLEN)));
    }
}

// All of `rows` positions, the largest tile first.
template <int MR, int NV>
static void direct_rows(const SpmmOperands& a, const float* x, int64_t ldx, float* y, int64_t rows, int64_t r,
                        int64_t o) {
    for (; rows >= MR; rows -= MR, x += MR * ldx, y += MR * a.ldy) direct_tile<MR, NV>(a, x, ldx, y, r, o);
    if constexpr (MR > 1) {
        constexpr int kNext = MR > 12 ? 12 : MR > 8 ? 8 : MR > 4 ? 4 : MR / 2;
        if (rows) direct_rows<kNext, NV>(a, x, ldx, y, rows, r, o);
    }
}

// Row blocks [r0, r1) for `rows` positions.
static void direct_tiles(const SpmmOperands& a, const float* x, int64_t ldx, float* y, int64_t rows, int64_t r0,
                         int64_t r1) {
    for (int64_t r = r0; r < r1; ++r) {
        if (a.nb % (2 * VLEN) == 0)
            for (int64_t o = 0; o < a.nb; o += 2 * VLEN) direct_rows<kRows2, 2>(a, x, ldx, y, rows, r, o);
        else
            direct_rows<kRows1, 1>(a, x, ldx, y, rows, r, 0);
    }
}

// NO outputs from output o of row block r on, NV vectors of positions: panel [k][NV * VLEN] -> out [NO][NV * VLEN].
template <int NO, int NV>
static void panel_tile(const SpmmOperands& a, const float* panel, float* out, int64_t r, int64_t o) {
    constexpr int kWidth = NV * VLEN;
    vfloat acc[NO][NV];
#pragma GCC unroll 8
    for (int i = 0; i < NO; ++i) {
        const int64_t output = r * a.nb + o + i;
        const vfloat start = broadcast(a.bias && output < a.n ? a.bias[output] : 0.0f);
        for (int v = 0; v < NV; ++v) acc[i][v] = start;
    }
    const int64_t block = a.nb * a.kb;
    for (int64_t e = a.ptr[r]; e < a.ptr[r + 1]; ++e) {
        const int64_t first = a.idx[e] * a.kb, kb = smaller(a.kb, a.k - first);
        const float* w = a.weights + (a.slot ? a.slot[e] : e) * block + o * a.stride_n;
        const float* x = panel + first * kWidth;
        for (int64_t k = 0; k < kb; ++k, x += kWidth, w += a.stride_k) {
            vfloat xv[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) xv[v] = load(x + v * VLEN);
#pragma GCC unroll 8
            for (int i = 0; i < NO; ++i) {
                const vfloat wv = broadcast(w[i * a.stride_n]);
#pragma GCC unroll 8
                for (int v = 0; v < NV; ++v) acc[i][v] = fma(xv[v], wv, acc[i][v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < NO; ++i)
        for (int v = 0; v < NV; ++v) store(out + i * kWidth + v * VLEN, acc[i][v]);
}

// Outputs that a panel collects before it transposes them into y, so that y is written by whole cache lines.
constexpr int64_t kPanelOutputs = 64;

// Row blocks [r0, r1) for the `rows` <= NV * VLEN positions of one panel; out is scratch [kPanelOutputs][NV * VLEN].
template <int NO, int NV>
static void panel_tiles(const SpmmOperands& a, const float* panel, float* out, float* y, int64_t rows, int64_t r0,
                        int64_t r1) {
    constexpr int kWidth = NV * VLEN;
    const int64_t chunk = kPanelOutputs / a.nb;
    for (int64_t c = r0; c < r1; c += chunk) {
        const int64_t stop = smaller(c + chunk, r1);
        for (int64_t r = c; r < stop; ++r)
            for (int64_t o = 0; o < a.nb; o += NO)
                panel_tile<NO, NV>(a, panel, out + ((r - c) * a.nb + o) * kWidth, r, o);
        transpose(out, kWidth, y + c * a.nb, a.ldy, smaller(stop * a.nb, a.n) - c * a.nb, rows);
    }
}

}  // namespace sk::SK_ISA
