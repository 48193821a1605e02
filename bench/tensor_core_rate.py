"""The rate of the tensor cores by the N of their instruction: a Triton kernel that multiplies the same tiles again and
again, every program on its own accumulators. On Hopper Triton emits `wgmma`, before it `mma.sync`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparse_kernels.nn.measure import call_ms

M, K, ROUNDS, WARPS = 128, 64, 512, 4
PROGRAMS_PER_MULTIPROCESSOR = 4


@triton.jit
def multiply(a_ptr, b_ptr, out_ptr, rounds, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """`rounds` products of one tile a by one tile b, summed."""
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + rows[:, None] * K + inner[None, :])
    b = tl.load(b_ptr + inner[:, None] * N + columns[None, :])
    sums = tl.zeros((M, N), dtype=tl.float32)
    for _ in range(rounds):
        sums = tl.dot(a, b, sums)
    tl.store(out_ptr + tl.program_id(0) * M * N + rows[:, None] * N + columns[None, :], sums)


def tensor_core_tflops(n: int) -> float:
    """TFLOP/s in bf16 with tiles of 128 positions and `n` outputs; random data."""
    gpu = torch.device("cuda")
    count = torch.cuda.get_device_properties(0).multi_processor_count * PROGRAMS_PER_MULTIPROCESSOR
    a, b = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((M, K), (K, n)))
    out = torch.empty(count, M, n, device="cuda")

    def run() -> None:
        multiply[(count,)](a, b, out, ROUNDS, M=M, N=n, K=K, num_warps=WARPS)

    call_ms(run, 3, gpu)
    return 2.0 * M * n * K * ROUNDS * count / (min(call_ms(run, 5, gpu) for _ in range(5)) * 1e9)
