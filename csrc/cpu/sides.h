// The sides of blocks.
#pragma once

#include <cstdint>

namespace sk {

// Whether the CPU kernels serve blocks of this height or width.
inline bool is_side(int64_t side) {
    return side == 1 || side == 4 || side == 8 || side == 16 || side == 32 || side == 64;
}

}  // namespace sk
