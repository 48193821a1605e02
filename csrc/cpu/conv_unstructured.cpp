// Unstructured convolution: workspaces and threads. The blocking is drawn in csrc/cpu/conv_unstructured.h.
#include "cpu/conv_unstructured.h"

#include <algorithm>

#include "cpu/arena.h"
#include "cpu/conv_unstructured_gather.h"
#include "cpu/conv_unstructured_index.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

SK_DECLARE_TABLE(ConvUnstructuredTable, conv_unstructured_table)

namespace sk {

namespace {

// Copies of the weight gradient that threads accumulate before they are added: bounds the workspace.
constexpr int64_t kMaxCopies = 8;

bool valid(const BlockIndex& w, int64_t taps) {
    return w.bh == 1 && w.bw == 1 && w.out > 0 && w.in > 0 && w.nnzb >= 0 && taps > 0;
}

int64_t taps_of(const ConvShape& conv) { return conv.kernel_h * conv.kernel_w; }

bool valid(int64_t size, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    return kernel > 0 && stride > 0 && dilation > 0 && pad >= 0 && size >= 0 && out >= 0 &&
           (out == 0 || (out - 1) * stride + dilation * (kernel - 1) + 1 <= size + 2 * pad);
}

bool valid(const BlockIndex& w, const ConvShape& c, int64_t threads) {
    return threads > 0 && c.batch >= 0 &&
           valid(c.height, c.out_height, c.kernel_h, c.stride_h, c.pad_h, c.dilation_h) &&
           valid(c.width, c.out_width, c.kernel_w, c.stride_w, c.pad_w, c.dilation_w) && valid(w, taps_of(c));
}

struct Source {
    const float* data;
    const ImageStrides& strides;
};

struct Target {
    float* data;
    const ImageStrides& strides;
};

// What one worker has to itself.
struct Desk {
    ConvLanes* lanes;       // of each kernel column and for writing
    ConvVectorRow* rows;    // of the tiles of a chunk
    ConvVectorRow* writes;  // [kMaxHeight]
    float *tiles, *panel;   // of a chunk; of outputs
    int32_t* place;         // of each tile
};

// The workspace of any of the three products.
struct Plan {
    ConvView w;
    ConvRuns index;
    int64_t threads, entries;
    int64_t* offsets;
    ConvGroup* groups;
    ConvTap* taps;
    ConvSource* sources;
    float* weights;  // the stream
    uint16_t* locals;
    ConvRun* shorter;  // the runs of a phase; null where all taps take part
    Desk first;        // of worker 0
    int64_t group_rows, lane_count, tile_floats, panel_floats, bytes;
    float* sums;

    Plan(const BlockIndex& weight, bool transposed, const int32_t* runs, const ConvShape& conv, int64_t threads,
         int64_t workers, int64_t copies, void* workspace)
        : w(weight, taps_of(conv), transposed), index(w, runs), threads(threads), entries(index.max_entries(w.nnz)) {
        const ConvTiling& tiling = index.tiling;
        group_rows = std::min(tiling.group_taps(), w.taps) * kMaxHeight;
        lane_count = (conv.kernel_w + 1) * (conv.kernel_h == 1 ? kMaxHeight : 1);
        tile_floats = round_up(tiling.chunk, kVectorRow) * w.taps * kMaxHeight * kVectorRow;
        panel_floats = round_up(w.rows, kVectorRow) * kMaxHeight * kVectorRow;
        Arena arena(workspace);
        offsets = arena.take<int64_t>(conv.kernel_h + conv.kernel_w);
        groups = arena.take<ConvGroup>(tiling.groups);
        taps = arena.take<ConvTap>(w.taps);
        sources = arena.take<ConvSource>(tiling.groups * group_rows);
        const bool phases = transposed && conv_phases(conv) > 1;
        weights = arena.take<float>(copies == 0 ? entries : 0);
        locals = arena.take<uint16_t>(entries + kReadAhead);
        shorter = phases ? arena.take<ConvRun>(tiling.tiles() * w.rows) : nullptr;
        first.lanes = arena.take<ConvLanes>(lane_count * workers);
        first.rows = arena.take<ConvVectorRow>(tiling.groups * group_rows * workers);
        first.writes = arena.take<ConvVectorRow>(kMaxHeight * workers);
        first.tiles = arena.take<float>(tile_floats * workers);
        first.panel = arena.take<float>(panel_floats * workers);
        first.place = arena.take<int32_t>(tiling.tiles() * threads);
        sums = arena.take<float>(entries * copies);
        bytes = arena.used;
    }

