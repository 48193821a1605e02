// Unstructured convolution on the CPU.
#include "bindings.h"

namespace sk {

void bind_conv_unstructured(py::module_& m) {
    m.def("conv_unstructured_runs_ints", &conv_unstructured_runs_ints, py::arg("index"), py::arg("taps"),
          py::arg("transposed"),
          "Length in int32 of the derived index of one orientation; a function of out, in, taps and nnzb alone.");
    m.def("conv_unstructured_derive_workspace_bytes", &conv_unstructured_derive_workspace_bytes, py::arg("index"),
          py::arg("taps"), py::arg("transposed"));
    m.def(
        "conv_unstructured_derive",
        [](const BlockIndex& w, int64_t taps, bool transposed, addr runs, addr workspace) {
            return conv_unstructured_derive(w, taps, transposed, ptr<int32_t>(runs), ptr<void>(workspace));
        },
        py::arg("index"), py::arg("taps"), py::arg("transposed"), py::arg("runs"), py::arg("workspace"), no_gil(),
        "Writes the derived index of one orientation; addresses of int32 buffers, see csrc/api.h.");
    m.def("conv_unstructured_spmm_workspace_bytes", &conv_unstructured_spmm_workspace_bytes, py::arg("index"),
          py::arg("conv"), py::arg("threads"));
    m.def(
        "conv_unstructured_spmm",
        [](const BlockIndex& w, addr runs, addr values, const ConvShape& conv, addr x, const ImageStrides& x_strides,
           addr bias, int64_t activation, addr pre, addr y, const ImageStrides& y_strides, int64_t threads,
           addr workspace) {
            return conv_unstructured_spmm(w, ptr<const int32_t>(runs), ptr<const float>(values), conv,
                                          ptr<const float>(x), x_strides, ptr<const float>(bias), activation,
                                          ptr<float>(pre), ptr<float>(y), y_strides, threads, ptr<void>(workspace));
        },
        py::arg("index"), py::arg("runs"), py::arg("values"), py::arg("conv"), py::arg("x"), py::arg("x_strides"),
        py::arg("bias"), py::arg("activation"), py::arg("pre"), py::arg("y"), py::arg("y_strides"), py::arg("threads"),
        py::arg("workspace"), no_gil(),
        "y = activation(conv(x, W) + bias); addresses of fp32 buffers, see csrc/api.h.");
    m.def("conv_unstructured_spmm_t_workspace_bytes", &conv_unstructured_spmm_t_workspace_bytes, py::arg("index"),
          py::arg("conv"), py::arg("threads"));
    m.def(
        "conv_unstructured_spmm_t",
        [](const BlockIndex& w, addr runs_t, addr values, const ConvShape& conv, addr dy,
           const ImageStrides& dy_strides, addr dx, const ImageStrides& dx_strides, int64_t threads, addr workspace) {
            return conv_unstructured_spmm_t(w, ptr<const int32_t>(runs_t), ptr<const float>(values), conv,
                                            ptr<const float>(dy), dy_strides, ptr<float>(dx), dx_strides, threads,
                                            ptr<void>(workspace));
        },
        py::arg("index"), py::arg("runs_t"), py::arg("values"), py::arg("conv"), py::arg("dy"), py::arg("dy_strides"),
        py::arg("dx"), py::arg("dx_strides"), py::arg("threads"), py::arg("workspace"), no_gil(),
        "dx = the input gradient of conv for dy; addresses of fp32 buffers, see csrc/api.h.");
    m.def("conv_unstructured_sddmm_workspace_bytes", &conv_unstructured_sddmm_workspace_bytes, py::arg("index"),
          py::arg("conv"), py::arg("threads"));
    m.def(
        "conv_unstructured_sddmm",
        [](const BlockIndex& w, addr runs, const ConvShape& conv, addr dy, const ImageStrides& dy_strides, addr x,
           const ImageStrides& x_strides, addr dvalues, int64_t threads, addr workspace) {
            return conv_unstructured_sddmm(w, ptr<const int32_t>(runs), conv, ptr<const float>(dy), dy_strides,
                                           ptr<const float>(x), x_strides, ptr<float>(dvalues), threads,
                                           ptr<void>(workspace));
        },
        py::arg("index"), py::arg("runs"), py::arg("conv"), py::arg("dy"), py::arg("dy_strides"), py::arg("x"),
        py::arg("x_strides"), py::arg("dvalues"), py::arg("threads"), py::arg("workspace"), no_gil(),
        "dvalues [nnzb] by slot at the active positions; addresses of fp32 buffers, see csrc/api.h.");
}

}  // namespace sk
