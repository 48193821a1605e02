// Launchers of the fused sparse GRU: they sort the batch, pack the weights, spread the tiles over threads and add up
// the threads' weight gradients in a fixed order.
#include "cpu/gru.h"

#include <cstring>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

SK_DECLARE_TABLE(GruTable, gru_table)

namespace sk {

namespace {

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A panel's rows: what the kernels may touch above the real ones, and at least one row that stays zero.
int64_t panel_rows(int64_t rows) { return round_up(rows + 1, 16); }

GruGeometry geometry(const GruLayer& layer) {
    // A strip of few rows reads much of its panel for each weight, so the panel has to fit the first-level cache; wide
    // strips gain more from long chunks, which load their weights and accumulators less often.
    bool narrow = false;
    for (int64_t i = 0; i < 2 * layer.directions; ++i) {
        const BlockIndex& w = layer.weights[i].index;
        narrow = narrow || (w.bh > 0 && (w.bh < 8 || w.bw < 8));
    }
    GruGeometry g = {};
    g.tiles = (layer.batch + kGruLanes - 1) / kGruLanes;
    g.chunk = (narrow ? 64 : 128) / kGruLanes;
    g.wide = g.chunk * kGruLanes;
    g.rows_x = panel_rows(layer.in);
    g.rows_h = panel_rows(layer.hidden);
    g.rows_g = panel_rows(3 * layer.hidden);
    // Both weights share the rows of r and z where a strip of 16 gate rows cannot straddle the border of z and n.
    const bool shared = layer.hidden % 16 == 0;
    g.ih_base = shared ? 0 : g.rows_g;
    g.n_shift = shared ? layer.hidden : g.rows_g;
    g.rows_dg = shared ? panel_rows(4 * layer.hidden) : 2 * g.rows_g;
    return g;
}

// Counting sort by falling length; stable.
void sort_batch(const GruLayer& layer, int32_t* order, int32_t* length, int32_t* start) {
    const int64_t steps = layer.steps;
    auto bucket = [&](int64_t b) { return steps - (layer.lengths ? layer.lengths[b] : steps); };
    std::memset(start, 0, sizeof(int32_t) * static_cast<size_t>(steps + 2));
    for (int64_t b = 0; b < layer.batch; ++b) ++start[bucket(b) + 1];
    for (int64_t t = 0; t <= steps; ++t) start[t + 1] += start[t];
    for (int64_t b = 0; b < layer.batch; ++b) {
        const int32_t at = start[bucket(b)]++;
        order[at] = static_cast<int32_t>(b);
        length[at] = static_cast<int32_t>(steps - bucket(b));
    }
}

bool valid(const GruLayer& layer, int64_t threads) {
    if (layer.batch < 0 || layer.steps < 0 || layer.in < 1 || layer.hidden < 1 || threads < 1) return false;
    if (layer.directions != 1 && layer.directions != 2) return false;
    for (int64_t b = 0; layer.lengths && b < layer.batch; ++b)
        if (layer.lengths[b] < 0 || layer.lengths[b] > layer.steps) return false;
    return true;
}

// Everything that lives in the workspace. Measured with a null base, then carved from the real one.
struct Plan {
    GruRun run = {};
    int32_t *order, *length, *start;
    int32_t* owner;       // [tasks] thread of each backward task
    int64_t* load;        // [threads]
    const float** parts;  // [threads]
    GruScratch* scratch;  // [threads]
    int64_t tasks;        // of the backward: tiles, or directions * tiles
};

float* panel(GruArena& arena, int64_t rows, int64_t stride) { return arena.take<float>(rows * stride); }

void take_common(GruArena& arena, const GruLayer& layer, int64_t threads, Plan& plan) {
    plan.run.layer = &layer;
    plan.run.geometry = geometry(layer);
    plan.order = arena.take<int32_t>(layer.batch);
    plan.length = arena.take<int32_t>(layer.batch);
    plan.start = arena.take<int32_t>(layer.steps + 2);
    plan.scratch = arena.take<GruScratch>(threads);
    plan.run.order = plan.order;
    plan.run.length = plan.length;
}

void take_forward(GruArena& arena, const GruLayer& layer, int64_t threads, Plan& plan) {
    take_common(arena, layer, threads, plan);
    const GruGeometry& g = plan.run.geometry;
    for (int64_t i = 0; i < 2 * layer.directions; ++i)
        plan.run.direction[i / 2].forward[i % 2] = gru_take_strips(arena, layer.weights[i], false);
    for (int64_t t = 0; t < threads; ++t) {
        GruScratch s = {};
        s.x = panel(arena, g.rows_x, g.wide);
        s.gates_x = panel(arena, g.rows_g, g.wide);
        s.gates_h = panel(arena, g.rows_g, kGruLanes);
        s.h = panel(arena, g.rows_h, kGruLanes);
        s.zeros = panel(arena, 1, g.rows_x > g.rows_h ? g.rows_x : g.rows_h);
        if (arena.base) plan.scratch[t] = s;
    }
}

void take_backward(GruArena& arena, const GruLayer& layer, int64_t threads, Plan& plan) {
    take_common(arena, layer, threads, plan);
    const GruGeometry& g = plan.run.geometry;
    // A task is a tile in both directions, so that the second one adds its dx to the first one's in cache; with more
    // threads than tiles the directions part and dx is added at the end.
    const bool apart = layer.directions == 2 && threads > g.tiles;
    plan.tasks = apart ? 2 * g.tiles : g.tiles;
    plan.run.dx_second = apart ? arena.take<float>(layer.batch * layer.steps * layer.in) : nullptr;
    plan.owner = arena.take<int32_t>(plan.tasks);
    plan.load = arena.take<int64_t>(threads);
    plan.parts = arena.take<const float*>(4 * threads);
    for (int64_t i = 0; i < 2 * layer.directions; ++i) {
        GruDirection& d = plan.run.direction[i / 2];
        d.transposed[i % 2] = gru_take_strips(arena, layer.weights[i], true);
        d.tiles[i % 2] = gru_take_tiles(arena, layer.weights[i]);
    }
    for (int64_t t = 0; t < threads; ++t) {
        GruScratch s = {};
        s.x = panel(arena, g.rows_x, g.wide);
        s.x_rows = panel(arena, g.wide, g.rows_x);
        s.h_prev = panel(arena, g.rows_h, g.wide);
        s.h_rows = panel(arena, g.wide, g.rows_h);
        s.dgates = panel(arena, g.rows_dg, g.wide);
        s.dx = panel(arena, g.rows_x, g.wide);
        s.dy = panel(arena, g.rows_h, kGruLanes);
        s.dh = panel(arena, g.rows_h, kGruLanes);
        s.zeros = panel(arena, 1, g.rows_x > g.rows_h ? g.rows_x : g.rows_h);
        for (int64_t d = 0; d < layer.directions; ++d) {
            s.bias[d] = panel(arena, g.rows_dg, 16);
            for (int w = 0; w < 2; ++w) s.grads[d][w] = arena.take<float>(plan.run.direction[d].tiles[w].floats);
        }
        if (arena.base) plan.scratch[t] = s;
    }
}

void clear_zeros(const Plan& plan, int64_t thread) {
    const GruGeometry& g = plan.run.geometry;
    const int64_t n = g.rows_x > g.rows_h ? g.rows_x : g.rows_h;
    std::memset(plan.scratch[thread].zeros, 0, sizeof(float) * static_cast<size_t>(n));
}

// The longest task first, each to the thread with the least to do: fixed by the lengths alone, as the bits of sums over
// a thread's tasks must be.
void assign(Plan& plan, int64_t threads) {
    const int64_t per_tile = plan.tasks / (plan.run.geometry.tiles ? plan.run.geometry.tiles : 1);
    for (int64_t t = 0; t < threads; ++t) plan.load[t] = 0;
    for (int64_t task = 0; task < plan.tasks; ++task) {
        int64_t least = 0;
        for (int64_t t = 1; t < threads; ++t)
            if (plan.load[t] < plan.load[least]) least = t;
        plan.owner[task] = static_cast<int32_t>(least);
        plan.load[least] += plan.length[task / per_tile * kGruLanes] + 1;
    }
}

void clear_grads(const Plan& plan, int64_t thread) {
    const GruScratch& s = plan.scratch[thread];
    for (int64_t d = 0; d < plan.run.layer->directions; ++d) {
        std::memset(s.bias[d], 0, sizeof(float) * 16 * static_cast<size_t>(plan.run.geometry.rows_dg));
        for (int w = 0; w < 2; ++w)
            std::memset(s.grads[d][w], 0, sizeof(float) * static_cast<size_t>(plan.run.direction[d].tiles[w].floats));
    }
}

void backward_share(const Plan& plan, int64_t share) {
    const GruTable& table = SK_TABLE(gru_table);
    for (int64_t task = 0; task < plan.tasks; ++task) {
        if (plan.owner[task] != share) continue;
        if (plan.run.dx_second)
            table.backward(plan.run, task % 2, task / 2, plan.scratch[share]);
        else
            for (int64_t d = 0; d < plan.run.layer->directions; ++d)
                table.backward(plan.run, d, task, plan.scratch[share]);
    }
}

// The gradients of weight i and of its bias, from every thread's sums.
void collect(const Plan& plan, int64_t i, int64_t threads) {
    const GruWeight& w = plan.run.layer->weights[i];
    const GruGeometry& g = plan.run.geometry;
    const int64_t d = i / 2, k = i % 2, hidden = plan.run.layer->hidden;
    const float** parts = plan.parts + i * threads;
    for (int64_t t = 0; t < threads; ++t) parts[t] = plan.scratch[t].grads[d][k];
    gru_unpack_tiles(plan.run.direction[d].tiles[k], w, parts, threads);
    if (!w.d_bias) return;
    for (int64_t row = 0; row < 3 * hidden; ++row) {
        const int64_t at = k ? row : row + (row < 2 * hidden ? g.ih_base : g.n_shift);
        float total = 0;
        for (int64_t t = 0; t < threads; ++t)
            for (int l = 0; l < 16; ++l) total += plan.scratch[t].bias[d][at * 16 + l];
        w.d_bias[row] = total;
    }
}

}  // namespace

int64_t gru_reserve_floats(int64_t batch, int64_t steps, int64_t hidden, int64_t directions) {
    return directions * steps * 4 * hidden * round_up(batch, kGruLanes);
}

int64_t gru_forward_workspace_bytes(const GruLayer& layer, int64_t threads) {
    GruArena arena = {nullptr};
    Plan plan;
    take_forward(arena, layer, threads, plan);
    return static_cast<int64_t>(arena.used);
}

int gru_forward(const GruLayer& layer, float* y, float* h_n, void* workspace, int64_t threads) {
    if (!valid(layer, threads) || reinterpret_cast<std::uintptr_t>(layer.reserve) % 64) return kInvalid;
    GruArena arena = {static_cast<char*>(workspace)};
    Plan plan;
    take_forward(arena, layer, threads, plan);
    plan.run.y = y;
    plan.run.h_n = h_n;
    sort_batch(layer, plan.order, plan.length, plan.start);
    const GruTable& table = SK_TABLE(gru_table);
    const GruGeometry& g = plan.run.geometry;
    const int64_t weights = 2 * layer.directions, tasks = layer.directions * g.tiles;
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        const int64_t thread = omp_get_thread_num();
        clear_zeros(plan, thread);
#pragma omp for schedule(static, 1)
        for (int64_t i = 0; i < weights; ++i)
            gru_pack_strips(plan.run.direction[i / 2].forward[i % 2], layer.weights[i], false, g, i % 2);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; ++task)
            table.forward(plan.run, task % layer.directions, task / layer.directions, plan.scratch[thread]);
    }
    return kOk;
}

