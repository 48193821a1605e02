// Transposes of small tiles in registers and of strips through them.
//
// Included by csrc/cpu/kernels/*.cpp only (see simd.h).
#pragma once

#include "cpu/simd.h"

namespace sk::SK_ISA {

// One stage of the transpose of VLEN vectors: swaps the off-diagonal S x S blocks of every 2S x 2S block.
template <int S>
SK_INLINE void transpose_stage(vfloat* row) {
#define SK_LOW(lane) (((lane) & S) == 0 ? (lane) : VLEN + (lane) - S)
#define SK_HIGH(lane) (((lane) & S) == 0 ? (lane) + S : VLEN + (lane))
#if SK_VLEN == 16
#define SK_LANES(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#elif SK_VLEN == 8
#define SK_LANES(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)
#else
#define SK_LANES(f) f(0), f(1), f(2), f(3)
#endif
#pragma GCC unroll 16
    for (int i = 0; i < VLEN; ++i)
        if (!(i & S)) {
            const vfloat a = row[i], b = row[i + S];
            row[i] = __builtin_shufflevector(a, b, SK_LANES(SK_LOW));
            row[i + S] = __builtin_shufflevector(a, b, SK_LANES(SK_HIGH));
        }
#undef SK_LANES
#undef SK_LOW
#undef SK_HIGH
}

SK_INLINE void transpose_registers(vfloat* row) {
#if SK_VLEN == 16
    transpose_stage<8>(row);
#endif
#if SK_VLEN >= 8
    transpose_stage<4>(row);
#endif
    transpose_stage<2>(row);
    transpose_stage<1>(row);
}

// dst[j, i] = src[i, j] for i < rows, j < cols; nothing else is read or written.
static void transpose(const float* src, int64_t src_ld, float* dst, int64_t dst_ld, int64_t rows, int64_t cols) {
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
