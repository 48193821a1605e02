// y [positions, channels] = gather(x) * W' (+ bias, + activation) with a block-CSR W, and dx = scatter(dy * W) through
// the transposed index, on the values as they are stored. Linear is a 1x1 convolution.
//
// A block of threads owns a tile of positions (gather.cuh) and `warps_n` rows of sub-blocks of side S = 32 or 16:
//
//                     rows of sub-blocks, one a warp
//                    +------+------+------+------+
//        16 TILES    | warp | warp | warp | ...  |     accumulators of a warp: 16 TILES x S, in registers
//        positions   +------+------+------+------+
//        of a warp   | warps_m times             |
//                    +------+------+------+------+
//
// For each chunk of channels the pixels of the tile, halo included, come on chip once, two buffers deep, and serve all
// taps and all rows. Then every warp walks the entries of its own row that fall into the chunk: absent blocks cost
// nothing, and warps meet only once a chunk, so that an uneven row delays the others little (nine taps of density d
// vary by 1/sqrt(9 d) of their mean, and two blocks of threads an SM even that out). A warp's sub-blocks arrive through
// a ring of its own, `stages` deep, which takes no barrier of the block.
//
// Traffic from L2 for a chunk of 32 channels, 3x3, P positions, G rows, density d, 2 bytes an element: P * 1.4 * 64
// bytes of pixels and 9 G d 2048 of weights for 9 G d * 65536 P / 32 FLOP. P = 128, G = 7, d = .5: 11.5 + 64.5 KB for
// 8.3 MFLOP, 109 FLOP a byte; P = 256, G = 4 (weights shared by two warps through L1): 20 + 37 KB for 9.4 MFLOP, 165.
//
// Registers: 16 TILES S / 32 fp32 sums a thread (128 for TILES = 8, S = 32), 8 of b, 4 of a, TILES addresses.
// Shared memory: 2 regions, stages * S * S * 2 bytes a warp, tables. From shared memory a warp reads
// (TILES + S / 16) * 512 bytes for TILES * S / 8 mma: 40 clocks for what takes 51 at the mma.sync rate of an H100.
#pragma once

#include "cuda/device.h"
#include "cuda/epilogue.cuh"
#include "cuda/fragments.cuh"
#include "cuda/gather.cuh"

namespace sk::gpu {

struct ProductArgs {
    Gather gather;
    Epilogue epilogue;
    const uint16_t *x, *values;
    float* partial;  // [splits, phases, tiles, positions, rows * S]: the sums of each split, or null for one split
    // Entry k of row r, start[r * (chunks + 1) + c] <= k < start[r * (chunks + 1) + c + 1], lies in chunk c:
    // entry[2 k] is (c * taps + tap) * (chunk / S) + column within the chunk, entry[2 k + 1] the sub-block's place in
    // values, in units of 16 elements. Sorted.
    const int32_t *start, *entry;
    int rows, chunks, chunk, pitch;  // chunk in channels; pitch: elements between a sub-block's stored rows
    int source_channels, aligned;
    int warps_m, warps_n, stages, splits;
};

// Where things lie in shared memory, in bytes.
struct ProductLayout {
    int sources, results, pixels, shifts, live, regions, region_bytes, rings, total;

