// Unstructured convolution: deriving the index, filling and emptying the stream.
#include "cpu/conv_unstructured_index.h"

#include <algorithm>

#include "cpu/arena.h"

namespace sk {

namespace {

// Vector rows of a tile of X, 40 KiB: what stays in an L1 of 48 KiB beside the streams.
constexpr int64_t kTileRows = 640;
// Where less than a seventh is left, longer runs save more in Y than X loses by overflowing into L2: at S=.9 3 to 10 %
// (Zen 5, 448 channels at 32 x 32 to 896 at 8 x 8); at S=.5 they lose 5 %.
constexpr int64_t kSparseTileRows = 960, kDense = 7;
constexpr int64_t kMaxColumns = 1024;

int64_t root(int64_t taps) {
    int64_t r = 1;
    while (r * r < taps) ++r;
    return r * r == taps && r <= 64 ? r : 0;
}

}  // namespace

ConvView::ConvView(const BlockIndex& w, int64_t taps, bool transposed)
    : rows(transposed ? w.in : w.out),
      cols(transposed ? w.out : w.in),
      taps(taps),
      nnz(w.nnzb),
      transposed(transposed),
      start(transposed ? w.ccol : w.crow),
      other(transposed ? w.row_t : w.col),
      slot(transposed ? w.slot_t : w.slot) {}

ConvTiling::ConvTiling(const ConvView& w) {
    const int64_t side = root(w.taps);
    kernel_rows = side ? side : 1;
    kernel_cols = w.taps / kernel_rows;
    // A kernel of one row shares nothing between the rows of a panel: half the height leaves room for twice the
    // columns.
    const int64_t height = kernel_rows == 1 ? kMaxHeight / 2 : kMaxHeight;
    const bool sparse = kDense * w.nnz < w.rows * w.cols * w.taps;
    const int64_t tile_rows = sparse ? kSparseTileRows : kTileRows;
    const int64_t pairs = std::max<int64_t>(1, tile_rows / (kernel_rows + height - 1));
    const int64_t wide = std::min(pairs, kMaxColumns / kernel_rows);  // (channel, kernel column)
    group_cols = std::max<int64_t>(1, std::min(kernel_cols, wide / w.cols));
    groups = ceil_div(kernel_cols, group_cols);
    chunk = w.cols <= wide ? w.cols : std::min(round_up(ceil_div(w.cols, ceil_div(w.cols, wide)), 16), wide);
    chunks = ceil_div(w.cols, chunk);
}

ConvRuns::ConvRuns(const ConvView& w, const int32_t* buffer)
    : tiling(w),
      rows(w.rows),
      cuts_row(w.transposed ? tiling.chunks : w.taps * tiling.chunks),
      cuts_tap(w.transposed ? w.rows * tiling.chunks : tiling.chunks) {
    runs = reinterpret_cast<ConvRun*>(const_cast<int32_t*>(buffer));
    counts = const_cast<int32_t*>(buffer) + run_ints();
    places = counts + tiling.tiles();
    cuts = places + rows * tiling.tiles();
}

int64_t ConvRuns::max_entries(int64_t nnz) const {
    return round_up(nnz + (kQuad - 1) * std::min(nnz, tiling.tiles() * rows), kQuad);
}

int64_t conv_derive_scratch_ints(const ConvView& w) { return w.rows + kMaxColumns + 2; }

void conv_derive(const ConvView& w, const ConvRuns& index, int32_t* scratch) {
    const ConvTiling& tiling = index.tiling;
    for (int64_t row = 0; row < w.rows; ++row) {
        // The taps of a row follow one another in its part of the index; those of a column have parts of their own.
        int32_t k = w.transposed ? 0 : w.start[row];
        for (int64_t tap = 0; tap < w.taps; ++tap) {
            const int64_t part = w.transposed ? tap * w.rows + row : row, origin = w.origin(tap);
            int32_t* cut = index.cuts + row * index.cuts_row + tap * index.cuts_tap;
            if (w.transposed) k = w.start[part];
            for (int64_t chunk = 0; chunk < tiling.chunks; ++chunk) {
                const int64_t bound = origin + std::min((chunk + 1) * tiling.chunk, w.cols);
                cut[chunk] = k;
                while (k < w.start[part + 1] && w.other[k] < bound) ++k;
            }
        }
    }
    index.cuts[w.rows * w.taps * tiling.chunks] = static_cast<int32_t>(w.nnz);

    int32_t *length = scratch, *place = length + w.rows;  // [rows] [kMaxColumns + 2]
    int32_t quad = 0;
    for (int64_t t = 0; t < tiling.tiles(); ++t) {
        const int64_t chunk = t / tiling.groups, group = t % tiling.groups;
        std::fill(length, length + w.rows, 0);
        for (int64_t row = 0; row < w.rows; ++row)
            for (int64_t tap = 0; tap < w.taps; ++tap) {
                const int32_t* cut = index.cut(row, tap) + chunk;
                if (tiling.group(tap) == group) length[row] += cut[1] - cut[0];
            }
        // A counting sort, longest first; rows of equal length stay in order.
        std::fill(place, place + kMaxColumns + 2, 0);
        for (int64_t row = 0; row < w.rows; ++row) ++place[kMaxColumns - length[row] + 1];
        for (int64_t i = 1; i <= kMaxColumns; ++i) place[i] += place[i - 1];
        const int64_t filled = place[kMaxColumns];
        ConvRun* runs = index.runs + t * w.rows;
        for (int64_t row = 0; row < w.rows; ++row)
            runs[place[kMaxColumns - length[row]]++] = {static_cast<int32_t>(row), length[row], 0};
        for (int64_t i = 0; i < w.rows; ++i) {
            runs[i].quad = quad;
            index.places[runs[i].row * tiling.tiles() + t] = quad;
            quad += static_cast<int32_t>(ceil_div(runs[i].count, kQuad));
        }
        index.counts[t] = static_cast<int32_t>(t == 0 ? w.rows : filled);
    }
}

void conv_shorten(const ConvRuns& index, const ConvTap* taps, int64_t tap_count, int64_t tile, ConvRun* runs) {
    const int64_t chunk = tile / index.tiling.groups, group = tile % index.tiling.groups;
    const ConvRun* whole = index.runs + tile * index.rows;
    for (int64_t i = 0; i < index.counts[tile]; ++i) {
        int32_t count = 0;
        for (int64_t m = 0; m < tap_count; ++m) {
            const int32_t* cut = index.cut(whole[i].row, taps[m].tap) + chunk;
            if (taps[m].group == group) count += cut[1] - cut[0];
        }
        runs[i] = {whole[i].row, count, whole[i].quad};
    }
}

}  // namespace sk
