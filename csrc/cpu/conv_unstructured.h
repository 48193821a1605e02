// Unstructured convolution: what the launchers (csrc/cpu/conv_unstructured*.cpp) and the kernels share.
//
// Output positions are cut into panels of `height` vector rows of 16. The images of a batch stand side by side, so that
// a vector row is 16 neighbours of the plane [H'][N * W'], and a panel `height` of them below one another. Where the
// kernel has one row there is nothing to share vertically: the plane is then the single row [N * H' * W'], and a panel
// `height` vector rows of it, beside one another.
//
// The weight's columns (tap, c) are cut into tiles: a chunk of channels times a group of taps, those of one kernel
// column s and all kernel rows r. A tile of an X panel holds, for each channel, the vector rows that its taps read,
// shifted by s: aligned, each stored once although up to R taps read it.
//
//     for each panel:  for each chunk:  pack X into the tiles of all groups, [channel][row][16]           (L2)
//                                       for each tile: for each run: Y[row] += Σ w_k · X[local_k][height][16]
//                      unpack Y                                                (a tile fits L1, the panel of Y L2)
//
// A run is the part of a weight's row that lies in one tile; runs are sorted by length. Their nonzeros form the stream:
// gathered values and 16-bit addresses within the tile, in units of a vector row, each run padded to quads.
//
// The input gradient is the same product on the transposed index, with dY in the place of X; a stride s makes it one
// such product for each of the s x s phases of dX, each with the taps that reach it.
#pragma once

#include <cstdint>

#include "api.h"

namespace sk {

constexpr int64_t kVectorRow = 16;
constexpr int64_t kMaxHeight = 8;  // vector rows of a panel

// The part of a row that lies in one tile: `count` entries of the stream, from 4 * quad on.
struct ConvRun {
    int32_t row, count, quad;
};

// A tap that takes part in a product. Input channel c of tile `chunk * groups + group`, which begins at channel
// chunk * width, is found at vector row `address + (c - chunk * width) * scale` of the tile.
struct ConvTap {
    int32_t tap, group, address, scale;
};

// What the stream is made from (see csrc/cpu/conv_unstructured_index.h); row r, tap t: chunk j of its entries begins at
// cuts[r * cuts_row + t * cuts_tap + j].
struct ConvFill {
    const int32_t *other, *slot, *cuts, *places;
    int64_t nnz, cuts_row, cuts_tap, origin_tap;  // `other` holds channel + tap * origin_tap
    int64_t chunks, groups, width;
    const ConvTap* taps;
    int64_t tap_count;
};

// Where the 16 positions of a vector row lie in a tensor.
struct ConvLanes {
    int64_t at[kVectorRow];  // in elements, from the tensor's first; -1 outside the image
    // Stretches of lanes inside the image at consecutive addresses.
    int32_t pieces;
    int32_t lane[kVectorRow], length[kVectorRow];
};

struct ConvVectorRow {
    const ConvLanes* lanes;
    int64_t offset;    // further elements; -1: the row is outside the image
    int64_t at, step;  // in the packed form: where the row of channel 0 lies, and the distance between channels
};

struct ConvUnstructuredTable {
    // x, whose channels are stride_c apart -> packed; what is outside the image reads as zero. Where stride_c is 1,
    // whole vectors of channels are written: packed has room for a multiple of 16.
    void (*pack)(const float* x, int64_t stride_c, int64_t channels, const ConvVectorRow* rows, int64_t count,
                 float* packed);
    // packed -> y; positions outside are dropped. Reads whole vectors of channels, as pack writes them.
    void (*unpack)(const float* packed, int64_t stride_c, int64_t channels, const ConvVectorRow* rows, int64_t count,
                   float* y);
    // y = activation(y), `count` floats; a multiple of 16.
    void (*activate)(Activation activation, float* y, int64_t count);
    // The stream of some rows: addresses, and values where weights is not null. place [tiles] is scratch.
    void (*fill)(const ConvFill& from, int64_t row, int64_t end, const float* values, float* weights, uint16_t* locals,
                 int32_t* place);
    // dvalues[slot] = the sum of `copies` streams of sums, `stride` entries apart, for the entries of some rows.
    void (*scatter)(const ConvFill& to, int64_t row, int64_t end, const float* sums, int64_t copies, int64_t stride,
                    float* dvalues, int32_t* place);
    // y[row] = start + Σ w_k · x[local_k] for every run, where start is y[row] itself, or on the first tile the row's
    // bias (zero where bias is null). y [rows][height][16]; height 1, 2, 4 or 8.
    void (*spmm_tile)(const ConvRun* runs, int64_t count, const float* weights, const uint16_t* locals, const float* x,
                      float* y, int64_t height, bool first, const float* bias);
    // sums[k] += Σ_p dy[row][p] · x[local_k][p] over the first `live` vector rows, for every entry of the runs; on the
    // first panel it is set.
    void (*sddmm_tile)(const ConvRun* runs, int64_t count, const uint16_t* locals, const float* x, const float* dy,
                       int64_t height, int64_t live, bool first, float* sums);
};

}  // namespace sk
