// ReLU, SiLU and GELU of a product's rows, in place while they are close: what follows the bias in an epilogue.
//
//     silu(x) = x sigmoid(x)      gelu(x) = x/2 (1 + erf(x/√2))      gelu_tanh(x) = x/2 (1 + tanh(√(2/π) (x + 0.044715
//     x³)))
//
// Included by csrc/cpu/kernels/*.cpp only (see simd.h).
#pragma once

#include "api.h"
#include "cpu/bf16.h"
#include "cpu/gru_math.h"

namespace sk::SK_ISA {

// The normal distribution's cumulative function, (1 + erf(x/√2)) / 2, within 2.1e-7 (torch's own: 3.5e-7). erf(t) = t
// P(t²) / Q(t²) on |t| <= 3.97, both of degree 5, fitted by iteratively reweighted least squares. Below -5.6 it is 0,
// lest the last digit of 1 + erf be multiplied by a large x.
SK_INLINE vfloat normal_cdf(vfloat x) {
    const vfloat t = clamp(x * broadcast(0.707106781f), -3.97f, 3.97f), s = t * t;
    vfloat p = broadcast(1.99674355e-6f), q = broadcast(3.76919343e-5f);
    p = fma(p, s, broadcast(2.87739472e-4f)), q = fma(q, s, broadcast(1.20525935e-3f));
    p = fma(p, s, broadcast(3.95115092e-3f)), q = fma(q, s, broadcast(1.53387450e-2f));
    p = fma(p, s, broadcast(5.33088222e-2f)), q = fma(q, s, broadcast(1.15938820e-1f));
    p = fma(p, s, broadcast(1.94907263e-1f)), q = fma(q, s, broadcast(5.06063402e-1f));
    p = fma(p, s, broadcast(1.12837899f)), q = fma(q, s, broadcast(1.0f));
    const vfloat half = broadcast(0.5f);
    return select(x < broadcast(-5.6f), zero(), fma(half * t, p / q, half));
}

template <Activation A>
SK_INLINE vfloat activate(vfloat x) {
    if constexpr (A == kRelu) return select(x < zero(), zero(), x);  // NaN stays
    // Our sigmoid ends at 6e-39, which a large x would make visible.
    if constexpr (A == kSilu) return x * select(x < broadcast(-88.0f), zero(), sigmoid(x));
    if constexpr (A == kGelu) return x * normal_cdf(x);
    if constexpr (A == kGeluTanh) {
        const vfloat inner = broadcast(0.797884561f) * fma(x * x * x, broadcast(0.044715f), x);
        return broadcast(0.5f) * x * (broadcast(1.0f) + tanh(inner));
    }
    return x;
}

template <Activation A>
static void activate_rows(element* y, element* pre, int64_t ld, int64_t rows, int64_t cols) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; j += VLEN) {
            const int64_t n = smaller(VLEN, cols - j), at = i * ld + j;
            const vfloat x = read_first(y + at, n);
            if (pre) store_first(pre + at, x, n);
            store_first(y + at, activate<A>(x), n);
        }
}

// y [rows, cols] = kind(y); what y held goes to pre unless that is null. Both have row stride ld.
static void activate(Activation kind, element* y, element* pre, int64_t ld, int64_t rows, int64_t cols) {
    if (kind == kRelu) activate_rows<kRelu>(y, pre, ld, rows, cols);
    if (kind == kSilu) activate_rows<kSilu>(y, pre, ld, rows, cols);
    if (kind == kGelu) activate_rows<kGelu>(y, pre, ld, rows, cols);
    if (kind == kGeluTanh) activate_rows<kGeluTanh>(y, pre, ld, rows, cols);
}

}  // namespace sk::SK_ISA
