// The fastest multiply-adds this instruction set can do: chains in registers, no memory. In fp32, or with
// __AVX512BF16__ of pairs of bf16 added to fp32 sums.
#include "cpu/peak.h"

#include "cpu/simd.h"

namespace sk::SK_ISA {

// Two pipes of latency 4 or 5 need 10 chains in flight; 12 leave registers for the factors on 16-register machines.
constexpr int kChains = 12;

#if defined(__AVX512BF16__)
constexpr int64_t kFlops = 4;  // of a lane
SK_INLINE vfloat multiply_add(vfloat acc, vfloat a, vfloat b) {
    return (vfloat)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
#else
constexpr int64_t kFlops = 2;
SK_INLINE vfloat multiply_add(vfloat acc, vfloat a, vfloat b) { return fma(acc, a, b); }
#endif

static float fma_chain(int64_t iterations, float factor, float term) {
    const vfloat a = broadcast(factor), b = broadcast(term);
    vfloat acc[kChains];
    for (int i = 0; i < kChains; ++i) acc[i] = broadcast(static_cast<float>(i));
    for (int64_t n = 0; n < iterations; ++n)
        for (int i = 0; i < kChains; ++i) acc[i] = multiply_add(acc[i], a, b);
    vfloat sum = acc[0];
    for (int i = 1; i < kChains; ++i) sum += acc[i];
    return reduce_add(sum);
}

extern const PeakTable peak_table;
const PeakTable peak_table = {kFlops * kChains * VLEN, fma_chain};

}  // namespace sk::SK_ISA
