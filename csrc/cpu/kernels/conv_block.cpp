// The block-CSR convolutions: plans, threads and workspaces around the tiles of conv_block_spmm.h and block_sddmm.h.
//
// Compiled with __AVX512BF16__, too: images are then bf16 with their channels side by side, only blocks whose sides are
// multiples of VLEN are served, and the weight gradient is left to the fp32 kernels.
#include "cpu/conv_block.h"

#include "cpu/block_sddmm.h"
#include "cpu/conv_block_spmm.h"
#include "cpu/conv_gather.h"
#include "cpu/parallel.h"

namespace sk::SK_ISA {

// Packed weights that stay in the second-level cache while the positions pass.
constexpr int64_t kWeightBytes = 256 << 10;

// Regions of a workspace, one after the other; the base may be null to measure.
struct Arena {
    char* base;
    int64_t used;

    template <class T>
    T* take(int64_t count) {
        T* at = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += whole_lines(count * static_cast<int64_t>(sizeof(T)));
        return at;
    }
};

struct ProductSpace {
    float *weights, *packed, *thread;
    int64_t *x_at, *y_at;
    int64_t packed_floats, place_floats, thread_floats;  // of one thread
};

// Floats of the packed weights at the start of a thread's scratch.
static int64_t packed_chunk(const ConvProduct& a) { return a.pack && !a.early ? a.chunk * a.nb * a.kb : 0; }

// The plan of a product and its workspace; false where it has no positions.
static bool plan_product(const BlockIndex& w, const ConvShape& c, bool transposed, int64_t phase_h, int64_t phase_w,
                         int64_t threads, Arena& arena, ConvProduct& a, ProductSpace& space) {
    a.gather = gather_of(c, phase_h, phase_w);
    if (!a.gather.h.grid || !a.gather.w.grid || !c.batch) return false;
    a.taps = c.kernel_h * c.kernel_w;
    a.n = transposed ? w.in : w.out, a.k = transposed ? w.out : w.in;
    const int64_t kb = transposed ? w.bh : w.bw;
    a.nb = transposed ? w.bw : w.bh, a.kb = units(kb);
    a.n_blocks = ceil_div(a.n, a.nb), a.k_blocks = ceil_div(a.k, kb);
    a.direct = kUnit > 1 || (a.nb >= VLEN && kb >= 8);
    a.outer = a.nb == 1;
    a.pack = a.direct && (kUnit > 1 || !transposed || a.nb == VLEN);
    a.panel_width = (a.outer ? kOuterVectors : a.nb >= kWideOutputs ? 3 : 6) * VLEN;
    a.chunk = kUnit > 1 ? a.taps * a.k_blocks : larger(1, kWeightBytes / (4 * a.nb * a.kb));
    a.stride_n = transposed ? 1 : w.bw, a.stride_k = transposed ? w.bw : 1;
    a.slices = plan_slices(a.gather, a.k, a.direct ? a.kb : larger(a.kb, 32), threads);
    a.early = a.pack && !a.slices.shared;
    a.ptr = arena.take<int32_t>(a.n_blocks + 1);
    a.idx = arena.take<int32_t>(w.nnzb), a.slot = arena.take<int32_t>(w.nnzb);
    const int64_t outer = a.outer ? 1 : 0;
    a.ptr_k = arena.take<int32_t>(outer * (a.taps * a.k_blocks + 1));
    a.idx_k = arena.take<int32_t>(outer * w.nnzb), a.slot_k = arena.take<int32_t>(outer * w.nnzb);
    a.distance = arena.take<int64_t>(a.taps * a.k_blocks);
    space.weights = arena.take<float>(a.early ? w.nnzb * w.bh * w.bw / kUnit : 0);
    const int64_t positions = a.slices.images * a.slices.rows * a.gather.w.grid;
    const int64_t copies = a.slices.shared ? 1 : threads;
    space.packed_floats = a.slices.bytes / 4, space.place_floats = (positions + 15) / 16 * 16;
    space.packed = arena.take<float>(copies * space.packed_floats);
    space.x_at = arena.take<int64_t>(copies * space.place_floats);
    space.y_at = arena.take<int64_t>(copies * space.place_floats);
    // Either packed weights and y in planes, or a panel, its outputs and y.
    space.thread_floats = a.direct
                              ? packed_chunk(a) + (kUnit > 1 ? 0 : positions * a.nb)
                              : (a.taps * a.k_blocks * a.kb + (a.outer ? a.n : kPanelOutputs) + a.n) * a.panel_width;
    space.thread_floats = (space.thread_floats + 15) / 16 * 16;
    space.thread = arena.take<float>(threads * space.thread_floats);
    return true;
}

// The lists of the gathered blocks, in counting order; cursor: ptr itself, shifted by one while it is filled.
static void list_blocks(const BlockIndex& w, bool transposed, const ConvProduct& a) {
    const int64_t columns = ceil_div(w.in, w.bw), row_blocks = ceil_div(w.out, w.bh);
    const auto append = [](int32_t* ptr, int32_t* idx, int32_t* slot, int64_t row, int64_t what, int32_t where) {
        const int32_t at = ptr[row + 1]++;
        idx[at] = static_cast<int32_t>(what), slot[at] = where;
    };
    // ptr[r + 1] is the place of the next block of row r: where row r starts, and in the end where r + 1 does.
    a.ptr[0] = 0;
    if (!transposed) {
        for (int64_t r = 0; r < row_blocks; ++r) a.ptr[r + 1] = w.crow[r];
        for (int64_t c = 0; c < columns; ++c)
            for (int64_t tap = 0; tap < a.taps; ++tap)
                for (int64_t e = w.ccol[tap * columns + c]; e < w.ccol[tap * columns + c + 1]; ++e)
                    append(a.ptr, a.idx, a.slot, w.row_t[e], tap * columns + c, w.slot_t[e]);
        if (!a.outer) return;
        for (int64_t c = 0; c <= a.taps * columns; ++c) a.ptr_k[c] = w.ccol[c];
        for (int64_t e = 0; e < w.nnzb; ++e) a.idx_k[e] = w.row_t[e], a.slot_k[e] = w.slot_t[e];
        return;
    }
    // Rows are column blocks of W, over all taps of the phase; a gathered block is a tap and a row block of W.
    for (int64_t c = 0; c < columns; ++c) {
        int32_t count = 0;
        for (int64_t tap = 0; tap < a.taps && c + 1 < columns; ++tap)
            if (has_tap(a.gather, tap)) count += w.ccol[tap * columns + c + 1] - w.ccol[tap * columns + c];
        if (!c) a.ptr[1] = 0;
        if (c + 1 < columns) a.ptr[c + 2] = a.ptr[c + 1] + count;
    }
    for (int64_t r = 0; r < row_blocks; ++r)
        for (int64_t e = w.crow[r]; e < w.crow[r + 1]; ++e) {
            const int64_t tap = w.col[e] / columns, c = w.col[e] % columns;
            if (has_tap(a.gather, tap)) append(a.ptr, a.idx, a.slot, c, tap * row_blocks + r, w.slot[e]);
        }
    if (!a.outer) return;
    int32_t count = 0;
    a.ptr_k[0] = 0;
    for (int64_t tap = 0; tap < a.taps; ++tap)
        for (int64_t r = 0; r < row_blocks; ++r) {
            for (int64_t e = w.crow[r]; e < w.crow[r + 1] && has_tap(a.gather, tap); ++e)
                if (w.col[e] / columns == tap) {
                    a.idx_k[count] = static_cast<int32_t>(w.col[e] % columns);
                    a.slot_k[count++] = w.slot[e];
                }
            a.ptr_k[tap * row_blocks + r + 1] = count;
        }
}

// The share of one of `threads` threads in a direct product over a shared slice: row blocks weigh as many blocks as
// they have, and where a share begins or ends inside one, its positions are divided.
static void direct_share(const ConvProduct& a, const Slice& s, const ProductSpace& space, int64_t positions,
                         int64_t thread, int64_t threads, float* scratch, float* planes) {
    const int64_t tiles = ceil_div(positions, kRows), total = (a.ptr[a.n_blocks] + a.n_blocks) * tiles;
    const int64_t from = total * thread / threads, to = total * (thread + 1) / threads;
    for (int64_t r = 0; r < a.n_blocks; ++r) {
        const int64_t weight = a.ptr[r + 1] - a.ptr[r] + 1, start = (a.ptr[r] + r) * tiles;
        const int64_t first = smaller(tiles, ceil_div(larger(0, from - start), weight));
        const int64_t stop = smaller(tiles, ceil_div(larger(0, to - start), weight));
        if (first < stop)
            direct_product(a, s, space.packed, space.x_at, space.y_at, r, first * kRows,
                           smaller(positions, stop * kRows), scratch, planes);
    }
}

// The lists, distances and output layout that a planned product reads.
static void prepare_product(const BlockIndex& w, bool transposed, ConvProduct& a, const ProductSpace& space) {
    const SlicePlan& p = a.slices;
    list_blocks(w, transposed, a);
    for (int64_t tap = 0; tap < a.taps; ++tap)
        for (int64_t j = 0; j < a.k_blocks && has_tap(a.gather, tap); ++j)
            a.distance[tap * a.k_blocks + j] = j * p.strip + tap_distance(a.gather, p, tap);
    a.weights = space.weights;
    const ImageStrides& d = a.dst_strides;
    a.dense = d.c == 1 && d.h == a.gather.w.grid * d.w && d.n == a.gather.h.grid * d.h;
}

// Every row of source images of a slice.
static void pack_slice(const Gather& g, const SlicePlan& p, const Slice& s, const element* src, const ImageStrides& at,
                       int64_t channels, float* packed) {
    const int64_t rows = source_rows(g.h, s.rows);
    for (int64_t n = 0; n < s.images; ++n)
        for (int64_t row = 0; row < rows; ++row) pack_row(g, p, s, n, row, src, at, channels, packed);
}

// All packed weights; called by every thread of a team.
static void pack_early(const ConvProduct& a, float* packed) {
    const int64_t block = a.nb * a.kb, blocks = a.ptr[a.n_blocks];
#pragma omp for schedule(static)
    for (int64_t e = 0; e < blocks; ++e)
        pack_weights(a.values + a.slot[e] * block * kUnit, a.stride_n, a.stride_k, a.nb, a.kb * kUnit,
                     packed + e * block);
}

static void run_product(const BlockIndex& w, bool transposed, ConvProduct& a, const ProductSpace& space,
                        int64_t threads) {
    const SlicePlan& p = a.slices;
    const int64_t columns = a.gather.w.grid;
    prepare_product(w, transposed, a, space);
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        const int64_t me = omp_get_thread_num();
        float* scratch = space.thread + me * space.thread_floats;
        float* planes = scratch + packed_chunk(a);
        if (a.early) pack_early(a, space.weights);
        if (p.shared) {
            const Slice s = slice_at(a.gather, p, 0);
            const int64_t positions = s.images * s.rows * columns;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < s.images * p.source_rows; ++i)
                pack_row(a.gather, p, s, i / p.source_rows, i % p.source_rows, a.src, a.src_strides, a.k, space.packed);
#pragma omp for schedule(static)
            for (int64_t row = 0; row < s.images * s.rows; ++row)
                place_rows(a, s, row, row + 1, space.x_at, space.y_at);
            if (a.direct) {
                direct_share(a, s, space, positions, me, omp_get_num_threads(), scratch, planes);
            }
#if !defined(__AVX512BF16__)
            else {
#pragma omp for schedule(static)
                for (int64_t q = 0; q < ceil_div(positions, a.panel_width); ++q)
                    panel_positions(a, s, space.packed, space.x_at, space.y_at, q * a.panel_width,
                                    smaller(positions, (q + 1) * a.panel_width), scratch);
            }
#endif
        } else {
            float* packed = space.packed + me * space.packed_floats;
            int64_t *x_at = space.x_at + me * space.place_floats, *y_at = space.y_at + me * space.place_floats;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < p.image_parts * p.row_parts; ++i) {
                const Slice s = slice_at(a.gather, p, i);
                const int64_t positions = s.images * s.rows * columns;
                pack_slice(a.gather, p, s, a.src, a.src_strides, a.k, packed);
                place_rows(a, s, 0, s.images * s.rows, x_at, y_at);
                if (a.direct) {
                    for (int64_t r = 0; r < a.n_blocks; ++r)
                        direct_product(a, s, packed, x_at, y_at, r, 0, positions, scratch, planes);
                }
#if !defined(__AVX512BF16__)
                else {
                    for (int64_t q = 0; q < positions; q += a.panel_width)
                        panel_positions(a, s, packed, x_at, y_at, q, smaller(positions, q + a.panel_width), scratch);
                }
#endif
            }
        }
    }
}

