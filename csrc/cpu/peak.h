#pragma once

#include <cstdint>

namespace sk {

struct PeakTable {
    int64_t flops_per_iteration;
    // Runs `iterations` of independent multiply-adds in registers; the result only keeps the compiler honest.
    float (*fma_chain)(int64_t iterations, float factor, float term);
};

}  // namespace sk
