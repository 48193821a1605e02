// Packs the weights of a GRU layer for its kernels, once per call and O(nnz): every pattern becomes strips of 16, 8 or
// 4 rows, or bundles of single rows, so that the kernels know four shapes and no index format.
#include <cstring>

#include "cpu/gru.h"

namespace sk {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

bool is_dense(const GruWeight& w) { return w.index.bh == 0; }

// The weight as its strips see it: `out` output rows cut into blocks of `bh` rows and `bw` columns of `in` inputs.
struct View {
    int64_t out, in, bh, bw;
    const int32_t *ptr, *col, *slot;
};

View view(const GruWeight& w, bool transposed) {
    const BlockIndex& i = w.index;
    if (transposed) return {i.in, i.out, i.bw, i.bh, i.ccol, i.row_t, i.slot_t};
    return {i.out, i.in, i.bh, i.bw, i.crow, i.col, i.slot};
}

// Calls f(column block, values of the block) for every active block of row block r.
template <class F>
void for_blocks(const View& v, const GruWeight& w, int64_t r, F f) {
    for (int32_t k = v.ptr[r]; k < v.ptr[r + 1]; ++k) f(v.col[k], w.values + v.slot[k] * v.bh * v.bw);
}

// First float of each input row: the panel's stride, and where W_ih finds its gate rows among the dgates.
struct Source {
    int64_t stride, split, low, high, zero;

    int32_t operator()(int64_t row) const { return static_cast<int32_t>((row + (row < split ? low : high)) * stride); }
    int32_t zero_row() const { return static_cast<int32_t>(zero * stride); }
};

Source gates_source(const GruWeight& w, const GruGeometry& g, bool recurrent) {
    const int64_t hidden = w.index.out / 3;
    if (recurrent) return {g.wide, 0, 0, 0, g.ih_base ? 3 * hidden : 4 * hidden};
    return {g.wide, 2 * hidden, g.ih_base, g.n_shift, 3 * hidden + g.n_shift};
}

Source state_source(const GruWeight& w, int64_t stride) { return {stride, 0, 0, 0, w.index.in}; }

// Rows by falling number of entries, stable, so that the four rows of a bundle end together.
void sort_rows(int32_t* rows, int32_t* start, const View& v) {
    const int64_t most = v.in;
    std::memset(start, 0, sizeof(int32_t) * static_cast<size_t>(most + 2));
    auto bucket = [&](int64_t row) { return most - least(most, (v.ptr[row + 1] - v.ptr[row]) * v.bw); };
    for (int64_t row = 0; row < v.out; ++row) ++start[bucket(row) + 1];
    for (int64_t b = 0; b <= most; ++b) start[b + 1] += start[b];
    for (int64_t row = 0; row < v.out; ++row) rows[start[bucket(row)]++] = static_cast<int32_t>(row);
}

void pack_bundles(GruStrips& s, const GruWeight& w, const View& v, const Source& source) {
    sort_rows(s.rows, s.scratch, v);
    for (int64_t i = v.out; i < 4 * s.count; ++i) s.rows[i] = static_cast<int32_t>(v.out);
    int32_t entry = 0;
    for (int64_t b = 0; b < s.count; ++b) {
        s.ptr[b] = entry;
        int64_t longest = 0;
        for (int i = 0; i < 4; ++i) {
            const int64_t row = s.rows[4 * b + i];
            int64_t n = 0;
            if (row < v.out)
                for_blocks(v, w, row, [&](int64_t c, const float* values) {
                    for (int64_t j = 0; j < v.bw && c * v.bw + j < v.in; ++j, ++n) {
                        s.src[4 * (entry + n) + i] = source(c * v.bw + j);
                        s.weight[4 * (entry + n) + i] = values[j];
                    }
                });
            // Rows come by falling count up to the padding of an edge block, which a later row may not have.
            for (; longest < n; ++longest)
                for (int before = 0; before < i; ++before) {
                    s.src[4 * (entry + longest) + before] = source.zero_row();
                    s.weight[4 * (entry + longest) + before] = 0;
                }
            for (; n < longest; ++n) {
                s.src[4 * (entry + n) + i] = source.zero_row();
                s.weight[4 * (entry + n) + i] = 0;
            }
        }
        entry += static_cast<int32_t>(longest);
    }
    s.ptr[s.count] = entry;
}

void pack_dense(GruStrips& s, const GruWeight& w, bool transposed, const Source& source) {
    const int64_t out = transposed ? w.index.in : w.index.out, in = transposed ? w.index.out : w.index.in;
    const int64_t row_step = transposed ? 1 : w.index.in, col_step = transposed ? w.index.in : 1;
    for (int64_t b = 0; b < s.count; ++b) {
        s.ptr[b] = static_cast<int32_t>(b * in);
        const int64_t real = least(s.side, out - b * s.side);
        for (int64_t j = 0; j < in; ++j) {
            s.src[b * in + j] = source(j);
            float* to = s.weight + (b * in + j) * s.side;
            const float* from = w.values + b * s.side * row_step + j * col_step;
            for (int64_t i = 0; i < real; ++i) to[i] = from[i * row_step];
            for (int64_t i = real; i < s.side; ++i) to[i] = 0;
        }
    }
    s.ptr[s.count] = static_cast<int32_t>(s.count * in);
}

void pack_blocks(GruStrips& s, const GruWeight& w, const View& v, bool transposed, const Source& source) {
    const int64_t row_step = transposed ? 1 : v.bw, col_step = transposed ? v.bh : 1;
    int32_t entry = 0;
    for (int64_t b = 0; b < s.count; ++b) {
        s.ptr[b] = entry;
        const int64_t first = b * s.side % v.bh;
        for_blocks(v, w, b * s.side / v.bh, [&](int64_t c, const float* values) {
            for (int64_t j = 0; j < v.bw && c * v.bw + j < v.in; ++j, ++entry) {
                s.src[entry] = source(c * v.bw + j);
                float* to = s.weight + entry * s.side;
                for (int64_t i = 0; i < s.side; ++i) to[i] = values[(first + i) * row_step + j * col_step];
            }
        });
    }
    s.ptr[s.count] = entry;
}

// Walks a weight in the one order in which its gradient is accumulated: strip(row) for every strip of rows, and in it
// column(row, first column, where the gradient goes, row stride there) for every tile (kOuter) or column (quads).
template <class Strip, class Column>
void walk(const GruTiles& t, const GruWeight& w, Strip strip, Column column) {
    const int64_t width = t.kind == GruGradKind::kOuter ? 16 : 1;
    const View v = view(w, false);
    for (int64_t row = 0; row < v.out; row += t.side) {
        strip(row);
        if (is_dense(w)) {
            for (int64_t c = 0; c < v.in; c += width) column(row, c, w.d_values + row * v.in + c, v.in);
            continue;
        }
        const int64_t r = row / v.bh, first = row % v.bh;
        for (int32_t k = v.ptr[r]; k < v.ptr[r + 1]; ++k)
            for (int64_t j = 0; j < v.bw && v.col[k] * v.bw + j < v.in; j += width)
                column(row, v.col[k] * v.bw + j, w.d_values + (v.slot[k] * v.bh + first) * v.bw + j, v.bw);
    }
}

}  // namespace

