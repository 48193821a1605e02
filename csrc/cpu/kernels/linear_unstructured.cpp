// Unstructured linear: the inner loops. The blocking is drawn in csrc/cpu/linear_unstructured.h.
#include "cpu/linear_unstructured.h"

#include "cpu/activation.h"
#include "cpu/simd.h"
#include "cpu/stream.h"

namespace sk::SK_ISA {

static void pack(const float* x, int64_t ld, int64_t positions, int64_t cols, int64_t width, float* tile) {
    for (int64_t p = 0; p < width; p += VLEN) {
        const int64_t live = positions - p < VLEN ? positions - p : VLEN;
        for (int64_t c = 0; c < cols; c += VLEN) {
            const float* from = x + p * ld + c;
            vfloat r[VLEN];
            if (live == VLEN && cols - c >= VLEN) {
                for (int i = 0; i < VLEN; ++i) r[i] = load(from + i * ld);
            } else {
                const int64_t n = cols - c < VLEN ? cols - c : VLEN;
                for (int i = 0; i < VLEN; ++i) r[i] = i < live ? load_first(from + i * ld, n) : zero();
            }
            transpose(r);
            for (int i = 0; i < VLEN; ++i) store(tile + (c + i) * width + p, r[i]);
        }
    }
}

static void unpack(const float* panel, int64_t width, int64_t rows, int64_t positions, float* y, int64_t ld) {
    for (int64_t p = 0; p < positions; p += VLEN) {
        const int64_t live = positions - p < VLEN ? positions - p : VLEN;
        for (int64_t o = 0; o < rows; o += VLEN) {
            float* to = y + p * ld + o;
            vfloat r[VLEN];
            for (int i = 0; i < VLEN; ++i) r[i] = load(panel + (o + i) * width + p);
            transpose(r);
            if (live == VLEN && rows - o >= VLEN) {
                for (int i = 0; i < VLEN; ++i) store(to + i * ld, r[i]);
            } else {
                const int64_t n = rows - o < VLEN ? rows - o : VLEN;
                for (int i = 0; i < VLEN; ++i)
                    if (i < live) store_first(to + i * ld, r[i], n);
            }
        }
    }
}

// Fetches two lines at every run: at S=.9, 8192 positions and 256 x 256 from memory that is a quarter of the time.
struct Fetcher {
    const char *at, *end;
    int64_t rows, bytes, ld_bytes;

