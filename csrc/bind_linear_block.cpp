// Block-CSR linear on the CPU.
#include "bindings.h"

namespace sk {

void bind_linear_block(py::module_& m) {
    m.def("block_spmm_workspace_bytes", &block_spmm_workspace_bytes, py::arg("index"), py::arg("positions"),
          py::arg("threads"));
    m.def(
        "block_spmm",
        [](const BlockIndex& w, addr values, addr x, int64_t ldx, addr bias, addr y, int64_t ldy, int64_t positions,
           int64_t threads, addr workspace) {
            return block_spmm(w, ptr<const float>(values), ptr<const float>(x), ldx, ptr<const float>(bias),
                              ptr<float>(y), ldy, positions, threads, ptr<void>(workspace));
        },
        py::arg("index"), py::arg("values"), py::arg("x"), py::arg("ldx"), py::arg("bias"), py::arg("y"),
        py::arg("ldy"), py::arg("positions"), py::arg("threads"), py::arg("workspace"), no_gil(),
        "y [positions, out] = x [positions, in] W' + bias; addresses of fp32 buffers, see csrc/api.h.");
    m.def("block_spmm_t_workspace_bytes", &block_spmm_t_workspace_bytes, py::arg("index"), py::arg("positions"),
          py::arg("threads"));
    m.def(
        "block_spmm_t",
        [](const BlockIndex& w, addr values, addr dy, int64_t ldy, addr dx, int64_t ldx, int64_t positions,
           int64_t threads, addr workspace) {
            return block_spmm_t(w, ptr<const float>(values), ptr<const float>(dy), ldy, ptr<float>(dx), ldx, positions,
                                threads, ptr<void>(workspace));
        },
        py::arg("index"), py::arg("values"), py::arg("dy"), py::arg("ldy"), py::arg("dx"), py::arg("ldx"),
        py::arg("positions"), py::arg("threads"), py::arg("workspace"), no_gil(),
        "dx [positions, in] = dy [positions, out] W; addresses of fp32 buffers, see csrc/api.h.");
    m.def("block_sddmm_workspace_bytes", &block_sddmm_workspace_bytes, py::arg("index"), py::arg("positions"),
          py::arg("threads"));
    m.def(
        "block_sddmm",
        [](const BlockIndex& w, addr dy, int64_t ldy, addr x, int64_t ldx, addr dvalues, int64_t positions,
           int64_t threads, addr workspace) {
            return block_sddmm(w, ptr<const float>(dy), ldy, ptr<const float>(x), ldx, ptr<float>(dvalues), positions,
                               threads, ptr<void>(workspace));
        },
        py::arg("index"), py::arg("dy"), py::arg("ldy"), py::arg("x"), py::arg("ldx"), py::arg("dvalues"),
        py::arg("positions"), py::arg("threads"), py::arg("workspace"), no_gil(),
        "dvalues [nnzb, bh, bw] = dy' x at the active blocks; addresses of fp32 buffers, see csrc/api.h.");
}

}  // namespace sk
