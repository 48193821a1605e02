// The machine's measured peak: what the benchmarks hold every kernel against.
#include "cpu/peak.h"

#include <algorithm>
#include <chrono>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

SK_DECLARE_TABLE(PeakTable, peak_table)
SK_DECLARE_BF16_TABLE(PeakTable, peak_table)

namespace sk {

int peak_fma_gflops(double seconds, int64_t threads, bool bf16, double* gflops) {
    if (!(seconds > 0) || threads < 1) return kInvalid;
    using clock = std::chrono::steady_clock;
    const PeakTable* chosen = bf16 ? SK_BF16_TABLE(peak_table) : &SK_TABLE(peak_table);
    if (!chosen) return kUnsupported;
    const PeakTable& table = *chosen;
    // A slice of about 2 ms on any machine: long against the clock, short against the scheduler.
    const int64_t iterations = 150000;
    double total = 0;
#pragma omp parallel num_threads(static_cast<int>(threads)) reduction(+ : total)
    {
        volatile float sink = 0;
        double best = 0;
        const auto end = clock::now() + std::chrono::duration<double>(seconds);
        do {
            const auto start = clock::now();
            sink = sink + table.fma_chain(iterations, 0.5f, 1.0f);
            const std::chrono::duration<double> elapsed = clock::now() - start;
            best = std::max(best, 1e-9 * static_cast<double>(iterations * table.flops_per_iteration) / elapsed.count());
        } while (clock::now() < end);
        total += best;
    }
    *gflops = total;
    return kOk;
}

}  // namespace sk
