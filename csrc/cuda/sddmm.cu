// The launchers of sddmm.cuh: weight gradients at the active blocks, and scores of all of them.
#include "cuda/sddmm.cuh"

#include "cuda/host_gather.h"
#include "cuda/launch.h"

namespace sk {

namespace {

using namespace gpu;

// Sub-blocks that a warp holds: 160 and 128 registers of sums.
constexpr int kBlocks32 = 5, kBlocks16 = 16;

SddmmArgs arguments(const CudaIndex& w, const ConvShape& conv, const CudaSddmmConfig& config) {
    SddmmArgs a{};
    a.gather = make_gather(conv, false, config.per_tap, config.tile_n, config.tile_h, config.tile_w);
    a.start = w.start;
    a.entry = w.entry;
    a.rows = static_cast<int>(w.rows), a.chunks = static_cast<int>(w.chunks), a.chunk = static_cast<int>(w.chunk);
    a.columns = ceil_div(w.source_channels, w.side);
    a.pitch = static_cast<int>(w.pitch), a.source_channels = static_cast<int>(w.source_channels);
    a.result_channels = static_cast<int>(w.result_channels);
    a.warps = static_cast<int>(config.warps), a.rows_n = static_cast<int>(config.rows);
    a.splits = static_cast<int>(config.splits);
    a.blocks = w.entries;
    return a;
}

bool is_valid(const CudaIndex& w, const ConvShape& conv, const CudaSddmmConfig& c) {
    if (!gpu::is_valid(w) || !gpu::is_valid(conv)) return false;
    if (c.tile_n < 1 || c.tile_h < 1 || c.tile_w < 1 || c.tile_n * c.tile_h * c.tile_w > 4096) return false;
    return c.tile_n * c.tile_h * c.tile_w % 16 == 0 && c.warps > 0 && c.warps <= 8 && c.rows > 0 && c.splits > 0 &&
           c.splits <= 65535;
}

void set_operands(SddmmArgs& a, const void* dy, const ImageStrides& dy_strides, const void* x,
                  const ImageStrides& x_strides) {
    a.gather.source_n_stride = x_strides.n, a.gather.source_h_stride = x_strides.h;
    a.gather.source_w_stride = x_strides.w;
    a.x = static_cast<const uint16_t*>(x);
    a.dy = static_cast<const uint16_t*>(dy);
    a.dy_n_stride = dy_strides.n, a.dy_h_stride = dy_strides.h, a.dy_w_stride = dy_strides.w;
    a.aligned = is_aligned(x, x_strides, 8) && is_aligned(dy, dy_strides, 8);
}

// The gradient of `rows` rows from a.first_row on.
template <class T, int SIDE, int BLOCKS>
int run(const SddmmArgs& a, int rows, void* stream) {
    const int64_t most = int64_t{a.rows_n} * a.gather.taps() * (a.chunk / SIDE);  // sub-blocks of a group
    const Grid grid{int64_t{ceil_div(rows, a.rows_n)} * a.chunks, a.splits, ceil_div(most, a.warps * BLOCKS),
                    32 * a.warps, SddmmLayout(a, SIDE).total};
    if (grid.z > 65535) return kUnsupported;
    const int status = launch(sddmm_kernel<T, SIDE, BLOCKS>, grid, stream, a);
    if (status != kOk || !a.partial) return status;
    return launch(sddmm_reduce_kernel<SIDE>, Grid{ceil_div(a.blocks, 8), 1, 1, 256, 0}, stream, a);
}

int run(const SddmmArgs& a, int64_t side, int64_t dtype, int rows, void* stream) {
    if (side == 32)
        return dtype == kCudaHalf ? run<Half, 32, kBlocks32>(a, rows, stream)
                                  : run<Bf16, 32, kBlocks32>(a, rows, stream);
    return dtype == kCudaHalf ? run<Half, 16, kBlocks16>(a, rows, stream) : run<Bf16, 16, kBlocks16>(a, rows, stream);
}

}  // namespace

int64_t cuda_sddmm_shared_bytes(const CudaIndex& w, const ConvShape& conv, const CudaSddmmConfig& config) {
    return SddmmLayout(arguments(w, conv, config), static_cast<int>(w.side)).total;
}

int64_t cuda_sddmm_workspace_bytes(const CudaIndex& w, const ConvShape&, const CudaSddmmConfig& config) {
    return config.splits == 1 ? 0 : config.splits * w.entries * w.side * w.side * 4;
}

int cuda_sddmm(const CudaIndex& w, const ConvShape& conv, const CudaSddmmConfig& config, int64_t dtype, const void* dy,
               const ImageStrides& dy_strides, const void* x, const ImageStrides& x_strides, float* dvalues,
               void* workspace, void* stream) {
    if (!is_valid(w, conv, config) || dy_strides.c != 1 || x_strides.c != 1) return kInvalid;
    if (dtype != kCudaHalf && dtype != kCudaBf16) return kInvalid;
    if (w.entries == 0) return kOk;
    SddmmArgs a = arguments(w, conv, config);
    set_operands(a, dy, dy_strides, x, x_strides);
    a.values = dvalues;
    a.partial = config.splits > 1 ? static_cast<float*>(workspace) : nullptr;
    return run(a, w.side, dtype, a.rows, stream);
}

int64_t cuda_scores_workspace_bytes(const CudaIndex& w, const ConvShape& conv, const CudaSddmmConfig& config,
                                    int64_t columns) {
    if (config.splits == 1) return 0;
    return config.splits * config.rows * conv.kernel_h * conv.kernel_w * columns * w.side * w.side * 4;
}

int cuda_scores(const CudaIndex& w, const ConvShape& conv, const CudaSddmmConfig& config, int64_t columns,
                int64_t dtype, const void* dy, const ImageStrides& dy_strides, const void* x,
                const ImageStrides& x_strides, float* scores, void* workspace, int64_t workspace_bytes, void* stream) {
    if (!is_valid(w, conv, config) || dy_strides.c != 1 || x_strides.c != 1) return kInvalid;
    if ((dtype != kCudaHalf && dtype != kCudaBf16) || columns * w.side > w.chunks * w.chunk) return kInvalid;
    SddmmArgs a = arguments(w, conv, config);
    set_operands(a, dy, dy_strides, x, x_strides);
    a.start = a.entry = nullptr;
    a.columns = static_cast<int>(columns);
    a.scores = scores;
    int64_t panel = a.rows;
    if (config.splits > 1) {
        const int64_t group = cuda_scores_workspace_bytes(w, conv, config, columns);
        if (workspace_bytes < group) return kInvalid;
        panel = workspace_bytes / group * a.rows_n;
        a.partial = static_cast<float*>(workspace);
    }
    for (int64_t row = 0; row < a.rows; row += panel) {
        const int rows = static_cast<int>(panel < a.rows - row ? panel : a.rows - row);
        a.first_row = static_cast<int>(row);
        a.blocks = int64_t{rows} * a.gather.taps() * columns;
        const int status = run(a, w.side, dtype, rows, stream);
        if (status != kOk) return status;
    }
    return kOk;
}

}  // namespace sk
