// What the CUDA runtime says about the GPUs of this machine. The static runtime opens the driver on first use, so
// without a driver these return a status and nothing else happens.
#include <cuda_runtime.h>

#include <cstring>

#include "api.h"

namespace sk {

namespace {

int status(cudaError_t error) {
    if (error == cudaSuccess) return kOk;
    cudaGetLastError();  // a failed query must not surface in an unrelated later call
    return kCudaError + static_cast<int>(error);
}

}  // namespace

int cuda_device_count(int64_t* count) {
    int n = 0;
    const int result = status(cudaGetDeviceCount(&n));
    *count = result == kOk ? n : 0;
    return result;
}

int cuda_device_info(int64_t device, CudaDeviceInfo* info) {
    cudaDeviceProp prop;
    const int result = status(cudaGetDeviceProperties(&prop, static_cast<int>(device)));
    if (result != kOk) return result;
    static_assert(sizeof(info->name) == sizeof(prop.name), "the runtime changed the length of a device's name");
    std::memcpy(info->name, prop.name, sizeof(info->name));
    info->capability_major = prop.major;
    info->capability_minor = prop.minor;
    info->multiprocessors = prop.multiProcessorCount;
    info->shared_bytes_per_block = static_cast<int64_t>(prop.sharedMemPerBlockOptin);
    info->l2_bytes = prop.l2CacheSize;
    info->memory_bytes = static_cast<int64_t>(prop.totalGlobalMem);
    return kOk;
}

int64_t cuda_archs(int64_t* archs, int64_t most) {
    static constexpr int known[] = {__CUDA_ARCH_LIST__};
    constexpr int64_t count = sizeof(known) / sizeof(known[0]);
    for (int64_t i = 0; i < count && i < most; ++i) archs[i] = known[i] / 10;
    return count;
}

const char* cuda_error_string(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status - kCudaError)); }

}  // namespace sk
