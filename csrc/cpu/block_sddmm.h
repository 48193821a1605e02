// dW[block] = A' B at the active blocks only, A [P, a] in strips of `ha` columns, B [P, b] in strips of `hb`: the
// weight gradient. Included by csrc/cpu/kernels/linear_block.cpp only (see simd.h).
//
//   A = dY, B = X, or the other way round over the transposed index, so that hb > 1, or hb == 1 and ha >= VLEN (thin).
//   Both are packed by strips, [strip][positions][side], a slice of positions at a time: the slice of B stays in the
//   second-level cache, a few strips of A beside it.
//   Register tile: IR columns of A (broadcast) x NV vectors of B; a vector is one piece of a block, or VLEN / PIECE
//   pieces of several blocks of the same row when a block is narrower than a vector. Thin: one vector of A, broadcasts
//   of up to 12 columns of B.
#pragma once

#include "cpu/transpose.h"

namespace sk::SK_ISA {

// One orientation of the sampled product.
struct SddmmOperands {
    int64_t ha, hb;
    const int32_t *ptr, *idx, *slot;
    float* out;     // [nnzb, ha, hb]
    int64_t first;  // strip of B that the packed slice starts with
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
#pragma GCC unroll 16
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
#pragma GCC unroll 16
        for (int i = 0; i < IR; ++i) {
            const vfloat av = broadcast(a[i]);
#pragma GCC unroll 12
            for (int v = 0; v < NV; ++v) acc[i][v] = fma(av, bv[v], acc[i][v]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < IR; ++i)
#pragma GCC unroll 12
        for (int v = 0; v < NV; ++v) store_pieces<PIECE>(out + v * kPieces, i * hb, acc[i][v]);
}

// Rows of A that a tile takes when the strip has enough of them.
constexpr int kSddmmRows = SK_VLEN == 16 ? 8 : 4;

// Floats from one packed strip to the next: a cache line more than it holds, lest all strips start in the same sets.
SK_INLINE int64_t strip_size(int64_t rows, int64_t side) { return (rows * side + 15) / 16 * 16 + 16; }

// NV vectors of row r from piece q on: a is the row's strip [rows, ha], b the packed slice; pieces from `end` on repeat
// the last one and are written to `spare`, IR x hb floats.
template <int IR, int NV, int PIECE>
static void sddmm_group(const SddmmOperands& s, const float* a, const float* b, int64_t q, int64_t end, int64_t rows,
                        bool accumulate, float* spare) {
    constexpr int kCount = NV * (VLEN / PIECE);
    const int64_t per_block = s.hb / PIECE, strip = strip_size(rows, s.hb);
    const float* from[kCount];
    float* to[kCount];
    for (int i = 0; i < kCount; ++i) {
        const int64_t piece = smaller(q + i, end - 1), e = piece / per_block, j = piece % per_block * PIECE;
        from[i] = b + (s.idx[e] - s.first) * strip + j;
        to[i] = q + i < end ? s.out + s.slot[e] * s.ha * s.hb + j : spare;
    }
    const int64_t after = (q + kCount) / per_block, last = end / per_block;
    for (int64_t i = 0; i < s.ha; i += IR) {
        // The blocks of the next group lie anywhere in memory: ask for them row by row while this one is computed.
        for (int64_t e = after; e < smaller(after + ceil_div(kCount, per_block), last); ++e) {
            const float* block = s.out + (s.slot[e] * s.ha + i) * s.hb;
            for (int64_t line = 0; line < IR * s.hb; line += 16) __builtin_prefetch(block + line, 1);
        }
        sddmm_tile<IR, NV, PIECE>(a + i, s.ha, from, s.hb, to, rows, accumulate);
        for (int p = 0; p < kCount; ++p)
            if (q + p < end) to[p] += IR * s.hb;
    }
}

// Blocks [begin, end) of one row, in groups of NV vectors, a remainder of 1 to NV + 1 in one or two smaller ones.
template <int IR, int NV, int PIECE>
static void sddmm_row(const SddmmOperands& s, const float* a, const float* b, int64_t begin, int64_t end, int64_t rows,
                      bool accumulate, float* spare) {
    constexpr int kPieces = VLEN / PIECE, kHalf = (NV + 1) / 2;
    const int64_t per_block = s.hb / PIECE;
    int64_t q = begin * per_block, left;
    end *= per_block;
    for (; (left = ceil_div(end - q, kPieces)) > NV + 1 || left == NV; q += NV * kPieces)
        sddmm_group<IR, NV, PIECE>(s, a, b, q, end, rows, accumulate, spare);
    for (; (left = ceil_div(end - q, kPieces)) > 1; q += kHalf * kPieces)
        sddmm_group<IR, kHalf, PIECE>(s, a, b, q, end, rows, accumulate, spare);
    if (left > 0) {
        if (IR == kSddmmRows && s.ha >= 2 * IR)
            sddmm_group<2 * IR, 1, PIECE>(s, a, b, q, end, rows, accumulate, spare);
        else
            sddmm_group<IR, 1, PIECE>(s, a, b, q, end, rows, accumulate, spare);
    }
}

template <int PIECE>
static void sddmm_row(const SddmmOperands& s, const float* a, const float* b, int64_t begin, int64_t end, int64_t rows,
                      bool accumulate, float* spare) {
    if (s.ha >= kSddmmRows)
        sddmm_row<kSddmmRows, 3, PIECE>(s, a, b, begin, end, rows, accumulate, spare);
    else if (s.ha == 4)
        sddmm_row<4, SK_VLEN == 16 ? 6 : 3, PIECE>(s, a, b, begin, end, rows, accumulate, spare);
    else
        sddmm_row<1, 8, PIECE>(s, a, b, begin, end, rows, accumulate, spare);
}

// out[j][VLEN rows of the block] (+)= sum over positions of a[p, those rows] * b[j][p]: columns of one strip of A.
template <int NC>
static void thin_tile(const float* a, int64_t ha, const float* const* b, float* const* out, int64_t rows,
                      bool accumulate) {
    vfloat acc[NC];
    const float* from[NC];
#pragma GCC unroll 12
    for (int j = 0; j < NC; ++j) acc[j] = accumulate ? load(out[j]) : zero(), from[j] = b[j];
    for (int64_t p = 0; p < rows; ++p) {
        const vfloat av = load(a + p * ha);
#pragma GCC unroll 12
        for (int j = 0; j < NC; ++j) acc[j] = fma(av, broadcast(from[j][p]), acc[j]);
    }
#pragma GCC unroll 12
    for (int j = 0; j < NC; ++j) store(out[j], acc[j]);
}

// Blocks [e, e + NC) of one row, blocks from `end` on as in sddmm_group.
template <int NC>
static void thin_group(const SddmmOperands& s, const float* a, const float* b, int64_t e, int64_t end, int64_t rows,
                       bool accumulate, float* spare) {
    const float* from[NC];
    float* to[NC];
    for (int j = 0; j < NC; ++j) {
        from[j] = b + (s.idx[smaller(e + j, end - 1)] - s.first) * strip_size(rows, 1);
        to[j] = e + j < end ? s.out + s.slot[e + j] * s.ha : spare;
        if (e + NC + j < end) __builtin_prefetch(s.out + s.slot[e + NC + j] * s.ha, 1);
    }
    for (int64_t i = 0; i < s.ha; i += VLEN) {
        thin_tile<NC>(a + i, s.ha, from, to, rows, accumulate);
        for (int j = 0; j < NC; ++j)
            if (e + j < end) to[j] += VLEN;
    }
}

static void thin_row(const SddmmOperands& s, const float* a, const float* b, int64_t begin, int64_t end, int64_t rows,
                     bool accumulate, float* spare) {
    constexpr int kColumns = 12, kFew = 4;
    int64_t e = begin;
    for (; e + kColumns <= end; e += kColumns) thin_group<kColumns>(s, a, b, e, end, rows, accumulate, spare);
    for (; e < end; e += kFew) thin_group<kFew>(s, a, b, e, end, rows, accumulate, spare);
}

// The blocks of row r in the strips [s.first, stop) of B: a is the row's strip of A, b holds those strips.
static void sddmm_row(const SddmmOperands& s, const float* a, const float* b, int64_t r, int64_t stop, int64_t rows,
                      bool accumulate, float* spare) {
    int64_t begin = s.ptr[r], end = s.ptr[r + 1];
    while (begin < end && s.idx[begin] < s.first) ++begin;
    while (begin < end && s.idx[end - 1] >= stop) --end;
    if (s.hb == 1)
        thin_row(s, a, b, begin, end, rows, accumulate, spare);
    else if (s.hb >= VLEN)
        sddmm_row<VLEN>(s, a, b, begin, end, rows, accumulate, spare);
#if SK_VLEN == 16
    else if (s.hb == 8)
        sddmm_row<8>(s, a, b, begin, end, rows, accumulate, spare);
#endif
#if SK_VLEN >= 8
    else
        sddmm_row<4>(s, a, b, begin, end, rows, accumulate, spare);
#endif
}

// dst[strip][rows][side] = src[rows, strips * side], strip_size() apart; columns from `cols` on are zero.
static void pack_strips(const float* src, int64_t ld, int64_t rows, int64_t cols, int64_t side, float* dst) {
    const int64_t strip = strip_size(rows, side);
    if (side == 1) return transpose(src, ld, dst, strip, rows, cols);
    // Whole rows one after the other: the order in which memory streams.
    for (int64_t p = 0; p < rows; ++p, src += ld, dst += side) {
        float* to = dst;
        int64_t c = 0;
        if (side >= VLEN) {
            for (; c + side <= cols; c += side, to += strip)
                for (int64_t j = 0; j < side; j += VLEN) store(to + j, load(src + c + j));
        } else if (side == 8) {
            for (; c + 8 <= cols; c += 8, to += strip)
                *reinterpret_cast<float8_u*>(to) = *reinterpret_cast<const float8_u*>(src + c);
        } else {
            for (; c + 4 <= cols; c += 4, to += strip)
                *reinterpret_cast<float4_u*>(to) = *reinterpret_cast<const float4_u*>(src + c);
        }
        if (c < cols)
            for (int64_t j = 0; j < side; ++j) to[j] = c + j < cols ? src[c + j] : 0.0f;
    }
}

}  // namespace sk::SK_ISA
