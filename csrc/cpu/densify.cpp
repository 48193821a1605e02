// The dense weight of block-CSR values, and the active blocks of a dense weight: copies of elements of 2, 4 or 8 bytes,
// or between fp32 values and a bf16 weight. Threads own rows.
#include <algorithm>
#include <cstring>

#include "api.h"
#include "cpu/parallel.h"
#include "cpu/sides.h"

namespace sk {

namespace {

constexpr int64_t kTile = 32, kTileArea = kTile * kTile;
// A thread that copies less than this costs more than it saves (10 us to wake it, Zen 5).
constexpr int64_t kBytesOfAThread = 1 << 18;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool valid(const BlockIndex& w, const DenseLayout& d, int64_t threads) {
    return is_side(w.bh) && is_side(w.bw) && w.out > 0 && w.in > 0 && d.taps > 0 && w.nnzb >= 0 && threads > 0 &&
           (d.tile == 0 || d.tile == kTile);
}

// Bits of an element of the one as bits of the other.
template <class To, class From>
inline To as(From x) {
    if constexpr (sizeof(To) == sizeof(From)) {
        return x;
    } else if constexpr (sizeof(To) > sizeof(From)) {  // bf16 to fp32
        return static_cast<To>(x) << 16;
    } else {  // fp32 to bf16, to the nearest, ties to even; a NaN stays one
        const bool nan = (x & 0x7fffffffu) > 0x7f800000u;
        return static_cast<To>(nan ? (x >> 16) | 0x40u : (x + 0x7fffu + ((x >> 16) & 1u)) >> 16);
    }
}

// V and D are the elements of values and of the dense weight, BW the block width: whole blocks are copied in pieces of
// a length that the compiler knows.
template <class V, class D, int BW>
class Copy {
public:
    Copy(const BlockIndex& w, const DenseLayout& layout, V* values, D* dense)
        : w(w), layout(layout), values(values), dense(dense) {}

    void scatter([[maybe_unused]] int64_t threads) const {
        const bool rows_are_whole = layout.tile || layout.out_stride == width;
        if (!rows_are_whole) std::memset(dense, 0, w.out * width * sizeof(D));
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t unit = 0; unit < units; ++unit) {
            const int64_t first = unit * unit_rows;
            // Whole rows are cleared by the thread that fills them, while they are in its cache.
            if (layout.tile && !single)
                std::memset(at(first, 0, 0), 0,
                            (std::min(tiles_rows(), first + unit_rows) - first) * padded_width * sizeof(D));
            else if (!layout.tile && rows_are_whole && !single)
                std::memset(at(first, 0, 0), 0, (std::min(w.out, first + unit_rows) - first) * width * sizeof(D));
            for (int64_t r = first / w.bh; r < (first + unit_rows) / w.bh; ++r) {
                if (single)
                    scatter_row(r, rows_are_whole);
                else if (r < row_blocks)
                    for (int64_t k = w.crow[r]; k < w.crow[r + 1]; ++k) scatter_block(r, k);
            }
        }
    }

    void gather([[maybe_unused]] int64_t threads) const {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t r = 0; r < row_blocks; ++r) {
            if (single)
                gather_row(r);
            else
                for (int64_t k = w.crow[r]; k < w.crow[r + 1]; ++k) gather_block(r, k);
        }
    }

private:
    static constexpr int kPiece = BW < kTile ? BW : kTile;

    D* at(int64_t o, int64_t t, int64_t c) const {
        if (!layout.tile) return dense + o * layout.out_stride + t * layout.tap_stride + c * layout.in_stride;
        const int64_t tile = (o / kTile * layout.taps + t) * tiles_per_tap + c / kTile;
        return dense + tile * kTileArea + o % kTile * kTile + c % kTile;
    }