static int64_t spmm_workspace(const BlockIndex& w, const ConvShape& c, bool transposed, int64_t threads) {
    int64_t bytes = 0;
    const int64_t phases_h = transposed ? c.stride_h : 1, phases_w = transposed ? c.stride_w : 1;
    for (int64_t phase = 0; phase < phases_h * phases_w; ++phase) {
        Arena arena = {nullptr, 0};
        ConvProduct a;
        ProductSpace space;
        plan_product(w, c, transposed, transposed ? phase / phases_w : -1, transposed ? phase % phases_w : -1, threads,
                     arena, a, space);
        bytes = larger(bytes, arena.used);
    }
    return bytes;
}

static void spmm(const BlockIndex& w, const ConvShape& c, bool transposed, const float* values, const element* x,
                 const ImageStrides& x_strides, const float* bias, element* y, const ImageStrides& y_strides,
                 int64_t threads, void* workspace) {
    const int64_t phases_h = transposed ? c.stride_h : 1, phases_w = transposed ? c.stride_w : 1;
    for (int64_t phase = 0; phase < phases_h * phases_w; ++phase) {
        const int64_t phase_h = phase / phases_w, phase_w = phase % phases_w;
        Arena arena = {static_cast<char*>(workspace), 0};
        ConvProduct a;
        ProductSpace space;
        if (!plan_product(w, c, transposed, transposed ? phase_h : -1, transposed ? phase_w : -1, threads, arena, a,
                          space))
            continue;
        a.values = values, a.src = x, a.src_strides = x_strides, a.bias = bias;
        a.dst = y + phase_h * y_strides.h + phase_w * y_strides.w, a.dst_strides = y_strides;
        a.dst_strides.h *= phases_h, a.dst_strides.w *= phases_w;
        run_product(w, transposed, a, space, threads);
    }
}