    Desk desk(int64_t worker) const {
        return {first.lanes + worker * lane_count,   first.rows + worker * index.tiling.groups * group_rows,
                first.writes + worker * kMaxHeight,  first.tiles + worker * tile_floats,
                first.panel + worker * panel_floats, place(worker)};
    }
    ConvSource* sources_of(int64_t group) const { return sources + group * group_rows; }
    int32_t* place(int64_t thread) const { return first.place + thread * index.tiling.tiles(); }
    ConvFill lay_out(const ConvPanels& panels) const {
        int64_t count = 0;
        for (int64_t g = 0; g < index.tiling.groups; ++g) {
            groups[g] = conv_group(panels, index.tiling, g, taps + count, sources_of(g));
            count += groups[g].taps;
        }
        // In the order of the index.
        std::sort(taps, taps + count, [](const ConvTap& a, const ConvTap& b) { return a.tap < b.tap; });
        return {w.other,
                w.slot,
                index.cuts,
                index.places,
                w.nnz,
                index.cuts_row,
                index.cuts_tap,
                w.origin(1),
                index.tiling.chunks,
                index.tiling.groups,
                index.tiling.chunk,
                taps,
                count};
    }
    // One thread's part of the stream and, where not all taps take part, of the runs.
    void fill(const ConvUnstructuredTable& kernels, const ConvFill& from, const float* values, int64_t id,
              int64_t team) const {
        kernels.fill(from, w.rows * id / team, w.rows * (id + 1) / team, values, values ? weights : nullptr, locals,
                     place(id));
        for (int64_t t = id; shorter && t < index.tiling.tiles(); t += team)
            conv_shorten(index, from.taps, from.tap_count, t, shorter + t * w.rows);
    }
    const ConvRun* runs(int64_t tile) const { return (shorter ? shorter : index.runs) + tile * w.rows; }
    // Where the tile of a group lies among those of a chunk.
    int64_t tile_at(int64_t group) const {
        int64_t rows = 0;
        for (int64_t g = 0; g < group; ++g) rows += groups[g].rows;
        return round_up(index.tiling.chunk, kVectorRow) * rows * kVectorRow;
    }
    // Packs the tiles of a chunk for one panel of x.
    void pack(const ConvUnstructuredTable& kernels, const ConvPanels& panels, int64_t panel, int64_t chunk,
              const Source& x, const Desk& desk) const {
        int64_t rows = 0;
        for (int64_t g = 0; g < index.tiling.groups; ++g) {
            conv_read_rows(panels, panel, x.strides, groups[g], sources_of(g), desk.lanes, tile_at(g),
                           desk.rows + rows);
            rows += groups[g].rows;
        }
        const int64_t c = chunk * index.tiling.chunk;
        kernels.pack(x.data + c * x.strides.c, x.strides.c, std::min(index.tiling.chunk, w.cols - c), desk.rows, rows,
                     desk.tiles);
    }
};

void multiply(const Plan& plan, const ConvPanels& panels, const float* values, const Source& x,
              const Epilogue<float>& end, const Target& y) {
    const ConvUnstructuredTable& kernels = SK_TABLE(conv_unstructured_table);
    const ConvRuns& index = plan.index;
    const ConvFill from = plan.lay_out(panels);
#pragma omp parallel num_threads(static_cast<int>(plan.threads))
    {
        const int64_t id = omp_get_thread_num(), team = omp_get_num_threads();
        plan.fill(kernels, from, values, id, team);
#pragma omp barrier
        const Desk desk = plan.desk(id);
        for (int64_t p = id; p < panels.count; p += team) {
            conv_lanes(panels, p, x.strides, y.strides, desk.lanes);
            for (int64_t t = 0; t < index.tiling.tiles(); ++t) {
                const int64_t group = t % index.tiling.groups;
                if (group == 0) plan.pack(kernels, panels, p, t / index.tiling.groups, x, desk);
                kernels.spmm_tile(plan.runs(t), index.counts[t], plan.weights, plan.locals,
                                  desk.tiles + plan.tile_at(group), desk.panel, panels.height, t == 0, end.bias);
            }
            conv_write_rows(panels, p, y.strides, desk.lanes, desk.writes);
            if (end.activation != kIdentity) {
                if (end.pre) kernels.unpack(desk.panel, y.strides.c, plan.w.rows, desk.writes, panels.height, end.pre);
                kernels.activate(end.activation, desk.panel, plan.w.rows * panels.height * kVectorRow);
            }
            kernels.unpack(desk.panel, y.strides.c, plan.w.rows, desk.writes, panels.height, y.data);
        }
    }
}

int64_t copies_of(int64_t threads) { return std::min(threads, kMaxCopies); }

}  // namespace

int64_t conv_unstructured_runs_ints(const BlockIndex& w, int64_t taps, bool transposed) {
    return valid(w, taps) ? ConvRuns(ConvView(w, taps, transposed), nullptr).ints(taps) : 0;
}

int64_t conv_unstructured_derive_workspace_bytes(const BlockIndex& w, int64_t taps, bool transposed) {
    return valid(w, taps) ? conv_derive_scratch_ints(ConvView(w, taps, transposed)) * 4 : 0;
}

int conv_unstructured_derive(const BlockIndex& weight, int64_t taps, bool transposed, int32_t* runs, void* workspace) {
    if (!valid(weight, taps)) return kInvalid;
    const ConvView w(weight, taps, transposed);
    conv_derive(w, ConvRuns(w, runs), static_cast<int32_t*>(workspace));
    return kOk;
}

int64_t conv_unstructured_spmm_workspace_bytes(const BlockIndex& w, const ConvShape& conv, int64_t threads) {
    return valid(w, conv, threads) ? Plan(w, false, nullptr, conv, threads, threads, 0, nullptr).bytes : 0;
}

int conv_unstructured_spmm(const BlockIndex& w, const int32_t* runs, const float* values, const ConvShape& conv,
                           const float* x, const ImageStrides& x_strides, const float* bias, int64_t activation,
                           float* pre, float* y, const ImageStrides& y_strides, int64_t threads, void* workspace) {
    if (!valid(w, conv, threads) || activation < kIdentity || activation > kGeluTanh) return kInvalid;
    const Plan plan(w, false, runs, conv, threads, threads, 0, workspace);
    const ConvProduct product = conv_forward(conv, plan.offsets);
    const Epilogue<float> end = {bias, static_cast<Activation>(activation), pre};
    if (!product.empty()) multiply(plan, ConvPanels(product, threads), values, {x, x_strides}, end, {y, y_strides});
    return kOk;
}

int64_t conv_unstructured_spmm_t_workspace_bytes(const BlockIndex& w, const ConvShape& conv, int64_t threads) {
    return valid(w, conv, threads) ? Plan(w, true, nullptr, conv, threads, threads, 0, nullptr).bytes : 0;
}

int conv_unstructured_spmm_t(const BlockIndex& w, const int32_t* runs_t, const float* values, const ConvShape& conv,
                             const float* dy, const ImageStrides& dy_strides, float* dx, const ImageStrides& dx_strides,
                             int64_t threads, void* workspace) {
    if (!valid(w, conv, threads)) return kInvalid;
    const Plan plan(w, true, runs_t, conv, threads, threads, 0, workspace);
    for (int64_t phase = 0; phase < conv_phases(conv); ++phase) {
        const ConvProduct product = conv_phase(conv, phase, plan.offsets);
        if (!product.empty())
            multiply(plan, ConvPanels(product, threads), values, {dy, dy_strides}, {nullptr, kIdentity, nullptr},
                     {dx, dx_strides});
    }
    return kOk;
}

int64_t conv_unstructured_sddmm_workspace_bytes(const BlockIndex& w, const ConvShape& conv, int64_t threads) {
    const int64_t copies = copies_of(threads);
    return valid(w, conv, threads) ? Plan(w, false, nullptr, conv, threads, copies, copies, nullptr).bytes : 0;
}

int conv_unstructured_sddmm(const BlockIndex& w, const int32_t* runs, const ConvShape& conv, const float* dy,
                            const ImageStrides& dy_strides, const float* x, const ImageStrides& x_strides,
                            float* dvalues, int64_t threads, void* workspace) {
    if (!valid(w, conv, threads)) return kInvalid;
    const int64_t most = copies_of(threads);
    const Plan plan(w, false, runs, conv, threads, most, most, workspace);
    const ConvProduct product = conv_forward(conv, plan.offsets);
    if (product.empty()) {
        std::fill(dvalues, dvalues + w.nnzb, 0.0f);
        return kOk;
    }
    const ConvPanels panels(product, most);
    // One copy of the sums a worker; the runtime may give fewer threads than there are workers.
    const int64_t copies = std::min(most, panels.count);
    const ConvUnstructuredTable& kernels = SK_TABLE(conv_unstructured_table);
    const ConvRuns& index = plan.index;
    const ConvFill from = plan.lay_out(panels);
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        const int64_t id = omp_get_thread_num(), team = omp_get_num_threads();
        plan.fill(kernels, from, nullptr, id, team);
#pragma omp barrier
        for (int64_t worker = id; worker < copies; worker += team) {
            const Desk desk = plan.desk(worker);
            float* sums = plan.sums + worker * plan.entries;
            for (int64_t p = worker; p < panels.count; p += copies) {
                conv_lanes(panels, p, x_strides, dy_strides, desk.lanes);
                conv_write_rows(panels, p, dy_strides, desk.lanes, desk.writes);
                kernels.pack(dy, dy_strides.c, w.out, desk.writes, panels.height, desk.panel);
                for (int64_t t = 0; t < index.tiling.tiles(); ++t) {
                    const int64_t group = t % index.tiling.groups;
                    if (group == 0) plan.pack(kernels, panels, p, t / index.tiling.groups, {x, x_strides}, desk);
                    kernels.sddmm_tile(plan.runs(t), index.counts[t], plan.locals, desk.tiles + plan.tile_at(group),
                                       desk.panel, panels.height, panels.live(p), p == worker, sums);
                }
            }
        }
#pragma omp barrier
        kernels.scatter(from, w.out * id / team, w.out * (id + 1) / team, plan.sums, copies, plan.entries, dvalues,
                        plan.place(id));
    }
    return kOk;
}

}  // namespace sk
