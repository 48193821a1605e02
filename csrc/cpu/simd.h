// Vectors of VLEN floats over the compiler's vector extensions: the same source for AVX-512, AVX2 and anything else.
//
// Included by csrc/cpu/kernels/*.cpp only, which are compiled with -DSK_ISA=avx512 | avx2 | portable and that
// instruction set's flags. `a * b + c` on vfloat contracts to a fused multiply-add (-ffp-contract=fast). Everything
// here is always_inline inside the namespace of its instruction set, so no symbol leaves the file.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define SK_VLEN 16
#elif defined(__AVX2__)
#define SK_VLEN 8
#else
#define SK_VLEN 4
#endif

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define SK_INLINE static inline __attribute__((always_inline, unused))

namespace sk::SK_ISA {

constexpr int VLEN = SK_VLEN;

typedef float vfloat __attribute__((vector_size(4 * SK_VLEN), may_alias));
typedef int32_t vint __attribute__((vector_size(4 * SK_VLEN), may_alias));
// The same, at any address that a float may have.
typedef float vfloat_u __attribute__((vector_size(4 * SK_VLEN), aligned(4), may_alias));
typedef int32_t vint_u __attribute__((vector_size(4 * SK_VLEN), aligned(4), may_alias));

SK_INLINE vfloat load(const float* p) { return *reinterpret_cast<const vfloat_u*>(p); }
SK_INLINE void store(float* p, vfloat v) { *reinterpret_cast<vfloat_u*>(p) = v; }
SK_INLINE vint load(const int32_t* p) { return *reinterpret_cast<const vint_u*>(p); }
SK_INLINE void store(int32_t* p, vint v) { *reinterpret_cast<vint_u*>(p) = v; }

SK_INLINE vfloat zero() { return vfloat{}; }
// x - 0 is x for every x, so this is one broadcast; 0 + x is not (x = -0) and costs an addition.
SK_INLINE vfloat broadcast(float x) { return x - vfloat{}; }
SK_INLINE vint broadcast(int32_t x) { return vint{} + x; }

SK_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) { return a * b + c; }
SK_INLINE vfloat as_float(vint v) { return reinterpret_cast<vfloat>(v); }
SK_INLINE vint as_int(vfloat v) { return reinterpret_cast<vint>(v); }

// mask ? a : b, lane by lane; a mask is what a comparison of two vectors gives (all bits or none).
SK_INLINE vfloat select(vint mask, vfloat a, vfloat b) { return as_float((mask & as_int(a)) | (~mask & as_int(b))); }
SK_INLINE vfloat max(vfloat a, vfloat b) { return select(a > b, a, b); }
SK_INLINE vfloat min(vfloat a, vfloat b) { return select(a < b, a, b); }

// Lanes [0, n) are true; n in [0, VLEN].
SK_INLINE vint first_lanes(int64_t n) {
    vint lane;
    for (int i = 0; i < VLEN; ++i) lane[i] = i;
    return lane < broadcast(static_cast<int32_t>(n));
}

// The first n floats at p, n in [0, VLEN]; the other lanes are zero and their memory is not touched.
SK_INLINE vfloat load_first(const float* p, int64_t n) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1u), p);
#elif defined(__AVX2__)
    return (vfloat)_mm256_maskload_ps(p, (__m256i)first_lanes(n));
#else
    vfloat v = {};
    for (int64_t i = 0; i < n; ++i) v[i] = p[i];
    return v;
#endif
}

// Stores lanes [0, n) to p, n in [0, VLEN]; other memory is not touched.
SK_INLINE void store_first(float* p, vfloat v, int64_t n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1u), (__m512)v);
#elif defined(__AVX2__)
    _mm256_maskstore_ps(p, (__m256i)first_lanes(n), (__m256)v);
#else
    for (int64_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// The sum of the lanes, by halves: the same tree on every run.
SK_INLINE float reduce_add(vfloat v) {
    float lane[VLEN];
    store(lane, v);
    for (int half = VLEN / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
}

}  // namespace sk::SK_ISA
