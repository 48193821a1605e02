// How a tile of positions reads the pixels that it multiplies: linear, conv1d and conv2d, forward and transposed.
//
// In each dimension a position p of the result meets tap r of the kernel at the source
//
//     forward       p * stride + r * dilation - padding
//     transposed    (p + padding - r * dilation) / stride, where that is whole
//
// The transposed one is cut into stride phases a, p = p' * stride + a, in each of which the taps that meet anything
// are fixed and the source is p' + (a + padding - r * dilation) / stride: a convolution of stride 1 once more.
//
// A tile is tile_n images x tile_h x tile_w positions. Its source pixels, the halo of all taps included, lie on chip
// once for a chunk of channels ("region"): for 3x3 and stride 1 an 8 x 16 tile reads 180 pixels instead of 9 * 128.
// Where the region would be too large (dilation) a tile takes its taps one by one, and the region is a pixel a
// position.
#pragma once

#include "cuda/device.h"

namespace sk::gpu {

struct Gather {
    int transposed, per_tap;
    int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
    int batch, source_h, source_w, result_h, result_w;
    int64_t source_n_stride, source_h_stride, source_w_stride;  // in elements; channels lie side by side
    int64_t result_n_stride, result_h_stride, result_w_stride;
    int tile_n, tile_h, tile_w, tiles_n, tiles_h, tiles_w;
    int region_h, region_w;  // source pixels of a tile and an image

    SK_BOTH int taps() const { return kernel_h * kernel_w; }
    SK_BOTH int positions() const { return tile_n * tile_h * tile_w; }
    SK_BOTH int tiles() const { return tiles_n * tiles_h * tiles_w; }
    SK_BOTH int region() const { return tile_n * region_h * region_w; }
    SK_BOTH int phases() const { return transposed ? stride_h * stride_w : 1; }
    // Rounds of loading pixels and multiplying for a chunk of channels.
    SK_BOTH int rounds() const { return per_tap ? taps() : 1; }
};

// One dimension of a Gather in one phase.
struct Axis {
    int transposed, phase, kernel, stride, pad, dilation;

    SK_BOTH bool meets(int tap) const { return !transposed || (phase + pad - tap * dilation) % stride == 0; }
    SK_BOTH int offset(int tap) const {
        return transposed ? (phase + pad - tap * dilation) / stride : tap * dilation - pad;
    }
    SK_BOTH int step() const { return transposed ? 1 : stride; }
    SK_BOTH int result(int position) const { return transposed ? position * stride + phase : position; }
    // The least offset of a tap that meets, and the span of all.
    SK_BOTH int first() const {
        if (!transposed) return -pad;
        int least = 1 << 30;
        for (int tap = 0; tap < kernel; ++tap)
            if (meets(tap) && offset(tap) < least) least = offset(tap);
        return least == 1 << 30 ? 0 : least;
    }
    SK_BOTH int span() const {
        int most = first();
        for (int tap = 0; tap < kernel; ++tap)
            if (meets(tap) && offset(tap) > most) most = offset(tap);
        return most - first();
    }
};

SK_BOTH Axis vertical(const Gather& g, int phase) {
    return Axis{g.transposed, phase / g.stride_w, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h};
}
SK_BOTH Axis horizontal(const Gather& g, int phase) {
    return Axis{g.transposed, phase % g.stride_w, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w};
}

// Where a tile begins.
struct Tile {
    int n, h, w;
};

SK_DEVICE Tile tile_at(const Gather& g, int tile) {
    const int row = tile / g.tiles_w;
    return Tile{row / g.tiles_h * g.tile_n, row % g.tiles_h * g.tile_h, tile % g.tiles_w * g.tile_w};
}

// Where position m of a tile is written, in elements; -1 outside the result.
SK_DEVICE int64_t result_offset(const Gather& g, const Axis& v, const Axis& u, const Tile& tile, int m) {
    const int row = m / g.tile_w;
    const int n = tile.n + row / g.tile_h, h = v.result(tile.h + row % g.tile_h), w = u.result(tile.w + m % g.tile_w);
    if (n >= g.batch || h >= g.result_h || w >= g.result_w) return -1;
    return n * g.result_n_stride + h * g.result_h_stride + w * g.result_w_stride;
}

// The pixel of the region that position m meets at the tap of the least offsets.
SK_DEVICE int region_pixel(const Gather& g, const Axis& v, const Axis& u, int m) {
    const int row = m / g.tile_w, step_h = g.per_tap ? 1 : v.step(), step_w = g.per_tap ? 1 : u.step();
    return (row / g.tile_h * g.region_h + row % g.tile_h * step_h) * g.region_w + m % g.tile_w * step_w;
}

// How many pixels further a tap lies; -1 where it meets nothing in this phase.
SK_DEVICE int tap_shift(const Gather& g, const Axis& v, const Axis& u, int tap) {
    const int r = tap / g.kernel_w, s = tap % g.kernel_w;
    if (!v.meets(r) || !u.meets(s)) return -1;
    return g.per_tap ? 0 : (v.offset(r) - v.first()) * g.region_w + u.offset(s) - u.first();
}

// Where pixel q of the region comes from, in elements; -1 in the border and beyond the batch.
SK_DEVICE int64_t source_offset(const Gather& g, const Axis& v, const Axis& u, const Tile& tile, int tap, int q) {
    const int row = q / g.region_w, n = tile.n + row / g.region_h;
    const int offset_h = g.per_tap ? v.offset(tap / g.kernel_w) : v.first();
    const int offset_w = g.per_tap ? u.offset(tap % g.kernel_w) : u.first();
    const int h = tile.h * v.step() + offset_h + row % g.region_h * (g.per_tap ? v.step() : 1);
    const int w = tile.w * u.step() + offset_w + q % g.region_w * (g.per_tap ? u.step() : 1);
    if (n >= g.batch || h < 0 || h >= g.source_h || w < 0 || w >= g.source_w) return -1;
    return n * g.source_n_stride + h * g.source_h_stride + w * g.source_w_stride;
}

// ---- Rows of 16-byte segments in shared memory ----
//
// ldmatrix reads a segment from each of eight consecutive rows: they must lie in different banks. Rows of 128 bytes (or
// a multiple) exchange segments by the row's number, those of 64 by half of it, of 32 by a quarter, so that any eight
// consecutive rows, and hence any tap of a convolution, are free of conflicts.
struct Rows {
    int pitch, shift, mask;

