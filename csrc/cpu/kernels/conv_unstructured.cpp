// Unstructured convolution: the inner loops. The blocking is drawn in csrc/cpu/conv_unstructured.h.
#include "cpu/conv_unstructured.h"

#include "cpu/activation.h"
#include "cpu/simd.h"
#include "cpu/stream.h"

namespace sk::SK_ISA {

constexpr int kRow = kVectorRow;

SK_INLINE void clear_row(float* to) {
    for (int l = 0; l < kRow; l += VLEN) store(to + l, zero());
}

// length in [1, 16].
SK_INLINE void copy_piece(const float* from, float* to, int64_t length) {
    if (length == 1) {
        *to = *from;
        return;
    }
    for (; length > VLEN; length -= VLEN, from += VLEN, to += VLEN) store(to, load(from));
    store_first(to, load_first(from, length), length);
}

SK_INLINE bool whole(const ConvLanes& lanes) { return lanes.pieces == 1 && lanes.length[0] == kRow; }

// Channels that are planes: a vector row is a few stretches of memory. All rows of a channel come before the next one,
// because planes a power of two apart share their sets in every cache: nothing that is read stays there for long.
static void pack_planes(const float* x, int64_t stride_c, int64_t channels, const ConvVectorRow* rows, int64_t count,
                        float* packed) {
    constexpr int64_t kAhead = 10;  // channels
    for (int64_t c = 0; c < channels; ++c) {
        const float* plane = x + c * stride_c;
        for (int64_t j = 0; j < count; ++j) {
            const ConvVectorRow& row = rows[j];
            const ConvLanes& lanes = *row.lanes;
            float* to = packed + row.at + c * row.step;
            if (row.offset < 0 || lanes.pieces == 0) {
                clear_row(to);
                continue;
            }
            const float* from = plane + row.offset + lanes.at[lanes.lane[0]];
            __builtin_prefetch(from + kAhead * stride_c);
            __builtin_prefetch(from + kAhead * stride_c + kRow - 1);
            if (whole(lanes)) {
                for (int l = 0; l < kRow; l += VLEN) store(to + l, load(from + l));
                continue;
            }
            clear_row(to);
            for (int32_t p = 0; p < lanes.pieces; ++p)
                copy_piece(plane + row.offset + lanes.at[lanes.lane[p]], to + lanes.lane[p], lanes.length[p]);
        }
    }
}

// Channels that are neighbours: 16 positions of as many channels are transposed.
static void pack_pixels(const float* x, int64_t channels, const ConvVectorRow& row, float* to) {
    if (row.offset < 0) {
        for (int64_t c = 0; c < channels; ++c) clear_row(to + c * row.step);
        return;
    }
    for (int lane = 0; lane < kRow; lane += VLEN) {
        const int64_t* at = row.lanes->at + lane;
        for (int64_t c = 0; c < channels; c += VLEN) {
            const int64_t n = channels - c < VLEN ? channels - c : VLEN;
            const float* from = x + row.offset + c;
            vfloat r[VLEN];
            for (int i = 0; i < VLEN; ++i)
                r[i] = at[i] < 0 ? zero() : n == VLEN ? load(from + at[i]) : load_first(from + at[i], n);
            transpose(r);
            for (int i = 0; i < VLEN; ++i) store(to + (c + i) * row.step + lane, r[i]);
        }
    }
}

static void pack(const float* x, int64_t stride_c, int64_t channels, const ConvVectorRow* rows, int64_t count,
                 float* packed) {
    if (stride_c != 1) return pack_planes(x, stride_c, channels, rows, count, packed);
    for (int64_t j = 0; j < count; ++j) pack_pixels(x, channels, rows[j], packed + rows[j].at);
}

static void unpack_planes(const float* packed, int64_t stride_c, int64_t channels, const ConvVectorRow* rows,
                          int64_t count, float* y) {
    for (int64_t c = 0; c < channels; ++c) {
        for (int64_t j = 0; j < count; ++j) {
            const ConvVectorRow& row = rows[j];
            if (row.offset < 0) continue;
            const ConvLanes& lanes = *row.lanes;
            const float* from = packed + row.at + c * row.step;
            float* to = y + c * stride_c + row.offset;
            for (int32_t p = 0; p < lanes.pieces; ++p)
                copy_piece(from + lanes.lane[p], to + lanes.at[lanes.lane[p]], lanes.length[p]);
        }
    }
}

static void unpack_pixels(const float* from, int64_t channels, const ConvVectorRow& row, float* y) {
    for (int lane = 0; lane < kRow; lane += VLEN) {
        const int64_t* at = row.lanes->at + lane;
        for (int64_t c = 0; c < channels; c += VLEN) {
            const int64_t n = channels - c < VLEN ? channels - c : VLEN;
            float* to = y + row.offset + c;
            vfloat r[VLEN];
            for (int i = 0; i < VLEN; ++i) r[i] = load(from + (c + i) * row.step + lane);
            transpose(r);
            for (int i = 0; i < VLEN; ++i) {
                if (at[i] < 0) continue;
                if (n == VLEN)
                    store(to + at[i], r[i]);
                else
                    store_first(to + at[i], r[i], n);
            }
        }
    }
}

static void unpack(const float* packed, int64_t stride_c, int64_t channels, const ConvVectorRow* rows, int64_t count,
                   float* y) {
    if (stride_c != 1) return unpack_planes(packed, stride_c, channels, rows, count, y);
    for (int64_t j = 0; j < count; ++j)
        if (rows[j].offset >= 0) unpack_pixels(packed + rows[j].at, channels, rows[j], y);
}

#if SK_VLEN == 16
// In entries. The stretches of a tap follow one another in the index, but in time those of other taps lie between.
constexpr int64_t kIndexAhead = 256, kSlotsAhead = 64;

// Whether slots follow one another, as all do until a regrow.
SK_INLINE bool in_order(__m512i slots, __mmask16 mask) {
    const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i first = _mm512_set1_epi32(_mm512_cvtsi512_si32(slots));
    return _mm512_mask_cmpneq_epi32_mask(mask, slots, _mm512_add_epi32(first, iota)) == 0;
}

// Entries [0, n) of one stretch, n in [1, 16].
SK_INLINE void fill_some(const int32_t* other, const int32_t* slot, int64_t n, uint32_t scale, uint32_t base,
                         const float* values, const int32_t* end_slot, float* weights, uint16_t* locals) {
    __builtin_prefetch(other + kIndexAhead);
    __builtin_prefetch(slot + kIndexAhead);
    const __mmask16 mask = (__mmask16)((1u << n) - 1u);
    const __m512i column = _mm512_maskz_loadu_epi32(mask, other);
    const __m512i local =
        _mm512_add_epi32(_mm512_mullo_epi32(column, _mm512_set1_epi32((int)scale)), _mm512_set1_epi32((int)base));
    _mm256_mask_storeu_epi16(locals, mask, _mm512_maskz_cvtepi32_epi16(mask, local));
    if (!weights) return;
    const __m512i slots = _mm512_maskz_loadu_epi32(mask, slot);
    if (in_order(slots, mask)) {
        __builtin_prefetch(values + *slot + kIndexAhead);
        _mm512_mask_storeu_ps(weights, mask, _mm512_maskz_loadu_ps(mask, values + *slot));
        return;
    }
    // A gather instruction is slower, and cannot look ahead.
    const int64_t far = end_slot - slot <= kSlotsAhead + n ? 0 : kSlotsAhead;
    for (int64_t k = 0; k < n; ++k) {
        __builtin_prefetch(values + slot[k + far]);
        weights[k] = values[slot[k]];
    }
}
#endif

SK_INLINE void fill_stretch(const int32_t* other, const int32_t* slot, int64_t count, uint32_t scale, uint32_t base,
                            const float* values, const int32_t* end_slot, float* weights, uint16_t* locals) {
#if SK_VLEN == 16
    for (int64_t k = 0; k < count; k += 16)
        fill_some(other + k, slot + k, count - k < 16 ? count - k : 16, scale, base, values, end_slot,
                  weights ? weights + k : weights, locals + k);
#else
    (void)end_slot;
    for (int64_t k = 0; k < count; ++k)
        locals[k] = static_cast<uint16_t>(static_cast<uint32_t>(other[k]) * scale + base);
    if (weights)
        for (int64_t k = 0; k < count; ++k) weights[k] = values[slot[k]];
#endif
}

// By rows, so that the index is read in order; the stream is written in as many places as there are tiles.
static void fill(const ConvFill& from, int64_t row, int64_t end, const float* values, float* weights, uint16_t* locals,
                 int32_t* place) {
    const int64_t tiles = from.chunks * from.groups;
    const int32_t* end_slot = from.slot + from.nnz;
    for (; row < end; ++row) {
        for (int64_t t = 0; t < tiles; ++t) {
            place[t] = 4 * from.places[row * tiles + t];
            if (row + 1 == end) continue;
            const int64_t later = 4 * static_cast<int64_t>(from.places[(row + 1) * tiles + t]);
            __builtin_prefetch(locals + later, 1);
            if (weights) __builtin_prefetch(weights + later, 1);
            if (weights) __builtin_prefetch(weights + later + 16, 1);
        }
        for (int64_t i = 0; i < from.tap_count; ++i) {
            const ConvTap tap = from.taps[i];
            const int32_t* cut = from.cuts + row * from.cuts_row + tap.tap * from.cuts_tap;
            // Modulo 2^32: only the difference from the tile's first column counts.
            const uint32_t scale = static_cast<uint32_t>(tap.scale);
            uint32_t first = static_cast<uint32_t>(tap.tap * from.origin_tap);
            for (int64_t j = 0; j < from.chunks; ++j, first += static_cast<uint32_t>(from.width)) {
                const int64_t count = cut[j + 1] - cut[j];
                int32_t& at = place[j * from.groups + tap.group];
                if (count > 0)
                    fill_stretch(from.other + cut[j], from.slot + cut[j], count, scale,
                                 static_cast<uint32_t>(tap.address) - first * scale, values, end_slot,
                                 weights ? weights + at : weights, locals + at);
                at += static_cast<int32_t>(count);
            }
        }
    }
}

// dvalues[slot[k]] = the sum of `copies` sums, `stride` entries apart.
SK_INLINE void scatter_stretch(const int32_t* slot, int64_t count, const float* sums, int64_t copies, int64_t stride,
                               float* dvalues) {
#if SK_VLEN == 16
    for (int64_t k = 0; k < count; k += 16) {
        const __mmask16 mask = (__mmask16)(count - k < 16 ? (1u << (count - k)) - 1u : 0xffffu);
        __builtin_prefetch(slot + k + kIndexAhead);
        const __m512i slots = _mm512_maskz_loadu_epi32(mask, slot + k);
        __m512 sum = _mm512_maskz_loadu_ps(mask, sums + k);
        for (int64_t c = 1; c < copies; ++c) sum += _mm512_maskz_loadu_ps(mask, sums + c * stride + k);
        if (in_order(slots, mask))
            _mm512_mask_storeu_ps(dvalues + slot[k], mask, sum);
        else
            _mm512_mask_i32scatter_ps(dvalues, mask, slots, sum, 4);
    }
#else
    for (int64_t k = 0; k < count; ++k) {
        float sum = sums[k];
        for (int64_t c = 1; c < copies; ++c) sum += sums[c * stride + k];
        dvalues[slot[k]] = sum;
    }
#endif
}

static void scatter(const ConvFill& to, int64_t row, int64_t end, const float* sums, int64_t copies, int64_t stride,
                    float* dvalues, int32_t* place) {
    const int64_t tiles = to.chunks * to.groups;
    for (; row < end; ++row) {
        for (int64_t t = 0; t < tiles; ++t) {
            place[t] = 4 * to.places[row * tiles + t];
            if (row + 1 == end) continue;
            const float* later = sums + 4 * static_cast<int64_t>(to.places[(row + 1) * tiles + t]);
            for (int64_t c = 0; c < copies; ++c) {
                __builtin_prefetch(later + c * stride);
                __builtin_prefetch(later + c * stride + 16);
            }
        }
        for (int64_t i = 0; i < to.tap_count; ++i) {
            const ConvTap tap = to.taps[i];
            const int32_t* cut = to.cuts + row * to.cuts_row + tap.tap * to.cuts_tap;
            for (int64_t j = 0; j < to.chunks; ++j) {
                int32_t& at = place[j * to.groups + tap.group];
                scatter_stretch(to.slot + cut[j], cut[j + 1] - cut[j], sums + at, copies, stride, dvalues);
                at += cut[j + 1] - cut[j];
            }
        }
    }
}

// Works on `Part` of the `Width` positions of a panel; x and y point at the part.
template <int Width, int Part>
static void spmm_part(const ConvRun* runs, int64_t count, const float* weights, const uint16_t* locals, const float* x,
                      float* y, bool first, const float* bias) {
    constexpr int kVectors = Part / VLEN;
    // Eight chains of multiply-adds in flight: two pipes of latency four.
    constexpr int kSets = kVectors >= 8 ? 1 : kVectors >= 4 ? 2 : 4;
    const float* const values = weights;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t start_at = 4 * static_cast<int64_t>(runs[i].quad);
        Columns columns(locals + start_at);
        weights = values + start_at;
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

        const auto add = [&](int set, vfloat weight, uint64_t local) __attribute__((always_inline)) {
            const float* from = x + local * kRow;
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
SK_INLINE void spmm_width(const ConvRun* runs, int64_t count, const float* weights, const uint16_t* locals,
                          const float* x, float* y, bool first, const float* bias) {
    constexpr int kPart = part_of(Width);
    for (int p = 0; p < Width; p += kPart)
        spmm_part<Width, kPart>(runs, count, weights, locals, x + p, y + p, first, bias);
}

static void spmm_tile(const ConvRun* runs, int64_t count, const float* weights, const uint16_t* locals, const float* x,
                      float* y, int64_t height, bool first, const float* bias) {
    if (height == 8) spmm_width<8 * kRow>(runs, count, weights, locals, x, y, first, bias);
    if (height == 4) spmm_width<4 * kRow>(runs, count, weights, locals, x, y, first, bias);
    if (height == 2) spmm_width<2 * kRow>(runs, count, weights, locals, x, y, first, bias);
    if (height == 1) spmm_width<1 * kRow>(runs, count, weights, locals, x, y, first, bias);
}

template <int Width, int Part>
static void sddmm_part(const ConvRun* runs, int64_t count, const uint16_t* locals, const float* x, const float* dy,
                       bool first, float* sums) {
    constexpr int kVectors = Part / VLEN;
    float* const all = sums;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t start_at = 4 * static_cast<int64_t>(runs[i].quad);
        Columns columns(locals + start_at);
        sums = all + start_at;
        vfloat d[kVectors];
        for (int v = 0; v < kVectors; ++v) d[v] = load(dy + static_cast<int64_t>(runs[i].row) * Width + v * VLEN);

        const auto dot = [&](uint64_t local) __attribute__((always_inline)) {
            const float* from = x + local * kRow;
            vfloat m = d[0] * load(from);
            for (int v = 1; v < kVectors; ++v) m = fma(d[v], load(from + v * VLEN), m);
            return m;
        };
        const auto add = [&](vquad sum) __attribute__((always_inline)) {
            vquad& to = *reinterpret_cast<vquad*>(sums);
            to = first ? sum : to + sum;
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

// The rows past the last position are left out: there X may hold what no position reads, and 0 * inf is not 0. Parts of
// 8, 4, 2 and 1 rows make up any number of them.
template <int Width, int Part>
SK_INLINE void sddmm_rows(const ConvRun* runs, int64_t count, const uint16_t* locals, const float* x, const float* dy,
                          int from, int end, bool first, float* sums) {
    if constexpr (Part <= Width && Part <= part_of(Width))
        for (; from + Part <= end; from += Part)
            sddmm_part<Width, Part>(runs, count, locals, x + from, dy + from, first && from == 0, sums);
    if constexpr (Part > kRow) sddmm_rows<Width, Part / 2>(runs, count, locals, x, dy, from, end, first, sums);
}

static void sddmm_tile(const ConvRun* runs, int64_t count, const uint16_t* locals, const float* x, const float* dy,
                       int64_t height, int64_t live, bool first, float* sums) {
    const int end = static_cast<int>(live) * kRow;
    if (height == 8) sddmm_rows<8 * kRow, 8 * kRow>(runs, count, locals, x, dy, 0, end, first, sums);
    if (height == 4) sddmm_rows<4 * kRow, 4 * kRow>(runs, count, locals, x, dy, 0, end, first, sums);
    if (height == 2) sddmm_rows<2 * kRow, 2 * kRow>(runs, count, locals, x, dy, 0, end, first, sums);
    if (height == 1) sddmm_rows<1 * kRow, 1 * kRow>(runs, count, locals, x, dy, 0, end, first, sums);
}

static void activate_floats(Activation activation, float* y, int64_t count) {
    activate(activation, y, nullptr, count, 1, count);
}

extern const ConvUnstructuredTable conv_unstructured_table;
const ConvUnstructuredTable conv_unstructured_table = {pack,    unpack,    activate_floats, fill,
                                                       scatter, spmm_tile, sddmm_tile};

}  // namespace sk::SK_ISA