extern const ConvProductTable<element> conv_product_table;
const ConvProductTable<element> conv_product_table = {spmm_workspace, spmm};

#if !defined(__AVX512BF16__)

// The weight gradient: dY and X packed by slices, X with its border; see block_sddmm.h for A and B.
struct ConvSddmmPlan {
    Gather gather;
    SlicePlan slices;  // of X
    bool thin, swapped;
    int64_t taps, columns, row_blocks;
    int64_t parts;                // threads with a gradient of their own, to be added up
    int64_t lines, dy_strip;      // grid rows of a slice at most; floats from one strip of dY to the next
    int64_t *strip_x, *strip_dy;  // [taps * columns], [row_blocks]: B's or A's place for each block
    float *partials, *x, *dy, *spare;
    int64_t *x_line, *dy_line;
    int64_t partial_floats, x_floats, dy_floats, spare_floats, line_count;
};

static ConvSddmmPlan plan_conv_sddmm(const BlockIndex& w, const ConvShape& c, int64_t threads, Arena& arena) {
    ConvSddmmPlan p;
    p.gather = gather_of(c, -1, -1);
    p.slices = plan_slices(p.gather, w.in, w.bw, threads);
    p.thin = smaller(w.bh, w.bw) == 1 && larger(w.bh, w.bw) >= VLEN;
    p.swapped = p.thin ? w.bh == 1 : w.bw == 1;
    p.taps = c.kernel_h * c.kernel_w, p.columns = ceil_div(w.in, w.bw), p.row_blocks = ceil_div(w.out, w.bh);
    const int64_t copies = p.slices.shared ? 1 : threads;
    p.partial_floats = (w.nnzb * w.bh * w.bw + 15) / 16 * 16;
    p.parts = p.slices.shared ? 1 : smaller(threads, p.slices.image_parts * p.slices.row_parts);
    p.lines = p.slices.images * p.slices.rows;
    p.dy_strip = strip_size(p.lines * p.gather.w.grid, w.bh);
    p.strip_x = arena.take<int64_t>(p.taps * p.columns), p.strip_dy = arena.take<int64_t>(p.row_blocks);
    p.partials = arena.take<float>((larger(1, p.parts) - 1) * p.partial_floats);
    p.x_floats = p.slices.bytes / 4, p.dy_floats = p.row_blocks * p.dy_strip;
    p.x = arena.take<float>(copies * p.x_floats), p.dy = arena.take<float>(copies * p.dy_floats);
    p.line_count = (p.lines + 7) / 8 * 8;
    p.x_line = arena.take<int64_t>(copies * p.line_count), p.dy_line = arena.take<int64_t>(copies * p.line_count);
    p.spare_floats = (w.bh * w.bw + 15) / 16 * 16;
    p.spare = arena.take<float>(threads * p.spare_floats);
    return p;
}

