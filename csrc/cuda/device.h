// What device code is written against: the only header that a .cuh file includes. The same unmodified file compiles
// with nvcc, with NVRTC (which has no headers at all) and, under the emulation header of the tests, on the CPU.
//
// Everything is a function: indices, barriers, shuffles, asynchronous copies, and the instructions of the tensor cores
// with the fragment layouts of the PTX manual (sections "Matrix Fragments for mma.m16n8k16", ".m16n8k8", ".m8n8k4").
#pragma once

#if defined(SK_EMULATION)

#include "emulation.h"

#else

#if defined(__CUDACC_RTC__)
using int32_t = int;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int64_t = long long;
#else
#include <cuda_runtime.h>

#include <cstdint>
#endif

// Ten times the compute capability that is compiled for, e.g. 800. The host's pass runs none of it.
#if defined(__CUDA_ARCH__)
#define SK_ARCH __CUDA_ARCH__
#else
#define SK_ARCH 800
#endif

#define SK_DEVICE __device__ __forceinline__
#define SK_BOTH __host__ __device__ __forceinline__
// A kernel whose blocks have at most `threads` threads, which bounds its registers.
#define SK_KERNEL(threads) __global__ void __launch_bounds__(threads)
#define SK_GRID_CONSTANT __grid_constant__
#define SK_UNROLL _Pragma("unroll")
#define SK_NO_UNROLL _Pragma("unroll 1")

namespace sk::gpu {

SK_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
SK_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
SK_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
SK_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
SK_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }

// The block's dynamic shared memory, 128-byte aligned.
SK_DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char bytes[];
    return bytes;
}

SK_DEVICE void sync_block() { __syncthreads(); }
SK_DEVICE void sync_warp() { __syncwarp(); }
SK_DEVICE int32_t shuffle(int32_t value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
SK_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

SK_DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of the first `bytes` of 16 from global to shared memory, the rest zero; both 16-byte aligned. Before
// sm_80 it is done at once.
SK_DEVICE void copy_16_async(void* shared, const void* global, int bytes) {
#if SK_ARCH >= 800
    // Through L1 (.ca): the warps that share a row of blocks find its weights there.
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
#else
    uint4 value{0, 0, 0, 0};
    if (bytes == 16) {
        value = *static_cast<const uint4*>(global);
    } else {
        uint32_t* words = &value.x;
        SK_UNROLL for (int i = 0; i < 7; ++i) {
            if (2 * i < bytes) words[i / 2] |= uint32_t{static_cast<const uint16_t*>(global)[i]} << 16 * (i & 1);
        }
    }
    *static_cast<uint4*>(shared) = value;
#endif
}
SK_DEVICE void store_16(void* global, const uint32_t (&words)[4]) {
    *static_cast<uint4*>(global) = uint4{words[0], words[1], words[2], words[3]};
}
SK_DEVICE void commit_copies() {
#if SK_ARCH >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most N of this thread's groups of copies are under way.
template <int N>
SK_DEVICE void wait_copies() {
#if SK_ARCH >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Four 8 x 8 matrices of 16-bit elements: lane 8 i + r names row r of matrix i (16 bytes).
SK_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
#if SK_ARCH >= 750
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}
SK_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
#if SK_ARCH >= 750
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// The dtypes of activations and weights, as 16 bits each.
struct Half {};
struct Bf16 {};

SK_DEVICE uint16_t to_bits(Half, float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
SK_DEVICE uint16_t to_bits(Bf16, float value) {
    uint16_t bits = 0;
#if SK_ARCH >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
    return bits;
}

// d [16, 8] += a [16, 16] * b [16, 8], sums in fp32. From sm_80.
SK_DEVICE void mma_16816(Half, float* d, const uint32_t* a, const uint32_t* b) {
#if SK_ARCH >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
SK_DEVICE void mma_16816(Bf16, float* d, const uint32_t* a, const uint32_t* b) {
#if SK_ARCH >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// d [16, 8] += a [16, 8] * b [8, 8] in fp16. From sm_75.
SK_DEVICE void mma_1688(float* d, const uint32_t* a, const uint32_t* b) {
#if SK_ARCH >= 750
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
#endif
}

// Four products at once, one by each quad pair: d [8, 8] += a [8, 4] * b [4, 8] in fp16. For sm_70, where it is the
// fast instruction. A thread holds 4 rows of one column of A where A_COLUMNS, else 4 columns of one row; and 4 rows of
// one column of B.
template <bool A_COLUMNS>
SK_DEVICE void mma_884(float* d, const uint32_t* a, const uint32_t* b) {
#if SK_ARCH >= 700
#define SK_MMA_884(a_layout)                                                                                         \
    asm("mma.sync.aligned.m8n8k4." a_layout                                                                          \
        ".col.f32.f16.f16.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9}, {%10, %11}, {%0, %1, %2, %3, %4, %5, %6, " \
        "%7};"                                                                                                       \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])             \
        : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(b[1]))
    if constexpr (A_COLUMNS)
        SK_MMA_884("col");
    else
        SK_MMA_884("row");
#undef SK_MMA_884
#endif
}

SK_DEVICE float exponential(float x) { return expf(x); }
SK_DEVICE float error_function(float x) { return erff(x); }
SK_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }

}  // namespace sk::gpu

#endif
