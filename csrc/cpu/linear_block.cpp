// The launchers of the block-CSR linear family: checks, then the kernels of the instruction set in use.
#include "cpu/linear_block.h"

#include "cpu/dispatch.h"
#include "cpu/sides.h"

SK_DECLARE_TABLE(LinearBlockTable<float>, linear_block_table)
SK_DECLARE_BF16_TABLE(LinearBlockTable<bf16>, linear_block_table)

namespace sk {

namespace {

// The kernels for activations of type T, or null where this CPU has none for these blocks.
template <class T>
const LinearBlockTable<T>* table(const BlockIndex& w);

template <>
const LinearBlockTable<float>* table(const BlockIndex&) {
    return &SK_TABLE(linear_block_table);
}

template <>
const LinearBlockTable<bf16>* table(const BlockIndex& w) {
    return w.bh < 16 || w.bw < 16 ? nullptr : SK_BF16_TABLE(linear_block_table);
}

bool valid(const BlockIndex& w, int64_t positions, int64_t threads) {
    return is_side(w.bh) && is_side(w.bw) && w.bh * w.bw > 1 && w.out > 0 && w.in > 0 && w.nnzb >= 0 &&
           positions >= 0 && threads > 0;
}

template <class T>
int64_t spmm_workspace(const BlockIndex& w, bool transposed, int64_t positions, int64_t threads) {
    const LinearBlockTable<T>* kernels = table<T>(w);
    return kernels && valid(w, positions, threads) ? kernels->spmm_workspace(w, transposed, positions, threads) : 0;
}

}  // namespace

template <class T>
int64_t block_spmm_workspace_bytes(const BlockIndex& w, int64_t positions, int64_t threads) {
    return spmm_workspace<T>(w, false, positions, threads);
}

template <class T>
int block_spmm(const BlockIndex& w, const float* values, const T* x, int64_t ldx, const float* bias, int64_t activation,
               T* pre, T* y, int64_t ldy, int64_t positions, int64_t threads, void* workspace) {
    if (!valid(w, positions, threads) || activation < kIdentity || activation > kGeluTanh) return kInvalid;
    const LinearBlockTable<T>* kernels = table<T>(w);
    if (!kernels) return kUnsupported;
    const Epilogue<T> epilogue = {bias, static_cast<Activation>(activation), pre};
    kernels->spmm(w, false, values, x, ldx, epilogue, y, ldy, positions, threads, workspace);
    return kOk;
}

template <class T>
int64_t block_spmm_t_workspace_bytes(const BlockIndex& w, int64_t positions, int64_t threads) {
    return spmm_workspace<T>(w, true, positions, threads);
}

template <class T>
int block_spmm_t(const BlockIndex& w, const float* values, const T* dy, int64_t ldy, T* dx, int64_t ldx,
                 int64_t positions, int64_t threads, void* workspace) {
    if (!valid(w, positions, threads)) return kInvalid;
    const LinearBlockTable<T>* kernels = table<T>(w);
    if (!kernels) return kUnsupported;
    kernels->spmm(w, true, values, dy, ldy, {nullptr, kIdentity, nullptr}, dx, ldx, positions, threads, workspace);
    return kOk;
}

template <class T>
int64_t block_sddmm_workspace_bytes(const BlockIndex& w, int64_t positions, int64_t threads) {
    const LinearBlockTable<T>* kernels = table<T>(w);
    return kernels && valid(w, positions, threads) ? kernels->sddmm_workspace(w, positions, threads) : 0;
}

template <class T>
int block_sddmm(const BlockIndex& w, const T* dy, int64_t ldy, const T* x, int64_t ldx, float* dvalues,
                int64_t positions, int64_t threads, void* workspace) {
    if (!valid(w, positions, threads)) return kInvalid;
    const LinearBlockTable<T>* kernels = table<T>(w);
    if (!kernels) return kUnsupported;
    kernels->sddmm(w, dy, ldy, x, ldx, dvalues, positions, threads, workspace);
    return kOk;
}

#define SK_INSTANTIATE(T)                                                                                           \
    template int64_t block_spmm_workspace_bytes<T>(const BlockIndex&, int64_t, int64_t);                            \
    template int block_spmm<T>(const BlockIndex&, const float*, const T*, int64_t, const float*, int64_t, T*, T*,   \
                               int64_t, int64_t, int64_t, void*);                                                   \
    template int64_t block_spmm_t_workspace_bytes<T>(const BlockIndex&, int64_t, int64_t);                          \
    template int block_spmm_t<T>(const BlockIndex&, const float*, const T*, int64_t, T*, int64_t, int64_t, int64_t, \
                                 void*);                                                                            \
    template int64_t block_sddmm_workspace_bytes<T>(const BlockIndex&, int64_t, int64_t);                           \
    template int block_sddmm<T>(const BlockIndex&, const T*, int64_t, const T*, int64_t, float*, int64_t, int64_t,  \
                                void*);

SK_INSTANTIATE(float)
SK_INSTANTIATE(bf16)

}  // namespace sk
