// Rows of memory <-> panels whose lanes are those rows: VLEN x VLEN transposes in registers.
#pragma once

#include "cpu/simd.h"

namespace sk::SK_ISA {

// Stores what is read again only after everything else: past the caches where a vector is a whole line, which saves
// reading the line first (64-byte aligned there). stream_fence() makes it visible to other threads.
SK_INLINE void stream(float* p, vfloat v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)v);
#else
    store(p, v);
#endif
}

SK_INLINE void stream_fence() {
#if defined(__AVX512F__)
    _mm_sfence();
#endif
}

// Exchange step of a transpose: of two vectors seen as blocks of `width` lanes, the even (or the odd) blocks of both.
#if SK_VLEN == 16
#define SK_SHUFFLE(a, b, i0, i1, i2, i3, i4, i5, i6, i7, i8, i9, i10, i11, i12, i13, i14, i15) \
    __builtin_shufflevector(a, b, i0, i1, i2, i3, i4, i5, i6, i7, i8, i9, i10, i11, i12, i13, i14, i15)
#elif SK_VLEN == 8
#define SK_SHUFFLE(a, b, i0, i1, i2, i3, i4, i5, i6, i7, ...) \
    __builtin_shufflevector(a, b, i0, i1, i2, i3, i4, i5, i6, i7)
#else
#define SK_SHUFFLE(a, b, i0, i1, i2, i3, ...) __builtin_shufflevector(a, b, i0, i1, i2, i3)
#endif

// Lane i of the even exchange is lane i of a where bit `width` of i is clear, else lane i - width of b; of the odd one
// lane i + width of a, else lane i of b.
#define SK_EVEN(i, w) (((i) & (w)) ? SK_VLEN + (i) - (w) : (i))
#define SK_ODD(i, w) (((i) & (w)) ? SK_VLEN + (i) : (i) + (w))
#define SK_EXCHANGE(which, a, b, w)                                                                             \
    SK_SHUFFLE(a, b, which(0, w), which(1, w), which(2, w), which(3, w), which(4, w), which(5, w), which(6, w), \
               which(7, w), which(8, w), which(9, w), which(10, w), which(11, w), which(12, w), which(13, w),   \
               which(14, w), which(15, w))

template <int W>
SK_INLINE vfloat exchange_even(vfloat a, vfloat b) {
    return SK_EXCHANGE(SK_EVEN, a, b, W);
}

template <int W>
SK_INLINE vfloat exchange_odd(vfloat a, vfloat b) {
    return SK_EXCHANGE(SK_ODD, a, b, W);
}

template <int W>
SK_INLINE void transpose_step(vfloat* r) {
    if constexpr (W < VLEN) {
#pragma GCC unroll 16
        for (int i = 0; i < VLEN; ++i)
            if (!(i & W)) {
                const vfloat a = r[i], b = r[i + W];
                r[i] = exchange_even<W>(a, b);
                r[i + W] = exchange_odd<W>(a, b);
            }
        transpose_step<2 * W>(r);
    }
}

SK_INLINE void transpose(vfloat* r) { transpose_step<1>(r); }

// Lane i of the result is the sum of the lanes of acc[i].
template <int W>
SK_INLINE void reduce_step(vfloat* acc) {
    if constexpr (W < VLEN) {
#pragma GCC unroll 16
        for (int i = 0; i < VLEN / (2 * W); ++i)
            acc[i] = exchange_even<W>(acc[2 * i], acc[2 * i + 1]) + exchange_odd<W>(acc[2 * i], acc[2 * i + 1]);
        reduce_step<2 * W>(acc);
    }
}

SK_INLINE vfloat reduce_lanes(vfloat* acc) {
    reduce_step<1>(acc);
    return acc[0];
}

// panel[j * stride + lane] = row[lane][j] for j < cols; rows of the panel up to the next multiple of VLEN become zero.
static inline void load_panel(const float* const* row, int64_t lanes, int64_t cols, float* panel, int64_t stride) {
    for (int64_t l = 0; l < lanes; l += VLEN)
        for (int64_t j = 0; j < cols; j += VLEN) {
            vfloat r[VLEN];
            if (cols - j >= VLEN) {
#pragma GCC unroll 16
                for (int i = 0; i < VLEN; ++i) r[i] = load(row[l + i] + j);
            } else {
#pragma GCC unroll 16
                for (int i = 0; i < VLEN; ++i) r[i] = load_first(row[l + i] + j, cols - j);
            }
            transpose(r);
#pragma GCC unroll 16
            for (int i = 0; i < VLEN; ++i) store(panel + (j + i) * stride + l, r[i]);
        }
}

// row[lane][j] = panel[j * stride + lane] (+ row[lane][j] if Add) for j < cols and the first `active` lanes. The panel
// has rows up to the next multiple of VLEN.
template <bool Add>
static inline void store_panel(const float* panel, int64_t stride, int64_t cols, float* const* row, int64_t active) {
    for (int64_t l = 0; l < active; l += VLEN) {
        const int64_t n = active - l < VLEN ? active - l : VLEN;
        for (int64_t j = 0; j < cols; j += VLEN) {
            vfloat r[VLEN];
#pragma GCC unroll 16
            for (int i = 0; i < VLEN; ++i) r[i] = load(panel + (j + i) * stride + l);
            transpose(r);
            const int64_t width = cols - j < VLEN ? cols - j : VLEN;
#pragma GCC unroll 16
            for (int i = 0; i < VLEN; ++i) {
                if (i >= n) break;
                float* to = row[l + i] + j;
                if (width == VLEN)
                    store(to, Add ? load(to) + r[i] : r[i]);
                else
                    store_first(to, Add ? load_first(to, width) + r[i] : r[i], width);
            }
        }
    }
}

// rows[p * stride + j] = row[p][j] for j < cols, zero up to the next multiple of VLEN.
static inline void copy_rows(const float* const* row, int64_t count, int64_t cols, float* rows, int64_t stride) {
    for (int64_t p = 0; p < count; ++p) {
        int64_t j = 0;
        for (; j + VLEN <= cols; j += VLEN) store(rows + p * stride + j, load(row[p] + j));
        if (j < cols) store(rows + p * stride + j, load_first(row[p] + j, cols - j));
    }
}

}  // namespace sk::SK_ISA
