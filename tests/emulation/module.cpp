// The launchers of csrc/cuda under emulation, as a Python module beside sparse_kernels._C.
#include "bindings.h"

PYBIND11_MODULE(emulated_cuda, m) { sk::bind_cuda_products(m); }
