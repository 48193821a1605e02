// The Gather of a convolution, which the launchers hand to the kernels.
#pragma once

#include "api.h"
#include "cuda/gather.cuh"

namespace sk::gpu {

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Whether sizes are those of a convolution and its strides such as kernels take.
inline bool is_valid(const ConvShape& c) {
    const auto fits = [](int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
        return kernel > 0 && stride > 0 && dilation > 0 && pad >= 0 && in >= 0 && out > 0 &&
               (in + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1 == out;
    };
    const int64_t most = 1 << 30;
    return c.batch >= 0 && c.batch < most && c.height < most && c.width < most && c.out_width < most &&
           fits(c.height, c.out_height, c.kernel_h, c.stride_h, c.pad_h, c.dilation_h) &&
           fits(c.width, c.out_width, c.kernel_w, c.stride_w, c.pad_w, c.dilation_w);
}

inline Gather make_gather(const ConvShape& c, bool transposed, bool per_tap, int64_t tile_n, int64_t tile_h,
                          int64_t tile_w) {
    Gather g{};
    const auto whole = [](int64_t value) { return static_cast<int>(value); };
    g.transposed = transposed;
    g.per_tap = per_tap;
    g.kernel_h = whole(c.kernel_h), g.kernel_w = whole(c.kernel_w);
    g.stride_h = whole(c.stride_h), g.stride_w = whole(c.stride_w);
    g.pad_h = whole(c.pad_h), g.pad_w = whole(c.pad_w);
    g.dilation_h = whole(c.dilation_h), g.dilation_w = whole(c.dilation_w);
    g.batch = whole(c.batch);
    g.source_h = whole(transposed ? c.out_height : c.height), g.source_w = whole(transposed ? c.out_width : c.width);
    g.result_h = whole(transposed ? c.height : c.out_height), g.result_w = whole(transposed ? c.width : c.out_width);
    g.tile_n = whole(tile_n), g.tile_h = whole(tile_h), g.tile_w = whole(tile_w);
    // Positions of the largest phase, the first.
    g.tiles_n = ceil_div(c.batch, tile_n);
    g.tiles_h = ceil_div(transposed ? ceil_div(c.height, c.stride_h) : c.out_height, tile_h);
    g.tiles_w = ceil_div(transposed ? ceil_div(c.width, c.stride_w) : c.out_width, tile_w);
    g.region_h = g.tile_h, g.region_w = g.tile_w;
    for (int phase = 0; !per_tap && phase < g.phases(); ++phase) {
        const Axis v = vertical(g, phase), u = horizontal(g, phase);
        const int high = (g.tile_h - 1) * v.step() + v.span() + 1, wide = (g.tile_w - 1) * u.step() + u.span() + 1;
        g.region_h = high > g.region_h ? high : g.region_h;
        g.region_w = wide > g.region_w ? wide : g.region_w;
    }
    return g;
}

inline bool is_aligned(const void* p, const ImageStrides& s, int64_t elements) {
    return reinterpret_cast<uintptr_t>(p) % (2 * elements) == 0 && s.n % elements == 0 && s.h % elements == 0 &&
           s.w % elements == 0;
}

inline bool is_valid(const CudaIndex& w) {
    return (w.side == 16 || w.side == 32) && w.chunk >= 32 && w.chunk % w.side == 0 && w.rows > 0 && w.chunks > 0 &&
           w.pitch >= w.side && w.pitch % 8 == 0 && w.result_channels > 0 && w.source_channels > 0;
}

}  // namespace sk::gpu