int64_t gru_backward_workspace_bytes(const GruLayer& layer, int64_t threads) {
    GruArena arena = {nullptr};
    Plan plan;
    take_backward(arena, layer, threads, plan);
    return static_cast<int64_t>(arena.used);
}

int gru_backward(const GruLayer& layer, const GruBackward& grad, void* workspace, int64_t threads) {
    if (!valid(layer, threads) || (!layer.reserve && layer.batch * layer.steps > 0)) return kInvalid;
    GruArena arena = {static_cast<char*>(workspace)};
    Plan plan;
    take_backward(arena, layer, threads, plan);
    plan.run.grad = &grad;
    sort_batch(layer, plan.order, plan.length, plan.start);
    assign(plan, threads);
    const GruGeometry& g = plan.run.geometry;
    const int64_t weights = 2 * layer.directions, dx_size = layer.batch * layer.steps * layer.in;
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        const int64_t thread = omp_get_thread_num();
#pragma omp for schedule(static, 1)
        for (int64_t i = 0; i < weights; ++i) {
            GruDirection& d = plan.run.direction[i / 2];
            gru_pack_strips(d.transposed[i % 2], layer.weights[i], true, g, i % 2);
            gru_pack_tiles(d.tiles[i % 2], layer.weights[i], g, i % 2);
        }
        // The accumulators were measured for the worst case; the packed tiles say how much of them is in use.
#pragma omp for schedule(static, 1)
        for (int64_t t = 0; t < threads; ++t) {
            clear_zeros(plan, t);
            clear_grads(plan, t);
        }
        // `threads` shares of work, whatever number of threads the runtime grants.
        for (int64_t t = thread; t < threads; t += omp_get_num_threads()) backward_share(plan, t);
#pragma omp barrier
#pragma omp for schedule(static, 1)
        for (int64_t i = 0; i < weights; ++i) collect(plan, i, threads);
        if (plan.run.dx_second && grad.dx) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < dx_size; ++i) grad.dx[i] += plan.run.dx_second[i];
        }
    }
    return kOk;
}

}  // namespace sk
