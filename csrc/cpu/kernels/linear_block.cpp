// The block-CSR linear products: plans, threads and workspaces around the tiles of block_spmm.h and block_sddmm.h.
//
// Compiled with __AVX512BF16__, too: x, y and dy are then bf16, sizes below count units (see bf16.h), and only blocks
// whose sides are multiples of VLEN are served.
#include "cpu/linear_block.h"

#include "cpu/activation.h"
#include "cpu/block_panel.h"
#include "cpu/block_sddmm.h"
#include "cpu/block_spmm.h"
#include "cpu/parallel.h"

namespace sk::SK_ISA {

// Half of the smallest second-level cache that matters: what one thread's slice of activations may take.
constexpr int64_t kSliceBytes = 512 << 10;

// Workspace regions start on cache lines.
SK_INLINE int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct SpmmPlan {
    bool direct, outer, pack_weights;
    int64_t unit;                      // positions are dealt in multiples of it
    int64_t tiles, row_parts;          // tasks: position tiles x ranges of row blocks
    int64_t max_rows;                  // of a tile
    int64_t ldp;                       // row stride of a packed slice (direct), floats: an odd number of cache lines
    int64_t weight_bytes, task_bytes;  // packed weights; scratch of one thread
};

static SpmmPlan plan_spmm(const BlockIndex& w, bool transposed, int64_t positions, int64_t threads) {
    const int64_t nb = transposed ? w.bw : w.bh, kb = transposed ? w.bh : w.bw;
    const int64_t n = transposed ? w.in : w.out, k = units(transposed ? w.out : w.in);
    SpmmPlan p;
    p.direct = kUnit > 1 || (nb >= VLEN && kb >= 8);
    p.outer = nb == 1;
    p.pack_weights = p.direct && (kUnit > 1 || !transposed || nb == VLEN);
    p.unit = p.direct  ? (nb == VLEN ? kLargest<true> : kLargest<false>)
             : p.outer ? kOuterVectors * VLEN
                       : (nb >= kWideOutputs ? 3 : 6) * VLEN;
    const int64_t units = ceil_div(positions, p.unit);
    const int64_t slice = larger(1, (p.direct ? kSliceBytes / 2 : kSliceBytes) / (4 * k * p.unit));
    p.tiles = smaller(units, ceil_div(ceil_div(units, slice), threads) * threads);
    p.row_parts = p.outer ? 1 : smaller(ceil_div(n, nb), ceil_div(threads, larger(1, p.tiles)));
    p.max_rows = p.tiles ? ceil_div(units, p.tiles) * p.unit : 0;
    p.ldp = (ceil_div(k, 16) | 1) * 16;
    p.weight_bytes = p.pack_weights ? aligned(4 * w.nnzb * w.bh * w.bw / kUnit) : 0;
    if (p.direct)
        p.task_bytes = aligned(4 * p.max_rows * p.ldp);
    else
        p.task_bytes = aligned(4 * (k * p.max_rows + (p.outer ? n : kPanelOutputs) * p.unit));
    return p;
}

static int64_t spmm_workspace(const BlockIndex& w, bool transposed, int64_t positions, int64_t threads) {
    const SpmmPlan p = plan_spmm(w, transposed, positions, threads);
    return p.weight_bytes + threads * p.task_bytes;
}

static void pack_rows(const element* src, int64_t src_ld, float* dst, int64_t dst_ld, int64_t rows, int64_t cols) {
    for (int64_t i = 0; i < rows; ++i) pack_row(src + i * src_ld, dst + i * dst_ld, cols);
}

#if !defined(__AVX512BF16__)

// The positions [p0, p1) transposed to panels [k][width].
static void pack_panels(const SpmmOperands& a, int64_t p0, int64_t p1, int64_t width, float* panels) {
    for (int64_t p = p0; p < p1; p += width)
        transpose(a.x + p * a.ldx, a.ldx, panels + (p - p0) * a.k, width, smaller(width, p1 - p), a.k);
}

template <int NO, int NV>
static void panel_task(const SpmmOperands& a, int64_t p0, int64_t p1, int64_t r0, int64_t r1, float* scratch) {
    constexpr int kWidth = NV * VLEN;
    float* out = scratch;
    float* panels = scratch + kPanelOutputs * kWidth;
    pack_panels(a, p0, p1, kWidth, panels);
    // Row blocks outermost: their weights stay close while every panel of the slice passes.
    const int64_t chunk = kPanelOutputs / a.nb;
    for (int64_t r = r0; r < r1; r += chunk)
        for (int64_t p = p0; p < p1; p += kWidth)
            panel_tiles<NO, NV>(a, panels + (p - p0) * a.k, out, a.y + p * a.ldy, smaller(kWidth, p1 - p), r,
                                smaller(r1, r + chunk));
}

static void outer_task(const SpmmOperands& a, int64_t p0, int64_t p1, float* scratch) {
    constexpr int kWidth = kOuterVectors * VLEN;
    float* panels = scratch + a.n * kWidth;
    pack_panels(a, p0, p1, kWidth, panels);
    for (int64_t p = p0; p < p1; p += kWidth)
        outer_tiles(a, panels + (p - p0) * a.k, scratch, a.y + p * a.ldy, smaller(kWidth, p1 - p));
}

#endif

static void spmm(const BlockIndex& w, bool transposed, const float* values, const element* x, int64_t ldx,
                 const Epilogue<element>& epilogue, element* y, int64_t ldy, int64_t positions, int64_t threads,
                 void* workspace) {
    const SpmmPlan p = plan_spmm(w, transposed, positions, threads);
    SpmmOperands a;
    const int64_t cols = transposed ? w.out : w.in, kb = transposed ? w.bh : w.bw;
    a.n = transposed ? w.in : w.out, a.k = units(cols);
    a.nb = transposed ? w.bw : w.bh, a.kb = units(kb);
    a.ptr = transposed ? w.ccol : w.crow, a.idx = transposed ? w.row_t : w.col, a.slot = transposed ? w.slot_t : w.slot;
    a.ptr_k = transposed ? w.crow : w.ccol, a.idx_k = transposed ? w.col : w.row_t;
    a.slot_k = transposed ? w.slot : w.slot_t;
    a.weights = values;
    a.stride_n = transposed ? 1 : w.bw, a.stride_k = transposed ? w.bw : 1;
    a.bias = epilogue.bias, a.x = x, a.ldx = ldx, a.y = y, a.ldy = ldy;
    // An activation reads y again at once.
    a.past_caches = epilogue.activation == kIdentity && streams(y, ldy, positions, a.n);
    float* packed = static_cast<float*>(workspace);
    char* scratch = static_cast<char*>(workspace) + p.weight_bytes;
    if (p.pack_weights) {
        a.weights = packed, a.slot = nullptr;
    }
    const int32_t* order = transposed ? w.slot_t : w.slot;
    const int64_t row_blocks = ceil_div(a.n, a.nb), units = ceil_div(positions, p.unit);
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        if (p.pack_weights) {
            const int64_t block = w.bh * w.bw;
#pragma omp for schedule(static)
            for (int64_t e = 0; e < w.nnzb; ++e)
                pack_weights(values + order[e] * block, a.stride_n, a.stride_k, a.nb, kb, packed + e * block / kUnit);
        }
        float* mine = reinterpret_cast<float*>(scratch + omp_get_thread_num() * p.task_bytes);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < p.tiles * p.row_parts; ++task) {
            const int64_t tile = task / p.row_parts, part = task % p.row_parts;
            const int64_t p0 = units * tile / p.tiles * p.unit;
            const int64_t p1 = smaller(positions, units * (tile + 1) / p.tiles * p.unit);
            const int64_t r0 = row_blocks * part / p.row_parts, r1 = row_blocks * (part + 1) / p.row_parts;
            if (p.direct) {
                // One sequential pass that the hardware prefetches; the tiles would meet cold rows line by line, and a
                // dozen rows a multiple of 4 KiB apart would share the sets of the first-level cache.
                pack_rows(a.x + p0 * ldx, ldx, mine, p.ldp, p1 - p0, cols);
                // The tile that this thread will take if all are equally quick.
                const int64_t after = smaller(p.tiles, (task + threads) / p.row_parts);
                const int64_t n0 = smaller(positions, units * after / p.tiles * p.unit);
                const int64_t n1 = smaller(positions, units * smaller(p.tiles, after + 1) / p.tiles * p.unit);
                direct_tiles(a, mine, p.ldp, a.y + p0 * ldy, p1 - p0, r0, r1,
                             ahead_of(a.x + n0 * ldx, ldx, n1 - n0, cols));
            }
#if !defined(__AVX512BF16__)
            else if (a.nb >= kWideOutputs) {
                panel_task<kWideOutputs, 3>(a, p0, p1, r0, r1, mine);
            } else if (p.outer) {
                outer_task(a, p0, p1, mine);
            } else {
                panel_task<4, 6>(a, p0, p1, r0, r1, mine);
            }
#endif
            const int64_t first = p0 * ldy + r0 * a.nb;
            activate(epilogue.activation, y + first, epilogue.pre ? epilogue.pre + first : nullptr, ldy, p1 - p0,
                     smaller(a.n, r1 * a.nb) - r0 * a.nb);
        }
        if (a.past_caches) end_stream();
    }
}