static int64_t sddmm_workspace(const BlockIndex& w, const ConvShape& c, int64_t threads) {
    Arena arena = {nullptr, 0};
    plan_conv_sddmm(w, c, threads, arena);
    return arena.used;
}

// Blocks [begin, end) of the index that leads, for one packed slice.
static void conv_sddmm_blocks(const BlockIndex& w, const ConvSddmmPlan& p, const Slice& s, int64_t begin, int64_t end,
                              const float* x, const float* dy, const int64_t* x_line, const int64_t* dy_line,
                              float* out, bool accumulate, float* spare) {
    SddmmOperands o;
    o.ha = p.swapped ? w.bw : w.bh, o.hb = p.swapped ? w.bh : w.bw;
    o.ptr = p.swapped ? w.ccol : w.crow, o.idx = p.swapped ? w.row_t : w.col, o.slot = p.swapped ? w.slot_t : w.slot;
    o.out = out, o.strip_b = p.swapped ? p.strip_dy : p.strip_x, o.first = o.strip = 0;
    const int64_t columns = p.gather.w.grid, x_step = p.gather.w.step * w.bw;
    SddmmPositions at;
    at.lines = s.images * s.rows, at.length = columns;
    // The strips of a few lines, 16 to 24 KiB, stay in the first-level cache while a tile's other rows pass.
    at.chunk = larger(1, 128 / columns);
    at.a_line = p.swapped ? x_line : dy_line, at.b_line = p.swapped ? dy_line : x_line;
    at.a_step = p.swapped ? x_step : w.bh, at.b_step = p.swapped ? w.bh : x_step;
    const int64_t rows = p.swapped ? p.taps * p.columns : p.row_blocks;
    const float *a = p.swapped ? x : dy, *b = p.swapped ? dy : x;
    const int64_t* strip_a = p.swapped ? p.strip_x : p.strip_dy;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t e0 = larger(begin, o.ptr[r]), e1 = smaller(end, o.ptr[r + 1]);
        if (e0 < e1) sddmm_blocks(o, a + strip_a[r], b, e0, e1, at, accumulate, spare);
    }
}

