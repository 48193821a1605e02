"""What a GPU can do at best, measured: copies, the dense library's products, and tensor-core instructions by their N.

Ceilings of GPU rows come from here (`bench.roofline`), and `python -m bench gpu` writes them all. The rate of
`mma`/`wgmma` at N = 32 and 64 is what a product with 32 or 64 outputs a tile can reach however it is fed: operands stay
where they are, only accumulators change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from bench.replay import Replay
from bench.rows import machine
from sparse_kernels.nn.measure import call_ms

GPU = torch.device("cuda")
HBM_BYTES, L2_BYTES = 2**31, 2**24
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _best_ms(function: Callable[[], Any], calls: int) -> float:
    """Milliseconds of one call: the best of five replays of `calls` calls in one CUDA graph."""
    replay = Replay(function, calls)
    call_ms(replay, 2, GPU)
    return min(call_ms(replay, 1, GPU) for _ in range(5)) / calls


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


def rates(batch: int, shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, Any]]:
    """Every ceiling by name, one after the other, or why it could not be measured; `shapes` are channels and side of
    convolutions."""
    yield "machine", machine("cuda")
    ways: dict[str, Callable[[], Any]] = {
        "copy in memory, GB/s": copy_gbs,
        "copy in L2, GB/s": lambda: copy_gbs(L2_BYTES),
        **{f"product 8192³ {dtype}, TFLOP/s": partial(_product_tflops, dtype, 8192) for dtype in DTYPES},
        "product 4096³ bfloat16, TFLOP/s": partial(_product_tflops, "bfloat16", 4096),
        **{
            f"conv 3x3 N={batch} C={channels} {side}x{side} bfloat16, TFLOP/s": partial(
                conv_tflops, batch, channels, side
            )
            for channels, side in shapes
        },
        **{f"tensor cores at N={n}, TFLOP/s": partial(_tensor_core_tflops, n) for n in (32, 64, 128)},
    }
    for name, way in ways.items():
        try:
            yield name, way()
        # One that cannot be measured (memory, a missing package) must not cost the others.
        except Exception as error:
            yield name, f"not measured: {type(error).__name__}: {error}"


def _product_tflops(dtype: str, size: int) -> float:
    return round(product_gflops(dtype, size) / 1e3, 1)


def _tensor_core_tflops(n: int) -> float:
    from bench.tensor_core_rate import tensor_core_tflops

    return round(tensor_core_tflops(n), 1)