    inline __attribute__((always_inline)) explicit Fetcher(const UnstructuredAhead& ahead)
        : at(ahead.from), end(at + ahead.bytes), rows(ahead.rows), bytes(ahead.bytes), ld_bytes(ahead.ld_bytes) {}
    inline __attribute__((always_inline)) void line() {
        if (rows <= 0) return;
        __builtin_prefetch(at, 0, 2);
        at += 64;
        if (at < end) return;
        --rows;
        end += ld_bytes;
        at = end - bytes;
    }
    inline __attribute__((always_inline)) void run() {
        line();
        line();
    }
};

// Works on `Part` of the `Width` positions of a panel; x and y point at the part.
template <int Width, int Part>
static void spmm_part(const UnstructuredRun* runs, int64_t count, const float* weights, const uint16_t* locals,
                      const float* x, float* y, bool first, const float* bias, const UnstructuredAhead* ahead) {
    constexpr int kVectors = Part / VLEN;
    // Eight chains of multiply-adds in flight: two pipes of latency four.
    constexpr int kSets = kVectors >= 8 ? 1 : kVectors >= 4 ? 2 : 4;
    Columns columns(locals);
    Fetcher next(ahead[0]), later(ahead[1]);
    for (int64_t i = 0; i < count; ++i) {
        next.run();
        later.run();
        float* out = y + static_cast<int64_t>(runs[i].row) * Width;
        vfloat acc[kSets][kVectors];
        if (first) {
            const vfloat start = bias ? broadcast(bias[runs[i].row]) : zero();
            for (int v = 0; v < kVectors; ++v) acc[0][v] = start;
        } else {
            for (int v = 0; v < kVectors; ++v) acc[0][v] = load(out + v * VLEN);
        }
        for (int s = 1; s < kSets; ++s)
            for (int v = 0; v < kVectors; ++v) acc[s][v] = zero();

        const auto add = [&](int set, vfloat weight, uint64_t column) __attribute__((always_inline)) {
            const float* from = x + column * Width;
            for (int v = 0; v < kVectors; ++v) acc[set][v] = fma(weight, load(from + v * VLEN), acc[set][v]);
        };
        int32_t left = runs[i].count;
        for (; left >= 4; left -= 4) {
            const vfloat w = broadcast4(weights);
            const uint64_t word = columns.quad();
            weights += 4;
            add(0, in_lanes<0, 0, 0, 0>(w, w), SK_COLUMN(word, 0));
            add(1 % kSets, in_lanes<1, 1, 1, 1>(w, w), SK_COLUMN(word, 1));
            add(2 % kSets, in_lanes<2, 2, 2, 2>(w, w), SK_COLUMN(word, 2));
            add(3 % kSets, in_lanes<3, 3, 3, 3>(w, w), SK_COLUMN(word, 3));
        }
        if (left > 0) {
            const vfloat w = broadcast4(weights);
            const uint64_t word = columns.quad();
            weights += 4;
            add(0, in_lanes<0, 0, 0, 0>(w, w), SK_COLUMN(word, 0));
            if (left > 1) add(1 % kSets, in_lanes<1, 1, 1, 1>(w, w), SK_COLUMN(word, 1));
            if (left > 2) add(2 % kSets, in_lanes<2, 2, 2, 2>(w, w), SK_COLUMN(word, 2));
        }
        for (int s = 1; s < kSets; ++s)
            for (int v = 0; v < kVectors; ++v) acc[0][v] += acc[s][v];
        for (int v = 0; v < kVectors; ++v) store(out + v * VLEN, acc[0][v]);
    }
}

template <int Width>
SK_INLINE void spmm_width(const UnstructuredRun* runs, int64_t count, const float* weights, const uint16_t* locals,
                          const float* x, float* y, bool first, const float* bias, const UnstructuredAhead* ahead) {
    constexpr int kPart = part_of(Width);
    for (int p = 0; p < Width; p += kPart)
        spmm_part<Width, kPart>(runs, count, weights, locals, x + p, y + p, first, bias, ahead);
}

static void spmm_tile(const UnstructuredRun* runs, int64_t count, const float* weights, const uint16_t* locals,
                      const float* x, float* y, int64_t width, bool first, const float* bias,
                      const UnstructuredAhead* ahead) {
    if (width == 64) spmm_width<64>(runs, count, weights, locals, x, y, first, bias, ahead);
    if (width == 32) spmm_width<32>(runs, count, weights, locals, x, y, first, bias, ahead);
    if (width == 16) spmm_width<16>(runs, count, weights, locals, x, y, first, bias, ahead);
}

template <int Width, int Part>
static void sddmm_part(const UnstructuredRun* runs, int64_t count, const uint16_t* locals, const float* x,
                       const float* dy, float* sums, const UnstructuredAhead* ahead) {
    constexpr int kVectors = Part / VLEN;
    Columns columns(locals);
    Fetcher next(ahead[0]), later(ahead[1]);
    for (int64_t i = 0; i < count; ++i) {
        next.run();
        later.run();
        vfloat d[kVectors];
        for (int v = 0; v < kVectors; ++v) d[v] = load(dy + static_cast<int64_t>(runs[i].row) * Width + v * VLEN);

        const auto dot = [&](uint64_t column) __attribute__((always_inline)) {
            const float* from = x + column * Width;
            vfloat m = d[0] * load(from);
            for (int v = 1; v < kVectors; ++v) m = fma(d[v], load(from + v * VLEN), m);
            return m;
        };
        const auto add = [&](vquad sum) __attribute__((always_inline)) {
            *reinterpret_cast<vquad*>(sums) += sum;
            sums += 4;
        };
        int32_t left = runs[i].count;
        for (; left >= 4; left -= 4) {
            const uint64_t word = columns.quad();
            const vfloat m0 = dot(SK_COLUMN(word, 0)), m1 = dot(SK_COLUMN(word, 1));
            const vfloat m2 = dot(SK_COLUMN(word, 2)), m3 = dot(SK_COLUMN(word, 3));
            add(reduce4(m0, m1, m2, m3));
        }
        if (left > 0) {
            const uint64_t word = columns.quad();
            const vfloat m0 = dot(SK_COLUMN(word, 0));
            vfloat m1 = zero(), m2 = zero();
            if (left > 1) m1 = dot(SK_COLUMN(word, 1));
            if (left > 2) m2 = dot(SK_COLUMN(word, 2));
            add(reduce4(m0, m1, m2, zero()));
        }
    }
}

template <int Width>
SK_INLINE void sddmm_width(const UnstructuredRun* runs, int64_t count, const uint16_t* locals, const float* x,
                           const float* dy, float* sums, const UnstructuredAhead* ahead) {
    constexpr int kPart = part_of(Width);
    for (int p = 0; p < Width; p += kPart) sddmm_part<Width, kPart>(runs, count, locals, x + p, dy + p, sums, ahead);
}

static void sddmm_tile(const UnstructuredRun* runs, int64_t count, const uint16_t* locals, const float* x,
                       const float* dy, int64_t width, float* sums, const UnstructuredAhead* ahead) {
    if (width == 64) sddmm_width<64>(runs, count, locals, x, dy, sums, ahead);
    if (width == 32) sddmm_width<32>(runs, count, locals, x, dy, sums, ahead);
    if (width == 16) sddmm_width<16>(runs, count, locals, x, dy, sums, ahead);
}

extern const UnstructuredTable unstructured_table;
const UnstructuredTable unstructured_table = {pack, unpack, spmm_tile, sddmm_tile, activate};

}  // namespace sk::SK_ISA