// Adds the gradients of the parts to that of the first; called by every thread of a team.
static void add_partials(const ConvSddmmPlan& p, int64_t size, float* dvalues) {
    if (p.parts <= 1) return;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < size; i += VLEN) {
        const int64_t n = smaller(VLEN, size - i);
        vfloat sum = load_first(dvalues + i, n);
        for (int64_t part = 1; part < p.parts; ++part)
            sum += load_first(p.partials + (part - 1) * p.partial_floats + i, n);
        store_first(dvalues + i, sum, n);
    }
}

// Where the taps of X and the strips of dY lie in packed slices.
static void place_strips(const ConvSddmmPlan& p) {
    for (int64_t tap = 0; tap < p.taps; ++tap)
        for (int64_t j = 0; j < p.columns; ++j)
            p.strip_x[tap * p.columns + j] = j * p.slices.strip + tap_distance(p.gather, p.slices, tap);
    for (int64_t r = 0; r < p.row_blocks; ++r) p.strip_dy[r] = r * p.dy_strip;
}

// Grid row `line` of a slice of dY into its strips, and where it lies in those of X and dY.
static void pack_line(const BlockIndex& w, const ConvSddmmPlan& p, const Slice& s, int64_t line, const float* dy,
                      const ImageStrides& d, float* packed, int64_t* x_line, int64_t* dy_line) {
    const int64_t n = line / s.rows, u = line % s.rows;
    x_line[line] = row_start(p.gather, p.slices, n, u), dy_line[line] = line * p.gather.w.grid * w.bh;
    pack_pixels(dy + (s.n + n) * d.n + (s.u + u) * d.h, d, p.gather.w.grid, w.out, w.bh, packed + dy_line[line],
                p.dy_strip);
}

