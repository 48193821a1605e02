// Large buffers in large pages.
#include <cstdint>

#include "api.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sk {

void advise_huge_pages(void* buffer, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // Rounded outwards: a large page at the border of two buffers is as welcome, and this is a hint that changes
    // nobody's data. Where part of the range is not mapped, the kernel says so and takes the rest.
    constexpr std::uintptr_t kPage = std::uintptr_t{1} << 21;
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(buffer);
    const std::uintptr_t first = address / kPage * kPage;
    const std::uintptr_t end = (address + static_cast<std::uintptr_t>(bytes) + kPage - 1) / kPage * kPage;
    (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
    (void)buffer;
    (void)bytes;
#endif
}

}  // namespace sk
