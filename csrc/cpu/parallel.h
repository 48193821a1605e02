// OpenMP where the compiler has it, one thread where it has not (Apple's clang).
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#else
static inline int omp_get_thread_num() { return 0; }
static inline int omp_get_num_threads() { return 1; }
#endif