static void sddmm(const BlockIndex& w, const ConvShape& c, const float* dy, const ImageStrides& dy_strides,
                  const float* x, const ImageStrides& x_strides, float* dvalues, int64_t threads, void* workspace) {
    Arena arena = {static_cast<char*>(workspace), 0};
    const ConvSddmmPlan p = plan_conv_sddmm(w, c, threads, arena);
    const int64_t size = w.nnzb * w.bh * w.bw;
    if (!c.batch) {
        for (int64_t i = 0; i < size; ++i) dvalues[i] = 0;
        return;
    }
    place_strips(p);
    const int64_t slices = p.slices.image_parts * p.slices.row_parts;
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
        float* spare = p.spare + me * p.spare_floats;
        if (p.slices.shared) {
            const Slice s = slice_at(p.gather, p.slices, 0);
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < s.images * p.slices.source_rows; ++i)
                pack_row(p.gather, p.slices, s, i / p.slices.source_rows, i % p.slices.source_rows, x, x_strides, w.in,
                         p.x);
#pragma omp for schedule(static)
            for (int64_t line = 0; line < s.images * s.rows; ++line)
                pack_line(w, p, s, line, dy, dy_strides, p.dy, p.x_line, p.dy_line);
            conv_sddmm_blocks(w, p, s, w.nnzb * me / team, w.nnzb * (me + 1) / team, p.x, p.dy, p.x_line, p.dy_line,
                              dvalues, false, spare);
        } else {
#pragma omp for schedule(static, 1)
            for (int64_t part = 0; part < p.parts; ++part) {
                float* out = part ? p.partials + (part - 1) * p.partial_floats : dvalues;
                float *x_packed = p.x + me * p.x_floats, *dy_packed = p.dy + me * p.dy_floats;
                int64_t *x_line = p.x_line + me * p.line_count, *dy_line = p.dy_line + me * p.line_count;
                const int64_t first = slices * part / p.parts;
                for (int64_t i = first; i < slices * (part + 1) / p.parts; ++i) {
                    const Slice s = slice_at(p.gather, p.slices, i);
                    pack_slice(p.gather, p.slices, s, x, x_strides, w.in, x_packed);
                    for (int64_t line = 0; line < s.images * s.rows; ++line)
                        pack_line(w, p, s, line, dy, dy_strides, dy_packed, x_line, dy_line);
                    conv_sddmm_blocks(w, p, s, 0, w.nnzb, x_packed, dy_packed, x_line, dy_line, out, i > first, spare);
                }
            }
            add_partials(p, size, dvalues);
        }
    }
    clear_padding(w, p.taps, dvalues);
}

// Both gradients, and that of the bias, in one pass over dY: it is packed once, with the border that dX wants, and read
// by all three.
struct BackwardPlan {
    ConvProduct product;  // dX
    ProductSpace space;
    ConvSddmmPlan grad;  // dW; its dY is the product's packed source
    float* bias_sums;    // [threads][row_blocks * bh]
    int64_t bias_floats;
};

// A stride leaves dX's gather without some pixels of dY, and so does padding wider than the kernel; other tiles pack dY
// in strips of other widths.
static bool backward_fuses(const BlockIndex& w, const ConvShape& c) {
    return c.stride_h == 1 && c.stride_w == 1 && c.pad_h <= c.dilation_h * (c.kernel_h - 1) &&
           c.pad_w <= c.dilation_w * (c.kernel_w - 1) && w.bw >= VLEN && w.bh >= 8;
}

