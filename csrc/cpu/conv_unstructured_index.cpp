// Unstructured convolution: deriving the index, filling and emptying the stream.
#include "cpu/conv_unstructured_index.h"

#include <algorithm>
#include <cstring>

#include "cpu/arena.h"

namespace sk {

namespace {

// Vector rows of a tile of X, 40 KiB: what stays in an L1 of 48 KiB beside the streams.
constexpr int64_t kTileRows = 640;
constexpr int64_t kMaxHeight = 8;
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
    const int64_t pairs = std::max<int64_t>(1, kTileRows / (kernel_rows + kMaxHeight - 1));
    const int64_t wide = std::min(pairs, kMaxColumns / kernel_rows);  // (channel, kernel column)
    group_cols = std::max<int64_t>(1, std::min(kernel_cols, wide / w.cols));
    groups = ceil_div(kernel_cols, group_cols);
    chunk = w.cols <= wide ? w.cols : std::min(round_up(ceil_div(w.cols, ceil_div(w.cols, wide)), 16), wide);
    chunks = ceil_div(w.cols, chunk);
}

ConvRuns::ConvRuns(const ConvView& w, const int32_t* buffer)
    : tiling(w), rows(w.rows), cuts_count(w.rows * w.taps * tiling.chunks + 1) {
    counts = const_cast<int32_t*>(buffer);
    quads = counts + tiling.tiles();
    cuts = quads + tiling.tiles() + 1;
    order = cuts + cuts_count;
}

int64_t ConvRuns::max_entries(int64_t nnz) const {
    return round_up(nnz + (kQuad - 1) * std::min(nnz, tiling.tiles() * rows), kQuad);
}

int64_t conv_derive_scratch_ints(const ConvView& w) { return w.rows + kMaxColumns + 2; }

void conv_derive(const ConvView& w, const ConvRuns& index, int32_t* scratch) {
    const ConvTiling& tiling = index.tiling;
    for (int64_t row = 0; row < w.rows; ++row) {
        // Stretches of a row follow one another in its part of the index; those of a column have parts of their own.
        int32_t k = w.transposed ? 0 : w.start[row];
        for (int64_t tap = 0; tap < w.taps; ++tap) {
            const int64_t part = w.transposed ? tap * w.rows + row : row, origin = w.origin(tap);
            if (w.transposed) k = w.start[part];
            for (int64_t j = 0; j < tiling.chunks; ++j) {
                index.cuts[w.stretch(row, tap) * tiling.chunks + j] = k;
                const int64_t bound = origin + std::min((j + 1) * tiling.chunk, w.cols);
                while (k < w.start[part + 1] && w.other[k] < bound) ++k;
            }
        }
    }
    index.cuts[index.cuts_count - 1] = static_cast<int32_t>(w.nnz);

    int32_t *length = scratch, *place = scratch + w.rows;  // [rows] [kMaxColumns + 2]
    index.quads[0] = 0;
    for (int64_t t = 0; t < tiling.tiles(); ++t) {
        const int64_t chunk = t / tiling.groups, group = t % tiling.groups;
        std::fill(length, length + w.rows, 0);
        for (int64_t tap = 0; tap < w.taps; ++tap) {
            if (tiling.group(tap) != group) continue;
            for (int64_t row = 0; row < w.rows; ++row) {
                const int32_t* cut = index.cut(w, row, tap, chunk);
                length[row] += cut[1] - cut[0];
            }
        }
        // A counting sort, longest first; rows of equal length stay in order.
        std::fill(place, place + kMaxColumns + 2, 0);
        int64_t quads = 0, empty = 0;
        for (int64_t row = 0; row < w.rows; ++row) {
            ++place[kMaxColumns - length[row] + 1];
            quads += ceil_div(length[row], kQuad);
            empty += length[row] == 0;
        }
        for (int64_t i = 1; i <= kMaxColumns; ++i) place[i] += place[i - 1];
        for (int64_t row = 0; row < w.rows; ++row)
            index.order[t * w.rows + place[kMaxColumns - length[row]]++] = static_cast<int32_t>(row);
        index.quads[t + 1] = static_cast<int32_t>(index.quads[t] + quads);
        index.counts[t] = static_cast<int32_t>(t == 0 ? w.rows : w.rows - empty);
    }
}

void conv_fill(const ConvView& w, const ConvRuns& index, const ConvGroup& group, const float* values, int64_t tile,
               const ConvStream& stream) {
    const int64_t chunk = tile / index.tiling.groups, rows = group.rows;
    uint16_t* locals = stream.locals + kQuad * index.quads[tile];
    float* weights = values ? stream.weights + kQuad * index.quads[tile] : nullptr;
    ConvRun* runs = stream.runs + tile * w.rows;
    const int32_t* order = index.order + tile * w.rows;
    for (int64_t i = 0; i < index.counts[tile]; ++i) {
        int64_t n = 0;
        for (int64_t m = 0; m < group.count; ++m) {
            const ConvTap tap = group.taps[m];
            const int32_t* cut = index.cut(w, order[i], tap.tap, chunk);
            const int64_t first = w.origin(tap.tap) + chunk * index.tiling.chunk;
            // Modulo 2^32: only the difference from the tile's first column counts.
            const uint32_t scale = static_cast<uint32_t>(rows),
                           base = static_cast<uint32_t>(tap.address - first * rows);
            const int32_t *other = w.other + cut[0], *slot = w.slot + cut[0];
            const int64_t count = cut[1] - cut[0];
            for (int64_t k = 0; k < count; ++k)
                locals[n + k] = static_cast<uint16_t>(static_cast<uint32_t>(other[k]) * scale + base);
            if (weights)
                for (int64_t k = 0; k < count; ++k) weights[n + k] = values[slot[k]];
            n += count;
        }
        runs[i] = {order[i], static_cast<int32_t>(n)};
        const int64_t padded = round_up(n, kQuad);
        for (int64_t k = n; k < padded; ++k) locals[k] = 0;
        locals += padded;
        if (!weights) continue;
        for (int64_t k = n; k < padded; ++k) weights[k] = 0;
        weights += padded;
    }
}

void conv_scatter(const ConvView& w, const ConvRuns& index, const ConvGroup& group, int64_t tile, const float* sums,
                  int64_t copies, int64_t stride, float* dvalues) {
    const int64_t chunk = tile / index.tiling.groups;
    const int32_t* order = index.order + tile * w.rows;
    sums += kQuad * index.quads[tile];
    for (int64_t i = 0; i < index.counts[tile]; ++i) {
        int64_t n = 0;
        for (int64_t m = 0; m < group.count; ++m) {
            const int32_t* cut = index.cut(w, order[i], group.taps[m].tap, chunk);
            for (int32_t k = cut[0]; k < cut[1]; ++k, ++n) {
                float sum = sums[n];
                for (int64_t c = 1; c < copies; ++c) sum += sums[n + c * stride];
                dvalues[w.slot[k]] = sum;
            }
        }
        sums += round_up(n, kQuad);
    }
}

}  // namespace sk
