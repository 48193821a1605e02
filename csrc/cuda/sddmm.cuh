// dW [S, S] = dY' [S, positions] * gather(X) [positions, S] at active sub-blocks (the weight gradient), or at all of
// them for their squared norms (growth scores). Sums are fp32, split over positions without atomics: each split writes
// its own partial sums, and a second kernel adds them in order.
//
// A block of threads owns the sub-blocks of `rows_n` rows and one chunk of channels, all taps (those of one tap are
// shifted reads of the same region on chip, gather.cuh), of which each warp holds up to BLOCKS in registers:
//
//                        chunk of channels x taps
//                       +--+--+--+--+--+--+--+--+--+
//            rows_n     |##|  |##|##|  |  |##|  |##|      # active; dealt out evenly to the warps in their order,
//            rows       |  |##|  |  |##|##|  |##|  |      a run each, so that neighbours of a row share dY's fragment
//                       +--+--+--+--+--+--+--+--+--+
//
// and walks its share of the tiles of positions, two buffers deep. With more active sub-blocks than
// warps * BLOCKS, further passes (block_z) take the rest.
//
// Traffic from L2, 3x3, S = 32, a tile of P positions, G rows, density d: P * 1.4 * 64 bytes of X and 64 P G of dY for
// 9 G d * 2048 P FLOP: G = 8, d = .5: 123 FLOP a byte; lower densities take more rows. Registers: BLOCKS * S * S / 32
// sums (160), 16 of fragments. Shared memory: 2 (region * chunk + P * G * S) * 2 bytes, and 20 a pixel.
#pragma once

#include "cuda/device.h"
#include "cuda/fragments.cuh"
#include "cuda/gather.cuh"

namespace sk::gpu {

// Where every sub-block counts, a launch takes a panel of rows, so that `partial` stays small.
struct SddmmArgs {
    Gather gather;  // forward
    const uint16_t *x, *dy;
    int64_t dy_n_stride, dy_h_stride, dy_w_stride;
    const int32_t *start, *entry;       // as for ProductArgs; null: every sub-block counts
    float* values;                      // or null: by entry[2 k + 1], rows of `pitch`
    float* scores;                      // or null: [rows, taps, columns], squared norms
    float* partial;                     // or null: [splits, blocks, S, S]
    int64_t blocks;                     // sub-blocks that `partial` has room for: the active ones, or the panel's
    int rows, first_row;                // of the whole weight, and of the panel, a multiple of rows_n
    int chunks, chunk, columns, pitch;  // columns: of sub-blocks a tap
    int source_channels, result_channels, aligned;
    int warps, rows_n, splits;
};

struct SddmmLayout {
    int sources, dy_sources, pixels, shifts, region_bytes, stage_bytes, stages, total;

