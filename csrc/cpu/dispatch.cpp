#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace sk {

namespace {

bool detect(Isa isa) {
#if defined(__x86_64__)
    // __builtin_cpu_supports reads CPUID and XGETBV, so a feature that the operating system does not save is absent.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    if (isa == Isa::kAvx2) return avx2;
    if (isa == Isa::kAvx512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#endif
    return isa == Isa::kPortable;
}

struct State {
    std::atomic<Isa> isa{Isa::kPortable};
    const char* error = nullptr;

    State() {
        for (Isa candidate : kIsas)
            if (detect(candidate)) {
                isa = candidate;
                break;
            }
        const char* forced = std::getenv("SPARSE_KERNELS_ISA");
        if (!forced || !*forced) return;
        for (Isa candidate : kIsas)
            if (!std::strcmp(forced, isa_name(candidate))) {
                if (detect(candidate))
                    isa = candidate;
                else
                    error = "SPARSE_KERNELS_ISA names an instruction set that this CPU or build lacks; unset it";
                return;
            }
        error = "SPARSE_KERNELS_ISA must be avx512, avx2 or portable; unset it to let the CPU decide";
    }
};

State& state() {
    static State instance;
    return instance;
}

}  // namespace

Isa isa() { return state().isa.load(std::memory_order_relaxed); }

const char* isa_name(Isa isa) { return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "portable"; }

const char* isa_name() { return isa_name(isa()); }

bool bf16_kernels() {
#if defined(__x86_64__)
    static const bool present = __builtin_cpu_supports("avx512bf16");
    return present && isa() == Isa::kAvx512;
#else
    return false;
#endif
}

bool isa_supported(Isa isa) { return detect(isa); }

int set_isa(const char* name) {
    for (Isa candidate : kIsas)
        if (!std::strcmp(name, isa_name(candidate)) && detect(candidate)) {
            state().isa.store(candidate, std::memory_order_relaxed);
            return kOk;
        }
    return kUnsupported;
}

const char* dispatch_error() { return state().error; }

}  // namespace sk
