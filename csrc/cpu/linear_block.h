// The kernel table of the block-CSR linear family (see dispatch.h); the launchers are documented in api.h.
#pragma once

#include "api.h"

namespace sk {

// T is the type of activations.
template <class T>
struct LinearBlockTable {
    int64_t (*spmm_workspace)(const BlockIndex&, bool transposed, int64_t positions, int64_t threads);
    void (*spmm)(const BlockIndex&, bool transposed, const float* values, const T* x, int64_t ldx,
                 const Epilogue<T>& epilogue, T* y, int64_t ldy, int64_t positions, int64_t threads, void* workspace);
    int64_t (*sddmm_workspace)(const BlockIndex&, int64_t positions, int64_t threads);
    void (*sddmm)(const BlockIndex&, const T* dy, int64_t ldy, const T* x, int64_t ldx, float* dvalues,
                  int64_t positions, int64_t threads, void* workspace);
};

}  // namespace sk
