// The launchers of the block-CSR linear family: checks, then the kernels of the instruction set in use.
#include "cpu/linear_block.h"

#include "cpu/dispatch.h"

SK_DECLARE_TABLE(LinearBlockTable, linear_block_table)

namespace sk {

namespace {

bool is_side(int64_t side) { return side == 1 || side == 4 || side == 8 || side == 16 || side == 32 || side == 64; }

bool valid(const BlockIndex& w, int64_t positions, int64_t threads) {
    return is_side(w.bh) && is_side(w.bw) && w.bh * w.bw > 1 && w.out > 0 && w.in > 0 && w.nnzb >= 0 &&
           positions >= 0 && threads > 0;
}

int64_t spmm_workspace(const BlockIndex& w, bool transposed, int64_t positions, int64_t threads) {
    if (!valid(w, positions, threads)) return 0;
    return SK_TABLE(linear_block_table).spmm_workspace(w, transposed, positions, threads);
}

}  // namespace

int64_t block_spmm_workspace_bytes(const BlockIndex& w, int64_t positions, int64_t threads) {
    return spmm_workspace(w, false, positions, threads);
}

int block_spmm(const BlockIndex& w, const float* values, const float* x, int64_t ldx, const float* bias, float* y,
               int64_t ldy, int64_t positions, int64_t threads, void* workspace) {
    if (!valid(w, positions, threads)) return kInvalid;
    SK_TABLE(linear_block_table).spmm(w, false, values, x, ldx, bias, y, ldy, positions, threads, workspace);
    return kOk;
}

int64_t block_spmm_t_workspace_bytes(const BlockIndex& w, int64_t positions, int64_t threads) {
    return spmm_workspace(w, true, positions, threads);
}

int block_spmm_t(const BlockIndex& w, const float* values, const float* dy, int64_t ldy, float* dx, int64_t ldx,
                 int64_t positions, int64_t threads, void* workspace) {
    if (!valid(w, positions, threads)) return kInvalid;
    SK_TABLE(linear_block_table).spmm(w, true, values, dy, ldy, nullptr, dx, ldx, positions, threads, workspace);
    return kOk;
}

int64_t block_sddmm_workspace_bytes(const BlockIndex& w, int64_t positions, int64_t threads) {
    if (!valid(w, positions, threads)) return 0;
    return SK_TABLE(linear_block_table).sddmm_workspace(w, positions, threads);
}

int block_sddmm(const BlockIndex& w, const float* dy, int64_t ldy, const float* x, int64_t ldx, float* dvalues,
                int64_t positions, int64_t threads, void* workspace) {
    if (!valid(w, positions, threads)) return kInvalid;
    SK_TABLE(linear_block_table).sddmm(w, dy, ldy, x, ldx, dvalues, positions, threads, workspace);
    return kOk;
}

}  // namespace sk
