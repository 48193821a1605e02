// Between block-CSR values and a dense weight, on the CPU.
#include "bindings.h"

namespace sk {

void bind_densify(py::module_& m) {
    py::class_<DenseLayout>(m, "DenseLayout", "Where the elements of a dense weight lie, in elements.")
        .def(py::init([](int64_t taps, int64_t out_stride, int64_t tap_stride, int64_t in_stride, int64_t tile) {
                 return DenseLayout{taps, out_stride, tap_stride, in_stride, tile};
             }),
             py::arg("taps"), py::arg("out_stride"), py::arg("tap_stride"), py::arg("in_stride"), py::arg("tile") = 0);
    m.def(
        "densify",
        [](const BlockIndex& w, const DenseLayout& layout, int64_t value_bytes, int64_t dense_bytes, addr values,
           addr dense, int64_t threads) {
            return densify(w, layout, value_bytes, dense_bytes, ptr<const void>(values), ptr<void>(dense), threads);
        },
        py::arg("index"), py::arg("layout"), py::arg("value_bytes"), py::arg("dense_bytes"), py::arg("values"),
        py::arg("dense"), py::arg("threads"), no_gil(),
        "The dense weight of block values; addresses, and the bytes of an element of each.");
    m.def(
        "gather_blocks",
        [](const BlockIndex& w, const DenseLayout& layout, int64_t value_bytes, int64_t dense_bytes, addr dense,
           addr values, int64_t threads) {
            return gather_blocks(w, layout, value_bytes, dense_bytes, ptr<const void>(dense), ptr<void>(values),
                                 threads);
        },
        py::arg("index"), py::arg("layout"), py::arg("value_bytes"), py::arg("dense_bytes"), py::arg("dense"),
        py::arg("values"), py::arg("threads"), no_gil(),
        "The active blocks of a dense weight, padding zero; addresses as for densify().");
    m.def(
        "block_norms",
        [](addr dense, int64_t rows, int64_t taps, int64_t in, int64_t bh, int64_t bw, addr norms, int64_t threads) {
            return block_norms(ptr<const float>(dense), rows, taps, in, bh, bw, ptr<float>(norms), threads);
        },
        py::arg("dense"), py::arg("rows"), py::arg("taps"), py::arg("in"), py::arg("bh"), py::arg("bw"),
        py::arg("norms"), py::arg("threads"), no_gil(),
        "norms = the sum of squares of each block of dense [rows, taps * in]; fp32 addresses, see csrc/api.h.");
}

}  // namespace sk
