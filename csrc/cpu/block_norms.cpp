// Squared Frobenius norms of the blocks of a dense matrix: one pass over it, row by row as it lies in memory.
#include <algorithm>

#include "api.h"
#include "cpu/arena.h"
#include "cpu/parallel.h"
#include "cpu/sides.h"

namespace sk {

namespace {

// Partial sums of a block, so that additions neither wait for each other nor add up more than bh * bw / 16 squares
// each.
constexpr int64_t kSums = 16;
// Blocks beside each other that are summed at a time: their sums stay in the first-level cache.
constexpr int64_t kBlocks = 64;

// Rows of `width` floats, `stride` apart, the blocks of `bw` columns in them: norms [ceil(width / bw)].
void norms_of(const float* dense, int64_t rows, int64_t stride, int64_t width, int64_t bw, float* norms) {
    float sums[kBlocks][kSums] = {};
    for (int64_t i = 0; i < rows; ++i, dense += stride)
        for (int64_t c = 0, b = 0; c < width; c += bw, ++b) {
            const float* v = dense + c;
            const int64_t count = std::min(bw, width - c);
            int64_t j = 0;
            for (; j + kSums <= count; j += kSums)
                for (int64_t k = 0; k < kSums; ++k) sums[b][k] += v[j + k] * v[j + k];
            for (int64_t k = 0; j + k < count; ++k) sums[b][k] += v[j + k] * v[j + k];
        }
    for (int64_t b = 0; b * bw < width; ++b) {
        for (int64_t half = kSums / 2; half > 0; half /= 2)
            for (int64_t k = 0; k < half; ++k) sums[b][k] += sums[b][k + half];
        norms[b] = sums[b][0];
    }
}

}  // namespace

int block_norms(const float* dense, int64_t rows, int64_t taps, int64_t in, int64_t bh, int64_t bw, float* norms,
                int64_t threads) {
    if (!is_side(bh) || !is_side(bw) || rows < 0 || taps <= 0 || in <= 0 || threads <= 0) return kInvalid;
    const int64_t row_blocks = ceil_div(rows, bh), columns = ceil_div(in, bw), pieces = ceil_div(columns, kBlocks);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (int64_t task = 0; task < row_blocks * taps * pieces; ++task) {
        const int64_t piece = task % pieces, tap = task / pieces % taps, r = task / pieces / taps;
        const int64_t first = piece * kBlocks, col = first * bw;
        norms_of(dense + (r * bh * taps + tap) * in + col, std::min(bh, rows - r * bh), taps * in,
                 std::min(kBlocks * bw, in - col), bw, norms + (r * taps + tap) * columns + first);
    }
    return kOk;
}

}  // namespace sk
