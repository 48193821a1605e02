// Unstructured linear: what the launchers (csrc/cpu/linear_unstructured.cpp) and the kernels share.
//
// Positions are cut into panels of 16, 32 or 64, stored batch-contiguous: X as [in][width], Y as [out][width]. The
// weight's columns are cut into tiles, so that a tile of an X panel stays in L1 while all rows run over it:
//
//     for each panel:  for each tile:  pack X into [tile][width]                        (L1)
//                                      for each run: Y[row] += Σ w_k · X[local_k]       (Y panel in L2)
//                      unpack Y into rows
//
// A run is the part of a weight's row that lies in one tile. The runs of a tile are sorted by length, so that the loop
// over a run ends where the branch predictor expects it. Their nonzeros form the stream: 16-bit column numbers within
// the tile and gathered values, each run padded to quads.
#pragma once

#include <cstdint>

#include "api.h"

namespace sk {

// One part of a row: entries begin .. begin + count of the sorted index.
struct UnstructuredRun {
    int32_t row, begin, count;
};

// Memory that is touched next, brought to L2 during the runs: rows of `bytes` bytes, ld_bytes apart.
struct UnstructuredAhead {
    const char* from;
    int64_t rows, bytes, ld_bytes;
};

struct UnstructuredTable {
    // x [positions, cols], rows ld apart -> tile [ceil16(cols)][width]; positions past the end read as zero.
    void (*pack)(const float* x, int64_t ld, int64_t positions, int64_t cols, int64_t width, float* tile);
    // panel [ceil16(rows)][width] -> y [positions, rows], rows ld apart.
    void (*unpack)(const float* panel, int64_t width, int64_t rows, int64_t positions, float* y, int64_t ld);
    // y[row] = start + Σ w_k · x[local_k] for every run, where start is y[row] itself, or on the first tile the row's
    // bias (zero where bias is null). x [tile][width], y [rows][width]; ahead [2].
    void (*spmm_tile)(const UnstructuredRun* runs, int64_t count, const float* weights, const uint16_t* locals,
                      const float* x, float* y, int64_t width, bool first, const float* bias,
                      const UnstructuredAhead* ahead);
    // sums[k] += Σ_p dy[row][p] · x[local_k][p] for every entry of the stream; ahead [2].
    void (*sddmm_tile)(const UnstructuredRun* runs, int64_t count, const uint16_t* locals, const float* x,
                       const float* dy, int64_t width, float* sums, const UnstructuredAhead* ahead);
    // y [rows, cols] = kind(y), what y held to pre unless null; rows ld apart.
    void (*activate)(Activation kind, float* y, float* pre, int64_t ld, int64_t rows, int64_t cols);
};

}  // namespace sk