    SK_BOTH explicit Rows(int bytes)
        : pitch(bytes),
          shift(bytes % 128 == 0  ? 0
                : bytes % 64 == 0 ? 1
                                  : 2),
          mask(bytes % 128 == 0  ? 7
               : bytes % 64 == 0 ? 3
                                 : 1) {}
    SK_BOTH int at(int row, int segment) const { return row * pitch + 16 * (segment ^ ((row >> shift) & mask)); }
};

SK_DEVICE int clamp_segment(int left) { return left < 0 ? 0 : left > 8 ? 8 : left; }

// Copies up to eight elements, the rest zero: at once where their address may not be a multiple of 16 bytes.
SK_DEVICE void copy_segment(void* shared, const uint16_t* source, int elements, bool aligned) {
    if (aligned) {
        copy_16_async(shared, source, 2 * elements);
        return;
    }
    uint32_t* words = static_cast<uint32_t*>(shared);
    SK_UNROLL for (int i = 0; i < 4; ++i) {
        const uint32_t low = 2 * i < elements ? source[2 * i] : 0u;
        const uint32_t high = 2 * i + 1 < elements ? source[2 * i + 1] : 0u;
        words[i] = low | high << 16;
    }
}

// Copies `count` rows of `segments` segments by the whole block, row r from base + from[r], zeros where that is
// negative and past the first `channels`. A thread keeps to its segment, so that nothing but rows is left to count; up
// to segments - 1 threads stand by.
SK_DEVICE void copy_rows(unsigned char* to, const Rows& placed, const uint16_t* base, const int64_t* from, int count,
                         int segments, int channels, bool aligned) {
    const int width = segments < block_threads() ? segments : block_threads(), down = block_threads() / width;
    if (thread_index() >= width * down) return;
    for (int segment = thread_index() % width; segment < segments; segment += width) {
        const int real = clamp_segment(channels - 8 * segment);
        const uint16_t* source = base + (real ? 8 * segment : 0);
        SK_NO_UNROLL for (int row = thread_index() / width; row < count; row += down) {
            const int64_t offset = from[row];
            copy_segment(to + placed.at(row, segment), source + (offset < 0 ? 0 : offset), offset < 0 ? 0 : real,
                         aligned);
        }
    }
}

// Waits until at most `count` groups of copies, 3 at most, are under way; the instruction takes a constant.
SK_DEVICE void wait_copies_but(int count) {
    if (count <= 0)
        wait_copies<0>();
    else if (count == 1)
        wait_copies<1>();
    else if (count == 2)
        wait_copies<2>();
    else
        wait_copies<3>();
}

}  // namespace sk::gpu
