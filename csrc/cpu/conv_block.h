// The kernel tables of the block-CSR convolution (see dispatch.h); the launchers are documented in api.h.
#pragma once

#include "api.h"

namespace sk {

// T is that of images: float, or bf16.
template <class T>
struct ConvProductTable {
    int64_t (*spmm_workspace)(const BlockIndex&, const ConvShape&, bool transposed, int64_t threads);
    void (*spmm)(const BlockIndex&, const ConvShape&, bool transposed, const float* values, const T* x,
                 const ImageStrides& x_strides, const Epilogue<T>& epilogue, T* y, const ImageStrides& y_strides,
                 int64_t threads, void* workspace);
};

struct ConvGradientTable {
    int64_t (*sddmm_workspace)(const BlockIndex&, const ConvShape&, int64_t threads);
    void (*sddmm)(const BlockIndex&, const ConvShape&, const float* dy, const ImageStrides& dy_strides, const float* x,
                  const ImageStrides& x_strides, float* dvalues, int64_t threads, void* workspace);
    bool (*backward_fuses)(const BlockIndex&, const ConvShape&);
    int64_t (*backward_workspace)(const BlockIndex&, const ConvShape&, int64_t threads);
    void (*backward)(const BlockIndex&, const ConvShape&, const float* values, const float* dy,
                     const ImageStrides& dy_strides, const float* x, const ImageStrides& x_strides, float* dx,
                     const ImageStrides& dx_strides, float* dvalues, float* dbias, int64_t threads, void* workspace);
};

}  // namespace sk