    // Calls visit(values, dense, columns inside) for every row of a block and every piece of it that lies together;
    // dense is null where nothing is inside.
    template <class Visit>
    void pieces(int64_t r, int64_t k, Visit visit) const {
        const uint32_t block = static_cast<uint32_t>(w.col[k]);
        // Without edge blocks tap-major rows are of one kind, which saves a division.
        const int64_t tap = whole ? 0 : block / per_tap, col = (whole ? block : block % per_tap) * int64_t{BW};
        const int64_t down = layout.tile ? kTile : layout.out_stride;
        for (int64_t i = 0; i < w.bh; i += kTile) {
            const int64_t o = r * w.bh + i, rows = std::min(w.bh - i, kTile);
            for (int64_t j = 0; j < BW; j += kPiece) {
                const int64_t inside = whole ? kPiece : std::clamp<int64_t>(w.in - col - j, 0, kPiece);
                const int64_t rows_inside = inside ? std::clamp<int64_t>(w.out - o, 0, rows) : 0;
                V* v = values + (w.slot[k] * w.bh + i) * BW + j;
                D* d = rows_inside ? at(o, tap, col + j) : nullptr;
                for (int64_t n = 0; n < rows; ++n) {
                    const bool real = n < rows_inside;
                    visit(v + n * BW, real ? d + n * down : nullptr, real ? inside : 0);
                }
            }
        }
    }

    void scatter_block(int64_t r, int64_t k) const {
        pieces(r, k, [&](const V* v, D* to, int64_t inside) {
            if (inside >= kPiece && step == 1)
                for (int j = 0; j < kPiece; ++j) to[j] = as<D>(v[j]);
            else
                for (int64_t j = 0; j < inside; ++j) to[j * step] = as<D>(v[j]);
        });
    }

    void gather_block(int64_t r, int64_t k) const {
        pieces(r, k, [&](V* v, const D* from, int64_t inside) {
            if (inside >= kPiece && step == 1) {
                for (int j = 0; j < kPiece; ++j) v[j] = as<V>(from[j]);
            } else {
                for (int64_t j = 0; j < inside; ++j) v[j] = as<V>(from[j * step]);
                for (int64_t j = inside; j < kPiece; ++j) v[j] = 0;
            }
        });
    }

    // Of an unstructured weight a division a nonzero, or a call, would take most of the time. Its columns rise.

    void scatter_row(int64_t o, bool clear) const {
        int64_t k = o < w.out ? w.crow[o] : w.nnzb;
        const int64_t end = o < w.out ? w.crow[o + 1] : w.nnzb;
        if (layout.tile) {
            return tile_rows(o, [&](D* to, int64_t first, int64_t last) {
                std::memset(to, 0, kTile * sizeof(D));
                for (; k < end && w.col[k] < last; ++k) to[w.col[k] - first] = as<D>(values[w.slot[k]]);
            });
        }
        D* row = at(o, 0, 0);
        if (clear) std::memset(row, 0, width * sizeof(D));
        if (tap_major) {
            for (; k < end; ++k) row[w.col[k]] = as<D>(values[w.slot[k]]);
            return;
        }
        for (int64_t t = 0; t < layout.taps; ++t) {
            D* to = at(o, t, 0);
            for (const int64_t first = t * w.in; k < end && w.col[k] < first + w.in; ++k)
                to[(w.col[k] - first) * step] = as<D>(values[w.slot[k]]);
        }
    }

    void gather_row(int64_t o) const {
        int64_t k = w.crow[o];
        const int64_t end = w.crow[o + 1];
        if (layout.tile) {
            return tile_rows(o, [&](const D* from, int64_t first, int64_t last) {
                for (; k < end && w.col[k] < last; ++k) values[w.slot[k]] = as<V>(from[w.col[k] - first]);
            });
        }
        if (tap_major) {
            const D* row = at(o, 0, 0);
            for (; k < end; ++k) values[w.slot[k]] = as<V>(row[w.col[k]]);
            return;
        }
        for (int64_t t = 0; t < layout.taps; ++t) {
            const D* from = at(o, t, 0);
            for (const int64_t first = t * w.in; k < end && w.col[k] < first + w.in; ++k)
                values[w.slot[k]] = as<V>(from[(w.col[k] - first) * step]);
        }
    }

    // Calls visit(row, first column, last column + 1) for row o of every tile of its band, which follow each other in
    // memory. A row of a tile is on a page of its own, across which no hardware prefetches: 2.3 times as fast with.
    template <class Visit>
    void tile_rows(int64_t o, Visit visit) const {
        constexpr int64_t kAhead = 4;  // tiles
        D* row = at(o, 0, 0);
        const int64_t tiles = layout.taps * tiles_per_tap;
        for (int64_t t = 0, n = 0; t < layout.taps; ++t) {
            for (int64_t c = 0; c < w.in; c += kTile, row += kTileArea, ++n) {
                if (n + kAhead < tiles)
                    for (int64_t line = 0; line < kTile; line += 64 / sizeof(D))
                        __builtin_prefetch(row + kAhead * kTileArea + line, 1);
                visit(row, t * w.in + c, t * w.in + std::min(w.in, c + kTile));
            }
        }
    }

