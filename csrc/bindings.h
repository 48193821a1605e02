// What every bind_<family>.cpp shares. A family adds `bind_<family>` here and calls it from bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "api.h"

namespace sk {

namespace py = pybind11;

// Python passes addresses (`Tensor.data_ptr()`) as integers; 0 is "none".
using addr = std::uintptr_t;

template <class T>
inline T* ptr(addr address) {
    return reinterpret_cast<T*>(address);
}

// Launches run without the GIL: m.def("spmm", ..., no_gil()).
using no_gil = py::call_guard<py::gil_scoped_release>;

void bind_cpu(py::module_& m);
void bind_densify(py::module_& m);
void bind_linear_block(py::module_& m);
void bind_linear_unstructured(py::module_& m);
void bind_conv_block(py::module_& m);
void bind_conv_unstructured(py::module_& m);
void bind_gru(py::module_& m);
void bind_cuda(py::module_& m);
void bind_cuda_products(py::module_& m);

}  // namespace sk
