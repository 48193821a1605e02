// Unstructured convolution: deriving the index, filling and emptying the stream.
#include "cpu/conv_unstructured_index.h"

#include <algorithm>

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

ConvRuns::ConvRuns(const ConvView& w, const int32_t* buffer) : tiling(w), rows(w.rows) {
    counts = const_cast<int32_t*>(buffer);
    quads = counts + tiling.tiles();
    order = quads + tiling.tiles() + 1;
    parts = reinterpret_cast<ConvPart*>(order + tiling.tiles() * rows);
}

int64_t ConvRuns::max_entries(int64_t nnz) const {
    return round_up(nnz + (kQuad - 1) * std::min(nnz, tiling.tiles() * rows), kQuad);
}

namespace {

// Parts of all tiles in the order of rows, then the lengths of one tile's runs and the places of its lengths.
int64_t scratch_parts(const ConvView& w, const ConvTiling& tiling) {
    return tiling.tiles() * w.rows * tiling.group_taps();
}

}  // namespace

int64_t conv_derive_scratch_ints(const ConvView& w) {
    return 2 * scratch_parts(w, ConvTiling(w)) + w.rows + kMaxColumns + 2;
}

void conv_derive(const ConvView& w, const ConvRuns& index, int32_t* scratch) {
    const ConvTiling& tiling = index.tiling;
    const int64_t members = tiling.group_taps(), found_count = scratch_parts(w, tiling);
    ConvPart* found = reinterpret_cast<ConvPart*>(scratch);
    int32_t *length = scratch + 2 * found_count, *place = length + w.rows;
    std::fill(found, found + found_count, ConvPart{0, 0});
    for (int64_t row = 0; row < w.rows; ++row) {
        // The taps of a row follow one another in its part of the index; those of a column have parts of their own.
        int32_t k = w.transposed ? 0 : w.start[row];
        for (int64_t tap = 0; tap < w.taps; ++tap) {
            const int64_t part = w.transposed ? tap * w.rows + row : row, origin = w.origin(tap);
            if (w.transposed) k = w.start[part];
            for (int64_t chunk = 0; chunk < tiling.chunks; ++chunk) {
                const int64_t bound = origin + std::min((chunk + 1) * tiling.chunk, w.cols);
                const int64_t tile = chunk * tiling.groups + tiling.group(tap);
                const int32_t begin = k;
                while (k < w.start[part + 1] && w.other[k] < bound) ++k;
                found[(tile * w.rows + row) * members + tiling.member(tap)] = {begin, k - begin};
            }
        }
    }
    index.quads[0] = 0;
    for (int64_t t = 0; t < tiling.tiles(); ++t) {
        const ConvPart* tile = found + t * w.rows * members;
        // A counting sort, longest first; rows of equal length stay in order.
        std::fill(place, place + kMaxColumns + 2, 0);
        int64_t quads = 0, empty = 0;
        for (int64_t row = 0; row < w.rows; ++row) {
            length[row] = 0;
            for (int64_t m = 0; m < members; ++m) length[row] += tile[row * members + m].count;
            ++place[kMaxColumns - length[row] + 1];
            quads += ceil_div(length[row], kQuad);
            empty += length[row] == 0;
        }
        for (int64_t i = 1; i <= kMaxColumns; ++i) place[i] += place[i - 1];
        for (int64_t row = 0; row < w.rows; ++row) {
            const int64_t i = t * w.rows + place[kMaxColumns - length[row]]++;
            index.order[i] = static_cast<int32_t>(row);
            std::copy(tile + row * members, tile + (row + 1) * members, index.parts + i * members);
        }
        index.quads[t + 1] = static_cast<int32_t>(index.quads[t] + quads);
        index.counts[t] = static_cast<int32_t>(t == 0 ? w.rows : w.rows - empty);
    }
}

namespace {

// Runs of equal length are far apart in the sorted index, so that no hardware prefetcher sees them coming.
constexpr int64_t kAhead = 12;

void prefetch(const int32_t* from, int32_t count) {
    for (int32_t k = 0; k < count; k += 16) __builtin_prefetch(from + k);
    if (count > 0) __builtin_prefetch(from + count - 1);
}

}  // namespace

void conv_fill(const ConvView& w, const ConvRuns& index, const ConvGroup& group, const float* values, int64_t tile,
               const ConvStream& stream) {
    const int64_t chunk = tile / index.tiling.groups, runs = index.counts[tile];
    uint16_t* locals = stream.locals + kQuad * index.quads[tile];
    float* weights = values ? stream.weights + kQuad * index.quads[tile] : nullptr;
    // Modulo 2^32: only the difference from the tile's first column counts.
    const uint32_t scale = static_cast<uint32_t>(group.rows);
    for (int64_t i = 0; i < runs; ++i) {
        const ConvPart* parts = index.parts_of(tile, i);
        // First where the entries are, then the values that they name: a value is asked for half way.
        if (i + kAhead < runs) {
            const ConvPart* later = index.parts_of(tile, i + kAhead);
            for (int64_t m = 0; m < group.count; ++m) {
                const ConvPart part = later[group.taps[m].member];
                prefetch(w.other + part.begin, part.count);
                if (values) prefetch(w.slot + part.begin, part.count);
            }
        }
        if (values && i + kAhead / 2 < runs) {
            const ConvPart* later = index.parts_of(tile, i + kAhead / 2);
            for (int64_t m = 0; m < group.count; ++m) {
                const ConvPart part = later[group.taps[m].member];
                for (int32_t k = 0; k < part.count; k += 8) __builtin_prefetch(values + w.slot[part.begin + k]);
            }
        }
        int64_t n = 0;
        for (int64_t m = 0; m < group.count; ++m) {
            const ConvTap tap = group.taps[m];
            const ConvPart part = parts[tap.member];
            const int64_t first = w.origin(tap.tap) + chunk * index.tiling.chunk;
            const uint32_t base = static_cast<uint32_t>(tap.address) - static_cast<uint32_t>(first) * scale;
            const int32_t *other = w.other + part.begin, *slot = w.slot + part.begin;
            for (int32_t k = 0; k < part.count; ++k)
                locals[n + k] = static_cast<uint16_t>(static_cast<uint32_t>(other[k]) * scale + base);
            if (weights)
                for (int32_t k = 0; k < part.count; ++k) weights[n + k] = values[slot[k]];
            n += part.count;
        }
        stream.runs[tile * w.rows + i] = {index.order[tile * w.rows + i], static_cast<int32_t>(n)};
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
    const int64_t runs = index.counts[tile];
    sums += kQuad * index.quads[tile];
    for (int64_t i = 0; i < runs; ++i) {
        if (i + kAhead < runs) {
            const ConvPart* later = index.parts_of(tile, i + kAhead);
            for (int64_t m = 0; m < group.count; ++m) {
                const ConvPart part = later[group.taps[m].member];
                prefetch(w.slot + part.begin, part.count);
            }
        }
        const ConvPart* parts = index.parts_of(tile, i);
        int64_t n = 0;
        for (int64_t m = 0; m < group.count; ++m) {
            const ConvPart part = parts[group.taps[m].member];
            const int32_t* slot = w.slot + part.begin;
            for (int32_t k = 0; k < part.count; ++k, ++n) {
                float sum = sums[n];
                for (int64_t c = 1; c < copies; ++c) sum += sums[n + c * stride];
                dvalues[slot[k]] = sum;
            }
        }
        sums += round_up(n, kQuad);
    }
}

}  // namespace sk
