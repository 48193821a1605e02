// CPU dispatch and the machine's measured peak.
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "cpu/dispatch.h"

namespace sk {

void bind_cpu(py::module_& m) {
    if (const char* error = dispatch_error()) throw std::runtime_error(error);

    m.def("isa_name", [] { return isa_name(); }, "The instruction set in use: 'avx512', 'avx2' or 'portable'.");
    m.def(
        "bf16_kernels", [] { return bf16_kernels(); },
        "Whether the kernels for bf16 activations run here, with the instruction set in use.");
    m.def("transposed_slots_workspace_bytes", &transposed_slots_workspace_bytes, py::arg("index"),
          py::arg("col_blocks"), py::arg("threads"));
    m.def(
        "transposed_slots",
        [](const BlockIndex& w, int64_t col_blocks, addr slot_t, int64_t threads, addr workspace) {
            return transposed_slots(w, col_blocks, ptr<int32_t>(slot_t), threads, ptr<void>(workspace));
        },
        py::arg("index"), py::arg("col_blocks"), py::arg("slot_t"), py::arg("threads"), py::arg("workspace"), no_gil(),
        "Writes slot_t [nnzb] from the other arrays of the index; the address of an int32 buffer.");
    m.def(
        "isa_names",
        [] {
            py::list names;
            for (Isa isa : kIsas)
                if (isa_supported(isa)) names.append(isa_name(isa));
            return names;
        },
        "The instruction sets that this build has and this CPU runs, best first.");
    m.def(
        "set_isa",
        [](const std::string& name) {
            if (set_isa(name.c_str()) != kOk)
                throw std::invalid_argument("set_isa: this CPU or build has no instruction set '" + name +
                                            "'; see isa_names()");
        },
        py::arg("name"), "Use another instruction set from now on, for tests and benchmarks.");
    m.def(
        "advise_huge_pages", [](addr buffer, int64_t bytes) { advise_huge_pages(ptr<void>(buffer), bytes); },
        py::arg("buffer"), py::arg("bytes"), "Ask for 2 MiB pages behind a buffer; a hint.");
    m.def(
        "peak_fma_gflops",
        [](double seconds, int64_t threads, bool bf16) {
            double gflops = 0;
            const int status = peak_fma_gflops(seconds, threads, bf16, &gflops);
            if (status == kUnsupported)
                throw std::invalid_argument("peak_fma_gflops: no bf16 kernels here; see bf16_kernels()");
            if (status != kOk) throw std::invalid_argument("peak_fma_gflops: seconds and threads must be positive");
            return gflops;
        },
        py::arg("seconds") = 0.1, py::arg("threads") = 1, py::arg("bf16") = false, no_gil(),
        "Measured multiply-add rate of `threads` threads in GFLOP/s, the instruction set as in isa_name().");
}

}  // namespace sk
