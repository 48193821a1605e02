// Unstructured linear: blocking, index derivation and threads. The inner loops are in csrc/cpu/kernels.
#include "cpu/linear_unstructured.h"

#include <algorithm>
#include <cstring>

#include "cpu/arena.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

SK_DECLARE_TABLE(UnstructuredTable, unstructured_table)

namespace sk {

namespace {

constexpr int64_t kQuad = 4;
// 16-bit columns are read two quads ahead of the last one.
constexpr int64_t kReadAhead = 2 * kQuad;
// Copies of the weight gradient that threads accumulate before they are added: bounds the workspace.
constexpr int64_t kMaxCopies = 8;
constexpr int64_t kMaxTile = 1024;

// The weight seen by rows or, for the input gradient, by columns.
struct View {
    int64_t rows, cols, nnz;
    const int32_t *start, *other, *slot;
};

bool valid(const BlockIndex& w, int64_t positions = 0, int64_t threads = 1) {
    return w.bh == 1 && w.bw == 1 && w.out > 0 && w.in > 0 && w.nnzb >= 0 && positions >= 0 && threads > 0;
}

View by_row(const BlockIndex& w) { return {w.out, w.in, w.nnzb, w.crow, w.col, w.slot}; }
View by_col(const BlockIndex& w) { return {w.in, w.out, w.nnzb, w.ccol, w.row_t, w.slot_t}; }
View view(const BlockIndex& w, bool transposed) { return transposed ? by_col(w) : by_row(w); }

// Columns of a tile. 64 positions of 144 columns are 36 KiB, which stays in a 48 KiB L1 beside the streams. Sparser
// weights want longer tiles, from L2, because a short run costs more in Y than its X saves. Zen 5, one thread,
// 1024 x 1024, GF/s of the nonzeros at 128/176/256/512/1024 columns: S=.5 200/192/157, S=.9 166/168/160,
// S=.95 126/135/139/129/118, S=.98 88/96/108/124/131.
int64_t tile_columns(int64_t rows, int64_t cols, int64_t nnz) {
    const int64_t wanted = nnz > 0 ? 80 + 10 * rows * cols / nnz : kMaxTile;
    const int64_t width = std::min<int64_t>(std::max<int64_t>(wanted, 144), kMaxTile);
    return round_up(ceil_div(cols, ceil_div(cols, width)), 16);
}

// The derived index of one orientation, in one int32 buffer: [tiles] run counts, [tiles + 1] where the quads of a tile
// start in the stream, then [tiles][rows] runs. Every row has a run in the first tile, so that every output is written.
struct Runs {
    int64_t rows, tile, tiles;
    int32_t *counts, *quads;
    UnstructuredRun* runs;

    Runs(int64_t rows, int64_t cols, int64_t nnz, int32_t* buffer)
        : rows(rows), tile(tile_columns(rows, cols, nnz)), tiles(ceil_div(cols, tile)) {
        counts = buffer;
        quads = counts + tiles;
        runs = reinterpret_cast<UnstructuredRun*>(quads + tiles + 1);
    }
    Runs(const View& w, const int32_t* buffer) : Runs(w.rows, w.cols, w.nnz, const_cast<int32_t*>(buffer)) {}