static BackwardPlan plan_backward(const BlockIndex& w, const ConvShape& c, int64_t threads, Arena& arena) {
    BackwardPlan b;
    plan_product(w, c, true, 0, 0, threads, arena, b.product, b.space);
    const SlicePlan& dy = b.product.slices;
    ConvSddmmPlan& p = b.grad;
    p.gather = gather_of(c, -1, -1);
    p.thin = p.swapped = false;
    p.taps = b.product.taps, p.columns = ceil_div(w.in, w.bw), p.row_blocks = ceil_div(w.out, w.bh);
    // The rows of dY that a slice owns, see owned_rows, and their rows of X.
    p.slices = dy;
    p.slices.side = w.bw, p.slices.strips = p.columns;
    p.slices.rows = smaller(c.out_height, dy.rows + c.pad_h);
    p.slices.source_rows = source_rows(p.gather.h, p.slices.rows);
    p.slices.width = (p.gather.w.grid - 1) * p.gather.w.step + p.gather.w.high - p.gather.w.low + 1;
    p.slices.strip = strip_size(p.slices.images * p.slices.source_rows * p.slices.width, w.bw);
    p.slices.bytes = whole_lines(4 * p.slices.strips * p.slices.strip);
    const int64_t copies = dy.shared ? 1 : threads;
    p.parts = dy.shared ? 1 : smaller(threads, dy.image_parts * dy.row_parts);
    p.lines = p.slices.images * p.slices.rows, p.line_count = (p.lines + 7) / 8 * 8;
    p.dy_strip = dy.strip, p.dy = b.space.packed, p.dy_floats = b.space.packed_floats;
    p.strip_x = arena.take<int64_t>(p.taps * p.columns), p.strip_dy = arena.take<int64_t>(p.row_blocks);
    p.partial_floats = (w.nnzb * w.bh * w.bw + 15) / 16 * 16;
    p.partials = arena.take<float>((larger(1, p.parts) - 1) * p.partial_floats);
    p.x_floats = p.slices.bytes / 4;
    p.x = arena.take<float>(copies * p.x_floats);
    p.x_line = arena.take<int64_t>(copies * p.line_count), p.dy_line = arena.take<int64_t>(copies * p.line_count);
    p.spare_floats = (w.bh * w.bw + 15) / 16 * 16;
    p.spare = arena.take<float>(threads * p.spare_floats);
    b.bias_floats = (p.row_blocks * w.bh + 15) / 16 * 16;
    b.bias_sums = arena.take<float>(threads * b.bias_floats);
    return b;
}

static int64_t backward_workspace(const BlockIndex& w, const ConvShape& c, int64_t threads) {
    Arena arena = {nullptr, 0};
    if (c.batch) plan_backward(w, c, threads, arena);
    return arena.used;
}

// The rows of dY whose part in dW belongs to a slice of dX: every row to one slice that packs it.
static Slice owned_rows(const BackwardPlan& b, const Slice& s) {
    const GatherAxis& h = b.product.gather.h;
    const int64_t first = s.u ? larger(0, s.u + h.low) : 0;
    const int64_t stop = s.u + s.rows == h.grid ? h.source : smaller(h.source, larger(0, s.u + s.rows + h.low));
    return {s.n, s.images, first, larger(0, stop - first)};
}

// Where the owned row `line` lies in the strips of X and dY.
static void place_line(const BlockIndex& w, const BackwardPlan& b, const Slice& s, const Slice& owned, int64_t line,
                       int64_t* x_line, int64_t* dy_line) {
    const Gather& g = b.product.gather;
    const int64_t n = line / owned.rows, u = line % owned.rows;
    x_line[line] = row_start(b.grad.gather, b.grad.slices, n, u);
    const int64_t row = n * b.product.slices.source_rows + owned.u + u - (s.u + g.h.low);
    dy_line[line] = (row * b.product.slices.width - g.w.low) * w.bh;
}

// sums [row_blocks * bh] += the packed row of dY at `line`.
static void add_row(const BlockIndex& w, const BackwardPlan& b, const float* line, float* sums) {
    for (int64_t r = 0; r < b.grad.row_blocks; ++r, line += b.grad.dy_strip, sums += w.bh) {
        float row[64] = {};
        for (int64_t p = 0; p < b.grad.gather.w.grid; ++p)
            for (int64_t j = 0; j < w.bh; ++j) row[j] += line[p * w.bh + j];
        for (int64_t j = 0; j < w.bh; ++j) sums[j] += row[j];
    }
}

static void backward(const BlockIndex& w, const ConvShape& c, const float* values, const float* dy,
                     const ImageStrides& dy_strides, const float* x, const ImageStrides& x_strides, float* dx,
                     const ImageStrides& dx_strides, float* dvalues, float* dbias, int64_t threads, void* workspace) {
    const int64_t size = w.nnzb * w.bh * w.bw;
    if (!c.batch) {
        for (int64_t i = 0; i < size; ++i) dvalues[i] = 0;
        for (int64_t i = 0; dbias && i < w.out; ++i) dbias[i] = 0;
        return;
    }
    Arena arena = {static_cast<char*>(workspace), 0};
    BackwardPlan b = plan_backward(w, c, threads, arena);
    ConvProduct& a = b.product;
    const ConvSddmmPlan& p = b.grad;
    a.values = values, a.src = dy, a.src_strides = dy_strides, a.bias = nullptr, a.dst = dx, a.dst_strides = dx_strides;
    prepare_product(w, true, a, b.space);
    place_strips(p);
    const int64_t slices = a.slices.image_parts * a.slices.row_parts;
    for (int64_t i = 0; i < threads * b.bias_floats; ++i) b.bias_sums[i] = 0;
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
        float *scratch = b.space.thread + me * b.space.thread_floats, *spare = p.spare + me * p.spare_floats;
        float* planes = scratch + packed_chunk(a);
        float* sums = b.bias_sums + me * b.bias_floats;
        if (a.early) pack_early(a, b.space.weights);
        if (a.slices.shared) {
            const Slice s = slice_at(a.gather, a.slices, 0), owned = owned_rows(b, s);
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < s.images * a.slices.source_rows; ++i)
                pack_row(a.gather, a.slices, s, i / a.slices.source_rows, i % a.slices.source_rows, dy, dy_strides,
                         w.out, b.space.packed);
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < s.images * p.slices.source_rows; ++i)
                pack_row(p.gather, p.slices, owned, i / p.slices.source_rows, i % p.slices.source_rows, x, x_strides,
                         w.in, p.x);
