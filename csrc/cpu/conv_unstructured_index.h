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
    // The place of a tap among those of its group, of which there are group_taps() at most.
    int64_t member(int64_t tap) const { return tap / kernel_cols * group_cols + tap % kernel_cols % group_cols; }
    int64_t group_taps() const { return kernel_rows * group_cols; }

    explicit ConvTiling(const ConvView& w);
};

// The part of a run that belongs to one tap: entries begin .. begin + count of the sorted index.
struct ConvPart {
    int32_t begin, count;
};

// In one int32 buffer: [tiles] run counts, [tiles + 1] where the quads of a tile start in the stream, [tiles][rows] the
// rows that have runs, longest first, and [tiles][rows][group_taps] their parts. Every row has a run in the first tile,
// so that every output is written.
struct ConvRuns {
    ConvTiling tiling;
    int64_t rows;
    int32_t *counts, *quads, *order;
    ConvPart* parts;

    ConvRuns(const ConvView& w, const int32_t* buffer);

    int64_t ints() const { return 2 * tiling.tiles() + 1 + tiling.tiles() * rows * (1 + 2 * tiling.group_taps()); }
    // Of the stream, whatever the pattern: each run wastes at most three quarters of a quad.
    int64_t max_entries(int64_t nnz) const;
    const ConvPart* parts_of(int64_t tile, int64_t run) const {
        return parts + (tile * rows + run) * tiling.group_taps();
    }
};

int64_t conv_derive_scratch_ints(const ConvView& w);
void conv_derive(const ConvView& w, const ConvRuns& index, int32_t* scratch);

// A tap of a group that takes part in a product: its place in the group, and its first vector row within a channel's
// rows of the tile.
struct ConvTap {
    int32_t tap, member, address;
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