    int64_t ints() const { return 2 * tiles + 1 + 3 * tiles * rows; }
    // Quads of the stream, whatever the pattern: each run wastes at most three quarters of one.
    int64_t max_quads(int64_t nnz) const { return ceil_div(nnz + 3 * std::min(nnz, tiles * rows), kQuad); }
    UnstructuredRun* of(int64_t t) const { return runs + t * rows; }
};

// Width of the panels: the widest that keeps all threads busy. Narrow ones cost more per position.
int64_t panel_width(int64_t positions, int64_t threads) {
    int64_t best = 64;
    double best_cost = 0;
    for (const int64_t width : {64, 32, 16}) {
        const double rounds = static_cast<double>(ceil_div(ceil_div(positions, width), threads));
        const double cost = rounds * static_cast<double>(width) * (width == 64 ? 1.0 : width == 32 ? 1.15 : 1.5);
        if (width == 64 || cost < best_cost) {
            best = width;
            best_cost = cost;
        }
    }
    return best;
}

struct Stream {
    float* weights;
    uint16_t* locals;
};

// Runs of equal length are far apart in the sorted index, so that no hardware prefetcher sees them coming.
constexpr int64_t kPrefetch = 12;

void prefetch(const int32_t* from, int32_t count) {
    for (int32_t k = 0; k < count; k += 16) __builtin_prefetch(from + k);
}

// Writes the stream of the tiles t = first, first + step, ...
void fill_stream(const View& w, const Runs& index, const float* values, const Stream& stream, int64_t first,
                 int64_t step) {
    for (int64_t t = first; t < index.tiles; t += step) {
        uint16_t* locals = stream.locals + kQuad * index.quads[t];
        float* weights = values ? stream.weights + kQuad * index.quads[t] : nullptr;
        const int32_t base = static_cast<int32_t>(t * index.tile);
        const UnstructuredRun* runs = index.of(t);
        for (int64_t i = 0; i < index.counts[t]; ++i) {
            if (i + kPrefetch < index.counts[t]) {
                const UnstructuredRun& later = runs[i + kPrefetch];
                prefetch(w.other + later.begin, later.count);
                if (values) prefetch(w.slot + later.begin, later.count);
            }
            const int32_t *other = w.other + runs[i].begin, *slot = w.slot + runs[i].begin;
            const int64_t count = runs[i].count, padded = round_up(count, kQuad);
            for (int64_t k = 0; k < count; ++k) locals[k] = static_cast<uint16_t>(other[k] - base);
            for (int64_t k = count; k < padded; ++k) locals[k] = 0;
            locals += padded;
            if (!weights) continue;
            for (int64_t k = 0; k < count; ++k) weights[k] = values[slot[k]];
            for (int64_t k = count; k < padded; ++k) weights[k] = 0;
            weights += padded;
        }
    }
}

// The piece of a matrix x [positions, cols] that starts at position `at` and column c, cut off at its edges.
UnstructuredAhead piece(const float* x, int64_t ld, int64_t positions, int64_t cols, int64_t at, int64_t height,
                        int64_t c, int64_t width) {
    const int64_t rows = std::min(height, positions - at), bytes = 4 * std::min(width, cols - c);
    if (rows <= 0 || bytes <= 0) return {nullptr, 0, 0, 0};
    return {reinterpret_cast<const char*>(x + at * ld + c), rows, bytes, 4 * ld};
}

// Beside the panel in L2, as many rows of the result (of the next dy) may wait as do not push it out.
int64_t fetched_rows(const View& w, int64_t width) { return w.rows * width * 4 <= (128 << 10) ? w.rows : 0; }

struct SpmmPlan {
    Runs index;
    int64_t width, panels, workers;
    Stream stream;
    float *tiles, *panel;  // one of each per worker
    int64_t tile_floats, panel_floats, bytes;

    SpmmPlan(const View& w, const int32_t* runs, int64_t positions, int64_t threads, void* workspace)
        : index(w, runs),
          width(panel_width(positions, threads)),
          panels(ceil_div(positions, width)),
          workers(std::min(threads, panels)),
          tile_floats(index.tile * width),
          panel_floats(round_up(w.rows, 16) * width) {
        Arena arena(workspace);
        const int64_t entries = kQuad * index.max_quads(w.nnz);
        stream.weights = arena.take<float>(entries);
        stream.locals = arena.take<uint16_t>(entries + kReadAhead);
        tiles = arena.take<float>(tile_floats * workers);
        panel = arena.take<float>(panel_floats * workers);
        bytes = arena.used;
    }
};

void spmm(const View& w, const int32_t* runs, const float* values, const float* x, int64_t ldx,
          const Epilogue<float>& epilogue, float* y, int64_t ldy, int64_t positions, int64_t threads, void* workspace) {
    if (positions == 0) return;
    const SpmmPlan plan(w, runs, positions, threads, workspace);
    const Runs& index = plan.index;
    const UnstructuredTable& kernels = SK_TABLE(unstructured_table);
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        const int64_t id = omp_get_thread_num(), team = omp_get_num_threads();
        fill_stream(w, index, values, plan.stream, id, team);
#pragma omp barrier
        // The runtime may give fewer threads than asked for: the panels are dealt out to those that came.
        const int64_t workers = std::min(team, plan.workers);
        const int64_t fetched = fetched_rows(w, plan.width), share = round_up(ceil_div(w.rows, index.tiles), 16);
        if (id < workers) {
            float *tile = plan.tiles + id * plan.tile_floats, *panel = plan.panel + id * plan.panel_floats;
            for (int64_t p = id; p < plan.panels; p += workers) {
                const int64_t at = p * plan.width, live = std::min(plan.width, positions - at);
                for (int64_t t = 0; t < index.tiles; ++t) {
                    const int64_t c = t * index.tile, start = kQuad * index.quads[t];
                    kernels.pack(x + at * ldx + c, ldx, live, std::min(index.tile, w.cols - c), plan.width, tile);
                    const bool last = t + 1 == index.tiles;
                    const UnstructuredAhead ahead[2] = {
                        piece(x, ldx, positions, w.cols, last ? at + workers * plan.width : at, plan.width,
                              last ? 0 : c + index.tile, index.tile),
                        piece(y, ldy, positions, fetched, at, plan.width, t * share, share)};
                    kernels.spmm_tile(index.of(t), index.counts[t], plan.stream.weights + start,
                                      plan.stream.locals + start, tile, panel, plan.width, t == 0, epilogue.bias,
                                      ahead);
                }
                kernels.unpack(panel, plan.width, w.rows, live, y + at * ldy, ldy);
                kernels.activate(epilogue.activation, y + at * ldy, epilogue.pre ? epilogue.pre + at * ldy : nullptr,
                                 ldy, live, w.rows);
            }
        }
    }
}

struct SddmmPlan {
    Runs index;
    int64_t width, panels, copies, shares;  // a worker takes every copies-th panel and every shares-th run
    Stream stream;
    float *tiles, *panel, *sums;
    int64_t tile_floats, panel_floats, entries, bytes;

