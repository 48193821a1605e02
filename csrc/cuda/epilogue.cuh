// What follows a product while it is close: bias and activation, y = activation(sum + bias), pre = sum + bias.
#pragma once

#include "cuda/device.h"

namespace sk::gpu {

// The numbers of csrc/api.h.
SK_DEVICE float activate(int kind, float x) {
    if (kind == 1) return x < 0.0f ? 0.0f : x;  // NaN stays
    if (kind == 2) return x / (1.0f + exponential(-x));
    if (kind == 3) return 0.5f * x * (1.0f + error_function(0.707106781f * x));
    if (kind == 4) return 0.5f * x * (1.0f + hyperbolic_tangent(0.797884561f * (x + 0.044715f * x * x * x)));
    return x;
}

// Where results go: elements at y + offset + channel.
struct Epilogue {
    const float* bias;  // [channels] or null
    uint16_t *y, *pre;  // pre may be null
    int channels, activation;
    int aligned;  // whether elements at multiples of eight channels are 16-byte aligned

    // The sums of eight channels from `channel` on, of which the last may be past the end.
    template <class T>
    SK_DEVICE void store(int64_t offset, int channel, float (&sums)[8]) const {
        if (bias) {
            SK_UNROLL for (int i = 0; i < 8; ++i) {
                if (channel + i < channels) sums[i] += bias[channel + i];
            }
        }
        if (pre) write<T>(pre + offset + channel, channel, sums);
        if (activation != 0) {
            SK_UNROLL for (int i = 0; i < 8; ++i) sums[i] = activate(activation, sums[i]);
        }
        write<T>(y + offset + channel, channel, sums);
    }

    template <class T>
    SK_DEVICE void write(uint16_t* to, int channel, const float (&sums)[8]) const {
        if (aligned && channel + 8 <= channels) {
            uint32_t words[4];
            SK_UNROLL for (int i = 0; i < 4; ++i) {
                const uint32_t low = to_bits(T{}, sums[2 * i]), high = to_bits(T{}, sums[2 * i + 1]);
                words[i] = low | high << 16;
            }
            store_16(to, words);
        } else {
            SK_UNROLL for (int i = 0; i < 8; ++i) {
                if (channel + i < channels) to[i] = to_bits(T{}, sums[i]);
            }
        }
    }
};

}  // namespace sk::gpu
