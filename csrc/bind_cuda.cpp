// The GPUs of this machine, as the CUDA runtime that is linked into the module sees them.
#include <stdexcept>
#include <string>

#include "bindings.h"

namespace sk {

#if defined(SK_CUDA)

static py::object device_dict(int64_t device) {
    CudaDeviceInfo info;
    const int status = cuda_device_info(device, &info);
    if (status != kOk) throw std::runtime_error(std::string("cuda_devices: ") + cuda_error_string(status));
    py::dict entry;
    entry["name"] = info.name;
    entry["capability"] = py::make_tuple(info.capability_major, info.capability_minor);
    entry["multiprocessors"] = info.multiprocessors;
    entry["shared_bytes_per_block"] = info.shared_bytes_per_block;
    entry["l2_bytes"] = info.l2_bytes;
    entry["memory_bytes"] = info.memory_bytes;
    return entry;
}

void bind_cuda(py::module_& m) {
    m.def("cuda_built", [] { return true; }, "Whether this build contains the CUDA kernels.");
    m.def(
        "cuda_why_unavailable",
        []() -> py::object {
            int64_t count = 0;
            const int status = cuda_device_count(&count);
            if (status != kOk) return py::str(cuda_error_string(status));
            if (count == 0) return py::str("no CUDA-capable device is detected");
            return py::none();
        },
        "None where a GPU can be used, else what the CUDA runtime says.");
    m.def(
        "cuda_devices",
        [] {
            int64_t count = 0;
            py::list devices;
            if (cuda_device_count(&count) == kOk)
                for (int64_t device = 0; device < count; ++device) devices.append(device_dict(device));
            return devices;
        },
        "One dict a GPU: name, capability, multiprocessors, shared_bytes_per_block, l2_bytes, memory_bytes.");
    m.def(
        "cuda_archs",
        [] {
            int64_t archs[32];
            const int64_t count = cuda_archs(archs, 32);
            py::list found;
            for (int64_t i = 0; i < count && i < 32; ++i) found.append(py::make_tuple(archs[i] / 10, archs[i] % 10));
            return found;
        },
        "The compute capabilities that this build has code for.");
}

#else

void bind_cuda(py::module_& m) {
    m.def("cuda_built", [] { return false; }, "Whether this build contains the CUDA kernels.");
    m.def(
        "cuda_why_unavailable", [] { return "built without nvcc"; },
        "None where a GPU can be used, else what the CUDA runtime says.");
    m.def("cuda_devices", [] { return py::list(); }, "The GPUs that the CUDA kernels can use: none in this build.");
    m.def("cuda_archs", [] { return py::list(); }, "The compute capabilities that this build has code for: none.");
}

#endif

}  // namespace sk
