// The launchers of the block-CSR convolution: checks, then the kernels of the instruction set in use.
#include "cpu/conv_block.h"

#include "cpu/dispatch.h"
#include "cpu/sides.h"

SK_DECLARE_TABLE(ConvProductTable<float>, conv_product_table)
SK_DECLARE_TABLE(ConvGradientTable, conv_gradient_table)
SK_DECLARE_BF16_TABLE(ConvProductTable<bf16>, conv_product_table)

namespace sk {

namespace {

bool axis_fits(int64_t size, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    return size >= 0 && kernel > 0 && stride > 0 && pad >= 0 && dilation > 0 && out > 0 &&
           (size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1 == out;
}

bool valid(const BlockIndex& w, const ConvShape& c, int64_t threads) {
    return is_side(w.bh) && is_side(w.bw) && w.bh * w.bw > 1 && w.out > 0 && w.in > 0 && w.nnzb >= 0 && c.batch >= 0 &&
           axis_fits(c.height, c.out_height, c.kernel_h, c.stride_h, c.pad_h, c.dilation_h) &&
           axis_fits(c.width, c.out_width, c.kernel_w, c.stride_w, c.pad_w, c.dilation_w) && threads > 0;
}

// The products for images of type T, or null where this CPU has none for these blocks.
template <class T>
const ConvProductTable<T>* table(const BlockIndex& w);

template <>
const ConvProductTable<float>* table(const BlockIndex&) {
    return &SK_TABLE(conv_product_table);
}

template <>
const ConvProductTable<bf16>* table(const BlockIndex& w) {
    return w.bh < 16 || w.bw < 16 ? nullptr : SK_BF16_TABLE(conv_product_table);
}

template <class T = float>
bool valid(const ImageStrides& s) {
    return s.c == 1 || (s.w == 1 && sizeof(T) == sizeof(float));
}

template <class T>
int64_t spmm_workspace(const BlockIndex& w, const ConvShape& conv, bool transposed, int64_t threads) {
    const ConvProductTable<T>* kernels = table<T>(w);
    return kernels && valid(w, conv, threads) ? kernels->spmm_workspace(w, conv, transposed, threads) : 0;
}

template <class T>
int spmm(const BlockIndex& w, const ConvShape& conv, bool transposed, const float* values, const T* x,
         const ImageStrides& x_strides, const Epilogue<T>& epilogue, T* y, const ImageStrides& y_strides,
         int64_t threads, void* workspace) {
    if (!valid(w, conv, threads) || !valid<T>(x_strides) || !valid<T>(y_strides)) return kInvalid;
    const ConvProductTable<T>* kernels = table<T>(w);
    if (!kernels) return kUnsupported;
    kernels->spmm(w, conv, transposed, values, x, x_strides, epilogue, y, y_strides, threads, workspace);
    return kOk;
}

}  // namespace

template <class T>
int64_t conv_block_spmm_workspace_bytes(const BlockIndex& w, const ConvShape& conv, int64_t threads) {
    return spmm_workspace<T>(w, conv, false, threads);
}

template <class T>
int conv_block_spmm(const BlockIndex& w, const ConvShape& conv, const float* values, const T* x,
                    const ImageStrides& x_strides, const float* bias, int64_t activation, T* pre, T* y,
                    const ImageStrides& y_strides, int64_t threads, void* workspace) {
    if (activation < kIdentity || activation > kGeluTanh) return kInvalid;
    const Epilogue<T> epilogue = {bias, static_cast<Activation>(activation), pre};
    return spmm(w, conv, false, values, x, x_strides, epilogue, y, y_strides, threads, workspace);
}

template <class T>
int64_t conv_block_spmm_t_workspace_bytes(const BlockIndex& w, const ConvShape& conv, int64_t threads) {
    return spmm_workspace<T>(w, conv, true, threads);
}

template <class T>
int conv_block_spmm_t(const BlockIndex& w, const ConvShape& conv, const float* values, const T* dy,
                      const ImageStrides& dy_strides, T* dx, const ImageStrides& dx_strides, int64_t threads,
                      void* workspace) {
    const Epilogue<T> none = {nullptr, kIdentity, nullptr};
    return spmm<T>(w, conv, true, values, dy, dy_strides, none, dx, dx_strides, threads, workspace);
}

#define SK_INSTANTIATE(T)                                                                                             \
    template int64_t conv_block_spmm_workspace_bytes<T>(const BlockIndex&, const ConvShape&, int64_t);                \
    template int conv_block_spmm<T>(const BlockIndex&, const ConvShape&, const float*, const T*, const ImageStrides&, \
                                    const float*, int64_t, T*, T*, const ImageStrides&, int64_t, void*);              \
    template int64_t conv_block_spmm_t_workspace_bytes<T>(const BlockIndex&, const ConvShape&, int64_t);              \
    template int conv_block_spmm_t<T>(const BlockIndex&, const ConvShape&, const float*, const T*,                    \
                                      const ImageStrides&, T*, const ImageStrides&, int64_t, void*);

SK_INSTANTIATE(float)
SK_INSTANTIATE(bf16)

int64_t conv_block_sddmm_workspace_bytes(const BlockIndex& w, const ConvShape& conv, int64_t threads) {
    if (!valid(w, conv, threads)) return 0;
    return SK_TABLE(conv_gradient_table).sddmm_workspace(w, conv, threads);
}

int conv_block_sddmm(const BlockIndex& w, const ConvShape& conv, const float* dy, const ImageStrides& dy_strides,
                     const float* x, const ImageStrides& x_strides, float* dvalues, int64_t threads, void* workspace) {
    if (!valid(w, conv, threads) || !valid(dy_strides) || !valid(x_strides)) return kInvalid;
    SK_TABLE(conv_gradient_table).sddmm(w, conv, dy, dy_strides, x, x_strides, dvalues, threads, workspace);
    return kOk;
}

bool conv_block_backward_fuses(const BlockIndex& w, const ConvShape& conv) {
    return valid(w, conv, 1) && SK_TABLE(conv_gradient_table).backward_fuses(w, conv);
}

int64_t conv_block_backward_workspace_bytes(const BlockIndex& w, const ConvShape& conv, int64_t threads) {
    if (!valid(w, conv, threads) || !conv_block_backward_fuses(w, conv)) return 0;
    return SK_TABLE(conv_gradient_table).backward_workspace(w, conv, threads);
}

int conv_block_backward(const BlockIndex& w, const ConvShape& conv, const float* values, const float* dy,
                        const ImageStrides& dy_strides, const float* x, const ImageStrides& x_strides, float* dx,
                        const ImageStrides& dx_strides, float* dvalues, float* dbias, int64_t threads,
                        void* workspace) {
    if (!valid(w, conv, threads) || !valid(dy_strides) || !valid(x_strides) || !valid(dx_strides)) return kInvalid;
    if (!conv_block_backward_fuses(w, conv)) return kUnsupported;
    SK_TABLE(conv_gradient_table)
        .backward(w, conv, values, dy, dy_strides, x, x_strides, dx, dx_strides, dvalues, dbias, threads, workspace);
    return kOk;
}

}  // namespace sk
