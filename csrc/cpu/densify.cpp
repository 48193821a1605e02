// The dense weight of block-CSR values, and the active blocks of a dense weight: copies, no arithmetic, so any element
// of 2, 4 or 8 bytes. Threads own block rows.
#include <cstring>

#include "api.h"
#include "cpu/parallel.h"
#include "cpu/sides.h"

namespace sk {

namespace {

bool valid(const BlockIndex& w, const DenseLayout& d, int64_t bytes, int64_t threads) {
    return is_side(w.bh) && is_side(w.bw) && w.out > 0 && w.in > 0 && d.taps > 0 && w.nnzb >= 0 && threads > 0 &&
           (bytes == 2 || bytes == 4 || bytes == 8);
}

// Where an active block lies: its rows' first elements in the dense weight, and how much of it is inside.
struct Place {
    int64_t offset, rows, cols;
};

template <int BW>
inline Place place(const BlockIndex& w, const DenseLayout& d, int64_t row_block, int32_t col_block) {
    const int64_t row = row_block * w.bh, rows = w.out - row < w.bh ? w.out - row : w.bh;
    // Tap-major without edge blocks: a division a block is what unstructured weights would spend most of their time on.
    if (d.in_stride == 1 && d.tap_stride == w.in && w.in % BW == 0)
        return {row * d.out_stride + static_cast<int64_t>(col_block) * BW, rows, BW};
    const uint32_t per_tap = static_cast<uint32_t>((w.in + BW - 1) / BW), block = static_cast<uint32_t>(col_block);
    const int64_t tap = block / per_tap, col = static_cast<int64_t>(block % per_tap) * BW;
    const int64_t cols = w.in - col < BW ? w.in - col : BW;
    return {row * d.out_stride + tap * d.tap_stride + col * d.in_stride, rows, cols};
}

// BW is the block width of whole blocks, whose copies then have a length that the compiler knows.
template <class T, int BW>
void scatter_row(const BlockIndex& w, const DenseLayout& d, const T* values, T* dense, int64_t r) {
    for (int64_t k = w.crow[r]; k < w.crow[r + 1]; ++k) {
        const Place p = place<BW>(w, d, r, w.col[k]);
        const T* block = values + w.slot[k] * w.bh * BW;
        T* to = dense + p.offset;
        for (int64_t i = 0; i < p.rows; ++i, block += BW, to += d.out_stride) {
            if (d.in_stride == 1 && p.cols == BW)
                std::memcpy(to, block, BW * sizeof(T));
            else
                for (int64_t j = 0; j < p.cols; ++j) to[j * d.in_stride] = block[j];
        }
    }
}

template <class T, int BW>
void gather_row(const BlockIndex& w, const DenseLayout& d, const T* dense, T* values, int64_t r) {
    for (int64_t k = w.crow[r]; k < w.crow[r + 1]; ++k) {
        const Place p = place<BW>(w, d, r, w.col[k]);
        T* block = values + w.slot[k] * w.bh * BW;
        const T* from = dense + p.offset;
        for (int64_t i = 0; i < w.bh; ++i, block += BW, from += d.out_stride) {
            const int64_t cols = i < p.rows ? p.cols : 0;
            if (d.in_stride == 1 && cols == BW) {
                std::memcpy(block, from, BW * sizeof(T));
            } else {
                for (int64_t j = 0; j < cols; ++j) block[j] = from[j * d.in_stride];
                for (int64_t j = cols; j < BW; ++j) block[j] = 0;
            }
        }
    }
}

// Where rows of the dense weight are whole, the thread that fills them clears them, while they are in its cache.
template <class T, int BW>
void run(const BlockIndex& w, const DenseLayout& d, bool scatter, T* values, T* dense, int64_t threads) {
    const int64_t row_blocks = (w.out + w.bh - 1) / w.bh, width = d.taps * w.in;
    if (scatter && d.out_stride != width) std::memset(dense, 0, w.out * width * sizeof(T));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < row_blocks; ++r) {
        if (!scatter) {
            gather_row<T, BW>(w, d, dense, values, r);
            continue;
        }
        const int64_t row = r * w.bh, rows = w.out - row < w.bh ? w.out - row : w.bh;
        if (d.out_stride == width) std::memset(dense + row * width, 0, rows * width * sizeof(T));
        scatter_row<T, BW>(w, d, values, dense, r);
    }
}

template <class T>
void run(const BlockIndex& w, const DenseLayout& d, bool scatter, void* values, void* dense, int64_t threads) {
    T *v = static_cast<T*>(values), *to = static_cast<T*>(dense);
    switch (w.bw) {
        case 1:
            return run<T, 1>(w, d, scatter, v, to, threads);
        case 4:
            return run<T, 4>(w, d, scatter, v, to, threads);
        case 8:
            return run<T, 8>(w, d, scatter, v, to, threads);
        case 16:
            return run<T, 16>(w, d, scatter, v, to, threads);
        case 32:
            return run<T, 32>(w, d, scatter, v, to, threads);
        default:
            return run<T, 64>(w, d, scatter, v, to, threads);
    }
}

int copy(const BlockIndex& w, const DenseLayout& d, int64_t bytes, bool scatter, void* values, void* dense,
         int64_t threads) {
    if (!valid(w, d, bytes, threads)) return kInvalid;
    if (bytes == 2) run<uint16_t>(w, d, scatter, values, dense, threads);
    if (bytes == 4) run<uint32_t>(w, d, scatter, values, dense, threads);
    if (bytes == 8) run<uint64_t>(w, d, scatter, values, dense, threads);
    return kOk;
}

}  // namespace

int densify(const BlockIndex& w, const DenseLayout& layout, int64_t bytes, const void* values, void* dense,
            int64_t threads) {
    return copy(w, layout, bytes, true, const_cast<void*>(values), dense, threads);
}

int gather_blocks(const BlockIndex& w, const DenseLayout& layout, int64_t bytes, const void* dense, void* values,
                  int64_t threads) {
    return copy(w, layout, bytes, false, values, const_cast<void*>(dense), threads);
}

}  // namespace sk
