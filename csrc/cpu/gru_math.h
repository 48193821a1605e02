// sigmoid and tanh on vfloat, within 2 units in the last place; NaN in, NaN out.
#pragma once

#include "cpu/simd.h"

namespace sk::SK_ISA {

// x within [low, high], NaN where it is NaN: the machine's minimum and maximum return their second operand then.
SK_INLINE vfloat clamp(vfloat x, float low, float high) {
#if defined(__AVX512F__)
    // The forms without a mask make GCC 12 warn of an uninitialised operand; a full mask costs nothing.
    const __mmask16 all = 0xffff;
    const __m512 capped = _mm512_maskz_min_ps(all, (__m512)broadcast(high), (__m512)x);
    return (vfloat)_mm512_maskz_max_ps(all, (__m512)broadcast(low), capped);
#elif defined(__AVX2__)
    return (vfloat)_mm256_max_ps((__m256)broadcast(low), _mm256_min_ps((__m256)broadcast(high), (__m256)x));
#else
    x = x > broadcast(high) ? broadcast(high) : x;
    return x < broadcast(low) ? broadcast(low) : x;
#endif
}

struct Expm1 {
    vfloat scale, part;  // exp(x) - 1 = scale * part + (scale - 1), scale a power of two
};

// x = k ln 2 + r with |r| <= ln 2 / 2, scale = 2^k, part = exp(r) - 1 by a polynomial of degree 7.
SK_INLINE Expm1 expm1_parts(vfloat x) {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the mantissa.
    const vfloat shift = broadcast(12582912.0f);
    x = clamp(x, -87.0f, 88.0f);
    const vfloat shifted = fma(x, broadcast(1.44269504f), shift);
    const vfloat k = shifted - shift;
    vfloat r = fma(k, broadcast(-0.693359375f), x);
    r = fma(k, broadcast(2.12194440e-4f), r);
    vfloat p = broadcast(1.98412698e-4f);
    p = fma(p, r, broadcast(1.38888889e-3f));
    p = fma(p, r, broadcast(8.33333333e-3f));
    p = fma(p, r, broadcast(4.16666667e-2f));
    p = fma(p, r, broadcast(1.66666667e-1f));
    p = fma(p, r, broadcast(0.5f));
    return {as_float((as_int(shifted) << 23) + broadcast(0x3f800000)), fma(r * r, p, r)};
}

SK_INLINE vfloat sigmoid(vfloat x) {
    const Expm1 e = expm1_parts(-x);
    return broadcast(1.0f) / (fma(e.scale, e.part, e.scale) + broadcast(1.0f));
}

SK_INLINE vfloat tanh(vfloat x) {
    const Expm1 e = expm1_parts(x + x);
    const vfloat m = fma(e.scale, e.part, e.scale - broadcast(1.0f));
    return m / (m + broadcast(2.0f));
}

}  // namespace sk::SK_ISA
