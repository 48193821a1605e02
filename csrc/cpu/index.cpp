// What follows from an index set and is not stored.
#include <algorithm>

#include "api.h"
#include "cpu/arena.h"
#include "cpu/parallel.h"

namespace sk {

int64_t transposed_slots_workspace_bytes(const BlockIndex& w, int64_t, int64_t threads) {
    return w.out > 0 && w.bh > 0 && threads > 0 ? 4 * threads * ceil_div(w.out, w.bh) : 0;
}

int transposed_slots(const BlockIndex& w, int64_t col_blocks, int32_t* slot_t, int64_t threads, void* workspace) {
    if (w.out <= 0 || w.bh <= 0 || w.nnzb < 0 || col_blocks <= 0 || threads <= 0) return kInvalid;
    const int64_t rows = ceil_div(w.out, w.bh);
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        const int64_t id = omp_get_thread_num(), team = omp_get_num_threads();
        const int64_t first = col_blocks * id / team, end = col_blocks * (id + 1) / team;
        // Columns ascend within a row, so that each row's blocks are met in their own order, from column `first` on.
        int32_t* next = static_cast<int32_t*>(workspace) + id * rows;
        for (int64_t row = 0; row < rows; ++row) {
            const int32_t *begin = w.col + w.crow[row], *past = w.col + w.crow[row + 1];
            next[row] = static_cast<int32_t>((first == 0 ? begin : std::lower_bound(begin, past, first)) - w.col);
        }
        for (int64_t k = w.ccol[first]; k < w.ccol[end]; ++k) {
            const int32_t e = next[w.row_t[k]]++;
            __builtin_prefetch(w.slot + e + 16);  // as many streams as rows: no hardware prefetcher follows them
            slot_t[k] = w.slot[e];
        }
    }
    return kOk;
}

}  // namespace sk
