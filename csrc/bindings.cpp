// The Python module sparse_kernels._C: integers (addresses) in, int status out.
#include "bindings.h"

using namespace sk;

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of sparse_kernels: addresses and sizes in, a status out (0 is success).";

    py::class_<BlockIndex>(m, "BlockIndex", "The index set of one weight; holds addresses, owns nothing.")
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

    bind_cpu(m);
    bind_linear_block(m);
    bind_linear_unstructured(m);
    bind_gru(m);
    bind_cuda(m);
}