    SddmmPlan(const View& w, const int32_t* runs, int64_t positions, int64_t threads, void* workspace)
        : index(w, runs),
          width(panel_width(positions, threads)),
          panels(ceil_div(positions, width)),
          copies(std::max<int64_t>(1, std::min({threads, panels, kMaxCopies}))),
          shares(threads / copies),
          tile_floats(index.tile * width),
          panel_floats(round_up(w.rows, 16) * width),
          entries(kQuad * index.max_quads(w.nnz)) {
        Arena arena(workspace);
        stream.weights = nullptr;
        stream.locals = arena.take<uint16_t>(entries + kReadAhead);
        tiles = arena.take<float>(tile_floats * copies * shares);
        panel = arena.take<float>(panel_floats * copies * shares);
        sums = arena.take<float>(entries * copies);
        bytes = arena.used;
    }
};

}  // namespace

int64_t unstructured_runs_ints(const BlockIndex& w, bool transposed) {
    return valid(w) ? Runs(view(w, transposed), nullptr).ints() : 0;
}

int64_t unstructured_derive_workspace_bytes(const BlockIndex& w, bool transposed) {
    if (!valid(w)) return 0;
    const Runs index(view(w, transposed), nullptr);
    return index.tiles * index.rows * static_cast<int64_t>(sizeof(UnstructuredRun));
}

int unstructured_derive(const BlockIndex& weight, bool transposed, int32_t* runs, void* workspace) {
    if (!valid(weight)) return kInvalid;
    const View w = view(weight, transposed);
    const Runs index(w, runs);
    const int64_t rows = w.rows;
    // Runs in row order first, then a stable counting sort by length, longest first.
    UnstructuredRun* found = static_cast<UnstructuredRun*>(workspace);
    int32_t histogram[kMaxTile + 2];
    for (int64_t r = 0; r < rows; ++r) {
        int32_t k = w.start[r];
        for (int64_t t = 0; t < index.tiles; ++t) {
            const int32_t begin = k, bound = static_cast<int32_t>(std::min((t + 1) * index.tile, w.cols));
            while (k < w.start[r + 1] && w.other[k] < bound) ++k;
            found[t * rows + r] = {static_cast<int32_t>(r), begin, k - begin};
        }
    }
    index.quads[0] = 0;
    for (int64_t t = 0; t < index.tiles; ++t) {
        const UnstructuredRun* tile = found + t * rows;
        std::memset(histogram, 0, sizeof histogram);
        for (int64_t r = 0; r < rows; ++r) ++histogram[index.tile - tile[r].count + 1];
        int64_t quads = 0;
        for (int64_t r = 0; r < rows; ++r) quads += ceil_div(tile[r].count, kQuad);
        index.quads[t + 1] = static_cast<int32_t>(index.quads[t] + quads);
        for (int64_t i = 1; i <= index.tile; ++i) histogram[i] += histogram[i - 1];
        for (int64_t r = 0; r < rows; ++r) index.of(t)[histogram[index.tile - tile[r].count]++] = tile[r];
        // Empty runs came last; only the first tile keeps them.
        const int64_t empty = rows - histogram[index.tile - 1];
        index.counts[t] = static_cast<int32_t>(t == 0 ? rows : rows - empty);
    }
    return kOk;
}

int64_t unstructured_spmm_workspace_bytes(const BlockIndex& w, int64_t positions, int64_t threads) {
    return valid(w, positions, threads) ? SpmmPlan(by_row(w), nullptr, positions, threads, nullptr).bytes : 0;
}