struct SddmmPlan {
    bool thin;                          // one side is 1, the other a vector or more: lanes along it, the 1 broadcast
    bool swapped;                       // A is X, B is dY
    int64_t position_parts, row_parts;  // threads
    int64_t tile_rows;                  // positions of one packed slice
    int64_t strips;                     // of A packed at a time
    int64_t chunk;                      // strips of B packed at a time
    int64_t partial_bytes;              // dW of every position part but the first
    int64_t a_bytes, b_bytes, thread_bytes;
};

static SddmmPlan plan_sddmm(const BlockIndex& w, int64_t positions, int64_t threads) {
    SddmmPlan p;
    p.thin = smaller(w.bh, w.bw) == 1 && larger(w.bh, w.bw) >= VLEN;
    p.swapped = p.thin ? w.bh == 1 : w.bw == 1;
    const int64_t ha = p.swapped ? w.bw : w.bh, hb = p.swapped ? w.bh : w.bw;
    const int64_t b_strips = ceil_div(p.swapped ? w.out : w.in, hb);
    // A part of the positions costs one more dW to add up: 256 positions pay for it.
    p.position_parts = larger(1, smaller(threads, positions / 256));
    p.row_parts = threads / p.position_parts;
    const int64_t share = ceil_div(positions, p.position_parts);
    // More columns at a time mean fewer passes over A, fewer columns longer slices and so fewer passes over dW.
    int64_t chunks = 1;
    while ((chunks + 1) * (chunks + 1) * kSliceBytes <= 3 * w.nnzb * w.bh * w.bw) ++chunks;
    p.chunk = ceil_div(b_strips, smaller(chunks, b_strips));
    const int64_t limit = kUnit * larger(32, smaller(256, kSliceBytes / (4 * p.chunk * hb)));
    p.tile_rows = ceil_div(share, larger(1, ceil_div(share, limit)));
    const int64_t tile_units = units(p.tile_rows);
    p.strips = larger(1, 128 / ha);
    p.partial_bytes = aligned(4 * w.nnzb * w.bh * w.bw);
    p.b_bytes = aligned(4 * p.chunk * strip_size(tile_units, hb));
    p.a_bytes = aligned(4 * p.strips * strip_size(tile_units, ha));
    p.thread_bytes = p.b_bytes + p.a_bytes + aligned(4 * ha * hb);
    return p;
}

