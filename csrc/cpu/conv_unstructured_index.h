// Unstructured convolution: the derived index of one orientation of a weight, and the stream that is made from it.
#pragma once

#include "api.h"
#include "cpu/conv_unstructured.h"

namespace sk {

constexpr int64_t kQuad = 4;
// 16-bit addresses are read two quads ahead of the last one.
constexpr int64_t kReadAhead = 2 * kQuad;

// The weight seen by rows or, for the input gradient, by columns: entries of (row, tap, col), where row and col are an
// output and an input channel, or the other way round.
struct ConvView {
    int64_t rows, cols, taps, nnz;
    bool transposed;
    const int32_t *start, *other, *slot;

    ConvView(const BlockIndex& w, int64_t taps, bool transposed);

    // The place of (row, tap) among the stretches of the sorted index that share both.
    int64_t stretch(int64_t row, int64_t tap) const { return transposed ? tap * rows + row : row * taps + tap; }
    // What the sorted index holds for col 0 of a tap.
    int64_t origin(int64_t tap) const { return transposed ? 0 : tap * cols; }
};

// How the columns (tap, col) are cut into tiles; a function of the view's sizes alone.
//
// The index does not know the kernel's shape, only its number of taps: a square kernel is assumed where taps is a
// square, else one row. A wrong guess costs shared vector rows, nothing else.
struct ConvTiling {
    int64_t kernel_rows, kernel_cols;                  // as guessed
    int64_t chunk, chunks;                             // channels of a tile
    int64_t group_cols, groups;                        // kernel columns of a tile
    int64_t tiles() const { return chunks * groups; }  // tile t is chunk t / groups, group t % groups
    int64_t group(int64_t tap) const { return tap % kernel_cols / group_cols; }
    int64_t group_taps() const { return kernel_rows * group_cols; }  // at most

    explicit ConvTiling(const ConvView& w);
};

// In one int32 buffer: [tiles] run counts, [tiles + 1] where the quads of a tile start in the stream, [stretches *
// chunks + 1] where each chunk of each stretch starts in the sorted index, and [tiles][rows] the rows that have runs,
// longest first. Every row has a run in the first tile, so that every output is written.
struct ConvRuns {
    ConvTiling tiling;
    int64_t rows, cuts_count;
    int32_t *counts, *quads, *cuts, *order;

    ConvRuns(const ConvView& w, const int32_t* buffer);

    int64_t ints() const { return 2 * tiling.tiles() + 1 + cuts_count + tiling.tiles() * rows; }
    // Of the stream, whatever the pattern: each run wastes at most three quarters of a quad.
    int64_t max_entries(int64_t nnz) const;
    const int32_t* cut(const ConvView& w, int64_t row, int64_t tap, int64_t chunk) const {
        return cuts + w.stretch(row, tap) * tiling.chunks + chunk;
    }
};

void conv_derive(const ConvView& w, const ConvRuns& index, int32_t* scratch);
int64_t conv_derive_scratch_ints(const ConvView& w);

// A tap of a group that takes part in a product, and its first vector row within a channel's rows of the tile.
struct ConvTap {
    int32_t tap, address;
};

// What a tile holds: `taps` of its group, `rows` vector rows a channel.
struct ConvGroup {
    const ConvTap* taps;
    int64_t count, rows;
};

// The stream and the runs of all tiles.
struct ConvStream {
    float* weights;  // null where only addresses are wanted
    uint16_t* locals;
    ConvRun* runs;  // [tiles][rows]
};

// Writes the stream and the runs of one tile.
void conv_fill(const ConvView& w, const ConvRuns& index, const ConvGroup& group, const float* values, int64_t tile,
               const ConvStream& stream);

// dvalues[slot] = the sum of `copies` streams of sums, `stride` entries apart, for the entries of one tile.
void conv_scatter(const ConvView& w, const ConvRuns& index, const ConvGroup& group, int64_t tile, const float* sums,
                  int64_t copies, int64_t stride, float* dvalues);

}  // namespace sk
