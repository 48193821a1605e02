// The two products of the GRU over packed weights: panels of lanes times strips, and weight gradients at the active
// blocks.
#pragma once

#include "cpu/gru.h"
#include "cpu/gru_panels.h"
#include "cpu/simd.h"

namespace sk::SK_ISA {

// R of a strip's Side rows times NV vectors of the panel, on top of a bias a row or of what `out` holds.
template <int Side, int R, int NV, bool Accumulate>
SK_INLINE void strip_rows(const float* weight, const int32_t* src, int64_t entries, const float* panel,
                          const float* bias, float* out, int64_t stride) {
    vfloat acc[R][NV];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] = Accumulate ? load(out + r * stride + v * VLEN) : broadcast(bias[r]);
    for (int64_t e = 0; e < entries; ++e) {
        const float* x = panel + src[e];
        vfloat xv[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) xv[v] = load(x + v * VLEN);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const vfloat w = broadcast(weight[e * Side + r]);
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) acc[r][v] = fma(w, xv[v], acc[r][v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) store(out + r * stride + v * VLEN, acc[r][v]);
}

// Four rows of about equal length, each with its own columns.
template <int NV, bool Accumulate>
SK_INLINE void bundle_rows(const float* weight, const int32_t* src, int64_t entries, const int32_t* rows,
                           const float* panel, const float* bias, float* out, int64_t stride) {
    vfloat acc[4][NV];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v)
            acc[r][v] = Accumulate ? load(out + rows[r] * stride + v * VLEN) : broadcast(bias[rows[r]]);
    for (int64_t e = 0; e < entries; ++e)
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            const vfloat w = broadcast(weight[4 * e + r]);
            const float* x = panel + src[4 * e + r];
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) acc[r][v] = fma(w, load(x + v * VLEN), acc[r][v]);
        }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) store(out + rows[r] * stride + v * VLEN, acc[r][v]);
}

template <int Side, int R, int NV, bool Accumulate>
SK_INLINE int64_t strip_columns(const GruStrips& s, int64_t b, int64_t v, int64_t vectors, const float* panel,
                                float* out, int64_t stride) {
    const int64_t from = s.ptr[b], entries = s.ptr[b + 1] - from;
    for (; v + NV <= vectors; v += NV) {
        const float* p = panel + v * VLEN;
        if constexpr (Side == 1) {
            bundle_rows<NV, Accumulate>(s.weight + 4 * from, s.src + 4 * from, entries, s.rows + 4 * b, p, s.bias,
                                        out + v * VLEN, stride);
        } else {
            for (int r = 0; r < Side; r += R)
                strip_rows<Side, R, NV, Accumulate>(s.weight + from * Side + r, s.src + from, entries, p,
                                                    s.bias + b * Side + r, out + (b * Side + r) * stride + v * VLEN,
                                                    stride);
        }
    }
    return v;
}

// out[row] = bias[row] + sum of weight * panel row (out[row] += ... if Accumulate), on `vectors` vectors of both.
template <bool Accumulate>
static void apply_strips(const GruStrips& s, const float* panel, float* out, int64_t stride, int64_t vectors) {
    for (int64_t b = 0; b < s.count; ++b) {
        int64_t v = 0;
#if SK_VLEN == 16
        // 32 registers: 16 accumulators hide the latency; two vectors a scalar spare the load ports.
        if (s.side == 16) {
            v = strip_columns<16, 8, 2, Accumulate>(s, b, v, vectors, panel, out, stride);
            strip_columns<16, 16, 1, Accumulate>(s, b, v, vectors, panel, out, stride);
        } else if (s.side == 8) {
            v = strip_columns<8, 8, 2, Accumulate>(s, b, v, vectors, panel, out, stride);
            strip_columns<8, 8, 1, Accumulate>(s, b, v, vectors, panel, out, stride);
        } else if (s.side == 4) {
            v = strip_columns<4, 4, 4, Accumulate>(s, b, v, vectors, panel, out, stride);
            v = strip_columns<4, 4, 2, Accumulate>(s, b, v, vectors, panel, out, stride);
            strip_columns<4, 4, 1, Accumulate>(s, b, v, vectors, panel, out, stride);
        } else {
            v = strip_columns<1, 4, 4, Accumulate>(s, b, v, vectors, panel, out, stride);
            v = strip_columns<1, 4, 2, Accumulate>(s, b, v, vectors, panel, out, stride);
            strip_columns<1, 4, 1, Accumulate>(s, b, v, vectors, panel, out, stride);
        }
#else
        // 16 registers; panels have a multiple of 16 lanes, so `vectors` is even.
        if (s.side == 16)
            strip_columns<16, 4, 2, Accumulate>(s, b, v, vectors, panel, out, stride);
        else if (s.side == 8)
            strip_columns<8, 4, 2, Accumulate>(s, b, v, vectors, panel, out, stride);
        else if (s.side == 4)
            strip_columns<4, 4, 2, Accumulate>(s, b, v, vectors, panel, out, stride);
        else
            strip_columns<1, 4, 2, Accumulate>(s, b, v, vectors, panel, out, stride);
#endif
    }
}

constexpr int kTileVectors = 16 / VLEN;