static int64_t sddmm_workspace(const BlockIndex& w, int64_t positions, int64_t threads) {
    const SddmmPlan p = plan_sddmm(w, positions, threads);
    return (p.position_parts - 1) * p.partial_bytes + threads * p.thread_bytes;
}

static void sddmm(const BlockIndex& w, const element* dy, int64_t ldy, const element* x, int64_t ldx, float* dvalues,
                  int64_t positions, int64_t threads, void* workspace) {
    const SddmmPlan p = plan_sddmm(w, positions, threads);
    const int64_t size = w.nnzb * w.bh * w.bw;
    if (!positions) {
        for (int64_t i = 0; i < size; ++i) dvalues[i] = 0;
        return;
    }
    const element *a = p.swapped ? x : dy, *b = p.swapped ? dy : x;
    const int64_t lda = p.swapped ? ldx : ldy, ldb = p.swapped ? ldy : ldx;
    const int64_t a_cols = p.swapped ? w.in : w.out, b_cols = p.swapped ? w.out : w.in;
    SddmmOperands s;
    s.ha = p.swapped ? w.bw : w.bh, s.hb = p.swapped ? w.bh : w.bw;
    s.ptr = p.swapped ? w.ccol : w.crow, s.idx = p.swapped ? w.row_t : w.col, s.slot = p.swapped ? w.slot_t : w.slot;
    s.strip_b = nullptr;
    const int64_t row_blocks = ceil_div(a_cols, s.ha), b_strips = ceil_div(b_cols, s.hb);
    char* partials = static_cast<char*>(workspace);
    char* scratch = partials + (p.position_parts - 1) * p.partial_bytes;
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        char* mine = scratch + omp_get_thread_num() * p.thread_bytes;
        float* b_packed = reinterpret_cast<float*>(mine);
        float* a_packed = reinterpret_cast<float*>(mine + p.b_bytes);
        float* spare = reinterpret_cast<float*>(mine + p.b_bytes + p.a_bytes);
#pragma omp for schedule(static, 1)
        for (int64_t task = 0; task < p.position_parts * p.row_parts; ++task) {
            const int64_t part = task / p.row_parts, range = task % p.row_parts;
            SddmmOperands mine_s = s;
            mine_s.out = part ? reinterpret_cast<float*>(partials + (part - 1) * p.partial_bytes) : dvalues;
            const int64_t begin = positions * part / p.position_parts, end = positions * (part + 1) / p.position_parts;
            // Ranges of rows with equal numbers of blocks.
            int64_t r0 = 0, r1 = row_blocks;
            if (range)
                while (r0 < row_blocks && s.ptr[r0] < w.nnzb * range / p.row_parts) ++r0;
            if (range + 1 < p.row_parts)
                for (r1 = r0; r1 < row_blocks && s.ptr[r1] < w.nnzb * (range + 1) / p.row_parts;) ++r1;
            for (int64_t c = 0; c < b_strips; c += p.chunk) {
                mine_s.first = c;
                for (int64_t p0 = begin; p0 < end; p0 += p.tile_rows) {
                    const int64_t rows = smaller(p.tile_rows, end - p0), first = c * s.hb;
                    const int64_t strip_a = strip_size(units(rows), s.ha), line = 0;
                    mine_s.strip = strip_size(units(rows), s.hb);
                    pack_strips(b + p0 * ldb + first, ldb, rows, smaller(p.chunk * s.hb, b_cols - first), s.hb,
                                b_packed, mine_s.strip);
                    for (int64_t r = r0; r < r1; r += p.strips) {
                        const int64_t stop = smaller(r + p.strips, r1), from = r * s.ha;
                        Ahead next;
                        if (stop < r1) {
                            const int64_t last = smaller(smaller(stop + p.strips, r1) * s.ha, a_cols);
                            next = ahead_of(a + p0 * lda + stop * s.ha, lda, rows, last - stop * s.ha);
                            spread_over(next, (s.ptr[stop] - s.ptr[r]) * s.ha * s.hb / (kSddmmRows * 3 * VLEN));
                            // More lines than that in a tile's time come no sooner.
                            next.lines = smaller(next.lines, 32);
                        }
                        const SddmmPositions at = {1, units(rows), 1, &line, &line, s.ha, s.hb, &next};
                        pack_strips(a + p0 * lda + from, lda, rows, smaller(stop * s.ha, a_cols) - from, s.ha, a_packed,
                                    strip_a);
                        for (int64_t i = r; i < stop; ++i) {
                            int64_t e0 = s.ptr[i], e1 = s.ptr[i + 1];
                            while (e0 < e1 && s.idx[e0] < c) ++e0;
                            while (e0 < e1 && s.idx[e1 - 1] >= c + p.chunk) --e1;
                            sddmm_blocks(mine_s, a_packed + (i - r) * strip_a, b_packed, e0, e1, at, p0 > begin, spare);
                        }
                    }
                }
            }
        }
        if (p.position_parts > 1) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < size; i += VLEN) {
                const int64_t n = smaller(VLEN, size - i);
                vfloat sum = load_first(dvalues + i, n);
                for (int64_t part = 1; part < p.position_parts; ++part)
                    sum += load_first(reinterpret_cast<const float*>(partials + (part - 1) * p.partial_bytes) + i, n);
                store_first(dvalues + i, sum, n);
            }
        }
    }
    clear_padding(w, 1, dvalues);
}

extern const LinearBlockTable<element> linear_block_table;
const LinearBlockTable<element> linear_block_table = {spmm_workspace, spmm, sddmm_workspace, sddmm};

}  // namespace sk::SK_ISA
