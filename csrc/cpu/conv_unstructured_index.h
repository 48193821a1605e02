// Unstructured convolution: the derived index of one orientation of a weight, and the stream that is made from it.
#pragma once

#include "api.h"
#include "cpu/conv_unstructured.h"

namespace sk {

constexpr int64_t kQuad = 4;
// 16-bit addresses are read two quads ahead of the last one, and written sixteen at a time.
constexpr int64_t kReadAhead = 16;

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
    // Of a group, at most.
    int64_t group_taps() const { return kernel_rows * group_cols; }

    explicit ConvTiling(const ConvView& w);
};

// In one int32 buffer: [tiles][rows] runs of all taps, longest first; [tiles] how many of them count (every row has a
// run in the first tile, so that every output is written; elsewhere empty ones are left out); [rows][tiles] where the
// quads of a run start in the stream; and [rows][taps][chunks] (transposed: [taps][rows][chunks]) where each chunk's
// entries start in the sorted index, then nnz.
struct ConvRuns {
    ConvTiling tiling;
    int64_t rows, cuts_row, cuts_tap;
    ConvRun* runs;
    int32_t *counts, *places, *cuts;

    ConvRuns(const ConvView& w, const int32_t* buffer);

    int64_t run_ints() const { return 3 * tiling.tiles() * rows; }
    int64_t ints(int64_t taps) const {
        return run_ints() + tiling.tiles() + rows * tiling.tiles() + rows * taps * tiling.chunks + 1;
    }
    // Of the stream, whatever the pattern: each run wastes at most three quarters of a quad.
    int64_t max_entries(int64_t nnz) const;
    const int32_t* cut(int64_t row, int64_t tap) const { return cuts + row * cuts_row + tap * cuts_tap; }
};

int64_t conv_derive_scratch_ints(const ConvView& w);
void conv_derive(const ConvView& w, const ConvRuns& index, int32_t* scratch);

// The runs of one tile in a product that some taps take no part in: those of all taps, with fewer entries.
void conv_shorten(const ConvRuns& index, const ConvTap* taps, int64_t tap_count, int64_t tile, ConvRun* runs);

}  // namespace sk
