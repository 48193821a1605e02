// One tile of sequences in one direction, all its steps: forward, and backward with every gradient.
#include "cpu/gru.h"

#include "cpu/gru_math.h"
#include "cpu/gru_products.h"

namespace sk::SK_ISA {

// The sequences of one tile and how a step of theirs is addressed.
struct Tile {
    int64_t first, size;  // its sequences are order[first .. first + size)
    int64_t direction;
    const int32_t *order, *length;

    Tile(const GruRun& run, int64_t direction, int64_t tile) : first(tile * kGruLanes), direction(direction) {
        const int64_t left = run.layer->batch - first;
        size = left < kGruLanes ? left : kGruLanes;
        order = run.order + first;
        length = run.length + first;
    }

    int64_t steps() const { return length[0]; }
    int64_t time(int64_t lane, int64_t step) const { return direction ? length[lane] - 1 - step : step; }

    // Lanes still running at a step: the first so many, because lengths fall.
    int64_t active(int64_t step) const {
        int64_t n = size;
        while (n > 0 && length[n - 1] <= step) --n;
        return n;
    }
};

// Row pointers of a [batch, steps, ...] array at a step; lanes that are not active get `idle`.
template <class T>
static void rows_at(const Tile& tile, T* base, int64_t batch_stride, int64_t step_stride, int64_t step, int64_t active,
                    int64_t lanes, T* idle, T** row) {
    for (int64_t l = 0; l < active; ++l)
        row[l] = base + tile.order[l] * batch_stride + tile.time(l, step) * step_stride;
    for (int64_t l = active; l < lanes; ++l) row[l] = idle;
}

// The same of a [batch, hidden] array.
template <class T>
static void rows_of(const Tile& tile, T* base, int64_t stride, int64_t lanes, T* idle, T** row) {
    for (int64_t l = 0; l < tile.size; ++l) row[l] = base + tile.order[l] * stride;
    for (int64_t l = tile.size; l < lanes; ++l) row[l] = idle;
}

// Rows of a tile lie in as many streams as it has sequences, more than a hardware prefetcher follows: fetches rows
// [0, active) at `offset` floats into the second-level cache, long before they are used.
template <bool Write>
static void prefetch_rows(const float* const* row, int64_t active, int64_t offset, int64_t cols) {
    for (int64_t l = 0; l < active; ++l)
        for (int64_t j = 0; j < cols; j += 16) __builtin_prefetch(row[l] + offset + j, Write, 2);
}

// h <- GRU cell for one step; `saved` takes r, z, n and the recurrent part of n, [4, hidden, lanes]. Two passes,
// because one would chain the latencies of a sigmoid and a tanh, longer than the reorder buffer reaches; the first
// leaves z and the argument of tanh in the panel of gates.
template <bool Save>
static void gates_forward(const float* gates_x, int64_t wide, float* gates_h, float* h, int64_t hidden, int64_t lanes,
                          int64_t active, float* saved) {
    for (int64_t l = 0; l < lanes; l += VLEN) {
        const int64_t n = active - l;
        const vint running = first_lanes(n < 0 ? 0 : n < VLEN ? n : VLEN);
        const float *xr = gates_x + l, *xz = xr + hidden * wide, *xn = xz + hidden * wide;
        float *hr = gates_h + l, *hz = hr + hidden * lanes, *hn = hz + hidden * lanes;
        float* state = h + l;
        float *save_r = saved + l, *save_z = save_r + hidden * lanes, *save_n = save_z + hidden * lanes;
        float* save_recurrent = save_n + hidden * lanes;
        for (int64_t j = 0; j < hidden; ++j) {
            const vfloat recurrent = load(hn + j * lanes);
            const vfloat r = sigmoid(load(xr + j * wide) + load(hr + j * lanes));
            const vfloat z = sigmoid(load(xz + j * wide) + load(hz + j * lanes));
            store(hz + j * lanes, z);
            store(hn + j * lanes, fma(r, recurrent, load(xn + j * wide)));
            if (Save) {
                stream(save_r + j * lanes, r);
                stream(save_z + j * lanes, z);
                stream(save_recurrent + j * lanes, recurrent);
            }
        }
        for (int64_t j = 0; j < hidden; ++j) {
            const vfloat c = tanh(load(hn + j * lanes)), z = load(hz + j * lanes), before = load(state + j * lanes);
            store(state + j * lanes, select(running, fma(z, before - c, c), before));
            if (Save) stream(save_n + j * lanes, c);
        }
    }
}

// dh <- the part of dL/dh(step - 1) that passes by the gates; the gates' gradients go into one step of the panel.
static void gates_backward(const float* saved, const float* next, const float* dy, const float* h_prev, int64_t wide,
                           float* dh, const GruGeometry& g, int64_t hidden, int64_t active, float* dgates) {
    const int64_t lanes = kGruLanes, plane = hidden * lanes;
    for (int64_t l = 0; l < lanes; l += VLEN) {
        const int64_t n = active - l;
        const vint running = first_lanes(n < 0 ? 0 : n < VLEN ? n : VLEN);
        const vfloat one = broadcast(1.0f);
        for (int64_t j = 0; j < hidden; ++j) {
            const float* from = saved + j * lanes + l;
            for (int i = 0; i < 4; ++i) __builtin_prefetch(next + (i * hidden + j) * lanes + l, 0, 2);
            const vfloat r = load(from), z = load(from + plane), c = load(from + 2 * plane);
            const vfloat recurrent = load(from + 3 * plane);
            const vfloat before = load(dh + j * lanes + l);
            const vfloat d = before + load(dy + j * lanes + l);
            const vfloat dn = select(running, d * (one - z) * fma(-c, c, one), zero());
            const vfloat dz = select(running, d * (load(h_prev + j * wide + l) - c) * (z * (one - z)), zero());
            const vfloat dr = select(running, dn * recurrent * (r * (one - r)), zero());
            const vfloat dhn = select(running, dn * r, zero());
            store(dh + j * lanes + l, select(running, d * z, before));
            float* to = dgates + j * wide + l;
            store(to, dr);
            store(to + hidden * wide, dz);
            store(to + 2 * hidden * wide, dhn);
            store(to + (2 * hidden + g.n_shift) * wide, dn);
            if (g.ih_base) {
                store(to + g.ih_base * wide, dr);
                store(to + (hidden + g.ih_base) * wide, dz);
            }
        }
    }
}

static void clear(float* p, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = 0;
}

// Zeroes rows [row, rows) of a panel.
static void clear_rows(float* panel, int64_t row, int64_t rows, int64_t stride) {
    clear(panel + row * stride, (rows - row) * stride);
}

// Zeroes what lies past each sequence's end.
static void clear_past_end(const Tile& tile, float* base, int64_t batch_stride, int64_t step_stride, int64_t steps,
                           int64_t cols) {
    for (int64_t l = 0; l < tile.size; ++l)
        for (int64_t t = tile.length[l]; t < steps; ++t)
            clear(base + tile.order[l] * batch_stride + t * step_stride, cols);
}

static float* reserve_at(const GruRun& run, int64_t direction, int64_t tile, int64_t step) {
    const GruLayer& layer = *run.layer;
    const int64_t size = 4 * layer.hidden * kGruLanes;
    return layer.reserve + ((direction * run.geometry.tiles + tile) * layer.steps + step) * size;
}

static void forward(const GruRun& run, int64_t direction, int64_t tile_index, const GruScratch& s) {
    const GruLayer& layer = *run.layer;
    const GruGeometry& g = run.geometry;
    const GruDirection& weights = run.direction[direction];
    const Tile tile(run, direction, tile_index);
    const int64_t hidden = layer.hidden, width = layer.directions * hidden;
    float* y = run.y + direction * hidden;
    const float* from[kGruLanes];
    float* to[kGruLanes];

    clear_rows(s.x, layer.in, g.rows_x, g.wide);
    clear_rows(s.h, hidden, g.rows_h, kGruLanes);
    rows_of<const float>(tile, layer.h0 + direction * layer.batch * hidden, hidden, kGruLanes, s.zeros, from);
    load_panel(from, kGruLanes, hidden, s.h, kGruLanes);

    for (int64_t first = 0; first < tile.steps(); first += g.chunk) {
        const int64_t end = first + g.chunk < tile.steps() ? first + g.chunk : tile.steps();
        for (int64_t step = first; step < end; ++step) {
            rows_at<const float>(tile, layer.x, layer.x_batch_stride, layer.x_step_stride, step, tile.active(step),
                                 kGruLanes, s.zeros, from);
            load_panel(from, kGruLanes, layer.in, s.x + (step - first) * kGruLanes, g.wide);
        }
        apply_strips<false>(weights.forward[0], s.x, s.gates_x, g.wide, (end - first) * kGruLanes / VLEN);
        for (int64_t step = first; step < end; ++step) {
            const int64_t active = tile.active(step);
            const float* gates_x = s.gates_x + (step - first) * kGruLanes;
            rows_at<float>(tile, y, layer.steps * width, width, step, active, kGruLanes, nullptr, to);
            prefetch_rows<true>(to, active, 0, hidden);
            if (step + g.chunk < tile.steps()) {
                const int64_t next = tile.active(step + g.chunk);
                rows_at<const float>(tile, layer.x, layer.x_batch_stride, layer.x_step_stride, step + g.chunk, next,
                                     kGruLanes, s.zeros, from);
                prefetch_rows<false>(from, next, 0, layer.in);
            }
            apply_strips<false>(weights.forward[1], s.h, s.gates_h, kGruLanes, kGruLanes / VLEN);
            if (layer.reserve)
                gates_forward<true>(gates_x, g.wide, s.gates_h, s.h, hidden, kGruLanes, active,
                                    reserve_at(run, direction, tile_index, step));
            else
                gates_forward<false>(gates_x, g.wide, s.gates_h, s.h, hidden, kGruLanes, active, s.gates_h);
            store_panel<false>(s.h, kGruLanes, hidden, to, active);
        }
    }
    clear_past_end(tile, y, layer.steps * width, width, layer.steps, hidden);
    rows_of<float>(tile, run.h_n + direction * layer.batch * hidden, hidden, kGruLanes, nullptr, to);
    store_panel<false>(s.h, kGruLanes, hidden, to, tile.size);
    stream_fence();
}

// Adds the sums over each vector's lanes of the panel rows to partial sums [rows, VLEN].
static void add_bias(const float* panel, int64_t rows, int64_t wide, int64_t lanes, float* sums) {
    for (int64_t j = 0; j < rows; ++j) {
        vfloat sum = load(sums + j * 16);
        for (int64_t l = 0; l < lanes; l += VLEN) sum += load(panel + j * wide + l);
        store(sums + j * 16, sum);
    }
}

static void add_gradient(const GruTiles& tiles, const float* dgates, const GruGeometry& g, const float* panel,
                         const float* rows, int64_t row_stride, int64_t lanes, float* grads) {
    if (tiles.kind == GruGradKind::kOuter)
        outer_tiles(tiles, dgates, g.wide, rows, row_stride, lanes, grads);
    else
        quad_tiles(tiles, dgates, g.wide, panel, lanes, grads);
}

// Rows of the dgates panel at one step -> [directions, batch, steps, 3 hidden].
static void store_dgates(const GruRun& run, const Tile& tile, const float* dgates, int64_t step, int64_t active) {
    const GruLayer& layer = *run.layer;
    const GruGeometry& g = run.geometry;
    const int64_t gates = 3 * layer.hidden, stride = layer.steps * gates;
    float* to[kGruLanes];
    const int64_t offset = tile.direction * layer.batch * stride;
    rows_at<float>(tile, run.grad->dgates_hh + offset, stride, gates, step, active, kGruLanes, nullptr, to);
    store_panel<false>(dgates, g.wide, gates, to, active);
    rows_at<float>(tile, run.grad->dgates_ih + offset, stride, gates, step, active, kGruLanes, nullptr, to);
    store_panel<false>(dgates + g.ih_base * g.wide, g.wide, 2 * layer.hidden, to, active);
    for (int64_t l = 0; l < active; ++l) to[l] += 2 * layer.hidden;
    store_panel<false>(dgates + (2 * layer.hidden + g.n_shift) * g.wide, g.wide, layer.hidden, to, active);
}

static void backward(const GruRun& run, int64_t direction, int64_t tile_index, const GruScratch& s) {
    const GruLayer& layer = *run.layer;
    const GruBackward& grad = *run.grad;
    const GruGeometry& g = run.geometry;
    const GruDirection& weights = run.direction[direction];
    const Tile tile(run, direction, tile_index);
    const int64_t hidden = layer.hidden, width = layer.directions * hidden, batch = layer.batch;
    const float *y = grad.y + direction * hidden, *dy = grad.dy + direction * hidden;
    const float* h0 = layer.h0 + direction * batch * hidden;
    const bool rows_x = weights.tiles[0].kind == GruGradKind::kOuter;
    const bool rows_h = weights.tiles[1].kind == GruGradKind::kOuter;
    float* dx = grad.dx && direction && run.dx_second ? run.dx_second : grad.dx;
    const bool add_dx = direction && !run.dx_second;
    const float* from[kGruLanes];
    float* to[kGruLanes];

    clear_rows(s.x, layer.in, g.rows_x, g.wide);
    clear_rows(s.h_prev, hidden, g.rows_h, g.wide);
    clear_rows(s.dh, hidden, g.rows_h, kGruLanes);
    clear(s.dgates, g.rows_dg * g.wide);
    rows_of<const float>(tile, grad.dh_n + direction * batch * hidden, hidden, kGruLanes, s.zeros, from);
    load_panel(from, kGruLanes, hidden, s.dh, kGruLanes);

    for (int64_t first = (tile.steps() - 1) / g.chunk * g.chunk; first >= 0 && tile.steps() > 0; first -= g.chunk) {
        const int64_t end = first + g.chunk < tile.steps() ? first + g.chunk : tile.steps();
        const int64_t lanes = (end - first) * kGruLanes;
        for (int64_t step = end - 1; step >= first; --step) {
            const int64_t active = tile.active(step), at = (step - first) * kGruLanes;
            rows_at(tile, dy, grad.dy_batch_stride, grad.dy_step_stride, step, active, kGruLanes,
                    static_cast<const float*>(s.zeros), from);
            load_panel(from, kGruLanes, hidden, s.dy, kGruLanes);
            if (step > 0)
                prefetch_rows<false>(from, active, direction ? grad.dy_step_stride : -grad.dy_step_stride, hidden);
            if (step)
                rows_at(tile, y, layer.steps * width, width, step - 1, active, kGruLanes,
                        static_cast<const float*>(s.zeros), from);
            else
                for (int64_t l = 0; l < kGruLanes; ++l) from[l] = l < active ? h0 + tile.order[l] * hidden : s.zeros;
            load_panel(from, kGruLanes, hidden, s.h_prev + at, g.wide);
            if (rows_h) copy_rows(from, kGruLanes, hidden, s.h_rows + at * g.rows_h, g.rows_h);
            if (step > 1) prefetch_rows<false>(from, active, direction ? width : -width, hidden);
            rows_at<const float>(tile, layer.x, layer.x_batch_stride, layer.x_step_stride, step, active, kGruLanes,
                                 s.zeros, from);
            prefetch_rows<false>(from, active, 0, layer.in);
            if (dx) {
                rows_at<float>(tile, dx, layer.steps * layer.in, layer.in, step, active, kGruLanes, nullptr, to);
                prefetch_rows<true>(to, active, 0, layer.in);
            }
            gates_backward(reserve_at(run, direction, tile_index, step),
                           reserve_at(run, direction, tile_index, step ? step - 1 : 0), s.dy, s.h_prev + at, g.wide,
                           s.dh, g, hidden, active, s.dgates + at);
            apply_strips<true>(weights.transposed[1], s.dgates + at, s.dh, kGruLanes, kGruLanes / VLEN);
            if (grad.dgates_ih) store_dgates(run, tile, s.dgates + at, step, active);
        }
        if (dx) apply_strips<false>(weights.transposed[0], s.dgates, s.dx, g.wide, lanes / VLEN);
        for (int64_t step = first; step < end; ++step) {
            const int64_t active = tile.active(step), at = (step - first) * kGruLanes;
            if (dx) {
                rows_at<float>(tile, dx, layer.steps * layer.in, layer.in, step, active, kGruLanes, nullptr, to);
                if (add_dx)
                    store_panel<true>(s.dx + at, g.wide, layer.in, to, active);
                else
                    store_panel<false>(s.dx + at, g.wide, layer.in, to, active);
            }
            rows_at<const float>(tile, layer.x, layer.x_batch_stride, layer.x_step_stride, step, active, kGruLanes,
                                 s.zeros, from);
            if (rows_x)
                copy_rows(from, kGruLanes, layer.in, s.x_rows + at * g.rows_x, g.rows_x);
            else
                load_panel(from, kGruLanes, layer.in, s.x + at, g.wide);
        }
        add_gradient(weights.tiles[0], s.dgates, g, s.x, s.x_rows, g.rows_x, lanes, s.grads[direction][0]);
        add_gradient(weights.tiles[1], s.dgates, g, s.h_prev, s.h_rows, g.rows_h, lanes, s.grads[direction][1]);
        if (layer.weights[0].d_bias) add_bias(s.dgates, g.rows_dg, g.wide, lanes, s.bias[direction]);
    }
    if (dx && !add_dx) clear_past_end(tile, dx, layer.steps * layer.in, layer.in, layer.steps, layer.in);
    rows_of<float>(tile, grad.dh0 + direction * batch * hidden, hidden, kGruLanes, nullptr, to);
    store_panel<false>(s.dh, kGruLanes, hidden, to, tile.size);
}

extern const GruTable gru_table;
const GruTable gru_table = {forward, backward};

}  // namespace sk::SK_ISA