    SK_BOTH SddmmLayout(const SddmmArgs& a, int side) {
        const Gather& g = a.gather;
        sources = 0;
        dy_sources = sources + 2 * 8 * g.region();
        pixels = dy_sources + 2 * 8 * g.positions();
        shifts = pixels + 4 * g.positions();
        stages = (shifts + 4 * g.taps() + 127) / 128 * 128;
        region_bytes = (g.region() * a.chunk * 2 + 127) / 128 * 128;
        stage_bytes = region_bytes + (g.positions() * a.rows_n * side * 2 + 127) / 128 * 128;
        total = stages + 2 * stage_bytes;
    }
};

// A sub-block of the group: its row within the group, its tap, its column within the chunk, and its number among the
// active ones or, where every one counts, its place in the panel.
struct Held {
    int row, tap, column;
    int64_t number;
};

template <class T, int SIDE, int BLOCKS>
SK_KERNEL(256)
sddmm_kernel(const SK_GRID_CONSTANT SddmmArgs a) {
    if constexpr (Served<T>::value) {
        constexpr int N = SIDE / 16;
        const Gather& g = a.gather;
        const SddmmLayout layout(a, SIDE);
        unsigned char* shared = shared_memory();
        auto* sources = reinterpret_cast<int64_t*>(shared + layout.sources);
        auto* dy_sources = reinterpret_cast<int64_t*>(shared + layout.dy_sources);
        auto* pixels = reinterpret_cast<int32_t*>(shared + layout.pixels);
        auto* shifts = reinterpret_cast<int32_t*>(shared + layout.shifts);

        const int thread = thread_index(), lane = thread & 31, warp = thread >> 5;
        const int split = block_y(), chunk = block_x() % a.chunks;
        const int first_row = a.first_row + block_x() / a.chunks * a.rows_n;
        const int rows = first_row + a.rows_n <= a.rows ? a.rows_n : a.rows - first_row;
        const int taps = g.taps(), positions = g.positions(), per_chunk = a.chunk / SIDE;
        Axis v = vertical(g, 0), u = horizontal(g, 0);
        v.transposed = u.transposed = 0;  // known to the compiler

        // This pass's run of the group's sub-blocks, and this warp's run of that.
        const auto count_in = [&](int r) {
            if (!a.start) return taps * per_chunk;
            const int32_t* start = a.start + int64_t{first_row + r} * (a.chunks + 1) + chunk;
            return start[1] - start[0];
        };
        int count = 0;
        for (int r = 0; r < rows; ++r) count += count_in(r);
        const int passes = (count + a.warps * BLOCKS - 1) / (a.warps * BLOCKS);
        if (block_z() >= passes) return;
        const int pass_first = static_cast<int>(int64_t{count} * block_z() / passes);
        const int pass_count = static_cast<int>(int64_t{count} * (block_z() + 1) / passes) - pass_first;
        const int first = pass_first + pass_count * warp / a.warps;
        const int held = pass_first + pass_count * (warp + 1) / a.warps - first;
        const auto locate = [&](int i) {
            int r = 0;
            for (int here = count_in(0); i >= here; here = count_in(++r)) i -= here;
            if (!a.start) {
                const int64_t at = (int64_t{first_row - a.first_row + r} * taps + i / per_chunk) * a.columns;
                return Held{r, i / per_chunk, i % per_chunk, at + chunk * per_chunk + i % per_chunk};
            }
            const int64_t number = a.start[int64_t{first_row + r} * (a.chunks + 1) + chunk] + i;
            const int key = a.entry[2 * number] - chunk * taps * per_chunk;
            return Held{r, key / per_chunk, key % per_chunk, number};
        };
        // Lane b finds the warp's block b, once.
        const Held mine = lane < held ? locate(first + lane) : Held{0, 0, 0, 0};
        int row_of[BLOCKS], tap_of[BLOCKS], column_of[BLOCKS];
        SK_UNROLL for (int b = 0; b < BLOCKS; ++b) {
            row_of[b] = shuffle(mine.row, b);
            tap_of[b] = shuffle(mine.tap, b);
            column_of[b] = shuffle(mine.column, b);
        }

        for (int m = thread; m < positions; m += block_threads()) pixels[m] = region_pixel(g, v, u, m);
        for (int tap = thread; tap < taps; tap += block_threads()) shifts[tap] = tap_shift(g, v, u, tap);

        const Rows x_rows(2 * a.chunk), dy_rows(a.rows_n * SIDE * 2);
        const int rounds = g.rounds();
        const int first_unit = static_cast<int>(int64_t{g.tiles()} * split / a.splits) * rounds;
        const int last_unit = static_cast<int>(int64_t{g.tiles()} * (split + 1) / a.splits) * rounds;
        // Where the pixels of a unit lie, once a pixel: the copies, one a segment, are most of what the warps issue.
        const auto find_unit = [&](int unit) {
            const Tile tile = tile_at(g, unit / rounds);
            int64_t* to = sources + (unit & 1) * g.region();
            SK_NO_UNROLL for (int q = thread; q < g.region(); q += block_threads()) to[q] =
                source_offset(g, v, u, tile, unit % rounds, q);
            to = dy_sources + (unit & 1) * positions;
            SK_NO_UNROLL for (int m = thread; m < positions; m += block_threads()) {
                const int row = m / g.tile_w;
                const int n = tile.n + row / g.tile_h, h = tile.h + row % g.tile_h, w = tile.w + m % g.tile_w;
                const bool inside = n < g.batch && h < g.result_h && w < g.result_w;
                to[m] = inside ? n * a.dy_n_stride + h * a.dy_h_stride + w * a.dy_w_stride : -1;
            }
        };
        const auto start_unit = [&](int unit) {
            unsigned char* stage = shared + layout.stages + (unit & 1) * layout.stage_bytes;
            const int channel = chunk * a.chunk, dy_channel = first_row * SIDE;
            copy_rows(stage, x_rows, a.x + channel, sources + (unit & 1) * g.region(), g.region(), a.chunk / 8,
                      a.source_channels - channel, a.aligned);
            copy_rows(stage + layout.region_bytes, dy_rows, a.dy + dy_channel, dy_sources + (unit & 1) * positions,
                      positions, a.rows_n * SIDE / 8, a.result_channels - dy_channel, a.aligned);
        };

        Accumulator sums[BLOCKS][N][N];
        SK_UNROLL for (int b = 0; b < BLOCKS; ++b) SK_UNROLL for (int m = 0; m < N; ++m)
            SK_UNROLL for (int n = 0; n < N; ++n) sums[b][m][n]
                .clear();

        // Found two units ahead, copied one ahead. What find_unit overwrites was read before the last barrier.
        for (int unit = first_unit - 2; unit < last_unit; ++unit) {
            if (unit + 1 >= first_unit && unit + 1 < last_unit) start_unit(unit + 1);
            commit_copies();
            if (unit + 2 < last_unit) find_unit(unit + 2);
            wait_copies<1>();
            sync_block();
            if (unit < first_unit) continue;
            const unsigned char* stage = shared + layout.stages + (unit & 1) * layout.stage_bytes;
            const int tap = unit % rounds;  // where taps go one by one
            for (int k = 0; k < positions; k += 16) {
                FragmentA<true> dy[N];
                SK_UNROLL for (int b = 0; b < BLOCKS; ++b) {
                    if (b >= held || (g.per_tap && tap_of[b] != tap)) continue;
                    if (g.per_tap || b == 0 || row_of[b] != row_of[b - 1])
                        SK_UNROLL for (int m = 0; m < N; ++m) dy[m].load([&](int i, int s) {
                            return stage + layout.region_bytes + dy_rows.at(k + i, row_of[b] * (SIDE / 8) + 2 * m + s);
                        });
                    const int shift = shifts[tap_of[b]];
                    SK_UNROLL for (int n = 0; n < N; ++n) {
                        FragmentB x;
                        x.load(true, [&](int i, int s) {
                            return stage + x_rows.at(pixels[k + i] + shift, 2 * (column_of[b] * N + n) + s);
                        });
                        SK_UNROLL for (int m = 0; m < N; ++m) sums[b][m][n].template multiply<T>(dy[m], x);
                    }
                }
            }
            sync_block();
        }
        wait_copies<0>();

        // The sums move up in their registers instead of being indexed.
        SK_NO_UNROLL for (int b = 0; b < held; ++b) {
            Accumulator block_sums[N][N];
            SK_UNROLL for (int m = 0; m < N; ++m) SK_UNROLL for (int n = 0; n < N; ++n) {
                block_sums[m][n] = sums[0][m][n];
                SK_UNROLL for (int later = 1; later < BLOCKS; ++later) sums[later - 1][m][n] = sums[later][m][n];
            }
            const Held block = locate(first + b);
            const int row = (first_row + block.row) * SIDE, column = (chunk * per_chunk + block.column) * SIDE;
            if (!a.start && column >= a.columns * SIDE) continue;  // the last chunk need not be full
            float* to = a.partial ? a.partial + (int64_t{split} * a.blocks + block.number) * (SIDE * SIDE) : nullptr;
            if (!to && a.values) to = a.values + 16 * int64_t{a.entry[2 * block.number + 1]};
            const int64_t pitch = a.partial ? SIDE : a.pitch;
            float norm = 0.0f;
            SK_UNROLL for (int m = 0; m < N; ++m) SK_UNROLL for (int n = 0; n < N; ++n)
                SK_UNROLL for (int i = 0; i < 8; ++i) {
                const int o = 16 * m + Accumulator::row(i), c = 16 * n + Accumulator::column(i);
                // Padding is zero whatever met it: zero times infinity is not.
                const bool real = row + o < a.result_channels && column + c < a.source_channels;
                const float d = real ? block_sums[m][n].d[i] : 0.0f;
                if (to)
                    to[o * pitch + c] = d;
                else
                    norm += d * d;
            }
            if (to) continue;
            SK_UNROLL for (int mask = 16; mask; mask /= 2) norm += shuffle_xor(norm, mask);
            if (lane == 0) a.scores[int64_t{a.first_row} * taps * a.columns + block.number] = norm;
        }
    }
}

// Adds the splits of one sub-block in their order: a warp of the block's eight takes one.
template <int SIDE>
SK_KERNEL(256)
sddmm_reduce_kernel(const SK_GRID_CONSTANT SddmmArgs a) {
    const int lane = thread_index() & 31;
    const int64_t block = int64_t{block_x()} * 8 + (thread_index() >> 5), stride = a.blocks * SIDE * SIDE;
    if (block >= a.blocks) return;
    float* values = a.values ? a.values + 16 * int64_t{a.entry[2 * block + 1]} : nullptr;
    float norm = 0.0f;
    for (int i = lane; i < SIDE * SIDE; i += 32) {
        const float* from = a.partial + block * SIDE * SIDE + i;
        float sum = 0.0f;
        for (int s = 0; s < a.splits; ++s) sum += from[s * stride];
        if (values) values[i / SIDE * a.pitch + i % SIDE] = sum;
        norm += sum * sum;
    }
    if (values) return;
    SK_UNROLL for (int mask = 16; mask; mask /= 2) norm += shuffle_xor(norm, mask);
    if (lane == 0) a.scores[int64_t{a.first_row} * a.gather.taps() * a.columns + block] = norm;
}

}  // namespace sk::gpu