#pragma omp for schedule(static) nowait
            for (int64_t row = 0; row < s.images * s.rows; ++row)
                place_rows(a, s, row, row + 1, b.space.x_at, b.space.y_at);
#pragma omp for schedule(static)
            for (int64_t line = 0; line < owned.images * owned.rows; ++line)
                place_line(w, b, s, owned, line, p.x_line, p.dy_line);
            if (dbias) {
#pragma omp for schedule(static) nowait
                for (int64_t line = 0; line < owned.images * owned.rows; ++line)
                    add_row(w, b, b.space.packed + p.dy_line[line], sums);
            }
            direct_share(a, s, b.space, s.images * s.rows * a.gather.w.grid, me, team, scratch, planes);
            conv_sddmm_blocks(w, p, owned, w.nnzb * me / team, w.nnzb * (me + 1) / team, p.x, b.space.packed, p.x_line,
                              p.dy_line, dvalues, false, spare);
        } else {
#pragma omp for schedule(static, 1)
            for (int64_t part = 0; part < p.parts; ++part) {
                float* out = part ? p.partials + (part - 1) * p.partial_floats : dvalues;
                float *x_packed = p.x + me * p.x_floats, *packed = b.space.packed + me * b.space.packed_floats;
                int64_t *x_line = p.x_line + me * p.line_count, *dy_line = p.dy_line + me * p.line_count;
                int64_t* x_at = b.space.x_at + me * b.space.place_floats;
                int64_t* y_at = b.space.y_at + me * b.space.place_floats;
                bool begun = false;
                for (int64_t i = slices * part / p.parts; i < slices * (part + 1) / p.parts; ++i) {
                    const Slice s = slice_at(a.gather, a.slices, i), owned = owned_rows(b, s);
                    pack_slice(a.gather, a.slices, s, dy, dy_strides, w.out, packed);
                    place_rows(a, s, 0, s.images * s.rows, x_at, y_at);
                    for (int64_t r = 0; r < a.n_blocks; ++r)
                        direct_product(a, s, packed, x_at, y_at, r, 0, s.images * s.rows * a.gather.w.grid, scratch,
                                       planes);
                    for (int64_t line = 0; line < owned.images * owned.rows; ++line) {
                        place_line(w, b, s, owned, line, x_line, dy_line);
                        if (dbias) add_row(w, b, packed + dy_line[line], sums);
                    }
                    if (!owned.rows) continue;
                    pack_slice(p.gather, p.slices, owned, x, x_strides, w.in, x_packed);
                    conv_sddmm_blocks(w, p, owned, 0, w.nnzb, x_packed, packed, x_line, dy_line, out, begun, spare);
                    begun = true;
                }
                for (int64_t i = 0; i < size && !begun; ++i) out[i] = 0;
            }
            add_partials(p, size, dvalues);
        }
    }
    clear_padding(w, p.taps, dvalues);
    for (int64_t i = 0; dbias && i < w.out; ++i) {
        dbias[i] = 0;
        for (int64_t t = 0; t < threads; ++t) dbias[i] += b.bias_sums[t * b.bias_floats + i];
    }
}

extern const ConvGradientTable conv_gradient_table;
const ConvGradientTable conv_gradient_table = {sddmm_workspace, sddmm, backward_fuses, backward_workspace, backward};

#endif

}  // namespace sk::SK_ISA
