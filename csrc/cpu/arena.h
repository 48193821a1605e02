// A workspace and how it is cut up.
#pragma once

#include <cstdint>

namespace sk {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Hands out 64-byte aligned pieces of a workspace; without a workspace it only counts.
struct Arena {
    char* base;
    int64_t used = 0;

    explicit Arena(void* workspace) : base(static_cast<char*>(workspace)) {}

    template <class T>
    T* take(int64_t count) {
        T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return piece;
    }
};

}  // namespace sk
