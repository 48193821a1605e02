// The launcher of product.cuh: which instance, which grid.
#include "cuda/product.cuh"

#include "cuda/host_gather.h"
#include "cuda/launch.h"

namespace sk {

namespace {

using namespace gpu;

ProductArgs arguments(const CudaIndex& w, const ConvShape& conv, bool transposed, const CudaProductConfig& config) {
    ProductArgs a{};
    a.gather = make_gather(conv, transposed, config.per_tap, config.tile_n, config.tile_h, config.tile_w);
    a.start = w.start;
    a.entry = w.entry;
    a.rows = static_cast<int>(w.rows), a.chunks = static_cast<int>(w.chunks), a.chunk = static_cast<int>(w.chunk);
    a.pitch = static_cast<int>(w.pitch), a.source_channels = static_cast<int>(w.source_channels);
    a.warps_n = static_cast<int>(config.warps_n), a.stages = static_cast<int>(config.stages);
    a.warps_m = a.gather.positions() / static_cast<int>(16 * config.m_tiles);
    a.splits = static_cast<int>(config.splits);
    return a;
}

bool is_valid(const CudaIndex& w, const ConvShape& conv, const CudaProductConfig& c) {
    if (!gpu::is_valid(w) || !gpu::is_valid(conv)) return false;
    if (c.tile_n < 1 || c.tile_h < 1 || c.tile_w < 1 || c.tile_n * c.tile_h * c.tile_w > 4096) return false;
    if ((c.m_tiles != 8 && (c.m_tiles != 4 || w.side == 16)) || c.stages < 2 || c.stages > 4) return false;
    const int64_t positions = c.tile_n * c.tile_h * c.tile_w;
    const int64_t most = c.m_tiles * w.side >= 256 ? 256 : 384;  // threads, by the launch bounds of any architecture
    return positions % (16 * c.m_tiles) == 0 && c.warps_n > 0 && c.splits > 0 && c.splits <= w.chunks &&
           positions / (16 * c.m_tiles) * c.warps_n * 32 <= most;
}

template <class T, int SIDE, int TILES>
int run(const ProductArgs& a, void* stream) {
    const Gather& g = a.gather;
    const Grid grid{g.tiles(), ceil_div(a.rows, a.warps_n), int64_t{g.phases()} * a.splits, 32 * a.warps_m * a.warps_n,
                    ProductLayout(a, SIDE).total};
    if (grid.y > 65535 || grid.z > 65535) return kUnsupported;
    const int status = launch(product_kernel<T, SIDE, TILES>, grid, stream, a);
    if (status != kOk || !a.partial) return status;
    return launch(product_reduce_kernel<T>, Grid{g.tiles(), g.phases(), 1, 256, 0}, stream, a, a.rows * SIDE);
}

template <class T>
int run(const ProductArgs& a, int64_t side, int64_t m_tiles, void* stream) {
    if (side == 16) return run<T, 16, 8>(a, stream);
    return m_tiles == 8 ? run<T, 32, 8>(a, stream) : run<T, 32, 4>(a, stream);
}

}  // namespace

int64_t cuda_product_shared_bytes(const CudaIndex& w, const ConvShape& conv, bool transposed,
                                  const CudaProductConfig& config) {
    return ProductLayout(arguments(w, conv, transposed, config), static_cast<int>(w.side)).total;
}

int64_t cuda_product_workspace_bytes(const CudaIndex& w, const ConvShape& conv, bool transposed,
                                     const CudaProductConfig& config) {
    if (config.splits == 1) return 0;
    const Gather g = make_gather(conv, transposed, config.per_tap, config.tile_n, config.tile_h, config.tile_w);
    return config.splits * g.phases() * g.tiles() * g.positions() * w.rows * w.side * 4;
}

int cuda_product(const CudaIndex& w, const ConvShape& conv, bool transposed, const CudaProductConfig& config,
                 int64_t dtype, const void* values, const void* x, const ImageStrides& x_strides, const float* bias,
                 int64_t activation, void* pre, void* y, const ImageStrides& y_strides, void* workspace, void* stream) {
    if (!is_valid(w, conv, config) || x_strides.c != 1 || y_strides.c != 1) return kInvalid;
    if ((dtype != kCudaHalf && dtype != kCudaBf16) || activation < kIdentity || activation > kGeluTanh) return kInvalid;
    ProductArgs a = arguments(w, conv, transposed, config);
    Gather& g = a.gather;
    if (g.tiles() == 0) return kOk;
    g.source_n_stride = x_strides.n, g.source_h_stride = x_strides.h, g.source_w_stride = x_strides.w;
    g.result_n_stride = y_strides.n, g.result_h_stride = y_strides.h, g.result_w_stride = y_strides.w;
    a.x = static_cast<const uint16_t*>(x);
    a.values = static_cast<const uint16_t*>(values);
    a.aligned = is_aligned(x, x_strides, 8);
    a.partial = config.splits > 1 ? static_cast<float*>(workspace) : nullptr;
    a.epilogue = gpu::Epilogue{bias,
                               static_cast<uint16_t*>(y),
                               static_cast<uint16_t*>(pre),
                               static_cast<int>(w.result_channels),
                               static_cast<int>(activation),
                               is_aligned(y, y_strides, 8) && is_aligned(pre, y_strides, 8)};
    return dtype == kCudaHalf ? run<Half>(a, w.side, config.m_tiles, stream)
                              : run<Bf16>(a, w.side, config.m_tiles, stream);
}

}  // namespace sk
