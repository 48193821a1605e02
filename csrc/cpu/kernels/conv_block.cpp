// The block-CSR convolutions: conv_block_product.h for every stride phase, conv_block_gradient.h, and both in one pass.
//
// Compiled with __AVX512BF16__, too: images are then bf16 with their channels side by side, only blocks whose sides are
// multiples of VLEN are served, and the weight gradient is left to the fp32 kernels.
#include "cpu/conv_block.h"

#include "cpu/conv_block_product.h"
#if !defined(__AVX512BF16__)
#include "cpu/conv_block_gradient.h"
#endif

namespace sk::SK_ISA {

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
                 const ImageStrides& x_strides, const Epilogue<element>& epilogue, element* y,
                 const ImageStrides& y_strides, int64_t threads, void* workspace) {
    const int64_t phases_h = transposed ? c.stride_h : 1, phases_w = transposed ? c.stride_w : 1;
    for (int64_t phase = 0; phase < phases_h * phases_w; ++phase) {
        const int64_t phase_h = phase / phases_w, phase_w = phase % phases_w;
        Arena arena = {static_cast<char*>(workspace), 0};
        ConvProduct a;
        ProductSpace space;
        if (!plan_product(w, c, transposed, transposed ? phase_h : -1, transposed ? phase_w : -1, threads, arena, a,
                          space))
            continue;
        a.values = values, a.src = x, a.src_strides = x_strides, a.epilogue = epilogue;
        a.dst = y + phase_h * y_strides.h + phase_w * y_strides.w, a.dst_strides = y_strides;
        a.dst_strides.h *= phases_h, a.dst_strides.w *= phases_w;
        run_product(w, transposed, a, space, threads);
    }
}

extern const ConvProductTable<element> conv_product_table;
const ConvProductTable<element> conv_product_table = {spmm_workspace, spmm};

#if !defined(__AVX512BF16__)

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
    return c.height > 0 && c.width > 0 && c.stride_h == 1 && c.stride_w == 1 &&
           c.pad_h <= c.dilation_h * (c.kernel_h - 1) && c.pad_w <= c.dilation_w * (c.kernel_w - 1) && w.bw >= VLEN &&
           w.bh >= 8;
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
    a.values = values, a.src = dy, a.src_strides = dy_strides, a.dst = dx, a.dst_strides = dx_strides;
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
                const int64_t stop = slices * (part + 1) / p.parts;
                for (int64_t i = slices * part / p.parts; i < stop; ++i) {
                    const Slice s = slice_at(a.gather, a.slices, i), owned = owned_rows(b, s);
                    Ahead next = source_of(a, i + 1, stop);
                    pack_slice(a.gather, a.slices, s, dy, dy_strides, w.out, packed);
                    place_rows(a, s, 0, s.images * s.rows, x_at, y_at);
                    for (int64_t r = 0; r < a.n_blocks; ++r)
                        direct_product(a, s, packed, x_at, y_at, r, 0, s.images * s.rows * a.gather.w.grid, scratch,
                                       planes, next);
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
        if (a.past_caches) end_stream();
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
