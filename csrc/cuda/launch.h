// How the launchers start a kernel: nvcc's way, or the emulation's.
#pragma once

#include <type_traits>

#include "api.h"
#include "cuda/device.h"

namespace sk::gpu {

struct Grid {
    int64_t x, y, z;
    int threads;
    int64_t shared;  // bytes
};

#if defined(SK_EMULATION)

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), const Grid& grid, void*, const Arguments&... arguments) {
    return run_grid(grid.x, grid.y, grid.z, grid.threads, grid.shared, [&] { kernel(arguments...); });
}

#else

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), const Grid& grid, void* stream, const Arguments&... arguments) {
    cudaError_t error = cudaSuccess;
    if (grid.shared > 48 << 10)
        error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared));
    if (error == cudaSuccess) {
        const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
        const void* given[] = {&arguments...};
        static_assert((std::is_same_v<std::remove_const_t<Parameters>, Arguments> && ...), "passed by address");
        error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), blocks,
                                 dim3(static_cast<unsigned>(grid.threads)), const_cast<void**>(given),
                                 static_cast<size_t>(grid.shared), static_cast<cudaStream_t>(stream));
    }
    if (error != cudaSuccess) cudaGetLastError();  // a failed launch must not surface in an unrelated later call
    return error == cudaSuccess ? static_cast<int>(kOk) : kCudaError + static_cast<int>(error);
}

#endif

}  // namespace sk::gpu
