// The tiles of a block-CSR product whose lanes are positions, `panel` and `outer`: see block_spmm.h.
// Included by csrc/cpu/kernels/*_block.cpp only (see simd.h).
#pragma once

#include "cpu/block_spmm.h"

#if !defined(__AVX512BF16__)

namespace sk::SK_ISA {

// How many blocks ahead a panel tile asks for its weights, which lie by slot: small pieces anywhere in memory.
constexpr int64_t kAhead = 4;

// NO outputs from output o of row block r on, NV vectors of positions: panel [k][NV * VLEN] -> out [NO][NV * VLEN].
// SINGLE: kb == 1.
template <int NO, int NV, bool SINGLE>
static void panel_tile(const SpmmOperands& a, const float* panel, float* out, int64_t r, int64_t o) {
    constexpr int kWidth = NV * VLEN;
    vfloat acc[NO][NV];
#pragma GCC unroll 8
    for (int i = 0; i < NO; ++i) {
        const int64_t output = r * a.nb + o + i;
        const vfloat start = broadcast(a.bias && output < a.n ? a.bias[output] : 0.0f);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) acc[i][v] = start;
    }
    const int64_t block = SINGLE ? a.nb : a.nb * a.kb, end = a.ptr[r + 1];
    const int64_t stride_n = SINGLE ? 1 : a.stride_n;
    for (int64_t e = a.ptr[r]; e < end; ++e) {
        const float* ahead = a.weights + a.slot[smaller(e + kAhead, end - 1)] * block + o * stride_n;
        for (int64_t line = 0; line < (SINGLE ? 1 : block); line += 16) __builtin_prefetch(ahead + line);
        const int64_t first = a.idx[e] * (SINGLE ? 1 : a.kb), kb = SINGLE ? 1 : smaller(a.kb, a.k - first);
        const float* w = a.weights + a.slot[e] * block + o * stride_n;
        const float* x = panel + first * kWidth;
        for (int64_t k = 0; k < kb; ++k, x += kWidth, w += a.stride_k) {
            vfloat xv[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) xv[v] = load(x + v * VLEN);
#pragma GCC unroll 8
            for (int i = 0; i < NO; ++i) {
                const vfloat wv = broadcast(w[i * stride_n]);
#pragma GCC unroll 8
                for (int v = 0; v < NV; ++v) acc[i][v] = fma(xv[v], wv, acc[i][v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < NO; ++i)
        for (int v = 0; v < NV; ++v) store(out + i * kWidth + v * VLEN, acc[i][v]);
}

// Row blocks [r0, r1) for the `rows` <= NV * VLEN positions of one panel; out is scratch [kPanelOutputs][NV * VLEN].
template <int NO, int NV>
static void panel_tiles(const SpmmOperands& a, const float* panel, float* out, float* y, int64_t rows, int64_t r0,
                        int64_t r1) {
    constexpr int kWidth = NV * VLEN;
    const int64_t chunk = kPanelOutputs / a.nb;
    for (int64_t c = r0; c < r1; c += chunk) {
        const int64_t stop = smaller(c + chunk, r1);
        for (int64_t r = c; r < stop; ++r)
            for (int64_t o = 0; o < a.nb; o += NO) {
                float* to = out + ((r - c) * a.nb + o) * kWidth;
                if (NO > 1 && a.kb == 1)
                    panel_tile<NO, NV, (NO > 1)>(a, panel, to, r, o);
                else
                    panel_tile<NO, NV, false>(a, panel, to, r, o);
            }
        transpose(out, kWidth, y + c * a.nb, a.ldy, smaller(stop * a.nb, a.n) - c * a.nb, rows);
    }
}

// y[idx_k[e + j]] += w[e + j] * x for NB blocks of one strip x [kb][kOuterVectors * VLEN] of the panel.
template <int NB>
static void outer_tile(const SpmmOperands& a, const float* x, int64_t kb, float* y, int64_t e) {
    constexpr int kWidth = kOuterVectors * VLEN;
    vfloat acc[NB][kOuterVectors];
    const float* w[NB];
    float* to[NB];
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) {
        w[j] = a.weights + a.slot_k[e + j] * a.kb;
        to[j] = y + a.idx_k[e + j] * kWidth;
#pragma GCC unroll 4
        for (int v = 0; v < kOuterVectors; ++v) acc[j][v] = load(to[j] + v * VLEN);
    }
    for (int64_t k = 0; k < kb; ++k, x += kWidth) {
        vfloat xv[kOuterVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kOuterVectors; ++v) xv[v] = load(x + v * VLEN);
#pragma GCC unroll 4
        for (int j = 0; j < NB; ++j) {
            const vfloat wv = broadcast(w[j][k]);
#pragma GCC unroll 4
            for (int v = 0; v < kOuterVectors; ++v) acc[j][v] = fma(xv[v], wv, acc[j][v]);
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j)
#pragma GCC unroll 4
        for (int v = 0; v < kOuterVectors; ++v) store(to[j] + v * VLEN, acc[j][v]);
}

// All of Y for the `rows` positions of one panel [k][width]; out is scratch [n][width]. nb == 1.
static void outer_tiles(const SpmmOperands& a, const float* panel, float* out, float* y, int64_t rows) {
    constexpr int64_t kWidth = kOuterVectors * VLEN;
    for (int64_t i = 0; i < a.n; ++i)
        for (int64_t v = 0; v < kWidth; v += VLEN) store(out + i * kWidth + v, broadcast(a.bias ? a.bias[i] : 0.0f));
    for (int64_t c = 0; c * a.kb < a.k; ++c) {
        const float* x = panel + c * a.kb * kWidth;
        const int64_t kb = smaller(a.kb, a.k - c * a.kb), end = a.ptr_k[c + 1];
        int64_t e = a.ptr_k[c];
        for (; e + kOuterBlocks <= end; e += kOuterBlocks) {
            for (int64_t j = e + kOuterBlocks; j < smaller(e + 2 * kOuterBlocks, end); ++j)
                __builtin_prefetch(a.weights + a.slot_k[j] * a.kb);
            outer_tile<kOuterBlocks>(a, x, kb, out, e);
        }
        for (; e < end; ++e) outer_tile<1>(a, x, kb, out, e);
    }
    transpose(out, kWidth, y, a.ldy, a.n, rows);
}

}  // namespace sk::SK_ISA

#endif
