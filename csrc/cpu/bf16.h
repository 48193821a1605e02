// What the block tiles multiply: fp32 numbers, or two bf16 in the place of each.
//
// A kernel file that names __AVX512BF16__ is compiled once more with that instruction set (setup.py). An element of X
// and Y is then a bf16, and a unit, what a lane of a vector holds, a pair of them in 32 bits; `mac` adds both products
// of a pair to an fp32 sum. So a tile keeps its shape and sees half as many columns (spmm) or positions (sddmm).
// Weights arrive in fp32 and are rounded while they are packed.
//
// Included by csrc/cpu/kernels/*.cpp only (see simd.h).
#pragma once

#include "cpu/transpose.h"

namespace sk::SK_ISA {

#if defined(__AVX512BF16__)
typedef uint16_t element;
constexpr int64_t kUnit = 2;  // elements of a unit
#else
typedef float element;
constexpr int64_t kUnit = 1;
#endif

SK_INLINE int64_t units(int64_t elements) { return ceil_div(elements, kUnit); }

#if defined(__AVX512BF16__)

typedef int32_t unit_bits __attribute__((may_alias));
typedef __m256i half_u __attribute__((aligned(1), may_alias));

// acc + the products of the units a and b.
SK_INLINE vfloat mac(vfloat a, vfloat b, vfloat acc) {
    return (vfloat)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}

// One unit in every lane; as an integer, because its bits need not be a number.
SK_INLINE vfloat spread(const float* unit) { return as_float(broadcast(*reinterpret_cast<const unit_bits*>(unit))); }

SK_INLINE __m256i narrow(vfloat v) { return (__m256i)_mm512_cvtneps_pbh((__m512)v); }

// Units of one element of each row.
SK_INLINE vfloat zip(__m256i low, __m256i high) {
    const __m512i shifted = _mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, high), 16);
    return (vfloat)_mm512_or_si512(_mm512_maskz_cvtepu16_epi32(0xffff, low), shifted);
}

SK_INLINE __m256i load_first(const element* p, int64_t n) {
    return _mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1u), p);
}

SK_INLINE void store(element* p, vfloat v) { *reinterpret_cast<half_u*>(p) = narrow(v); }
SK_INLINE void store_first(element* p, vfloat v, int64_t n) {
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1u), narrow(v));
}

// The first n elements at p in fp32, the other lanes zero.
SK_INLINE vfloat read_first(const element* p, int64_t n) { return zip(_mm256_setzero_si256(), load_first(p, n)); }

// `cols` elements as units; the second element of a last half unit is zero.
SK_INLINE void pack_row(const element* src, float* dst, int64_t cols) {
    constexpr int64_t kCount = 2 * VLEN;
    int64_t j = 0;
    for (; j + kCount <= cols; j += kCount, dst += VLEN) _mm512_storeu_si512(dst, _mm512_loadu_si512(src + j));
    if (j < cols) {
        const vint v = (vint)_mm512_maskz_loadu_epi16((__mmask32)((1u << (cols - j)) - 1u), src + j);
        store_first(dst, as_float(v), units(cols - j));
    }
}

// The units of 2 * VLEN columns of two rows.
SK_INLINE void zip_rows(const element* low, const element* high, vfloat& first, vfloat& second) {
    const __m512i a = _mm512_loadu_si512(low), b = _mm512_loadu_si512(high);
    const __m512i lane = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                          37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    first = (vfloat)_mm512_permutex2var_epi16(a, lane, b);
    second = (vfloat)_mm512_permutex2var_epi16(a, _mm512_add_epi16(lane, _mm512_set1_epi16(VLEN)), b);
}

// dst[s][units of rows][side] from src[rows, strips * side]: neighbouring rows make the units; strips are `strip` units
// apart, columns from `cols` on and a row behind the last one are zero. side is a multiple of VLEN.
[[maybe_unused]] static void pack_strips(const element* src, int64_t ld, int64_t rows, int64_t cols, int64_t side,
                                         float* dst, int64_t strip) {
    for (int64_t p = 0; p < rows; p += 2, src += 2 * ld, dst += side) {
        const bool pair = p + 1 < rows;
        float* to = dst;
        int64_t c = 0;
        if (pair && side == VLEN) {
            for (; c + 2 * VLEN <= cols; c += 2 * VLEN, to += 2 * strip) {
                vfloat first, second;
                zip_rows(src + c, src + ld + c, first, second);
                store(to, first), store(to + strip, second);
            }
        } else if (pair) {
            for (; c + side <= cols; c += side, to += strip)
                for (int64_t j = 0; j < side; j += 2 * VLEN) {
                    vfloat first, second;
                    zip_rows(src + c + j, src + ld + c + j, first, second);
                    store(to + j, first), store(to + j + VLEN, second);
                }
        }
        for (; c < cols; c += side, to += strip)
            for (int64_t j = 0; j < side; j += VLEN) {
                const int64_t n = larger(0, smaller(VLEN, cols - c - j));
                const __m256i low = load_first(src + c + j, n);
                store(to + j, zip(low, load_first(src + (pair ? ld : 0) + c + j, pair ? n : 0)));
            }
    }
}

#else

SK_INLINE vfloat mac(vfloat a, vfloat b, vfloat acc) { return fma(a, b, acc); }
SK_INLINE vfloat spread(const float* unit) { return broadcast(*unit); }
SK_INLINE vfloat read_first(const element* p, int64_t n) { return load_first(p, n); }

SK_INLINE void pack_row(const element* src, float* dst, int64_t cols) {
    int64_t j = 0;
    for (; j + VLEN <= cols; j += VLEN) store(dst + j, load(src + j));
    if (j < cols) store_first(dst + j, load_first(src + j, cols - j), cols - j);
}

#endif

}  // namespace sk::SK_ISA