    const BlockIndex& w;
    const DenseLayout& layout;
    V* const values;
    D* const dense;
    const int64_t width = layout.taps * w.in;
    const int64_t row_blocks = ceil_div(w.out, w.bh), tiles_per_tap = ceil_div(w.in, kTile);
    const int64_t padded_width = layout.taps * tiles_per_tap * kTile;
    const uint32_t per_tap = static_cast<uint32_t>(ceil_div(w.in, BW));
    const int64_t step = layout.tile ? 1 : layout.in_stride;
    const bool single = BW == 1 && w.bh == 1;
    const bool tap_major = !layout.tile && layout.in_stride == 1 && (layout.taps == 1 || layout.tap_stride == w.in);
    const bool whole = tap_major && w.in % BW == 0;
    // Rows that one thread writes at a time.
    const int64_t unit_rows = layout.tile ? std::max(w.bh, kTile) : w.bh;
    const int64_t units = ceil_div(layout.tile ? tiles_rows() : w.out, unit_rows);

    // Of tiles rows are written up to the edge of the last tile.
    int64_t tiles_rows() const { return ceil_div(w.out, kTile) * kTile; }
};

template <class V, class D, int BW>
void run(const BlockIndex& w, const DenseLayout& d, bool scatter, void* values, void* dense, int64_t threads) {
    const Copy<V, D, BW> copy(w, d, static_cast<V*>(values), static_cast<D*>(dense));
    scatter ? copy.scatter(threads) : copy.gather(threads);
}

template <class V, class D>
void run(const BlockIndex& w, const DenseLayout& d, bool scatter, void* values, void* dense, int64_t threads) {
    threads = std::min(threads, 1 + w.out * d.taps * w.in * static_cast<int64_t>(sizeof(D)) / kBytesOfAThread);
    switch (w.bw) {
        case 1:
            return run<V, D, 1>(w, d, scatter, values, dense, threads);
        case 4:
            return run<V, D, 4>(w, d, scatter, values, dense, threads);
        case 8:
            return run<V, D, 8>(w, d, scatter, values, dense, threads);
        case 16:
            return run<V, D, 16>(w, d, scatter, values, dense, threads);
        case 32:
            return run<V, D, 32>(w, d, scatter, values, dense, threads);
        default:
            return run<V, D, 64>(w, d, scatter, values, dense, threads);
    }
}

int copy(const BlockIndex& w, const DenseLayout& d, int64_t value_bytes, int64_t dense_bytes, bool scatter,
         void* values, void* dense, int64_t threads) {
    if (!valid(w, d, threads)) return kInvalid;
    if (value_bytes == 2 && dense_bytes == 2)
        run<uint16_t, uint16_t>(w, d, scatter, values, dense, threads);
    else if (value_bytes == 4 && dense_bytes == 2)
        run<uint32_t, uint16_t>(w, d, scatter, values, dense, threads);
    else if (value_bytes == 4 && dense_bytes == 4)
        run<uint32_t, uint32_t>(w, d, scatter, values, dense, threads);
    else if (value_bytes == 8 && dense_bytes == 8)
        run<uint64_t, uint64_t>(w, d, scatter, values, dense, threads);
    else
        return kInvalid;
    return kOk;
}

}  // namespace

int densify(const BlockIndex& w, const DenseLayout& layout, int64_t value_bytes, int64_t dense_bytes,
            const void* values, void* dense, int64_t threads) {
    return copy(w, layout, value_bytes, dense_bytes, true, const_cast<void*>(values), dense, threads);
}

int gather_blocks(const BlockIndex& w, const DenseLayout& layout, int64_t value_bytes, int64_t dense_bytes,
                  const void* dense, void* values, int64_t threads) {
    return copy(w, layout, value_bytes, dense_bytes, false, values, const_cast<void*>(dense), threads);
}

}  // namespace sk
