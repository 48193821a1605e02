// dW[block] = A' B at the active blocks only, A [P, a] in strips of `ha` columns, B [P, b] in strips of `hb`: the
// weight gradient. Included by csrc/cpu/kernels/linear_block.cpp only (see simd.h).
//
//   A = dY, B = X; for blocks one column wide A = X, B = dY over the transposed index, so that hb >= 4 always.
//   Both are packed by strips, [strip][positions][side], a slice of positions at a time: the slice of B stays in the
//   second-level cache, the strips of A in the first.
//   Register tile: IR columns of A (broadcast) x NV vectors of B; a vector is one piece of a block, or VLEN / PIECE
//   pieces of several blocks of the same row when a block is narrower than a vector.
#pragma once

#include "cpu/transpose.h"

namespace sk::SK_ISA {

// One orientation of the sampled product.
struct SddmmOperands {
    int64_t ha, hb;
    const int32_t *ptr, *idx, *slot;
    float* out;  // [nnzb, ha, hb]
};

typedef float float4 __attribute__((vector_size(16), may_alias));
typedef float float8 __attribute__((vector_size(32), may_alias));
typedef float float4_u __attribute__((vector_size(16), aligned(4), may_alias));
typedef float float8_u __attribute__((vector_size(32), aligned(4), may_alias));

// A vector from VLEN / PIECE places, `offset` floats behind each pointer.
template <int PIECE, class T>
SK_INLINE vfloat load_pieces(T* const* p, int64_t offset) {
    if constexpr (PIECE == VLEN) {
        return load(p[0] + offset);
    } else {
#if SK_VLEN == 16
        if constexpr (PIECE == 8) {
            const float8 lo = *reinterpret_cast<const float8_u*>(p[0] + offset);
            const float8 hi = *reinterpret_cast<const float8_u*>(p[1] + offset);
            return __builtin_shufflevector(lo, hi, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        } else {
            const float4 v0 = *reinterpret_cast<const float4_u*>(p[0] + offset);
            const float4 v1 = *reinterpret_cast<const float4_u*>(p[1] + offset);
            const float4 v2 = *reinterpret_cast<const float4_u*>(p[2] + offset);
            const float4 v3 = *reinterpret_cast<const float4_u*>(p[3] + offset);
            const float8 lo = __builtin_shufflevector(v0, v1, 0, 1, 2, 3, 4, 5, 6, 7);
            const float8 hi = __builtin_shufflevector(v2, v3, 0, 1, 2, 3, 4, 5, 6, 7);
            return __builtin_shufflevector(lo, hi, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        }
#elif SK_VLEN == 8
        const float4 lo = *reinterpret_cast<const float4_u*>(p[0] + offset);
        const float4 hi = *reinterpret_cast<const float4_u*>(p[1] + offset);
        return __builtin_shufflevector(lo, hi, 0, 1, 2, 3, 4, 5, 6, 7);
#endif
    }
}

template <int PIECE>
SK_INLINE void store_pieces(float* const* p, int64_t offset, vfloat v) {
    if constexpr (PIECE == VLEN) {
        store(p[0] + offset, v);
    } else {
        float lane[VLEN];
        store(lane, v);
        for (int q = 0; q < VLEN / PIECE; ++q)
            for (int j = 0; j < PIECE; ++j) p[q][offset + j] = lane[q * PIECE + j];
    }
}

// out[i, vectors] (+)= sum over positions of a[p, i] * b[p, vectors]; out pieces have row stride hb.
template <int IR, int NV, int PIECE>
static void sddmm_tile(const float* a, int64_t ha, const float* const* b, int64_t hb, float* const* out, int64_t rows,
                       bool accumulate) {
    constexpr int kPieces = VLEN / PIECE;
    vfloat acc[IR][NV];
#pragma GCC unroll 8
    for (int i = 0; i < IR; ++i)
#pragma GCC unroll 12
        for (int v = 0; v < NV; ++v) acc[i][v] = accumulate ? load_pieces<PIECE>(out + v * kPieces, i * hb) : zero();
    const float* from[NV * kPieces];
#pragma GCC unroll 24
    for (int q = 0; q < NV * kPieces; ++q) from[q] = b[q];
    for (int64_t p = 0, o = 0; p < rows; ++p, a += ha, o += hb) {
        vfloat bv[NV];
#pragma GCC unroll 12
        for (int v = 0; v < NV; ++v) bv[v] = load_pieces<PIECE>(from + v * kPieces, o);
#pragma GCC unroll 8
        for (int i = 0; i < IR; ++i) {
            const vfloat av = broadcast(a[i]);
#pragma GCC unroll 12
            for (int v = 0; v < NV; ++v) acc[i][v] = fma(av, bv[v], acc[i][v]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < IR; ++i)
#pragma GCC unroll 12
        for (int v = 0; v < NV; ++v) store_pieces<PIECE>(out + v * kPieces, i * hb, acc[i][v]);
}

// Every block of row r: a is its strip [rows, ha], b the packed slice, spare a place to write IR x hb floats.
template <int IR, int NV, int PIECE>
static void sddmm_row(const SddmmOperands& s, const float* a, const float* b, int64_t r, int64_t rows, bool accumulate,
                      float* spare) {
    constexpr int kGroup = NV * (VLEN / PIECE);
    const int64_t per_block = s.hb / PIECE, begin = s.ptr[r] * per_block, end = s.ptr[r + 1] * per_block;
    for (int64_t q0 = begin; q0 < end; q0 += kGroup) {
        const float* from[kGroup];
        float* to[kGroup];
        for (int q = 0; q < kGroup; ++q) {
            // Pieces beyond the row repeat its last one and are thrown away.
            const int64_t piece = q0 + q < end ? q0 + q : end - 1;
            const int64_t e = piece / per_block, j = piece % per_block * PIECE;
            from[q] = b + s.idx[e] * rows * s.hb + j;
            to[q] = q0 + q < end ? s.out + s.slot[e] * s.ha * s.hb + j : spare;
        }
        for (int64_t i = 0; i < s.ha; i += IR) {
            sddmm_tile<IR, NV, PIECE>(a + i, s.ha, from, s.hb, to, rows, accumulate);
            for (int q = 0; q < kGroup; ++q)
                if (q0 + q < end) to[q] += IR * s.hb;
        }
    }
}

// Rows of A that a tile takes when the strip has enough of them.
constexpr int kSddmmRows = SK_VLEN == 16 ? 8 : 4;

template <int PIECE>
static void sddmm_row(const SddmmOperands& s, const float* a, const float* b, int64_t r, int64_t rows, bool accumulate,
                      float* spare) {
    if (s.ha >= kSddmmRows)
        sddmm_row<kSddmmRows, 3, PIECE>(s, a, b, r, rows, accumulate, spare);
    else if (s.ha == 4)
        sddmm_row<4, SK_VLEN == 16 ? 6 : 3, PIECE>(s, a, b, r, rows, accumulate, spare);
    else
        sddmm_row<1, 8, PIECE>(s, a, b, r, rows, accumulate, spare);
}

static void sddmm_row(const SddmmOperands& s, const float* a, const float* b, int64_t r, int64_t rows, bool accumulate,
                      float* spare) {
    if (s.hb >= VLEN) sddmm_row<VLEN>(s, a, b, r, rows, accumulate, spare);
#if SK_VLEN == 16
    else if (s.hb == 8)
        sddmm_row<8>(s, a, b, r, rows, accumulate, spare);
#endif
#if SK_VLEN >= 8
    else
        sddmm_row<4>(s, a, b, r, rows, accumulate, spare);
#endif
}

// dst[strip][rows][side] = src[rows, strips * side]; columns from `cols` on are zero.
static void pack_strips(const float* src, int64_t ld, int64_t rows, int64_t cols, int64_t side, float* dst) {
    if (side == 1) return transpose(src, ld, dst, rows, rows, cols);
    for (int64_t c = 0; c < cols; c += side, dst += rows * side) {
        const int64_t n = cols - c < side ? cols - c : side;
        if (n == side && side >= VLEN) {
            for (int64_t p = 0; p < rows; ++p)
                for (int64_t j = 0; j < side; j += VLEN) store(dst + p * side + j, load(src + p * ld + c + j));
        } else {
            for (int64_t p = 0; p < rows; ++p)
                for (int64_t j = 0; j < side; ++j) dst[p * side + j] = j < n ? src[p * ld + c + j] : 0.0f;
        }
    }
}

}  // namespace sk::SK_ISA