// R rows of C tiles of one strip: grads[tile][row][16 columns] += sum of dgates[row][p] * x[p][column] over positions
// p < count. Each chunk is summed by itself first: long sums round less in two levels.
template <int Side, int R, int C>
SK_INLINE void outer_rows(const float* gates, int64_t stride, const float* x, int64_t x_stride, const int32_t* col,
                          int64_t count, float* grads) {
    constexpr int V = kTileVectors;
    vfloat acc[C][V][R];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) acc[c][v][r] = zero();
    for (int64_t p = 0; p < count; ++p) {
        vfloat xv[C][V];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) xv[c][v] = load(x + p * x_stride + col[c] + v * VLEN);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const vfloat d = broadcast(gates[r * stride + p]);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) acc[c][v][r] = fma(d, xv[c][v], acc[c][v][r]);
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                float* to = grads + (c * Side + r) * 16 + v * VLEN;
                store(to, load(to) + acc[c][v][r]);
            }
}

// Two (or C) tiles at a time while a strip has them, then one by one.
template <int Side, int R, int C, int R1>
SK_INLINE void outer_strip(const GruTiles& t, int64_t b, const float* gates, int64_t stride, const float* x,
                           int64_t x_stride, int64_t count, float* grads) {
    int64_t k = t.ptr[b];
    for (; k + C <= t.ptr[b + 1]; k += C)
        for (int r = 0; r < Side; r += R)
            outer_rows<Side, R, C>(gates + t.row[b] + r * stride, stride, x, x_stride, t.col + k, count,
                                   grads + (k * Side + r) * 16);
    for (; k < t.ptr[b + 1]; ++k)
        for (int r = 0; r < Side; r += R1)
            outer_rows<Side, R1, 1>(gates + t.row[b] + r * stride, stride, x, x_stride, t.col + k, count,
                                    grads + (k * Side + r) * 16);
}

static void outer_tiles(const GruTiles& t, const float* gates, int64_t stride, const float* x, int64_t x_stride,
                        int64_t count, float* grads) {
    for (int64_t b = 0; b < t.count; ++b) {
#if SK_VLEN == 16
        if (t.side == 16)
            outer_strip<16, 8, 2, 16>(t, b, gates, stride, x, x_stride, count, grads);
        else if (t.side == 8)
            outer_strip<8, 8, 2, 8>(t, b, gates, stride, x, x_stride, count, grads);
        else if (t.side == 4)
            outer_strip<4, 4, 4, 4>(t, b, gates, stride, x, x_stride, count, grads);
        else
            outer_strip<1, 1, 4, 1>(t, b, gates, stride, x, x_stride, count, grads);
#else
        constexpr int R = VLEN == 8 ? 4 : 2;
        if (t.side == 16)
            outer_strip<16, R, 1, R>(t, b, gates, stride, x, x_stride, count, grads);
        else if (t.side == 8)
            outer_strip<8, R, 1, R>(t, b, gates, stride, x, x_stride, count, grads);
        else if (t.side == 4)
            outer_strip<4, R, 1, R>(t, b, gates, stride, x, x_stride, count, grads);
        else
            outer_strip<1, 1, 1, 1>(t, b, gates, stride, x, x_stride, count, grads);
#endif
    }
}

// Dot products over the lanes of two panels: VLEN sums at a time, as many as one vector of results holds.
static void quad_tiles(const GruTiles& t, const float* gates, int64_t stride, const float* x, int64_t lanes,
                       float* grads) {
    constexpr int K = VLEN / 4;
    if (t.side == 4) {
        for (int64_t q = 0; q < t.count; ++q)
            for (int c = 0; c < 4; c += K) {
                const float* d = gates + t.row[q];
                const int32_t* col = t.col + 4 * q + c;
                vfloat acc[VLEN] = {};
                for (int64_t l = 0; l < lanes; l += VLEN) {
                    vfloat dv[4];
#pragma GCC unroll 4
                    for (int r = 0; r < 4; ++r) dv[r] = load(d + r * stride + l);
#pragma GCC unroll 4
                    for (int k = 0; k < K; ++k) {
                        const vfloat xv = load(x + col[k] + l);
#pragma GCC unroll 4
                        for (int r = 0; r < 4; ++r) acc[4 * k + r] = fma(dv[r], xv, acc[4 * k + r]);
                    }
                }
                float* to = grads + (4 * q + c) * 4;
                store(to, load(to) + reduce_lanes(acc));
            }
        return;
    }
    for (int64_t q = 0; q < t.count; q += K) {
        vfloat acc[VLEN] = {};
        for (int64_t l = 0; l < lanes; l += VLEN)
#pragma GCC unroll 4
            for (int k = 0; k < K; ++k) {
                const vfloat dv = load(gates + t.row[q + k] + l);
#pragma GCC unroll 4
                for (int c = 0; c < 4; ++c)
                    acc[4 * k + c] = fma(dv, load(x + t.col[4 * (q + k) + c] + l), acc[4 * k + c]);
            }
        float* to = grads + 4 * q;
        store(to, load(to) + reduce_lanes(acc));
    }
}

}  // namespace sk::SK_ISA
