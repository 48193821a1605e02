// The native contract: every launcher takes plain buffers, int64 sizes, a thread count or a stream, and returns a
// Status.
//
// Nothing allocates, throws or synchronises across this boundary. Scratch memory is a workspace pointer whose size
// `<launcher>_workspace_bytes(...)` returns; the caller allocates it, 64-byte aligned. All checks of dtype, shape,
// stride and device live in the Python layer above.
#pragma once

#include <cstdint>

namespace sk {

enum Status : int {
    kOk = 0,
    kUnsupported = 1,   // this build or this device has no kernel for the arguments
    kInvalid = 2,       // an argument breaks the launcher's contract
    kCudaError = 1000,  // plus a cudaError_t: what the CUDA runtime returned
};

// The index set of one weight [out, in] cut into blocks [bh, bw]: nnzb active blocks, seen from both orientations.
// Block k of the row-sorted order is values[slot[k]], k in crow[r] .. crow[r + 1], at column block col[k];
// block k of the column-sorted order is values[slot_t[k]], k in ccol[c] .. ccol[c + 1], at row block row_t[k].
struct BlockIndex {
    int64_t out, in, bh, bw, nnzb;
    const int32_t *crow, *col, *slot;      // [row_blocks + 1] [nnzb] [nnzb]
    const int32_t *ccol, *row_t, *slot_t;  // [col_blocks + 1] [nnzb] [nnzb]
};

// ---- CPU -----------------------------------------------------------------------------------------------------------

// The instruction set in use: "avx512", "avx2" or "portable".
const char* isa_name();

// The fp32 rate in GFLOP/s (a multiply-add counts two) that `threads` threads reach on independent register-resident
// multiply-adds with the instruction set in use: the sum of each thread's best slice within `seconds`.
int peak_fma_gflops(double seconds, int64_t threads, double* gflops);

// ---- CUDA (only in builds with SK_CUDA)
// ------------------------------------------------------------------------------

struct CudaDeviceInfo {
    char name[256];
    int64_t capability_major, capability_minor;
    int64_t multiprocessors, shared_bytes_per_block, l2_bytes, memory_bytes;
};

int cuda_device_count(int64_t* count);
int cuda_device_info(int64_t device, CudaDeviceInfo* info);

// The CUDA runtime's words for a status above kCudaError.
const char* cuda_error_string(int status);

}  // namespace sk