int unstructured_spmm(const BlockIndex& w, const int32_t* runs, const float* values, const float* x, int64_t ldx,
                      const float* bias, int64_t activation, float* pre, float* y, int64_t ldy, int64_t positions,
                      int64_t threads, void* workspace) {
    if (!valid(w, positions, threads) || activation < kIdentity || activation > kGeluTanh) return kInvalid;
    const Epilogue<float> epilogue = {bias, static_cast<Activation>(activation), pre};
    spmm(by_row(w), runs, values, x, ldx, epilogue, y, ldy, positions, threads, workspace);
    return kOk;
}

int64_t unstructured_spmm_t_workspace_bytes(const BlockIndex& w, int64_t positions, int64_t threads) {
    return valid(w, positions, threads) ? SpmmPlan(by_col(w), nullptr, positions, threads, nullptr).bytes : 0;
}

int unstructured_spmm_t(const BlockIndex& w, const int32_t* runs_t, const float* values, const float* dy, int64_t ldy,
                        float* dx, int64_t ldx, int64_t positions, int64_t threads, void* workspace) {
    if (!valid(w, positions, threads)) return kInvalid;
    spmm(by_col(w), runs_t, values, dy, ldy, {nullptr, kIdentity, nullptr}, dx, ldx, positions, threads, workspace);
    return kOk;
}

int64_t unstructured_sddmm_workspace_bytes(const BlockIndex& w, int64_t positions, int64_t threads) {
    return valid(w, positions, threads) ? SddmmPlan(by_row(w), nullptr, positions, threads, nullptr).bytes : 0;
}

int unstructured_sddmm(const BlockIndex& weight, const int32_t* runs, const float* dy, int64_t ldy, const float* x,
                       int64_t ldx, float* dvalues, int64_t positions, int64_t threads, void* workspace) {
    if (!valid(weight, positions, threads)) return kInvalid;
    const View w = by_row(weight);
    const SddmmPlan plan(w, runs, positions, threads, workspace);
    const Runs& index = plan.index;
    const UnstructuredTable& kernels = SK_TABLE(unstructured_table);
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        const int64_t id = omp_get_thread_num(), team = omp_get_num_threads();
        fill_stream(w, index, nullptr, plan.stream, id, team);
#pragma omp barrier
        for (int64_t worker = id; worker < plan.copies * plan.shares; worker += team) {
            const int64_t copy = worker % plan.copies, share = worker / plan.copies;
            float* tile = plan.tiles + worker * plan.tile_floats;
            float* panel = plan.panel + worker * plan.panel_floats;
            float* sums = plan.sums + copy * plan.entries;
            const int64_t fetched = fetched_rows(w, plan.width), slice = round_up(ceil_div(w.rows, index.tiles), 16);
            // Shares own whole tiles, hence disjoint pieces of the sums.
            for (int64_t t = share; t < index.tiles; t += plan.shares)
                std::fill(sums + kQuad * index.quads[t], sums + kQuad * index.quads[t + 1], 0.0f);
            for (int64_t p = copy; p < plan.panels; p += plan.copies) {
                const int64_t at = p * plan.width, live = std::min(plan.width, positions - at);
                kernels.pack(dy + at * ldy, ldy, live, w.rows, plan.width, panel);
                for (int64_t t = share; t < index.tiles; t += plan.shares) {
                    const int64_t c = t * index.tile, start = kQuad * index.quads[t];
                    kernels.pack(x + at * ldx + c, ldx, live, std::min(index.tile, w.cols - c), plan.width, tile);
                    const bool last = t + plan.shares >= index.tiles;
                    const int64_t next = at + plan.copies * plan.width;
                    const UnstructuredAhead ahead[2] = {
                        piece(x, ldx, positions, w.cols, last ? next : at, plan.width,
                              (last ? share : t + plan.shares) * index.tile, index.tile),
                        piece(dy, ldy, positions, fetched, next, plan.width, t * slice, slice)};
                    kernels.sddmm_tile(index.of(t), index.counts[t], plan.stream.locals + start, tile, panel,
                                       plan.width, sums + start, ahead);
                }
            }
        }
#pragma omp barrier
        for (int64_t t = id; t < index.tiles; t += team) {
            const float* sums = plan.sums + kQuad * index.quads[t];
            const UnstructuredRun* run = index.of(t);
            for (int64_t i = 0; i < index.counts[t]; ++i, ++run) {
                if (i + kPrefetch < index.counts[t]) prefetch(w.slot + run[kPrefetch].begin, run[kPrefetch].count);
                for (int32_t k = 0; k < run->count; ++k) {
                    float sum = sums[k];
                    for (int64_t c = 1; c < plan.copies; ++c) sum += sums[k + c * plan.entries];
                    dvalues[w.slot[run->begin + k]] = sum;
                }
                sums += round_up(run->count, kQuad);
            }
        }
    }
    return kOk;
}

}  // namespace sk
