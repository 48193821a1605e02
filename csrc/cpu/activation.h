// ReLU, SiLU and GELU of a product's rows, in place while they are close: what follows the bias in an epilogue.
//
//     silu(x) = x sigmoid(x)      gelu(x) = x/2 erfc(-x/√2)      gelu_tanh(x) = x/2 (1 + tanh(√(2/π) (x + 0.044715
//     x³)))
//
// Included by csrc/cpu/kernels/*.cpp only (see simd.h).
#pragma once

#include "api.h"
#include "cpu/bf16.h"
#include "cpu/gru_math.h"

namespace sk::SK_ISA {

// erfc(t) for t >= 0, within 4e-8: exp(-t²) times a polynomial in u = 1 / (1 + 0.45 t), fitted to erfc(t) exp(t²) by
// iteratively reweighted least squares.
SK_INLINE vfloat erfc_positive(vfloat t) {
    const vfloat u = broadcast(1.0f) / fma(t, broadcast(0.45f), broadcast(1.0f));
    vfloat p = broadcast(0.0925699224f);
    p = fma(p, u, broadcast(-0.494105674f));
    p = fma(p, u, broadcast(0.857170453f));
    p = fma(p, u, broadcast(-0.375805597f));
    p = fma(p, u, broadcast(0.460172267f));
    p = fma(p, u, broadcast(0.201008877f));
    p = fma(p, u, broadcast(0.258989753f));
    const Expm1 e = expm1_parts(-t * t);
    return p * u * fma(e.scale, e.part, e.scale);
}

template <Activation A>
SK_INLINE vfloat activate(vfloat x) {
    if constexpr (A == kRelu) return select(x < zero(), zero(), x);  // NaN stays
    // Our sigmoid ends at 6e-39, which a large x would make visible.
    if constexpr (A == kSilu) return x * select(x < broadcast(-88.0f), zero(), sigmoid(x));
    if constexpr (A == kGelu) {
        const vfloat t = x * broadcast(0.707106781f);
        const vfloat tail = erfc_positive(select(t < zero(), -t, t));
        return broadcast(0.5f) * x * select(t < zero(), tail, broadcast(2.0f) - tail);
    }
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
