// One binary for every CPU: each kernel family is compiled once per instruction set and chosen at run time.
//
// How a family joins (csrc/cpu/kernels/peak.cpp and csrc/cpu/peak.cpp show it):
//   1. csrc/cpu/<family>.h          struct FooTable { int (*forward)(...); ... };      plain function pointers
//   2. csrc/cpu/kernels/<family>.cpp  #include "cpu/simd.h"; namespace sk::SK_ISA { static kernels;
//                                     extern const FooTable foo_table = {forward}; }   constant-initialised
//   3. csrc/cpu/<family>.cpp        SK_DECLARE_TABLE(FooTable, foo_table); the launchers of api.h call
//                                     SK_TABLE(foo_table).forward(...)
//   4. csrc/bind_<family>.cpp       binds the launchers; add it to bindings.h and bindings.cpp.
// Kernel files include no std templates: the linker keeps one copy of an inline function for the whole module, and it
// might keep the AVX-512 one (tests/test_build.py reads the symbols).
#pragma once

#include "api.h"

namespace sk {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };
inline constexpr Isa kIsas[] = {Isa::kAvx512, Isa::kAvx2, Isa::kPortable};

// The instruction set in use: the best one the CPU and the operating system support, or the one that the environment
// variable SPARSE_KERNELS_ISA or set_isa() names.
Isa isa();
const char* isa_name(Isa isa);
bool isa_supported(Isa isa);
int set_isa(const char* name);

// Null, or why the value of SPARSE_KERNELS_ISA cannot be honoured.
const char* dispatch_error();

}  // namespace sk

#if defined(__x86_64__)
#define SK_DECLARE_TABLE(Type, name) \
    namespace sk {                   \
    namespace portable {             \
    extern const Type name;          \
    }                                \
    namespace avx2 {                 \
    extern const Type name;          \
    }                                \
    namespace avx512 {               \
    extern const Type name;          \
    }                                \
    }
// The table of kernels that are compiled once more, with AVX512-BF16 (see bf16.h); null where they do not run.
#define SK_DECLARE_BF16_TABLE(Type, name) \
    namespace sk {                        \
    namespace avx512_bf16 {               \
    extern const Type name;               \
    }                                     \
    }
#define SK_BF16_TABLE(name) (::sk::bf16_kernels() ? &::sk::avx512_bf16::name : nullptr)
#define SK_TABLE(name)                                      \
    (::sk::isa() == ::sk::Isa::kAvx512 ? ::sk::avx512::name \
     : ::sk::isa() == ::sk::Isa::kAvx2 ? ::sk::avx2::name   \
                                       : ::sk::portable::name)
#else
#define SK_DECLARE_TABLE(Type, name) \
    namespace sk {                   \
    namespace portable {             \
    extern const Type name;          \
    }                                \
    }
#define SK_DECLARE_BF16_TABLE(Type, name)
#define SK_BF16_TABLE(name) nullptr
#define SK_TABLE(name) (::sk::portable::name)
#endif
