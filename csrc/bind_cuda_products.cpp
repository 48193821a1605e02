// The block-CSR products on tensor cores. Structs cross as tuples in the order of their members in api.h, so that the
// same file also binds the kernels under emulation, in a module of its own.
#include "bindings.h"

namespace sk {

#if defined(SK_CUDA)

namespace {

int64_t whole(const py::tuple& t, size_t i) { return py::cast<int64_t>(t[i]); }

void check(const py::tuple& t, size_t members) {
    if (t.size() != members) throw py::value_error("cuda: a tuple has not as many members as its struct in api.h");
}

CudaIndex index_of(const py::tuple& t) {
    check(t, 10);
    return CudaIndex{whole(t, 0),
                     whole(t, 1),
                     whole(t, 2),
                     whole(t, 3),
                     whole(t, 4),
                     whole(t, 5),
                     whole(t, 6),
                     whole(t, 7),
                     ptr<const int32_t>(py::cast<addr>(t[8])),
                     ptr<const int32_t>(py::cast<addr>(t[9]))};
}

ConvShape conv_of(const py::tuple& t) {
    check(t, 13);
    return ConvShape{whole(t, 0), whole(t, 1), whole(t, 2), whole(t, 3),  whole(t, 4),  whole(t, 5), whole(t, 6),
                     whole(t, 7), whole(t, 8), whole(t, 9), whole(t, 10), whole(t, 11), whole(t, 12)};
}

ImageStrides strides_of(const py::tuple& t) {
    check(t, 4);
    return ImageStrides{whole(t, 0), whole(t, 1), whole(t, 2), whole(t, 3)};
}

CudaProductConfig product_config(const py::tuple& t) {
    check(t, 8);
    return CudaProductConfig{whole(t, 0), whole(t, 1), whole(t, 2), whole(t, 3),
                             whole(t, 4), whole(t, 5), whole(t, 6), whole(t, 7)};
}

CudaSddmmConfig sddmm_config(const py::tuple& t) {
    check(t, 7);
    return CudaSddmmConfig{whole(t, 0), whole(t, 1), whole(t, 2), whole(t, 3), whole(t, 4), whole(t, 5), whole(t, 6)};
}

}  // namespace

void bind_cuda_products(py::module_& m) {
    m.def("cuda_product_shared_bytes",
          [](const py::tuple& w, const py::tuple& conv, bool transposed, const py::tuple& config) {
              return cuda_product_shared_bytes(index_of(w), conv_of(conv), transposed, product_config(config));
          });
    m.def("cuda_product_workspace_bytes",
          [](const py::tuple& w, const py::tuple& conv, bool transposed, const py::tuple& config) {
              return cuda_product_workspace_bytes(index_of(w), conv_of(conv), transposed, product_config(config));
          });
    m.def("cuda_product", [](const py::tuple& w, const py::tuple& conv, bool transposed, const py::tuple& config,
                             int64_t dtype, addr values, addr x, const py::tuple& x_strides, addr bias,
                             int64_t activation, addr pre, addr y, const py::tuple& y_strides, addr workspace,
                             addr stream) {
        return cuda_product(index_of(w), conv_of(conv), transposed, product_config(config), dtype, ptr<void>(values),
                            ptr<void>(x), strides_of(x_strides), ptr<float>(bias), activation, ptr<void>(pre),
                            ptr<void>(y), strides_of(y_strides), ptr<void>(workspace), ptr<void>(stream));
    });
    m.def("cuda_sddmm_shared_bytes", [](const py::tuple& w, const py::tuple& conv, const py::tuple& config) {
        return cuda_sddmm_shared_bytes(index_of(w), conv_of(conv), sddmm_config(config));
    });
    m.def("cuda_sddmm_workspace_bytes", [](const py::tuple& w, const py::tuple& conv, const py::tuple& config) {
        return cuda_sddmm_workspace_bytes(index_of(w), conv_of(conv), sddmm_config(config));
    });
    m.def("cuda_sddmm", [](const py::tuple& w, const py::tuple& conv, const py::tuple& config, int64_t dtype, addr dy,
                           const py::tuple& dy_strides, addr x, const py::tuple& x_strides, addr dvalues,
                           addr workspace, addr stream) {
        return cuda_sddmm(index_of(w), conv_of(conv), sddmm_config(config), dtype, ptr<void>(dy),
                          strides_of(dy_strides), ptr<void>(x), strides_of(x_strides), ptr<float>(dvalues),
                          ptr<void>(workspace), ptr<void>(stream));
    });
    m.def("cuda_scores_workspace_bytes",
          [](const py::tuple& w, const py::tuple& conv, const py::tuple& config, int64_t columns) {
              return cuda_scores_workspace_bytes(index_of(w), conv_of(conv), sddmm_config(config), columns);
          });
    m.def("cuda_scores", [](const py::tuple& w, const py::tuple& conv, const py::tuple& config, int64_t columns,
                            int64_t dtype, addr dy, const py::tuple& dy_strides, addr x, const py::tuple& x_strides,
                            addr scores, addr workspace, int64_t workspace_bytes, addr stream) {
        return cuda_scores(index_of(w), conv_of(conv), sddmm_config(config), columns, dtype, ptr<void>(dy),
                           strides_of(dy_strides), ptr<void>(x), strides_of(x_strides), ptr<float>(scores),
                           ptr<void>(workspace), workspace_bytes, ptr<void>(stream));
    });
}

#else

void bind_cuda_products(py::module_&) {}

#endif

}  // namespace sk
