// Unstructured linear on the CPU.
#include "bindings.h"

namespace sk {

void bind_linear_unstructured(py::module_& m) {
    m.def("unstructured_runs_ints", &unstructured_runs_ints, py::arg("index"), py::arg("transposed"),
          "Length in int32 of the derived index of one orientation; a function of out, in and nnzb alone.");
    m.def("unstructured_derive_workspace_bytes", &unstructured_derive_workspace_bytes, py::arg("index"),
          py::arg("transposed"));
    m.def(
        "unstructured_derive",
        [](const BlockIndex& w, bool transposed, addr runs, addr workspace) {
            return unstructured_derive(w, transposed, ptr<int32_t>(runs), ptr<void>(workspace));
        },
        py::arg("index"), py::arg("transposed"), py::arg("runs"), py::arg("workspace"), no_gil(),
        "Writes the derived index of one orientation; addresses of int32 buffers, see csrc/api.h.");
    m.def("unstructured_spmm_workspace_bytes", &unstructured_spmm_workspace_bytes, py::arg("index"),
          py::arg("positions"), py::arg("threads"));
    m.def(
        "unstructured_spmm",
        [](const BlockIndex& w, addr runs, addr values, addr x, int64_t ldx, addr bias, int64_t activation, addr pre,
           addr y, int64_t ldy, int64_t positions, int64_t threads, addr workspace) {
            return unstructured_spmm(w, ptr<const int32_t>(runs), ptr<const float>(values), ptr<const float>(x), ldx,
                                     ptr<const float>(bias), activation, ptr<float>(pre), ptr<float>(y), ldy, positions,
                                     threads, ptr<void>(workspace));
        },
        py::arg("index"), py::arg("runs"), py::arg("values"), py::arg("x"), py::arg("ldx"), py::arg("bias"),
        py::arg("activation"), py::arg("pre"), py::arg("y"), py::arg("ldy"), py::arg("positions"), py::arg("threads"),
        py::arg("workspace"), no_gil(),
        "y [positions, out] = activation(x [positions, in] W' + bias); addresses of fp32 buffers, see csrc/api.h.");
    m.def("unstructured_spmm_t_workspace_bytes", &unstructured_spmm_t_workspace_bytes, py::arg("index"),
          py::arg("positions"), py::arg("threads"));
    m.def(
        "unstructured_spmm_t",
        [](const BlockIndex& w, addr runs_t, addr values, addr dy, int64_t ldy, addr dx, int64_t ldx, int64_t positions,
           int64_t threads, addr workspace) {
            return unstructured_spmm_t(w, ptr<const int32_t>(runs_t), ptr<const float>(values), ptr<const float>(dy),
                                       ldy, ptr<float>(dx), ldx, positions, threads, ptr<void>(workspace));
        },
        py::arg("index"), py::arg("runs_t"), py::arg("values"), py::arg("dy"), py::arg("ldy"), py::arg("dx"),
        py::arg("ldx"), py::arg("positions"), py::arg("threads"), py::arg("workspace"), no_gil(),
        "dx [positions, in] = dy [positions, out] W; addresses of fp32 buffers, see csrc/api.h.");
    m.def("unstructured_sddmm_workspace_bytes", &unstructured_sddmm_workspace_bytes, py::arg("index"),
          py::arg("positions"), py::arg("threads"));
    m.def(
        "unstructured_sddmm",
        [](const BlockIndex& w, addr runs, addr dy, int64_t ldy, addr x, int64_t ldx, addr dvalues, int64_t positions,
           int64_t threads, addr workspace) {
            return unstructured_sddmm(w, ptr<const int32_t>(runs), ptr<const float>(dy), ldy, ptr<const float>(x), ldx,
                                      ptr<float>(dvalues), positions, threads, ptr<void>(workspace));
        },
        py::arg("index"), py::arg("runs"), py::arg("dy"), py::arg("ldy"), py::arg("x"), py::arg("ldx"),
        py::arg("dvalues"), py::arg("positions"), py::arg("threads"), py::arg("workspace"), no_gil(),
        "dvalues [nnzb] by slot = dy' x at the active positions; addresses of fp32 buffers, see csrc/api.h.");
}

}  // namespace sk