GruStrips gru_take_strips(GruArena& arena, const GruWeight& w, bool transposed) {
    const View v = view(w, transposed);
    GruStrips s = {};
    s.side = is_dense(w) ? 16 : least(v.bh, 16);
    const bool bundles = s.side == 1;
    s.count = ceil_div(v.out, bundles ? 4 : s.side);
    const int64_t elements = is_dense(w) ? s.count * s.side * v.in : w.index.nnzb * v.bh * v.bw;
    // A bundle is as long as its longest row, and no longer than any row of the bundle before.
    const int64_t entries = bundles ? elements / 4 + v.in + v.bw : elements / s.side;
    s.ptr = arena.take<int32_t>(s.count + 1);
    s.src = arena.take<int32_t>(entries * (bundles ? 4 : 1));
    s.weight = arena.take<float>(entries * (bundles ? 4 : s.side));
    if (bundles) s.rows = arena.take<int32_t>(4 * s.count);
    if (bundles) s.scratch = arena.take<int32_t>(v.in + 2);
    s.bias = arena.take<float>(v.out + 16);
    return s;
}

void gru_pack_strips(GruStrips& s, const GruWeight& w, bool transposed, const GruGeometry& g, bool recurrent) {
    const View v = view(w, transposed);
    const Source source = transposed ? gates_source(w, g, recurrent) : state_source(w, recurrent ? kGruLanes : g.wide);
    if (is_dense(w))
        pack_dense(s, w, transposed, source);
    else if (s.side == 1)
        pack_bundles(s, w, v, source);
    else
        pack_blocks(s, w, v, transposed, source);
    const bool biased = w.bias && !transposed;
    for (int64_t i = 0; i < v.out + 16; ++i) s.bias[i] = biased && i < v.out ? w.bias[i] : 0;
}

