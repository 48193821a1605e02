// Block-CSR linear on the CPU.
#include <string>

#include "bindings.h"

namespace sk {

namespace {

// The launchers for activations of type T, their names ending in `type`.
template <class T>
void bind(py::module_& m, const std::string& type) {
    const auto name = [&](const char* launcher, const char* rest = "") { return launcher + type + rest; };
    const char* const bytes = "_workspace_bytes";
    m.def(name("block_spmm", bytes).c_str(), &block_spmm_workspace_bytes<T>, py::arg("index"), py::arg("positions"),
          py::arg("threads"));
    m.def(
        name("block_spmm").c_str(),
        [](const BlockIndex& w, addr values, addr x, int64_t ldx, addr bias, int64_t activation, addr pre, addr y,
           int64_t ldy, int64_t positions, int64_t threads, addr workspace) {
            return block_spmm(w, ptr<const float>(values), ptr<const T>(x), ldx, ptr<const float>(bias), activation,
                              ptr<T>(pre), ptr<T>(y), ldy, positions, threads, ptr<void>(workspace));
        },
        py::arg("index"), py::arg("values"), py::arg("x"), py::arg("ldx"), py::arg("bias"), py::arg("activation"),
        py::arg("pre"), py::arg("y"), py::arg("ldy"), py::arg("positions"), py::arg("threads"), py::arg("workspace"),
        no_gil(), "y [positions, out] = activation(x [positions, in] W' + bias); addresses, see csrc/api.h.");
    m.def(name("block_spmm_t", bytes).c_str(), &block_spmm_t_workspace_bytes<T>, py::arg("index"), py::arg("positions"),
          py::arg("threads"));
    m.def(
        name("block_spmm_t").c_str(),
        [](const BlockIndex& w, addr values, addr dy, int64_t ldy, addr dx, int64_t ldx, int64_t positions,
           int64_t threads, addr workspace) {
            return block_spmm_t(w, ptr<const float>(values), ptr<const T>(dy), ldy, ptr<T>(dx), ldx, positions, threads,
                                ptr<void>(workspace));
        },
        py::arg("index"), py::arg("values"), py::arg("dy"), py::arg("ldy"), py::arg("dx"), py::arg("ldx"),
        py::arg("positions"), py::arg("threads"), py::arg("workspace"), no_gil(),
        "dx [positions, in] = dy [positions, out] W; addresses, see csrc/api.h.");
    m.def(name("block_sddmm", bytes).c_str(), &block_sddmm_workspace_bytes<T>, py::arg("index"), py::arg("positions"),
          py::arg("threads"));
    m.def(
        name("block_sddmm").c_str(),
        [](const BlockIndex& w, addr dy, int64_t ldy, addr x, int64_t ldx, addr dvalues, int64_t positions,
           int64_t threads, addr workspace) {
            return block_sddmm(w, ptr<const T>(dy), ldy, ptr<const T>(x), ldx, ptr<float>(dvalues), positions, threads,
                               ptr<void>(workspace));
        },
        py::arg("index"), py::arg("dy"), py::arg("ldy"), py::arg("x"), py::arg("ldx"), py::arg("dvalues"),
        py::arg("positions"), py::arg("threads"), py::arg("workspace"), no_gil(),
        "dvalues [nnzb, bh, bw] = dy' x at the active blocks; addresses, see csrc/api.h.");
}

}  // namespace

void bind_linear_block(py::module_& m) {
    bind<float>(m, "");
    bind<bf16>(m, "_bf16");
}

}  // namespace sk
