// Unstructured linear: the inner loops. The blocking is drawn in csrc/cpu/linear_unstructured.h.
#include "cpu/linear_unstructured.h"

#include <string.h>

#include "cpu/simd.h"

namespace sk::SK_ISA {

// Element `i` of the pair (a, b) of 4-float lanes: 0..3 are a's, 4..7 are b's.
#define LANE_INDEX(lane, i) ((i) < 4 ? 4 * (lane) + (i) : SK_VLEN + 4 * (lane) + (i) - 4)
#define LANE(lane) LANE_INDEX(lane, I), LANE_INDEX(lane, J), LANE_INDEX(lane, K), LANE_INDEX(lane, L)

// The same shuffle in every 4-float lane.
template <int I, int J, int K, int L>
SK_INLINE vfloat in_lanes(vfloat a, vfloat b) {
#if SK_VLEN == 16
    return __builtin_shufflevector(a, b, LANE(0), LANE(1), LANE(2), LANE(3));
#elif SK_VLEN == 8
    return __builtin_shufflevector(a, b, LANE(0), LANE(1));
#else
    return __builtin_shufflevector(a, b, LANE(0));
#endif
}

#undef LANE
#undef LANE_INDEX

// Four floats at p in every lane.
SK_INLINE vfloat broadcast4(const float* p) {
#if SK_VLEN == 16
    return (vfloat)_mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(p));
#elif SK_VLEN == 8
    return (vfloat)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
#else
    return load(p);
#endif
}

typedef float vquad __attribute__((vector_size(16), aligned(4), may_alias));

// The sum of the 4-float lanes.
SK_INLINE vquad sum_lanes(vfloat v) {
#if SK_VLEN == 16
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
#endif
#if SK_VLEN >= 8
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
    return v;
#endif
}

// The four sums over all lanes of m0, m1, m2, m3.
SK_INLINE vquad reduce4(vfloat m0, vfloat m1, vfloat m2, vfloat m3) {
    const vfloat a = in_lanes<0, 1, 6, 7>(m0, m1) + in_lanes<2, 3, 4, 5>(m0, m1);  // m0 m0 m1 m1
    const vfloat b = in_lanes<0, 1, 6, 7>(m2, m3) + in_lanes<2, 3, 4, 5>(m2, m3);  // m2 m2 m3 m3
    return sum_lanes(in_lanes<0, 2, 4, 6>(a, b) + in_lanes<1, 3, 5, 7>(a, b));
}

SK_INLINE void transpose_lanes(vfloat* r) {
    const vfloat a = in_lanes<0, 4, 1, 5>(r[0], r[1]), b = in_lanes<2, 6, 3, 7>(r[0], r[1]);
    const vfloat c = in_lanes<0, 4, 1, 5>(r[2], r[3]), d = in_lanes<2, 6, 3, 7>(r[2], r[3]);
    r[0] = in_lanes<0, 1, 4, 5>(a, c);
    r[1] = in_lanes<2, 3, 6, 7>(a, c);
    r[2] = in_lanes<0, 1, 4, 5>(b, d);
    r[3] = in_lanes<2, 3, 6, 7>(b, d);
}

// Lanes 0, 2 (1, 3) of a, then those of b.
#if SK_VLEN == 16
SK_INLINE vfloat even_lanes(vfloat a, vfloat b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
}
SK_INLINE vfloat odd_lanes(vfloat a, vfloat b) {
    return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
#elif SK_VLEN == 8
SK_INLINE vfloat even_lanes(vfloat a, vfloat b) { return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11); }
SK_INLINE vfloat odd_lanes(vfloat a, vfloat b) { return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15); }
#endif

// Transposes the VLEN x VLEN matrix whose rows are r: 4x4 inside the lanes, then the lanes themselves.
SK_INLINE void transpose(vfloat* r) {
    for (int group = 0; group < VLEN; group += 4) transpose_lanes(r + group);
#if SK_VLEN == 16
    vfloat t[16];
    for (int k = 0; k < 4; ++k) {
        const vfloat ab_even = even_lanes(r[k], r[4 + k]), ab_odd = odd_lanes(r[k], r[4 + k]);
        const vfloat cd_even = even_lanes(r[8 + k], r[12 + k]), cd_odd = odd_lanes(r[8 + k], r[12 + k]);
        t[k] = even_lanes(ab_even, cd_even);
        t[4 + k] = even_lanes(ab_odd, cd_odd);
        t[8 + k] = odd_lanes(ab_even, cd_even);
        t[12 + k] = odd_lanes(ab_odd, cd_odd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
#elif SK_VLEN == 8
    for (int k = 0; k < 4; ++k) {
        const vfloat low = even_lanes(r[k], r[4 + k]), high = odd_lanes(r[k], r[4 + k]);
        r[k] = low;
        r[4 + k] = high;
    }
#endif
}

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

// The columns of the stream, four to a word, read two words ahead: a vector load whose address comes from a load that
// is still under way costs Zen 5 a third of its L1 bandwidth (6.2 against 4.6 cycles per nonzero and 128 positions).
struct Columns {
    const uint16_t* next;
    uint64_t first, second;

    inline __attribute__((always_inline)) explicit Columns(const uint16_t* locals) : next(locals + 8) {
        memcpy(&first, locals, 8);
        memcpy(&second, locals + 4, 8);
    }
    inline __attribute__((always_inline)) uint64_t quad() {
        const uint64_t word = first;
        first = second;
        memcpy(&second, next, 8);
        next += 4;
        return word;
    }
};

#define SK_COLUMN(word, k) (((word) >> (16 * (k))) & 0xffff)

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

// As many positions as eight vectors hold: more accumulators would not fit in 16 registers.
constexpr int part_of(int width) { return width < 8 * VLEN ? width : 8 * VLEN; }

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
const UnstructuredTable unstructured_table = {pack, unpack, spmm_tile, sddmm_tile};

}  // namespace sk::SK_ISA