GruTiles gru_take_tiles(GruArena& arena, const GruWeight& w) {
    const BlockIndex& i = w.index;
    GruTiles t = {};
    if (is_dense(w) || i.bw >= 16) {
        t.kind = GruGradKind::kOuter;
        t.side = is_dense(w) ? 16 : least(i.bh, 16);
        t.count = ceil_div(i.out, t.side);
        const int64_t tiles = is_dense(w) ? t.count * ceil_div(i.in, 16) : i.nnzb * (i.bh / t.side) * (i.bw / 16);
        t.ptr = arena.take<int32_t>(t.count + 1);
        t.row = arena.take<int32_t>(t.count);
        t.col = arena.take<int32_t>(tiles);
        t.floats = tiles * t.side * 16;
        return t;
    }
    t.kind = i.bh >= 4 ? GruGradKind::kQuad4 : GruGradKind::kQuad1;
    t.side = i.bh >= 4 ? 4 : 1;
    // Every strip of rows may end in a quad that is not full, and the quads are made up to a multiple of 4.
    const int64_t quads = i.nnzb * i.bh * i.bw / t.side / 4 + ceil_div(i.out, t.side) + 4;
    t.row = arena.take<int32_t>(quads);
    t.col = arena.take<int32_t>(4 * quads);
    t.floats = quads * 4 * t.side;
    return t;
}

void gru_pack_tiles(GruTiles& t, const GruWeight& w, const GruGeometry& g, bool recurrent) {
    const Source rows = gates_source(w, g, recurrent), columns = state_source(w, g.wide);
    if (t.kind == GruGradKind::kOuter) {
        int64_t strip = -1;
        int32_t tile = 0;
        walk(
            t, w,
            [&](int64_t row) {
                t.ptr[++strip] = tile;
                t.row[strip] = rows(row);
            },
            [&](int64_t, int64_t c, float*, int64_t) { t.col[tile++] = static_cast<int32_t>(c); });
        t.ptr[t.count] = tile;
        t.floats = static_cast<int64_t>(tile) * t.side * 16;
        return;
    }
    int64_t quad = 0;
    int used = 0;
    auto close = [&] {
        if (!used) return;
        for (; used < 4; ++used) t.col[4 * quad + used] = columns.zero_row();
        ++quad;
        used = 0;
    };
    walk(
        t, w, [&](int64_t) { close(); },
        [&](int64_t row, int64_t c, float*, int64_t) {
            t.row[quad] = rows(row);
            t.col[4 * quad + used++] = columns(c);
            if (used == 4) close();
        });
    close();
    for (; t.side == 1 && quad % 4; ++quad) {
        t.row[quad] = rows.zero_row();
        for (int i = 0; i < 4; ++i) t.col[4 * quad + i] = columns.zero_row();
    }
    t.count = quad;
    t.floats = quad * 4 * t.side;
}

void gru_unpack_tiles(const GruTiles& t, const GruWeight& w, const float* const* parts, int64_t threads) {
    const BlockIndex& i = w.index;
    const int64_t size = is_dense(w) ? i.out * i.in : i.nnzb * i.bh * i.bw;
    if (size > 0) std::memset(w.d_values, 0, sizeof(float) * static_cast<size_t>(size));  // an empty weight may be null
    auto sum = [&](int64_t at) {
        float total = parts[0][at];
        for (int64_t p = 1; p < threads; ++p) total += parts[p][at];
        return total;
    };
    int64_t tile = 0;
    if (t.kind == GruGradKind::kOuter) {
        walk(
            t, w, [](int64_t) {},
            [&](int64_t row, int64_t c, float* to, int64_t stride) {
                for (int64_t a = 0; a < t.side && row + a < i.out; ++a)
                    for (int64_t b = 0; b < 16 && c + b < i.in; ++b)
                        to[a * stride + b] = sum((tile * t.side + a) * 16 + b);
                ++tile;
            });
        return;
    }
    int used = 0;
    walk(
        t, w,
        [&](int64_t) {
            tile += used > 0;
            used = 0;
        },
        [&](int64_t row, int64_t, float* to, int64_t stride) {
            for (int64_t a = 0; a < t.side && row + a < i.out; ++a)
                to[a * stride] = sum((4 * tile + used) * t.side + a);
            if (++used == 4) {
                used = 0;
                ++tile;
            }
        });
}

}  // namespace sk
