// Block-CSR convolution on the CPU.
#include <string>

#include "bindings.h"

namespace sk {

namespace {

// The launchers for images of type T, their names ending in `type`.
template <class T>
void bind(py::module_& m, const std::string& type) {
    const auto name = [&](const char* launcher, const char* rest = "") { return launcher + type + rest; };
    const char* const bytes = "_workspace_bytes";
    m.def(name("conv_block_spmm", bytes).c_str(), &conv_block_spmm_workspace_bytes<T>, py::arg("index"),
          py::arg("conv"), py::arg("threads"));
    m.def(
        name("conv_block_spmm").c_str(),
        [](const BlockIndex& w, const ConvShape& conv, addr values, addr x, const ImageStrides& x_strides, addr bias,
           int64_t activation, addr pre, addr y, const ImageStrides& y_strides, int64_t threads, addr workspace) {
            return conv_block_spmm(w, conv, ptr<const float>(values), ptr<const T>(x), x_strides,
                                   ptr<const float>(bias), activation, ptr<T>(pre), ptr<T>(y), y_strides, threads,
                                   ptr<void>(workspace));
        },
        py::arg("index"), py::arg("conv"), py::arg("values"), py::arg("x"), py::arg("x_strides"), py::arg("bias"),
        py::arg("activation"), py::arg("pre"), py::arg("y"), py::arg("y_strides"), py::arg("threads"),
        py::arg("workspace"), no_gil(), "y = activation(conv(x, W) + bias); addresses, see csrc/api.h.");
    m.def(name("conv_block_spmm_t", bytes).c_str(), &conv_block_spmm_t_workspace_bytes<T>, py::arg("index"),
          py::arg("conv"), py::arg("threads"));
    m.def(
        name("conv_block_spmm_t").c_str(),
        [](const BlockIndex& w, const ConvShape& conv, addr values, addr dy, const ImageStrides& dy_strides, addr dx,
           const ImageStrides& dx_strides, int64_t threads, addr workspace) {
            return conv_block_spmm_t(w, conv, ptr<const float>(values), ptr<const T>(dy), dy_strides, ptr<T>(dx),
                                     dx_strides, threads, ptr<void>(workspace));
        },
        py::arg("index"), py::arg("conv"), py::arg("values"), py::arg("dy"), py::arg("dy_strides"), py::arg("dx"),
        py::arg("dx_strides"), py::arg("threads"), py::arg("workspace"), no_gil(),
        "dx = the input gradient of the convolution; addresses, see csrc/api.h.");
}

}  // namespace

void bind_conv_block(py::module_& m) {
    bind<float>(m, "");
    bind<bf16>(m, "_bf16");
    m.def("conv_block_sddmm_workspace_bytes", &conv_block_sddmm_workspace_bytes, py::arg("index"), py::arg("conv"),
          py::arg("threads"));
    m.def(
        "conv_block_sddmm",
        [](const BlockIndex& w, const ConvShape& conv, addr dy, const ImageStrides& dy_strides, addr x,
           const ImageStrides& x_strides, addr dvalues, int64_t threads, addr workspace) {
            return conv_block_sddmm(w, conv, ptr<const float>(dy), dy_strides, ptr<const float>(x), x_strides,
                                    ptr<float>(dvalues), threads, ptr<void>(workspace));
        },
        py::arg("index"), py::arg("conv"), py::arg("dy"), py::arg("dy_strides"), py::arg("x"), py::arg("x_strides"),
        py::arg("dvalues"), py::arg("threads"), py::arg("workspace"), no_gil(),
        "dvalues [nnzb, bh, bw] = the weight gradient at the active blocks; fp32 addresses, see csrc/api.h.");
    m.def("conv_block_backward_fuses", &conv_block_backward_fuses, py::arg("index"), py::arg("conv"),
          "Whether conv_block_backward runs this.");
    m.def("conv_block_backward_workspace_bytes", &conv_block_backward_workspace_bytes, py::arg("index"),
          py::arg("conv"), py::arg("threads"));
    m.def(
        "conv_block_backward",
        [](const BlockIndex& w, const ConvShape& conv, addr values, addr dy, const ImageStrides& dy_strides, addr x,
           const ImageStrides& x_strides, addr dx, const ImageStrides& dx_strides, addr dvalues, addr dbias,
           int64_t threads, addr workspace) {
            return conv_block_backward(w, conv, ptr<const float>(values), ptr<const float>(dy), dy_strides,
                                       ptr<const float>(x), x_strides, ptr<float>(dx), dx_strides, ptr<float>(dvalues),
                                       ptr<float>(dbias), threads, ptr<void>(workspace));
        },
        py::arg("index"), py::arg("conv"), py::arg("values"), py::arg("dy"), py::arg("dy_strides"), py::arg("x"),
        py::arg("x_strides"), py::arg("dx"), py::arg("dx_strides"), py::arg("dvalues"), py::arg("dbias"),
        py::arg("threads"), py::arg("workspace"), no_gil(),
        "The gradients of input, values and bias in one pass; fp32 addresses, see csrc/api.h.");
}

}  // namespace sk
