// The native contract: every launcher takes plain buffers, int64 sizes, a thread count or a stream, and returns a
// Status.
//
// Nothing allocates, throws or synchronises across this boundary. Scratch memory is a workspace pointer whose size
// `<launcher>_workspace_bytes(...)` returns; the caller allocates it, 64-byte aligned. All checks of dtype, shape,
// stride and device live in the Python layer above.
#pragma once

#include <cstdint>

namespace sk {

enum Status : int {
    kOk = 0,
    kUnsupported = 1,   // this build or this device has no kernel for the arguments
    kInvalid = 2,       // an argument breaks the launcher's contract
    kCudaError = 1000,  // plus a cudaError_t: what the CUDA runtime returned
};

// The index set of one weight [out, in] cut into blocks [bh, bw]: nnzb active blocks, seen from both orientations.
// Block k of the row-sorted order is values[slot[k]], k in crow[r] .. crow[r + 1], at column block col[k];
// block k of the column-sorted order is values[slot_t[k]], k in ccol[c] .. ccol[c + 1], at row block row_t[k].
// For 1 x 1 blocks slot_t may be null where a launcher does not multiply by the transposed weight.
struct BlockIndex {
    int64_t out, in, bh, bw, nnzb;
    const int32_t *crow, *col, *slot;      // [row_blocks + 1] [nnzb] [nnzb]
    const int32_t *ccol, *row_t, *slot_t;  // [col_blocks + 1] [nnzb] [nnzb]
};

// The bits of a bfloat16.
using bf16 = uint16_t;

// What is applied to a product and its bias; kIdentity applies nothing.
enum Activation : int { kIdentity, kRelu, kSilu, kGelu, kGeluTanh };

// The end of a product: y = activation(sum + bias), and pre = sum + bias for the backward, which kIdentity leaves
// unwritten.
template <class T>
struct Epilogue {
    const float* bias;  // [out] or null
    Activation activation;
    T* pre;  // as y, with its strides; or null
};

// ---- CPU -----------------------------------------------------------------------------------------------------------

// The instruction set in use: "avx512", "avx2" or "portable".
const char* isa_name();

// Whether the kernels for bf16 activations run: with AVX512-BF16, unless a lesser instruction set is forced.
bool bf16_kernels();

// The rate in GFLOP/s (a multiply-add counts two) that `threads` threads reach on independent register-resident
// multiply-adds with the instruction set in use: the sum of each thread's best slice within `seconds`. In fp32, or of
// bf16 pairs added to fp32 where bf16_kernels(); elsewhere kUnsupported.
int peak_fma_gflops(double seconds, int64_t threads, bool bf16, double* gflops);

// Asks the operating system to back a buffer by pages of 2 MiB, where it can: fresh memory is then zeroed a large page
// at a time instead of faulting every 4 KiB. Only a hint.
void advise_huge_pages(void* buffer, int64_t bytes);

// Writes slot_t [nnzb], which follows from the other arrays, for an index that does not store it. col_blocks counts
// those of all taps.
int64_t transposed_slots_workspace_bytes(const BlockIndex& w, int64_t col_blocks, int64_t threads);
int transposed_slots(const BlockIndex& w, int64_t col_blocks, int32_t* slot_t, int64_t threads, void* workspace);

// Where element (o, t, i) of a dense weight [out, taps, in] lies, in elements: at o * out_stride + t * tap_stride +
// i * in_stride where tile is 0. With a tile of 32 it lies as in the values of a full weight of 32 x 32 blocks whose
// slots are in the order of rows: [out / 32, taps, in / 32, 32, 32], edges padded with zeros; the strides are not read.
// The weight is one contiguous piece of memory.
struct DenseLayout {
    int64_t taps, out_stride, tap_stride, in_stride, tile;
};

// The dense weight of values [nnzb, bh, bw], absent blocks zero; and the active blocks of a dense weight, padding zero.
// w.in counts the inputs of one tap. Elements of values and of the weight have equally many bytes, 2, 4 or 8, and are
// copied; or 4 and 2: fp32 values and a bf16 weight, to which they are rounded.
int densify(const BlockIndex& w, const DenseLayout& layout, int64_t value_bytes, int64_t dense_bytes,
            const void* values, void* dense, int64_t threads);
int gather_blocks(const BlockIndex& w, const DenseLayout& layout, int64_t value_bytes, int64_t dense_bytes,
                  const void* dense, void* values, int64_t threads);

// norms [ceil(rows / bh), taps * ceil(in / bw)] = the sum of squares of each block of dense [rows, taps * in]; blocks
// lie within a tap.
int block_norms(const float* dense, int64_t rows, int64_t taps, int64_t in, int64_t bh, int64_t bw, float* norms,
                int64_t threads);

// Block-CSR linear, w.bh x w.bw in {1, 4, 8, 16, 32, 64}^2 without 1 x 1. Matrices have unit inner stride and any row
// stride ld*; values and dvalues are [nnzb, bh, bw] by slot; bias is [out] or null. Outputs are written completely,
// the padding of dvalues as zero, and do not depend on what they or the workspace held. Results repeat bit for bit;
// those of block_spmm and block_spmm_t are the same for every thread count.
//
// T is float, or bf16 for activations in bfloat16: the weights are rounded to bf16, sums are fp32. The bf16 kernels
// serve sides of 16 and more where bf16_kernels(); elsewhere they return kUnsupported.

// y [positions, out] = activation(x [positions, in] * W' + bias); pre (as y, or null) is what the activation is given
template <class T>
int64_t block_spmm_workspace_bytes(const BlockIndex& w, int64_t positions, int64_t threads);
template <class T>
int block_spmm(const BlockIndex& w, const float* values, const T* x, int64_t ldx, const float* bias, int64_t activation,
               T* pre, T* y, int64_t ldy, int64_t positions, int64_t threads, void* workspace);

// dx [positions, in] = dy [positions, out] * W
template <class T>
int64_t block_spmm_t_workspace_bytes(const BlockIndex& w, int64_t positions, int64_t threads);
template <class T>
int block_spmm_t(const BlockIndex& w, const float* values, const T* dy, int64_t ldy, T* dx, int64_t ldx,
                 int64_t positions, int64_t threads, void* workspace);

// dvalues = dy' [out, positions] * x [positions, in] at the active blocks
template <class T>
int64_t block_sddmm_workspace_bytes(const BlockIndex& w, int64_t positions, int64_t threads);
template <class T>
int block_sddmm(const BlockIndex& w, const T* dy, int64_t ldy, const T* x, int64_t ldx, float* dvalues,
                int64_t positions, int64_t threads, void* workspace);

// Unstructured linear, fp32, blocks 1 x 1; otherwise as above. `runs` is the derived index of one orientation: a list
// of the runs of nonzeros that share a row (a column) and a tile of columns (of rows).

// Length in int32 of the derived index; a function of out, in and nnzb alone.
int64_t unstructured_runs_ints(const BlockIndex& w, bool transposed);

// Writes runs from crow and col, or transposed from ccol and row_t.
int64_t unstructured_derive_workspace_bytes(const BlockIndex& w, bool transposed);
int unstructured_derive(const BlockIndex& w, bool transposed, int32_t* runs, void* workspace);

// y [positions, out] = activation(x [positions, in] * W' + bias); pre as in block_spmm
int64_t unstructured_spmm_workspace_bytes(const BlockIndex& w, int64_t positions, int64_t threads);
int unstructured_spmm(const BlockIndex& w, const int32_t* runs, const float* values, const float* x, int64_t ldx,
                      const float* bias, int64_t activation, float* pre, float* y, int64_t ldy, int64_t positions,
                      int64_t threads, void* workspace);

// dx [positions, in] = dy [positions, out] * W, through the transposed runs
int64_t unstructured_spmm_t_workspace_bytes(const BlockIndex& w, int64_t positions, int64_t threads);
int unstructured_spmm_t(const BlockIndex& w, const int32_t* runs_t, const float* values, const float* dy, int64_t ldy,
                        float* dx, int64_t ldx, int64_t positions, int64_t threads, void* workspace);

// dvalues [nnzb] = dy' [out, positions] * x [positions, in] at the active positions
int64_t unstructured_sddmm_workspace_bytes(const BlockIndex& w, int64_t positions, int64_t threads);
int unstructured_sddmm(const BlockIndex& w, const int32_t* runs, const float* dy, int64_t ldy, const float* x,
                       int64_t ldx, float* dvalues, int64_t positions, int64_t threads, void* workspace);

// ---- CPU: convolution -----------------------------------------------------------------------------------------------
//
// The weight is the matrix [out, kernel_h * kernel_w * in], tap-major: BlockIndex.in counts one tap's inputs, and
// column block `tap * ceil(in / bw) + j` is block j of that tap. Images are fp32 [batch, channels, height, width].

struct ConvShape {
    int64_t batch, height, width, out_height, out_width;
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// Of an image tensor, in floats: batch, channel, row, column.
struct ImageStrides {
    int64_t n, c, h, w;
};

// Unstructured convolution, fp32 (csrc/cpu/conv_unstructured.cpp). Images may have any strides; those of contiguous and
// channels_last tensors are the fast ones. Outputs are written completely and do not depend on what they or the
// workspace held. Results repeat bit for bit for a number of threads. `runs` is the derived index of one orientation.

// Length in int32 of the derived index; a function of out, in, taps and nnzb alone.
int64_t conv_unstructured_runs_ints(const BlockIndex& w, int64_t taps, bool transposed);
int64_t conv_unstructured_derive_workspace_bytes(const BlockIndex& w, int64_t taps, bool transposed);
int conv_unstructured_derive(const BlockIndex& w, int64_t taps, bool transposed, int32_t* runs, void* workspace);

// y = activation(conv(x, W) + bias); pre (as y with its strides, or null) is what an activation is given
int64_t conv_unstructured_spmm_workspace_bytes(const BlockIndex& w, const ConvShape& conv, int64_t threads);
int conv_unstructured_spmm(const BlockIndex& w, const int32_t* runs, const float* values, const ConvShape& conv,
                           const float* x, const ImageStrides& x_strides, const float* bias, int64_t activation,
                           float* pre, float* y, const ImageStrides& y_strides, int64_t threads, void* workspace);

// dx = the input gradient of conv for dy, through the transposed runs
int64_t conv_unstructured_spmm_t_workspace_bytes(const BlockIndex& w, const ConvShape& conv, int64_t threads);
int conv_unstructured_spmm_t(const BlockIndex& w, const int32_t* runs_t, const float* values, const ConvShape& conv,
                             const float* dy, const ImageStrides& dy_strides, float* dx, const ImageStrides& dx_strides,
                             int64_t threads, void* workspace);

// dvalues [nnzb] = the weight gradient at the active positions
int64_t conv_unstructured_sddmm_workspace_bytes(const BlockIndex& w, const ConvShape& conv, int64_t threads);
int conv_unstructured_sddmm(const BlockIndex& w, const int32_t* runs, const ConvShape& conv, const float* dy,
                            const ImageStrides& dy_strides, const float* x, const ImageStrides& x_strides,
                            float* dvalues, int64_t threads, void* workspace);

// Block-CSR convolution (csrc/cpu/conv_block.cpp), blocks as for block_spmm. Of the strides of an image, that of the
// channels or that of the columns is 1. Outputs and repeatability as for block_spmm. T is float, or bf16 for images in
// bfloat16 whose channels lie side by side, as for block_spmm; the weight gradient is fp32.

// y = activation(conv(x, W) + bias); pre as in conv_unstructured_spmm
template <class T>
int64_t conv_block_spmm_workspace_bytes(const BlockIndex& w, const ConvShape& conv, int64_t threads);
template <class T>
int conv_block_spmm(const BlockIndex& w, const ConvShape& conv, const float* values, const T* x,
                    const ImageStrides& x_strides, const float* bias, int64_t activation, T* pre, T* y,
                    const ImageStrides& y_strides, int64_t threads, void* workspace);

// dx = the input gradient of conv for dy
template <class T>
int64_t conv_block_spmm_t_workspace_bytes(const BlockIndex& w, const ConvShape& conv, int64_t threads);
template <class T>
int conv_block_spmm_t(const BlockIndex& w, const ConvShape& conv, const float* values, const T* dy,
                      const ImageStrides& dy_strides, T* dx, const ImageStrides& dx_strides, int64_t threads,
                      void* workspace);

// dvalues = the weight gradient at the active blocks
int64_t conv_block_sddmm_workspace_bytes(const BlockIndex& w, const ConvShape& conv, int64_t threads);
int conv_block_sddmm(const BlockIndex& w, const ConvShape& conv, const float* dy, const ImageStrides& dy_strides,
                     const float* x, const ImageStrides& x_strides, float* dvalues, int64_t threads, void* workspace);

// All three gradients of conv_block_spmm in one pass, where conv_block_backward_fuses (stride 1, padding within the
// kernel, blocks that the direct tiles take); elsewhere kUnsupported. dbias is [out] or null.
bool conv_block_backward_fuses(const BlockIndex& w, const ConvShape& conv);
int64_t conv_block_backward_workspace_bytes(const BlockIndex& w, const ConvShape& conv, int64_t threads);
int conv_block_backward(const BlockIndex& w, const ConvShape& conv, const float* values, const float* dy,
                        const ImageStrides& dy_strides, const float* x, const ImageStrides& x_strides, float* dx,
                        const ImageStrides& dx_strides, float* dvalues, float* dbias, int64_t threads, void* workspace);

// ---- CPU: GRU (csrc/cpu/gru.cpp) ------------------------------------------------------------------------------------
//
// One layer, one or two directions, with torch.nn.GRU's equations and gate order (r, z, n):
//     r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)      n  = tanh(W_in x + b_in + r * (W_hn h + b_hn))
//     z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)      h' = (1 - z) * n + z * h
// The second direction starts at each sequence's own end. Nothing past a sequence's length is read; y and dx are zero
// there. Bits do not depend on timing: they repeat for a given number of threads.

// One of a layer's weights [3 hidden, in]: block-CSR values [nnzb, bh, bw], or dense and row-major where index.bh is 0
// (then only index.out and index.in count).
struct GruWeight {
    BlockIndex index;
    const float* values;
    const float* bias;  // [3 hidden] or null
    float* d_values;    // like values; written by the backward
    float* d_bias;      // [3 hidden] or null
};

struct GruLayer {
    int64_t batch, steps, in, hidden, directions;
    const float* x;  // [batch, steps, in], unit inner stride
    int64_t x_batch_stride, x_step_stride;
    const float* h0;           // [directions, batch, hidden]
    const int32_t* lengths;    // [batch], 0 .. steps, or null: all are `steps`
    const GruWeight* weights;  // [2 * directions]: ih, hh, (ih, hh of the reverse direction)
    float* reserve;            // gru_reserve_floats(), 64-byte aligned: from the forward for the backward, or null
};

struct GruBackward {
    const float* y;   // [batch, steps, directions * hidden], contiguous: what the forward returned
    const float* dy;  // the same shape, unit inner stride
    int64_t dy_batch_stride, dy_step_stride;
    const float* dh_n;  // [directions, batch, hidden]
    float* dx;          // [batch, steps, in], contiguous, or null
    float* dh0;         // [directions, batch, hidden]
    // Gradients of the gates before their biases, [directions, batch, steps, 3 hidden], or null. Positions past a
    // sequence's length are not written.
    float *dgates_ih, *dgates_hh;
};

int64_t gru_reserve_floats(int64_t batch, int64_t steps, int64_t hidden, int64_t directions);
int64_t gru_forward_workspace_bytes(const GruLayer& layer, int64_t threads);
int gru_forward(const GruLayer& layer, float* y, float* h_n, void* workspace, int64_t threads);
int64_t gru_backward_workspace_bytes(const GruLayer& layer, int64_t threads);
int gru_backward(const GruLayer& layer, const GruBackward& grad, void* workspace, int64_t threads);

// ---- CUDA (only in builds with SK_CUDA) -----------------------------------------------------------------------------

struct CudaDeviceInfo {
    char name[256];
    int64_t capability_major, capability_minor;
    int64_t multiprocessors, shared_bytes_per_block, l2_bytes, memory_bytes;
};

int cuda_device_count(int64_t* count);
int cuda_device_info(int64_t device, CudaDeviceInfo* info);

// Writes up to `most` of the compute capabilities that the kernels were compiled for, ten times each, and returns how
// many there are.
int64_t cuda_archs(int64_t* archs, int64_t most);

// The CUDA runtime's words for a status above kCudaError.
const char* cuda_error_string(int status);

// Block-CSR products on tensor cores (csrc/cuda/product.cu, sddmm.cu), fp16 from sm_70 and bf16 from sm_80, sums in
// fp32. Linear is a 1x1 convolution of one image of one row. Channels lie side by side, other strides are free; those
// that are multiples of 8 elements, and addresses of 16 bytes, are the fast ones. Outputs are written completely and
// repeat bit for bit for a configuration. Launches are asynchronous on `stream`.

enum CudaDtype : int { kCudaHalf, kCudaBf16 };

// One orientation of a weight, cut into square sub-blocks of `side` 16 or 32: `rows` of them along the channels of the
// result. `chunk` channels of the source (a multiple of side) are on chip at a time. Entry k of row r lies in chunk c
// for start[r * (chunks + 1) + c] <= k < start[r * (chunks + 1) + c + 1]: entry[2 k] is
// (c * taps + tap) * (chunk / side) + column within the chunk, rising; entry[2 k + 1] is its place in values, in units
// of 16 elements, where its rows lie `pitch` elements apart. (sparse_kernels/backends/_cuda_index.py writes it.)
struct CudaIndex {
    int64_t side, rows, chunks, chunk, pitch, entries, result_channels, source_channels;
    const int32_t *start, *entry;  // [rows, chunks + 1] [entries, 2]
};

// How a product is cut, csrc/cuda/product.cuh: tile_n * tile_h * tile_w = 16 * m_tiles * warps_m positions and warps_n
// rows a block of threads, of which each warp takes 16 * m_tiles positions of one row; stages 2 .. 4 of the weights'
// ring; splits of the chunks; per_tap where the pixels of all taps do not fit on chip.
struct CudaProductConfig {
    int64_t tile_n, tile_h, tile_w, m_tiles, warps_n, stages, splits, per_tap;
};

// How a weight gradient is cut, csrc/cuda/sddmm.cuh: tiles of a multiple of 16 positions, `warps` warps on `rows` rows
// of sub-blocks, splits of the tiles.
struct CudaSddmmConfig {
    int64_t tile_n, tile_h, tile_w, warps, rows, splits, per_tap;
};

// y = activation(product + bias): the convolution `conv` of x, or, transposed, its input gradient from the output's
// gradient x, on the images' shapes of `conv` either way. pre as y, or null; bias is [result_channels] or null.
int64_t cuda_product_shared_bytes(const CudaIndex& w, const ConvShape& conv, bool transposed,
                                  const CudaProductConfig& config);
int64_t cuda_product_workspace_bytes(const CudaIndex& w, const ConvShape& conv, bool transposed,
                                     const CudaProductConfig& config);
int cuda_product(const CudaIndex& w, const ConvShape& conv, bool transposed, const CudaProductConfig& config,
                 int64_t dtype, const void* values, const void* x, const ImageStrides& x_strides, const float* bias,
                 int64_t activation, void* pre, void* y, const ImageStrides& y_strides, void* workspace, void* stream);

// dvalues = the weight gradient at the active blocks, padding zero; w as for the forward product.
int64_t cuda_sddmm_shared_bytes(const CudaIndex& w, const ConvShape& conv, const CudaSddmmConfig& config);
int64_t cuda_sddmm_workspace_bytes(const CudaIndex& w, const ConvShape& conv, const CudaSddmmConfig& config);
int cuda_sddmm(const CudaIndex& w, const ConvShape& conv, const CudaSddmmConfig& config, int64_t dtype, const void* dy,
               const ImageStrides& dy_strides, const void* x, const ImageStrides& x_strides, float* dvalues,
               void* workspace, void* stream);

// scores [rows, taps, columns] = squared norm of every sub-block of the dense weight gradient; w.start and w.entry are
// not read. Gradients are made for panels of rows whose partial sums fit into workspace_bytes.
int64_t cuda_scores_workspace_bytes(const CudaIndex& w, const ConvShape& conv, const CudaSddmmConfig& config,
                                    int64_t columns);  // of the smallest panel
int cuda_scores(const CudaIndex& w, const ConvShape& conv, const CudaSddmmConfig& config, int64_t columns,
                int64_t dtype, const void* dy, const ImageStrides& dy_strides, const void* x,
                const ImageStrides& x_strides, float* scores, void* workspace, int64_t workspace_bytes, void* stream);

}  // namespace sk
