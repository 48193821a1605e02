// Tiles of 16 x 16 x 16 on the tensor cores, d [m, n] += a [m, k] * b [k, n], the same for every architecture:
//
//     sm_80+   two mma.m16n8k16, operands by ldmatrix
//     sm_75    four mma.m16n8k8 on the same registers
//     sm_70    four mma.m8n8k4; quad pair q owns rows 8 (q & 1) and columns 8 (q >> 1) of d
//
// An operand lies in shared memory as 16 rows of two 16-byte segments. `at(row, segment)` is where a segment lies:
// rows may be anywhere, which is how a convolution's taps are gathered without a copy. A is stored [m][k] or, TURNED,
// [k][m]; B is stored [n][k] or, TURNED, [k][n].
#pragma once

#include "cuda/device.h"

namespace sk::gpu {

template <bool TURNED>
struct FragmentA {
#if SK_ARCH >= 750
    uint32_t r[4];

    // The only row that a lane asks `at` for where A is not turned.
    SK_DEVICE static int row(int lane) { return lane & 15; }

    template <class At>
    SK_DEVICE void load(const At& at) {
        const int lane = thread_index() & 31, matrix = lane >> 3;
        if constexpr (TURNED)
            load_matrices_transposed(r, at((lane & 7) + 8 * (matrix >> 1), matrix & 1));
        else
            load_matrices(r, at(row(lane), matrix >> 1));
    }
#else
    uint32_t r[8];

    SK_DEVICE static int row(int lane) { return 8 * ((lane >> 2) & 1) + (lane & 3) + 4 * (lane >> 4); }

    template <class At>
    SK_DEVICE void load(const At& at) {
        const int lane = thread_index() & 31, rows = (lane >> 2) & 1, high = lane >> 4;
        if constexpr (TURNED) {
            SK_UNROLL for (int step = 0; step < 4; ++step) {
                const uint32_t* four = reinterpret_cast<const uint32_t*>(at(4 * step + (lane & 3), rows)) + 2 * high;
                r[2 * step] = four[0];
                r[2 * step + 1] = four[1];
            }
        } else {
            SK_UNROLL for (int segment = 0; segment < 2; ++segment) {
                const uint32_t* eight = reinterpret_cast<const uint32_t*>(at(row(lane), segment));
                SK_UNROLL for (int i = 0; i < 4; ++i) r[4 * segment + i] = eight[i];
            }
        }
    }
#endif
};

// `turned` is a matter of loading alone, so that one kernel serves a weight and its transpose.
struct FragmentB {
#if SK_ARCH >= 750
    uint32_t r[4];

    template <class At>
    SK_DEVICE void load(bool turned, const At& at) {
        const int lane = thread_index() & 31, matrix = lane >> 3;
        if (turned)
            load_matrices_transposed(r, at(lane & 15, matrix >> 1));
        else
            load_matrices(r, at((lane & 7) + 8 * (matrix >> 1), matrix & 1));
    }
#else
    uint32_t r[8];

    template <class At>
    SK_DEVICE void load(bool turned, const At& at) {
        const int lane = thread_index() & 31, columns = (lane >> 3) & 1, column = (lane & 3) + 4 * (lane >> 4);
        if (turned) {
            SK_UNROLL for (int k = 0; k < 16; k += 2) {
                const uint32_t low = reinterpret_cast<const uint16_t*>(at(k, columns))[column];
                const uint32_t high = reinterpret_cast<const uint16_t*>(at(k + 1, columns))[column];
                r[k / 2] = low | high << 16;
            }
        } else {
            SK_UNROLL for (int segment = 0; segment < 2; ++segment) {
                const uint32_t* eight = reinterpret_cast<const uint32_t*>(at(8 * columns + column, segment));
                SK_UNROLL for (int i = 0; i < 4; ++i) r[4 * segment + i] = eight[i];
            }
        }
    }
#endif
};

// A thread's eight elements of d [16, 16]; elements i and i + 1, i even, are neighbours in a row.
struct Accumulator {
    float d[8];

    SK_DEVICE void clear() { SK_UNROLL for (int i = 0; i < 8; ++i) d[i] = 0.0f; }

    SK_DEVICE static int row(int i) {
        const int lane = thread_index() & 31;
#if SK_ARCH >= 750
        return (lane >> 2) + 8 * ((i >> 1) & 1);
#else
        return 8 * ((lane >> 2) & 1) + (lane & 1) + (i & 2) + 4 * (lane >> 4);
#endif
    }
    SK_DEVICE static int column(int i) {
        const int lane = thread_index() & 31;
#if SK_ARCH >= 750
        return 8 * (i >> 2) + 2 * (lane & 3) + (i & 1);
#else
        return 8 * ((lane >> 3) & 1) + (i & 4) + (lane & 2) + (i & 1);
#endif
    }

    template <class T, bool A_TURNED>
    SK_DEVICE void multiply(const FragmentA<A_TURNED>& a, const FragmentB& b) {
#if SK_ARCH >= 800
        mma_16816(T{}, d, a.r, b.r);
        mma_16816(T{}, d + 4, a.r, b.r + 2);
#elif SK_ARCH >= 750
        SK_UNROLL for (int k = 0; k < 2; ++k) {
            mma_1688(d, a.r + 2 * k, b.r + k);
            mma_1688(d + 4, a.r + 2 * k, b.r + 2 + k);
        }
#else
        SK_UNROLL for (int k = 0; k < 4; ++k) mma_884<A_TURNED>(d, a.r + 2 * k, b.r + 2 * k);
#endif
    }
};

// Whether this architecture multiplies in T.
template <class T>
struct Served {
    static constexpr bool value = SK_ARCH >= 800;
};
template <>
struct Served<Half> {
    static constexpr bool value = true;
};

}  // namespace sk::gpu
