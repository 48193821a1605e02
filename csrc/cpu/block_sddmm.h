// dW[block] = A' B at the active blocks only, A [P, a] in strips of `ha` columns, B [P, b] in strips of `hb`: the
// weight gradient of linear and of convolution. Included by csrc/cpu/kernels/*_block.cpp only (see simd.h).
//
//   A = dY, B = X, or the other way round over the transposed index, so that hb > 1, or hb == 1 and ha >= VLEN (thin).
//   Both are packed by strips, [strip][positions][side], a slice of positions at a time: the slice of B stays in the
//   second-level cache, a few strips of A beside it.
//   Register tile: IR columns of A (broadcast) x NV vectors of B; a vector is one piece of a block, or VLEN / PIECE
//   pieces of several blocks of the same row when a block is narrower than a vector. Thin: one vector of A, broadcasts
//   of up to 12 columns of B.
#pragma once

#include "api.h"
#include "cpu/ahead.h"
#include "cpu/bf16.h"

namespace sk::SK_ISA {

// One orientation of the sampled product.
struct SddmmOperands {
    int64_t ha, hb;
    const int32_t *ptr, *idx, *slot;
    float* out;              // [nnzb, ha, hb]
    const int64_t* strip_b;  // [strips of B]: where each starts in the packed slice, floats; or null:
    int64_t first, strip;    // they lie `strip` floats apart from strip `first` on
};

SK_INLINE int64_t strip_start(const SddmmOperands& s, int64_t c) {
    return s.strip_b ? s.strip_b[c] : (c - s.first) * s.strip;
}

// The positions of packed strips: `lines` runs of `length`, a_step and b_step floats from one position to the next;
// run l starts a_line[l] and b_line[l] floats behind its strip's start. A tile takes `chunk` runs at a time.
struct SddmmPositions {
    int64_t lines, length, chunk;
    const int64_t *a_line, *b_line;
    int64_t a_step, b_step;
    Ahead* next = nullptr;  // asked for with every tile
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
static void sddmm_tile(const float* a, const float* const* b, int64_t hb, float* const* out, const SddmmPositions& at,
                       int64_t line, int64_t stop, bool accumulate) {
    constexpr int kPieces = VLEN / PIECE;
    vfloat acc[IR][NV];
#pragma GCC unroll 16
    for (int i = 0; i < IR; ++i)
#pragma GCC unroll 12
        for (int v = 0; v < NV; ++v) acc[i][v] = accumulate ? load_pieces<PIECE>(out + v * kPieces, i * hb) : zero();
    const float* from[NV * kPieces];
#pragma GCC unroll 24
    for (int q = 0; q < NV * kPieces; ++q) from[q] = b[q];
    const int64_t a_step = at.a_step, b_step = at.b_step, length = at.length;
    for (; line < stop; ++line) {
        const float* row = a + at.a_line[line];
        for (int64_t p = 0, o = at.b_line[line]; p < length; ++p, row += a_step, o += b_step) {
            vfloat bv[NV];
#pragma GCC unroll 12
            for (int v = 0; v < NV; ++v) bv[v] = load_pieces<PIECE>(from + v * kPieces, o);
#pragma GCC unroll 16
            for (int i = 0; i < IR; ++i) {
                const vfloat av = spread(row + i);
#pragma GCC unroll 12
                for (int v = 0; v < NV; ++v) acc[i][v] = mac(av, bv[v], acc[i][v]);
            }
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

// NV vectors of row r from piece q on: a is the row's strip, b the packed slice; pieces from `end` on repeat the last
// one and are written to `spare`, IR x hb floats.
template <int IR, int NV, int PIECE>
static void sddmm_group(const SddmmOperands& s, const float* a, const float* b, int64_t q, int64_t end,
                        const SddmmPositions& at, bool accumulate, float* spare) {
    constexpr int kCount = NV * (VLEN / PIECE);
    const int64_t per_block = s.hb / PIECE;
    const float* from[kCount];
    float *first[kCount], *to[kCount];
    for (int i = 0; i < kCount; ++i) {
        const int64_t piece = smaller(q + i, end - 1), e = piece / per_block, j = piece % per_block * PIECE;
        from[i] = b + strip_start(s, s.idx[e]) + j;
        first[i] = q + i < end ? s.out + s.slot[e] * s.ha * s.hb + j : spare;
    }
    const int64_t after = (q + kCount) / per_block, last = end / per_block;
    for (int64_t line = 0; line < at.lines; line += at.chunk) {
        const int64_t stop = smaller(line + at.chunk, at.lines);
        for (int p = 0; p < kCount; ++p) to[p] = first[p];
        for (int64_t i = 0; i < s.ha; i += IR) {
            // The blocks of the next group lie anywhere in memory: ask for them row by row while this one is computed.
            for (int64_t e = line ? last : after; e < smaller(after + ceil_div(kCount, per_block), last); ++e) {
                const float* block = s.out + (s.slot[e] * s.ha + i) * s.hb;
                for (int64_t j = 0; j < IR * s.hb; j += 16) __builtin_prefetch(block + j, 1);
            }
            if (at.next) ask(*at.next);
            sddmm_tile<IR, NV, PIECE>(a + i, from, s.hb, to, at, line, stop, accumulate || line);
            for (int p = 0; p < kCount; ++p)
                if (q + p < end) to[p] += IR * s.hb;
        }
    }
}

// Blocks [begin, end) of one row, in groups of NV vectors, a remainder of 1 to NV + 1 in one or two smaller ones.
template <int IR, int NV, int PIECE>
static void sddmm_row(const SddmmOperands& s, const float* a, const float* b, int64_t begin, int64_t end,
                      const SddmmPositions& at, bool accumulate, float* spare) {
    constexpr int kPieces = VLEN / PIECE, kHalf = (NV + 1) / 2;
    const int64_t per_block = s.hb / PIECE;
    int64_t q = begin * per_block, left;
    end *= per_block;
    for (; (left = ceil_div(end - q, kPieces)) > NV + 1 || left == NV; q += NV * kPieces)
        sddmm_group<IR, NV, PIECE>(s, a, b, q, end, at, accumulate, spare);
    for (; (left = ceil_div(end - q, kPieces)) > 1; q += kHalf * kPieces)
        sddmm_group<IR, kHalf, PIECE>(s, a, b, q, end, at, accumulate, spare);
    if (left > 0) {
        if (IR == kSddmmRows && s.ha >= 2 * IR)
            sddmm_group<2 * IR, 1, PIECE>(s, a, b, q, end, at, accumulate, spare);
        else
            sddmm_group<IR, 1, PIECE>(s, a, b, q, end, at, accumulate, spare);
    }
}

template <int PIECE>
static void sddmm_row(const SddmmOperands& s, const float* a, const float* b, int64_t begin, int64_t end,
                      const SddmmPositions& at, bool accumulate, float* spare) {
    if (s.ha >= kSddmmRows)
        sddmm_row<kSddmmRows, 3, PIECE>(s, a, b, begin, end, at, accumulate, spare);
    else if (s.ha == 4)
        sddmm_row<4, SK_VLEN == 16 ? 6 : 3, PIECE>(s, a, b, begin, end, at, accumulate, spare);
    else
        sddmm_row<1, 8, PIECE>(s, a, b, begin, end, at, accumulate, spare);
}

// out[j][VLEN rows of the block] (+)= sum over positions of a[p, those rows] * b[j][p]: columns of one strip of A.
template <int NC>
static void thin_tile(const float* a, const float* const* b, float* const* out, const SddmmPositions& at, int64_t line,
                      int64_t stop, bool accumulate) {
    vfloat acc[NC];
    const float* from[NC];
#pragma GCC unroll 12
    for (int j = 0; j < NC; ++j) acc[j] = accumulate ? load(out[j]) : zero(), from[j] = b[j];
    const int64_t a_step = at.a_step, b_step = at.b_step, length = at.length;
    for (; line < stop; ++line) {
        const float* row = a + at.a_line[line];
        for (int64_t p = 0, o = at.b_line[line]; p < length; ++p, row += a_step, o += b_step) {
            const vfloat av = load(row);
#pragma GCC unroll 12
            for (int j = 0; j < NC; ++j) acc[j] = fma(av, broadcast(from[j][o]), acc[j]);
        }
    }
#pragma GCC unroll 12
    for (int j = 0; j < NC; ++j) store(out[j], acc[j]);
}

// Blocks [e, e + NC) of one row, blocks from `end` on as in sddmm_group.
template <int NC>
static void thin_group(const SddmmOperands& s, const float* a, const float* b, int64_t e, int64_t end,
                       const SddmmPositions& at, bool accumulate, float* spare) {
    const float* from[NC];
    float *first[NC], *to[NC];
    for (int j = 0; j < NC; ++j) {
        from[j] = b + strip_start(s, s.idx[smaller(e + j, end - 1)]);
        first[j] = e + j < end ? s.out + s.slot[e + j] * s.ha : spare;
        if (e + NC + j < end) __builtin_prefetch(s.out + s.slot[e + NC + j] * s.ha, 1);
    }
    for (int64_t line = 0; line < at.lines; line += at.chunk) {
        const int64_t stop = smaller(line + at.chunk, at.lines);
        for (int j = 0; j < NC; ++j) to[j] = first[j];
        for (int64_t i = 0; i < s.ha; i += VLEN) {
            thin_tile<NC>(a + i, from, to, at, line, stop, accumulate || line);
            for (int j = 0; j < NC; ++j)
                if (e + j < end) to[j] += VLEN;
        }
    }
}

static void thin_row(const SddmmOperands& s, const float* a, const float* b, int64_t begin, int64_t end,
                     const SddmmPositions& at, bool accumulate, float* spare) {
    constexpr int kColumns = 12, kFew = 4;
    int64_t e = begin;
    for (; e + kColumns <= end; e += kColumns) thin_group<kColumns>(s, a, b, e, end, at, accumulate, spare);
    for (; e < end; e += kFew) thin_group<kFew>(s, a, b, e, end, at, accumulate, spare);
}

// Blocks [begin, end) of one row: a is the row's strip of A, b the packed slice of B.
[[maybe_unused]] static void sddmm_blocks(const SddmmOperands& s, const float* a, const float* b, int64_t begin,
                                          int64_t end, const SddmmPositions& at, bool accumulate, float* spare) {
    if (s.hb == 1)
        thin_row(s, a, b, begin, end, at, accumulate, spare);
    else if (s.hb >= VLEN)
        sddmm_row<VLEN>(s, a, b, begin, end, at, accumulate, spare);
#if SK_VLEN == 16
    else if (s.hb == 8)
        sddmm_row<8>(s, a, b, begin, end, at, accumulate, spare);
#endif
#if SK_VLEN >= 8
    else
        sddmm_row<4>(s, a, b, begin, end, at, accumulate, spare);
#endif
}

#if !defined(__AVX512BF16__)

// dst[s][rows][side] = src[rows, strips * side], strips `strip` floats apart; columns from `cols` on are zero.
static void pack_strips(const float* src, int64_t ld, int64_t rows, int64_t cols, int64_t side, float* dst,
                        int64_t strip) {
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

#endif

// Zero where the last blocks of a row, or of the columns of each tap, stick out of W.
[[maybe_unused]] static void clear_padding(const BlockIndex& w, int64_t taps, float* dvalues) {
    const int64_t block = w.bh * w.bw, columns = ceil_div(w.in, w.bw);
    if (const int64_t real = w.out % w.bh) {
        const int64_t r = w.out / w.bh;
        for (int64_t e = w.crow[r]; e < w.crow[r + 1]; ++e)
            for (int64_t i = real * w.bw; i < block; ++i) dvalues[w.slot[e] * block + i] = 0;
    }
    if (const int64_t real = w.in % w.bw) {
        for (int64_t c = columns - 1; c < taps * columns; c += columns)
            for (int64_t e = w.ccol[c]; e < w.ccol[c + 1]; ++e)
                for (int64_t i = 0; i < block; i += w.bw)
                    for (int64_t j = real; j < w.bw; ++j) dvalues[w.slot_t[e] * block + i + j] = 0;
    }
}

}  // namespace sk::SK_ISA
