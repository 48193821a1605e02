"""What a GPU can do at best, measured: copies, the dense library's products, and tensor-core instructions by their N.

Ceilings of GPU rows come from here (`bench.roofline`), and `python -m bench gpu` writes them all. The rate of
`mma`/`wgmma` at N = 32 and 64 is what a product with 32 or 64 outputs a tile can reach however it is fed: operands stay
where they are, only accumulators change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.replay import event_ms
from bench.rows import machine

HBM_BYTES, L2_BYTES = 2**31, 2**24
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _best_ms(function: Callable[[], Any], count: int) -> float:
    event_ms(function, count)
    return min(event_ms(function, count) for _ in range(5))


@functools.cache
def product_gflops(dtype: str, size: int = 8192) -> float:
    """GFLOP/s of the dense library's `size`³ product of random matrices, float32 without tf32."""
    a, b = (torch.randn(size, size, device="cuda", dtype=DTYPES[dtype]) for _ in range(2))
    return round(2 * size**3 / (_best_ms(lambda: a @ b, 5) * 1e6), 1)


@functools.cache
def copy_gbs(nbytes: int = HBM_BYTES) -> float:
    """GB/s of a copy of `nbytes`, read and write counted; small enough, it stays in the L2 cache."""
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    count = max(5, min(200, HBM_BYTES // nbytes))
    return round(2 * nbytes / (_best_ms(lambda: target.copy_(source), count) * 1e6), 1)


def conv_tflops(batch: int, channels: int, side: int, kernel: int = 3) -> dict[str, float]:
    """TFLOP/s of cuDNN's bf16 channels_last convolution with `cudnn.benchmark`: forward, dX and dW."""
    make = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    last, pad = torch.channels_last, kernel // 2
    x, dy = (make(batch, channels, side, side).contiguous(memory_format=last) for _ in range(2))
    weight = make(channels, channels, kernel, kernel).contiguous(memory_format=last)
    geometry = ([1, 1], [pad, pad], [1, 1], False, [0, 0], 1)

    def gradient(which: int) -> Any:
        mask = [which == 0, which == 1, False]
        return torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, mask)

    passes: dict[str, Callable[[], Any]] = {
        "forward": lambda: torch.nn.functional.conv2d(x, weight, padding=pad),
        "input gradient": lambda: gradient(0),
        "weight gradient": lambda: gradient(1),
    }
    flops = 2.0 * batch * side**2 * channels**2 * kernel**2
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        return {name: round(flops / (_best_ms(run, 10) * 1e9), 1) for name, run in passes.items()}


def rates(batch: int, shapes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Every ceiling, with the machine it was measured on; `shapes` are channels and side of convolutions."""
    return {
        "machine": machine("cuda"),
        "copy GB/s": {"memory": copy_gbs(), "L2": copy_gbs(L2_BYTES)},
        "product TFLOP/s": {
            **{f"{dtype} 8192³": product_gflops(dtype) / 1e3 for dtype in DTYPES},
            "bfloat16 4096³": product_gflops("bfloat16", 4096) / 1e3,
        },
        "conv 3x3 TFLOP/s": {f"N={batch} C={c} {side}x{side}": conv_tflops(batch, c, side) for c, side in shapes},
        "tensor core TFLOP/s": _tensor_core_tflops(),
    }


def _tensor_core_tflops() -> dict[str, float] | str:
    try:
        from bench.tensor_core_rate import tensor_core_tflops
    except ImportError as error:
        return f"not measured: {error}"
    return {f"N={n}": round(tensor_core_tflops(n), 1) for n in (32, 64, 128)}
