// The fused sparse GRU.
#include <pybind11/stl.h>

#include <vector>

#include "bindings.h"

namespace sk {

namespace {

// A GruLayer and the weights it points to.
struct OwnedLayer {
    std::vector<GruWeight> weights;
    GruLayer layer;

    OwnedLayer(std::vector<GruWeight> w, const GruLayer& l) : weights(std::move(w)), layer(l) {
        layer.weights = weights.data();
    }
    OwnedLayer(const OwnedLayer&) = delete;
};

}  // namespace

void bind_gru(py::module_& m) {
    py::class_<GruWeight>(m, "GruWeight", "One weight of a GRU layer; index.bh = 0 means dense. Holds addresses.")
        .def(py::init([](const BlockIndex& index, addr values, addr bias, addr d_values, addr d_bias) {
                 return GruWeight{index, ptr<const float>(values), ptr<const float>(bias), ptr<float>(d_values),
                                  ptr<float>(d_bias)};
             }),
             py::arg("index"), py::arg("values"), py::arg("bias"), py::arg("d_values") = 0, py::arg("d_bias") = 0);

    py::class_<OwnedLayer>(m, "GruLayer", "One GRU layer's inputs; holds addresses.")
        .def(py::init([](int64_t batch, int64_t steps, int64_t in, int64_t hidden, int64_t directions, addr x,
                         int64_t x_batch_stride, int64_t x_step_stride, addr h0, addr lengths,
                         std::vector<GruWeight> weights, addr reserve) {
                 if (static_cast<int64_t>(weights.size()) != 2 * directions)
                     throw py::value_error("GruLayer: weights must be [ih, hh] for each direction");
                 return std::make_unique<OwnedLayer>(
                     std::move(weights),
                     GruLayer{batch, steps, in, hidden, directions, ptr<const float>(x), x_batch_stride, x_step_stride,
                              ptr<const float>(h0), ptr<const int32_t>(lengths), nullptr, ptr<float>(reserve)});
             }),
             py::arg("batch"), py::arg("steps"), py::arg("in_"), py::arg("hidden"), py::arg("directions"), py::arg("x"),
             py::arg("x_batch_stride"), py::arg("x_step_stride"), py::arg("h0"), py::arg("lengths"), py::arg("weights"),
             py::arg("reserve"));

    m.def("gru_reserve_floats", &gru_reserve_floats, py::arg("batch"), py::arg("steps"), py::arg("hidden"),
          py::arg("directions"), "Floats that a forward with `reserve` writes.");
    m.def(
        "gru_forward_workspace_bytes",
        [](const OwnedLayer& l, int64_t threads) { return gru_forward_workspace_bytes(l.layer, threads); },
        py::arg("layer"), py::arg("threads"));
    m.def(
        "gru_forward",
        [](const OwnedLayer& l, addr y, addr h_n, addr workspace, int64_t threads) {
            return gru_forward(l.layer, ptr<float>(y), ptr<float>(h_n), ptr<void>(workspace), threads);
        },
        py::arg("layer"), py::arg("y"), py::arg("h_n"), py::arg("workspace"), py::arg("threads"), no_gil());
    m.def(
        "gru_backward_workspace_bytes",
        [](const OwnedLayer& l, int64_t threads) { return gru_backward_workspace_bytes(l.layer, threads); },
        py::arg("layer"), py::arg("threads"));
    m.def(
        "gru_backward",
        [](const OwnedLayer& l, addr y, addr dy, int64_t dy_batch_stride, int64_t dy_step_stride, addr dh_n, addr dx,
           addr dh0, addr dgates_ih, addr dgates_hh, addr workspace, int64_t threads) {
            const GruBackward grad = {ptr<const float>(y), ptr<const float>(dy),   dy_batch_stride,
                                      dy_step_stride,      ptr<const float>(dh_n), ptr<float>(dx),
                                      ptr<float>(dh0),     ptr<float>(dgates_ih),  ptr<float>(dgates_hh)};
            return gru_backward(l.layer, grad, ptr<void>(workspace), threads);
        },
        py::arg("layer"), py::arg("y"), py::arg("dy"), py::arg("dy_batch_stride"), py::arg("dy_step_stride"),
        py::arg("dh_n"), py::arg("dx"), py::arg("dh0"), py::arg("dgates_ih"), py::arg("dgates_hh"),
        py::arg("workspace"), py::arg("threads"), no_gil());
}

}  // namespace sk
