// The fastest fp32 multiply-adds this instruction set can do: chains in registers, no memory.
#include "cpu/peak.h"

#include "cpu/simd.h"

namespace sk::SK_ISA {

// Two pipes of latency 4 or 5 need 10 chains in flight; 12 leave registers for the factors on 16-register machines.
constexpr int kChains = 12;

static float fma_chain(int64_t iterations, float factor, float term) {
    const vfloat a = broadcast(factor), b = broadcast(term);
    vfloat acc[kChains];
    for (int i = 0; i < kChains; ++i) acc[i] = broadcast(static_cast<float>(i));
    for (int64_t n = 0; n < iterations; ++n)
        for (int i = 0; i < kChains; ++i) acc[i] = fma(acc[i], a, b);
    vfloat sum = acc[0];
    for (int i = 1; i < kChains; ++i) sum += acc[i];
    return reduce_add(sum);
}

extern const PeakTable peak_table;
const PeakTable peak_table = {2 * kChains * VLEN, fma_chain};

}  // namespace sk::SK_ISA
