// The kernel table of the block-CSR linear family (see dispatch.h); the launchers are documented in api.h.
#pragma once

#include "api.h"

namespace sk {

struct LinearBlockTable {
    int64_t (*spmm_workspace)(const BlockIndex&, bool transposed, int64_t positions, int64_t threads);
    void (*spmm)(const BlockIndex&, bool transposed, const float* values, const float* x, int64_t ldx,
                 const float* bias, float* y, int64_t ldy, int64_t positions, int64_t threads, void* workspace);
    int64_t (*sddmm_workspace)(const BlockIndex&, int64_t positions, int64_t threads);
    void (*sddmm)(const BlockIndex&, const float* dy, int64_t ldy, const float* x, int64_t ldx, float* dvalues,
                  int64_t positions, int64_t threads, void* workspace);
};

}  // namespace sk
