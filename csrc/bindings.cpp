// The Python module sparse_kernels._C: integers (addresses) in, int status out.
#include "bindings.h"

using namespace sk;

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of sparse_kernels: addresses and sizes in, a status out (0 is success).";

    py::class_<BlockIndex>(m, "BlockIndex", py::dynamic_attr(),
                           "The index set of one weight; holds addresses, owns nothing.")
        .def(py::init([](int64_t out, int64_t in, int64_t bh, int64_t bw, int64_t nnzb, addr crow, addr col, addr slot,
                         addr ccol, addr row_t, addr slot_t) {
                 return BlockIndex{out,
                                   in,
                                   bh,
                                   bw,
                                   nnzb,
                                   ptr<const int32_t>(crow),
                                   ptr<const int32_t>(col),
                                   ptr<const int32_t>(slot),
                                   ptr<const int32_t>(ccol),
                                   ptr<const int32_t>(row_t),
                                   ptr<const int32_t>(slot_t)};
             }),
             py::arg("out"), py::arg("in_"), py::arg("bh"), py::arg("bw"), py::arg("nnzb"), py::arg("crow"),
             py::arg("col"), py::arg("slot"), py::arg("ccol"), py::arg("row_t"), py::arg("slot_t"));

    py::class_<ConvShape>(m, "ConvShape", "Sizes of a convolution.")
        .def(py::init([](int64_t batch, int64_t height, int64_t width, int64_t out_height, int64_t out_width,
                         int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_h,
                         int64_t pad_w, int64_t dilation_h, int64_t dilation_w) {
                 return ConvShape{batch,    height,   width, out_height, out_width,  kernel_h,  kernel_w,
                                  stride_h, stride_w, pad_h, pad_w,      dilation_h, dilation_w};
             }),
             py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("out_height"), py::arg("out_width"),
             py::arg("kernel_h"), py::arg("kernel_w"), py::arg("stride_h"), py::arg("stride_w"), py::arg("pad_h"),
             py::arg("pad_w"), py::arg("dilation_h"), py::arg("dilation_w"));
    py::class_<ImageStrides>(m, "ImageStrides", "Of an image tensor, in elements.")
        .def(py::init([](int64_t n, int64_t c, int64_t h, int64_t w) { return ImageStrides{n, c, h, w}; }),
             py::arg("n"), py::arg("c"), py::arg("h"), py::arg("w"));

    bind_cpu(m);
    bind_densify(m);
    bind_linear_block(m);
    bind_linear_unstructured(m);
    bind_conv_block(m);
    bind_conv_unstructured(m);
    bind_gru(m);
    bind_cuda(m);
    bind_cuda_products(m);
}
