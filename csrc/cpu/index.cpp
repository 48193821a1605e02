// What follows from an index set and is not stored.
#include <algorithm>

#include "api.h"

namespace sk {

int64_t transposed_slots_workspace_bytes(const BlockIndex& w, int64_t) {
    return w.out > 0 && w.bh > 0 ? 4 * ((w.out + w.bh - 1) / w.bh) : 0;
}

int transposed_slots(const BlockIndex& w, int32_t* slot_t, int64_t, void* workspace) {
    if (w.out <= 0 || w.bh <= 0 || w.nnzb < 0) return kInvalid;
    // Columns ascend within a row, so that each row's blocks are met in their own order.
    int32_t* next = static_cast<int32_t*>(workspace);
    std::copy_n(w.crow, (w.out + w.bh - 1) / w.bh, next);
    for (int64_t k = 0; k < w.nnzb; ++k) {
        const int32_t e = next[w.row_t[k]]++;
        __builtin_prefetch(w.slot + e + 16);  // as many streams as rows: no hardware prefetcher follows them
        slot_t[k] = w.slot[e];
    }
    return kOk;
}

}  // namespace sk
