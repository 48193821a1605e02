// What the kernels of unstructured weights share: 4-lane shuffles, sums over lanes, the stream of columns.
//
// Included by csrc/cpu/kernels/*.cpp only (see simd.h).
#pragma once

#include <string.h>

#include "cpu/simd.h"

namespace sk::SK_ISA {

// Element `i` of the pair (a, b) of 4-float lanes: 0..3 are a's, 4..7 are b's.
#define LANE_INDEX(lane, i) ((i) < 4 ? 4 * (lane) + (i) : SK_VLEN + 4 * (lane) + (i) - 4)
#define LANE(lane) LANE_INDEX(lane, I), LANE_INDEX(lane, J), LANE_INDEX(lane, K), LANE_INDEX(lane, L)

// The same shuffle in every 4-float lane.
template <int I, int J, int K, int L>
SK_INLINE vfloat in_lanes(vfloat a, vfloat b) {
#if SK_VLEN == 16
    return __builtin_shufflevector(a, b, LANE(0), LANE(1), LANE(2), LANE(3));
#elif SK_VLEN == 8
    return __builtin_shufflevector(a, b, LANE(0), LANE(1));
#else
    return __builtin_shufflevector(a, b, LANE(0));
#endif
}

#undef LANE
#undef LANE_INDEX

// Four floats at p in every lane.
SK_INLINE vfloat broadcast4(const float* p) {
#if SK_VLEN == 16
    return (vfloat)_mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(p));
#elif SK_VLEN == 8
    return (vfloat)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
#else
    return load(p);
#endif
}

typedef float vquad __attribute__((vector_size(16), aligned(4), may_alias));

// The sum of the 4-float lanes.
SK_INLINE vquad sum_lanes(vfloat v) {
#if SK_VLEN == 16
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
#endif
#if SK_VLEN >= 8
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
    return v;
#endif
}

// The four sums over all lanes of m0, m1, m2, m3.
SK_INLINE vquad reduce4(vfloat m0, vfloat m1, vfloat m2, vfloat m3) {
    const vfloat a = in_lanes<0, 1, 6, 7>(m0, m1) + in_lanes<2, 3, 4, 5>(m0, m1);  // m0 m0 m1 m1
    const vfloat b = in_lanes<0, 1, 6, 7>(m2, m3) + in_lanes<2, 3, 4, 5>(m2, m3);  // m2 m2 m3 m3
    return sum_lanes(in_lanes<0, 2, 4, 6>(a, b) + in_lanes<1, 3, 5, 7>(a, b));
}

SK_INLINE void transpose_lanes(vfloat* r) {
    const vfloat a = in_lanes<0, 4, 1, 5>(r[0], r[1]), b = in_lanes<2, 6, 3, 7>(r[0], r[1]);
    const vfloat c = in_lanes<0, 4, 1, 5>(r[2], r[3]), d = in_lanes<2, 6, 3, 7>(r[2], r[3]);
    r[0] = in_lanes<0, 1, 4, 5>(a, c);
    r[1] = in_lanes<2, 3, 6, 7>(a, c);
    r[2] = in_lanes<0, 1, 4, 5>(b, d);
    r[3] = in_lanes<2, 3, 6, 7>(b, d);
}

// Lanes 0, 2 (1, 3) of a, then those of b.
#if SK_VLEN == 16
SK_INLINE vfloat even_lanes(vfloat a, vfloat b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
}
SK_INLINE vfloat odd_lanes(vfloat a, vfloat b) {
    return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
#elif SK_VLEN == 8
SK_INLINE vfloat even_lanes(vfloat a, vfloat b) { return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11); }
SK_INLINE vfloat odd_lanes(vfloat a, vfloat b) { return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15); }
#endif

// Transposes the VLEN x VLEN matrix whose rows are r: 4x4 inside the lanes, then the lanes themselves.
SK_INLINE void transpose(vfloat* r) {
    for (int group = 0; group < VLEN; group += 4) transpose_lanes(r + group);
#if SK_VLEN == 16
    vfloat t[16];
    for (int k = 0; k < 4; ++k) {
        const vfloat ab_even = even_lanes(r[k], r[4 + k]), ab_odd = odd_lanes(r[k], r[4 + k]);
        const vfloat cd_even = even_lanes(r[8 + k], r[12 + k]), cd_odd = odd_lanes(r[8 + k], r[12 + k]);
        t[k] = even_lanes(ab_even, cd_even);
        t[4 + k] = even_lanes(ab_odd, cd_odd);
        t[8 + k] = odd_lanes(ab_even, cd_even);
        t[12 + k] = odd_lanes(ab_odd, cd_odd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
#elif SK_VLEN == 8
    for (int k = 0; k < 4; ++k) {
        const vfloat low = even_lanes(r[k], r[4 + k]), high = odd_lanes(r[k], r[4 + k]);
        r[k] = low;
        r[4 + k] = high;
    }
#endif
}

// The columns of the stream, four to a word, read two words ahead: a vector load whose address comes from a load that
// is still under way costs Zen 5 a third of its L1 bandwidth (6.2 against 4.6 cycles per nonzero and 128 positions).
struct Columns {
    const uint16_t* next;
    uint64_t first, second;

    inline __attribute__((always_inline)) explicit Columns(const uint16_t* locals) : next(locals + 8) {
        memcpy(&first, locals, 8);
        memcpy(&second, locals + 4, 8);
    }
    inline __attribute__((always_inline)) uint64_t quad() {
        const uint64_t word = first;
        first = second;
        memcpy(&second, next, 8);
        next += 4;
        return word;
    }
};

#define SK_COLUMN(word, k) (((word) >> (16 * (k))) & 0xffff)

// As many positions as eight vectors hold: more accumulators would not fit in 16 registers.
constexpr int part_of(int width) { return width < 8 * VLEN ? width : 8 * VLEN; }

}  // namespace sk::SK_ISA