    SK_BOTH ProductLayout(const ProductArgs& a, int side) {
        const Gather& g = a.gather;
        sources = 0;
        results = sources + 8 * (g.per_tap ? 0 : g.region());
        pixels = results + 8 * g.positions();
        shifts = pixels + 4 * g.positions();
        live = shifts + 4 * g.taps();
        regions = (live + a.chunks + 127) / 128 * 128;
        region_bytes = g.region() * a.chunk * 2;
        rings = (regions + 2 * region_bytes + 127) / 128 * 128;
        total = rings + a.stages * a.warps_m * a.warps_n * side * side * 2;
    }
};

// A sub-block into its place in the ring, by one warp.
template <int SIDE>
SK_DEVICE void copy_weights(unsigned char* to, const uint16_t* from, int pitch) {
    const int lane = thread_index() & 31;
    const Rows rows(2 * SIDE);
    SK_UNROLL for (int i = 0; i < SIDE * SIDE / 256; ++i) {
        const int at = lane + 32 * i, row = at / (SIDE / 8), segment = at % (SIDE / 8);
        copy_16_async(to + rows.at(row, segment), from + int64_t{row} * pitch + 8 * segment, 16);
    }
}

// The pixels of a tile for one chunk of channels, and one tap where taps go one by one, by the whole block.
SK_DEVICE void copy_region(unsigned char* to, const ProductArgs& a, const Axis& v, const Axis& u, const Tile& tile,
                           const int64_t* sources, int chunk, int tap) {
    const Gather& g = a.gather;
    const Rows rows(2 * a.chunk);
    const int segments = a.chunk / 8, count = g.region() * segments;
    for (int i = thread_index(); i < count; i += block_threads()) {
        const int pixel = i / segments, segment = i % segments, channel = chunk * a.chunk + 8 * segment;
        const int64_t offset = g.per_tap ? source_offset(g, v, u, tile, tap, pixel) : sources[pixel];
        const int elements = offset < 0 ? 0 : clamp_segment(a.source_channels - channel);
        copy_segment(to + rows.at(pixel, segment), elements ? a.x + offset + channel : a.x, elements, a.aligned);
    }
}

// Threads of a block at most: 16 TILES S sums a warp leave room for 8 warps, half of them for 12 (on sm_75, whose code
// needs a few registers more) and, in 128 registers, for two blocks of 8 an SM.
SK_BOTH constexpr int most_threads(int side, int tiles) {
    return tiles * side >= 256 ? 256 : SK_ARCH >= 800 ? 512 : 384;
}

template <class T, int SIDE, int TILES>
SK_KERNEL(most_threads(SIDE, TILES))
product_kernel(const SK_GRID_CONSTANT ProductArgs a) {
    if constexpr (Served<T>::value) {
        constexpr int N = SIDE / 16;  // tiles of 16 in a sub-block's side
        const Gather& g = a.gather;
        const ProductLayout layout(a, SIDE);
        unsigned char* shared = shared_memory();
        auto* sources = reinterpret_cast<int64_t*>(shared + layout.sources);
        auto* results = reinterpret_cast<int64_t*>(shared + layout.results);
        auto* pixels = reinterpret_cast<int32_t*>(shared + layout.pixels);
        auto* shifts = reinterpret_cast<int32_t*>(shared + layout.shifts);
        unsigned char* live = shared + layout.live;

        const int thread = thread_index(), lane = thread & 31, warp = thread >> 5;
        const int warp_n = warp % a.warps_n, warp_m = warp / a.warps_n;
        const int phase = block_z() / a.splits, split = block_z() % a.splits;
        const Axis v = vertical(g, phase), u = horizontal(g, phase);
        const Tile tile = tile_at(g, block_x());
        const int first_row = block_y() * a.warps_n, row = first_row + warp_n;
        const int first_chunk = static_cast<int>(int64_t{a.chunks} * split / a.splits);
        const int last_chunk = static_cast<int>(int64_t{a.chunks} * (split + 1) / a.splits);
        const int taps = g.taps(), positions = g.positions(), per_chunk = a.chunk / SIDE;

        if (!g.per_tap)
            for (int q = thread; q < g.region(); q += block_threads()) sources[q] = source_offset(g, v, u, tile, 0, q);
        for (int m = thread; m < positions; m += block_threads()) {
            results[m] = result_offset(g, v, u, tile, m);
            pixels[m] = region_pixel(g, v, u, m);
        }
        for (int tap = thread; tap < taps; tap += block_threads()) shifts[tap] = tap_shift(g, v, u, tap);
        // Which chunks any of the rows has a block in.
        for (int c = thread; c < a.chunks; c += block_threads()) {
            bool any = false;
            for (int r = first_row; r < first_row + a.warps_n && r < a.rows; ++r) {
                const int32_t* start = a.start + int64_t{r} * (a.chunks + 1) + c;
                any = any || start[1] > start[0];
            }
            live[c] = any;
        }
        sync_block();

        // This warp's entries, 64 of them in registers: entry `base + i` lies in lane i % 32 of window i / 32.
        int next = 0, end = 0;
        if (row < a.rows) {
            const int32_t* start = a.start + int64_t{row} * (a.chunks + 1);
            next = start[first_chunk];
            end = start[last_chunk];
        }
        int base = next;
        int32_t where[2], place[2];
        const auto fetch = [&](int window) {
            const int k = base + 32 * window + lane;
            where[window] = k < end ? a.entry[2 * int64_t{k}] : 0;
            place[window] = k < end ? a.entry[2 * int64_t{k} + 1] : 0;
        };
        fetch(0);
        fetch(1);
        unsigned char* ring = shared + layout.rings + warp * a.stages * SIDE * SIDE * 2;
        const int pitch = a.pitch;
        const bool turned = g.transposed;  // the stored sub-block is [k][n]
        const auto start_weights = [&](int k) {
            const int i = k - base;
            const int32_t at = shuffle(i < 32 ? place[0] : place[1], i & 31);
            if (k < end) copy_weights<SIDE>(ring + k % a.stages * SIDE * SIDE * 2, a.values + 16 * int64_t{at}, pitch);
        };
        for (int s = 0; s < a.stages - 1; ++s) {
            start_weights(next + s);
            commit_copies();
        }

        Accumulator sums[TILES][N];
        SK_UNROLL for (int m = 0; m < TILES; ++m) SK_UNROLL for (int n = 0; n < N; ++n) sums[m][n].clear();
        int base_pixel[TILES];
        SK_UNROLL for (int m = 0; m < TILES; ++m) base_pixel[m] =
            pixels[(warp_m * TILES + m) * 16 + FragmentA<false>::row(lane)];

        // Rounds are chunks, or (chunk, tap): those without a block in any row, or without a tap that meets, are left
        // out.
        const int rounds = g.rounds();
        const auto skip = [&](int round) {
            while (round < last_chunk * rounds && (!live[round / rounds] || (g.per_tap && shifts[round % rounds] < 0)))
                ++round;
            return round;
        };
        const auto start_region = [&](int round, int buffer) {
            if (round < last_chunk * rounds)
                copy_region(shared + layout.regions + buffer * layout.region_bytes, a, v, u, tile, sources,
                            round / rounds, round % rounds);
        };
        int round = skip(first_chunk * rounds), buffer = 0;
        start_region(round, buffer);
        // The first region must have arrived when `stages - 1` later groups are under way, as all regions must.
        for (int s = 0; s < a.stages; ++s) commit_copies();

        const Rows pixel_rows(2 * a.chunk), weight_rows(2 * SIDE);
        while (round < last_chunk * rounds) {
            wait_copies_but(a.stages - 1);
            sync_block();  // this round's pixels are here, and nobody reads those of the round before
            const int following = skip(round + 1);
            start_region(following, buffer ^ 1);
            const unsigned char* region = shared + layout.regions + buffer * layout.region_bytes;
            // Entries up to the first of the next chunk, or tap.
            const int limit = (g.per_tap ? round + 1 : (round + 1) * taps) * per_chunk;
            int steps = 0;
            for (;; ++next) {
                if (next - base >= 32) {
                    base += 32;
                    where[0] = where[1];
                    place[0] = place[1];
                    fetch(1);
                }
                const int32_t here = shuffle(where[0], (next - base) & 31);
                if (next >= end || here >= limit) break;
                start_weights(next + a.stages - 1);
                commit_copies();
                ++steps;
                const int column = here % per_chunk, shift = shifts[here / per_chunk % taps];
                // Before the next step copies to where it lies, even an entry that is passed over must have arrived.
                wait_copies_but(a.stages - 1);
                sync_warp();
                if (shift < 0) continue;
                const unsigned char* weights = ring + next % a.stages * SIDE * SIDE * 2;
                SK_UNROLL for (int k = 0; k < N; ++k) {
                    FragmentB b[N];
                    SK_UNROLL for (int n = 0; n < N; ++n) b[n].load(turned, [&](int i, int s) {
                        return weights + weight_rows.at(16 * (turned ? k : n) + i, 2 * (turned ? n : k) + s);
                    });
                    SK_UNROLL for (int m = 0; m < TILES; ++m) {
                        FragmentA<false> x;
                        x.load([&](int, int s) {
                            return region + pixel_rows.at(base_pixel[m] + shift, 2 * (column * N + k) + s);
                        });
                        SK_UNROLL for (int n = 0; n < N; ++n) sums[m][n].template multiply<T>(x, b[n]);
                    }
                }
                sync_warp();  // all have read the sub-block whose place the next step fills
            }
            for (; steps < a.stages; ++steps) commit_copies();
            buffer ^= 1;
            round = following;
        }
        wait_copies<0>();

        if (row >= a.rows) return;
        // Through the ring, 16 positions at a time, so that eight channels are stored at once. The sums move up in
        // their registers instead of being indexed: unrolled, this would be most of the kernel.
        auto* staged = reinterpret_cast<float*>(ring);
        const auto spot = [](int position, int channel) {
            return position * SIDE + (channel ^ 4 * (position & (SIDE / 4 - 1)));  // other banks for other positions
        };
        SK_NO_UNROLL for (int m = 0; m < TILES; ++m) {
            sync_warp();
            SK_UNROLL for (int n = 0; n < N; ++n) {
                SK_UNROLL for (int i = 0; i < 8; ++i)
                    staged[spot(Accumulator::row(i), 16 * n + Accumulator::column(i))] = sums[0][n].d[i];
                SK_UNROLL for (int later = 1; later < TILES; ++later) sums[later - 1][n] = sums[later][n];
            }
            sync_warp();
            SK_NO_UNROLL for (int i = lane; i < 2 * SIDE; i += 32) {
                const int at = i / (SIDE / 8), segment = i % (SIDE / 8), position = (warp_m * TILES + m) * 16 + at;
                const int channel = row * SIDE + 8 * segment;
                const int64_t offset = results[position];
                if (offset < 0) continue;
                float eight[8];
                SK_UNROLL for (int c = 0; c < 8; ++c) eight[c] = staged[spot(at, 8 * segment + c)];
                if (a.partial) {
                    const int64_t before = (int64_t{split} * g.phases() + phase) * g.tiles() + block_x();
                    float* to = a.partial + (before * positions + position) * (int64_t{a.rows} * SIDE) + channel;
                    SK_UNROLL for (int c = 0; c < 8; ++c) to[c] = eight[c];
                } else {
                    a.epilogue.template store<T>(offset, channel, eight);
                }
            }
        }
    }
}

// Adds the splits in their order. A thread takes eight channels of a position; block_y is the phase, block_x the tile.
template <class T>
SK_KERNEL(256)
product_reduce_kernel(const SK_GRID_CONSTANT ProductArgs a, int channels) {
    const Gather& g = a.gather;
    const int phase = block_y(), segments = channels / 8;
    const Axis v = vertical(g, phase), u = horizontal(g, phase);
    const Tile tile = tile_at(g, block_x());
    const int64_t stride = int64_t{g.phases()} * g.tiles() * g.positions() * channels;
    const int64_t first = (int64_t{phase} * g.tiles() + block_x()) * g.positions() * channels;
    SK_NO_UNROLL for (int i = thread_index(); i < g.positions() * segments; i += block_threads()) {
        const int position = i / segments, channel = i % segments * 8;
        const int64_t offset = result_offset(g, v, u, tile, position);
        if (offset < 0) continue;
        float sums[8] = {};
        for (int s = 0; s < a.splits; ++s) {
            const float* from = a.partial + first + int64_t{position} * channels + channel + s * stride;
            SK_UNROLL for (int c = 0; c < 8; ++c) sums[c] += from[c];
        }
        a.epilogue.template store<T>(offset, channel, sums);
    }
}

}  // namespace sk::gpu
