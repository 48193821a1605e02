"""What the machine could do at best: the measured multiply-add peak and stream bandwidth, and a row's ceiling by them.

    ours >= max(nonzero FLOPs / peak, bytes that must move / bandwidth)          ceiling = rival's time / that

The bandwidth is the one of the row's own working set: operands that fit a cache stream at that cache's rate, so the
ceiling is not set lower than the machine's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time

import torch

from bench import gpu_rates
from sparse_kernels import _native

SMALLEST_SET, LARGEST_SET = 2**21, 2**28  # bytes
PIECE = 2**20  # fp32 elements


@dataclasses.dataclass(frozen=True)
class Limits:
    """The least milliseconds that a row's work takes, by arithmetic and by memory, and the rates behind them."""

    compute_ms: float | None
    memory_ms: float | None
    peak_gflops: float | None
    bandwidth_gbs: float | None
    flops: float | None
    bytes_moved: float | None

    def forbids(self, goal: float, rival_ms: float) -> str:
        """The arithmetic by which a goal cannot be reached beside this rival; empty where it can."""
        allowed = rival_ms / goal
        for least, amount, rate in (
            (self.compute_ms, f"{(self.flops or 0) / 1e9:.3g} GFLOP", f"{self.peak_gflops or 0:.0f} GFLOP/s"),
            (self.memory_ms, f"{(self.bytes_moved or 0) / 1e6:.3g} MB", f"{self.bandwidth_gbs or 0:.0f} GB/s"),
        ):
            if least is not None and least > allowed:
                return (
                    f"{goal:.3g}x over {rival_ms:.3g} ms means {allowed:.3g} ms, but {amount} at the measured {rate} "
                    f"take {least:.3g} ms (ceiling {rival_ms / least:.2f}x)"
                )
        return ""


def limits(
    flops: float | None,
    bytes_moved: float | None,
    *,
    footprint: float | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> Limits:
    """The limits of a row at torch's present thread count, or on the GPU.

    Args:
        flops: of the nonzeros, 2 a multiply-add. bytes_moved: that any implementation must read or write.
        footprint: bytes of the operands, which the bandwidth depends on; default: `bytes_moved`.
        dtype: of the multiplications: "float32" or "bfloat16". device: "cpu" or "cuda"; there the peak is the dense
            library's best rate, and operands, being rotated, come from the GPU's memory.
    """
    threads = torch.get_num_threads()
    on_gpu = device == "cuda"
    peak = bandwidth = None
    if flops:
        peak = gpu_rates.product_gflops(dtype) if on_gpu else peak_gflops(threads, dtype)
    if bytes_moved:
        bandwidth = gpu_rates.copy_gbs() if on_gpu else stream_gbs(threads, footprint or bytes_moved)
    return Limits(
        flops / (peak * 1e6) if flops and peak else None,
        bytes_moved / (bandwidth * 1e6) if bytes_moved and bandwidth else None,
        peak,
        bandwidth,
        flops,
        bytes_moved,
    )


def peak_gflops(threads: int, dtype: str = "float32") -> float:
    """The machine's multiply-add rate with our instruction set: the best of five short runs, measured once a process.

    In bf16 it is that of the CPU's bf16 instruction, or the fp32 rate where it has none: a kernel converts there.
    """
    return _peak_gflops(threads, dtype, _native.native().isa_name())


@functools.cache
def _peak_gflops(threads: int, dtype: str, isa: str) -> float:
    module = _native.native()
    bf16 = dtype == "bfloat16" and module.bf16_kernels()
    return round(max(module.peak_fma_gflops(0.1, threads, bf16) for _ in range(5)), 1)


def stream_gbs(threads: int, footprint: float) -> float:
    """Stream bandwidth in GB/s over operands of `footprint` bytes, rounded down to a power of two: the best of a copy,
    an addition and a reduction."""
    size = min(max(footprint, SMALLEST_SET), LARGEST_SET)
    return _stream_gbs(threads, 2 ** int(math.log2(size)))


@functools.cache
def _stream_gbs(threads: int, footprint: int) -> float:
    """Passes over the whole footprint, timed piece by piece: short against the scheduler's slices, so that the best
    piece is undisturbed, and cold when a pass comes back to it if the footprint does not fit the cache."""
    pieces = torch.zeros(footprint // 4).split(PIECE)
    end = time.perf_counter() + 0.3
    best, passes = 0.0, 0
    while passes < 2 or time.perf_counter() < end:
        for way in (_add, _copy, _dot):
            for piece in pieces:
                start = time.perf_counter()
                moved = way(piece)
                best = max(best, moved / (time.perf_counter() - start) / 1e9)
        passes += 1
    return round(best, 1)


def _add(piece: torch.Tensor) -> int:
    thirds = piece[: piece.numel() // 3 * 3].view(3, -1)
    torch.add(thirds[0], thirds[1], out=thirds[2])
    return thirds.nbytes


def _copy(piece: torch.Tensor) -> int:
    halves = piece.view(2, -1)
    halves[0].copy_(halves[1])
    return piece.nbytes


def _dot(piece: torch.Tensor) -> int:
    halves = piece.view(2, -1)
    torch.dot(halves[0], halves[1])
    return piece.nbytes
