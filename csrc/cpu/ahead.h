// Memory that is wanted next, asked for a few lines at a time while tiles compute: a burst of a whole slice would wait
// for itself, and the slice's own packing would wait for memory. 4096 x 1024 bf16, S=.75, Zen 5: 404 -> 442 GFLOP/s.
//
// Included by csrc/cpu/kernels/*.cpp only (see simd.h).
#pragma once

#include "cpu/transpose.h"

namespace sk::SK_ISA {

// `rows` rows of `bytes`, `stride` bytes apart; `lines` of it with every call of ask().
struct Ahead {
    const char* row = nullptr;
    int64_t stride = 0, bytes = 0, rows = 0, lines = 0, at = 0;
};

template <class T>
SK_INLINE Ahead ahead_of(const T* first, int64_t ld, int64_t rows, int64_t cols) {
    constexpr int64_t kSize = sizeof(T);
    Ahead a;
    a.row = reinterpret_cast<const char*>(first), a.stride = ld * kSize, a.bytes = cols * kSize, a.rows = rows;
    return a;
}

// Shares what is wanted among `calls`.
SK_INLINE void spread_over(Ahead& a, int64_t calls) {
    a.lines = ceil_div(a.rows * ceil_div(a.bytes, 64), larger(1, calls));
}

SK_INLINE void ask(Ahead& a) {
    for (int64_t n = a.lines; n > 0 && a.rows > 0; --n) {
        __builtin_prefetch(a.row + a.at, 0, 2);  // into the second-level cache
        a.at += 64;
        if (a.at >= a.bytes) a.at = 0, a.row += a.stride, --a.rows;
    }
}

}  // namespace sk::SK_ISA
