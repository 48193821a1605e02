// Transposes of small tiles in registers and of strips through them.
//
// Included by csrc/cpu/kernels/*.cpp only (see simd.h).
#pragma once

#include "cpu/simd.h"

namespace sk::SK_ISA {

// std::min and std::max are templates that the linker might share between the instruction sets.
SK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
SK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
SK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if SK_VLEN == 16
#define SK_LANES(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#elif SK_VLEN == 8
#define SK_LANES(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)
#else
#define SK_LANES(f) f(0), f(1), f(2), f(3)
#endif
#define SK_LOW(lane) (((lane) & S) == 0 ? (lane) : VLEN + (lane) - S)
#define SK_HIGH(lane) (((lane) & S) == 0 ? (lane) + S : VLEN + (lane))
#define SK_ZIP_LOW(lane) ((lane) / 2 + (lane) % 2 * VLEN)
#define SK_ZIP_HIGH(lane) ((lane) / 2 + (lane) % 2 * VLEN + VLEN / 2)

// a0 b0 a1 b1 ... of the lower halves, and of the upper ones.
SK_INLINE vfloat interleave_low(vfloat a, vfloat b) { return __builtin_shufflevector(a, b, SK_LANES(SK_ZIP_LOW)); }
SK_INLINE vfloat interleave_high(vfloat a, vfloat b) { return __builtin_shufflevector(a, b, SK_LANES(SK_ZIP_HIGH)); }

// One stage of a transpose in `count` registers: rows `distance` apart swap the off-diagonal S lanes of every 2 S.
template <int S>
SK_INLINE void transpose_stage(vfloat* row, int distance, int count) {
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i)
        if (!(i & distance)) {
            const vfloat a = row[i], b = row[i + distance];
            row[i] = __builtin_shufflevector(a, b, SK_LANES(SK_LOW));
            row[i + distance] = __builtin_shufflevector(a, b, SK_LANES(SK_HIGH));
        }
}

#undef SK_LANES
#undef SK_LOW
#undef SK_HIGH
#undef SK_ZIP_LOW
#undef SK_ZIP_HIGH

// VLEN x VLEN floats.
SK_INLINE void transpose_registers(vfloat* row) {
#if SK_VLEN == 16
    transpose_stage<8>(row, 8, VLEN);
#endif
#if SK_VLEN >= 8
    transpose_stage<4>(row, 4, VLEN);
#endif
    transpose_stage<2>(row, 2, VLEN);
    transpose_stage<1>(row, 1, VLEN);
}

// dst[j / 2, i, j % 2] = src[i, j]: a transpose of pairs. rows is a multiple of VLEN / 2, cols of 2; dst rows of 2 *
// rows.
[[maybe_unused]] static void transpose_pairs(const float* src, int64_t src_ld, float* dst, int64_t dst_ld, int64_t rows,
                                             int64_t cols) {
    for (int64_t i = 0; i < rows; i += VLEN / 2)
        for (int64_t j = 0; j < cols; j += VLEN) {
            const int64_t n = cols - j < VLEN ? cols - j : VLEN;
            vfloat tile[VLEN / 2];
#pragma GCC unroll 8
            for (int r = 0; r < VLEN / 2; ++r) tile[r] = load_first(src + (i + r) * src_ld + j, n);
#if SK_VLEN == 16
            transpose_stage<8>(tile, 4, VLEN / 2);
#endif
#if SK_VLEN >= 8
            transpose_stage<4>(tile, 2, VLEN / 2);
#endif
            transpose_stage<2>(tile, 1, VLEN / 2);
#pragma GCC unroll 8
            for (int r = 0; r < VLEN / 2; ++r)
                if (2 * r < n) store(dst + (j / 2 + r) * dst_ld + 2 * i, tile[r]);
        }
}

// dst[j, i] = src[i, j] for i < rows, j < cols; nothing else is read or written.
[[maybe_unused]] static void transpose(const float* src, int64_t src_ld, float* dst, int64_t dst_ld, int64_t rows,
                                       int64_t cols) {
    for (int64_t i = 0; i < rows; i += VLEN) {
        const int64_t m = rows - i < VLEN ? rows - i : VLEN;
        for (int64_t j = 0; j < cols; j += VLEN) {
            const int64_t n = cols - j < VLEN ? cols - j : VLEN;
            vfloat tile[VLEN];
            if (m == VLEN && n == VLEN) {
#pragma GCC unroll 16
                for (int r = 0; r < VLEN; ++r) tile[r] = load(src + (i + r) * src_ld + j);
                transpose_registers(tile);
#pragma GCC unroll 16
                for (int c = 0; c < VLEN; ++c) store(dst + (j + c) * dst_ld + i, tile[c]);
            } else if (m * n <= VLEN) {
                for (int64_t r = 0; r < m; ++r)
                    for (int64_t c = 0; c < n; ++c) dst[(j + c) * dst_ld + i + r] = src[(i + r) * src_ld + j + c];
            } else {
                for (int r = 0; r < VLEN; ++r) tile[r] = r < m ? load_first(src + (i + r) * src_ld + j, n) : zero();
                transpose_registers(tile);
                for (int c = 0; c < n; ++c) store_first(dst + (j + c) * dst_ld + i, tile[c], m);
            }
        }
    }
}

}  // namespace sk::SK_ISA
