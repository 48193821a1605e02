"""The bf16 linear kernels against dense fp64 on the same rounded operands, native and converted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_kernels import _native
from sparse_kernels.backends import get
from sparse_kernels.patterns import Block
from sparse_kernels.topology import Topology

pytestmark = pytest.mark.skipif(_native.why_unavailable() is not None, reason=str(_native.why_unavailable()))

SIDES = [(16, 16), (16, 32), (32, 16), (32, 32), (64, 16), (16, 64), (64, 64), (8, 32)]
# (positions, out, in, density, threads, gap between rows)
CASES = [
    (37, 100, 75, 0.4, 1, 0),
    (1, 64, 129, 0.5, 2, 3),
    (0, 64, 64, 0.5, 2, 0),
    (13, 64, 64, 0.0, 1, 1),
    (601, 130, 97, 0.3, 2, 0),
    (65, 66, 67, 1.0, 3, 1),
]


def view(rows: int, cols: int, gap: int, seed: int) -> Tensor:
    """A random bf16 matrix with `gap` NaNs after every row and before the first."""
    buffer = torch.full((rows * (cols + gap) + gap,), float("nan"), dtype=torch.bfloat16)[gap:].view(rows, cols + gap)
    buffer[:, :cols] = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return buffer[:, :cols]


def assert_close(got: Tensor, exact: Tensor, terms: Tensor) -> None:
    """Within fp32 sums and one rounding to the result's dtype."""
    rounding = torch.finfo(torch.bfloat16).eps / 2 if got.dtype == torch.bfloat16 else 0.0
    assert torch.isfinite(got).all(), "an output was not written, or memory outside the operands was read"
    assert ((got - exact).abs() <= 1.01 * rounding * exact.abs() + 2e-6 * terms + 1e-30).all()


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_products_match_dense(isa: str, sides: tuple[int, int], case: tuple[int, int, int, float, int, int]) -> None:
    positions, out, in_, density, threads, gap = case
    pattern, cpu = Block(*sides), get("cpu")
    rng = torch.Generator().manual_seed(0)
    rows, cols = pattern.grid(out, in_)
    flat = torch.randperm(rows * cols, generator=rng)[: round(density * rows * cols)]
    topology = Topology(out, in_, pattern, flat // cols, flat % cols)
    values = topology.gather(torch.randn(out, in_, generator=rng))
    dense = topology.scatter(values).bfloat16().double()
    index, x, dy = topology.weight_index(), view(positions, in_, gap, 1), view(positions, out, gap, 2)
    bias = torch.randn(out, generator=rng).bfloat16().float()
    torch.set_num_threads(threads)
    y, dx, dw = cpu.spmm(x, values, index, bias), cpu.spmm_t(dy, values, index), cpu.sddmm(dy, x, index)
    again = cpu.spmm(x, values, index, bias), cpu.spmm_t(dy, values, index), cpu.sddmm(dy, x, index)
    torch.set_num_threads(1)
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    x64, dy64 = x.double(), dy.double()
    assert_close(y, x64 @ dense.T + bias, x64.abs() @ dense.abs().T + bias.abs())
    assert_close(dx, dy64 @ dense, dy64.abs() @ dense.abs())
    assert_close(dw, topology.gather(dy64.T @ x64), topology.gather(dy64.abs().T @ x64.abs()))
    assert (dw[topology.gather(torch.ones(out, in_)) == 0] == 0).all(), "padding must stay zero"
    assert all(torch.equal(first, second) for first, second in zip((y, dx, dw), again, strict=True))


def test_nan_and_inf_spread_no_further_than_their_products(isa: str) -> None:
    topology = Topology(64, 75, Block(32, 32), torch.tensor([0, 1]), torch.tensor([2, 0]))
    values, index, cpu = topology.gather(torch.randn(64, 75)), topology.weight_index(), get("cpu")
    x = view(30, 75, 1, 1)
    x[7, 74] = float("nan")
    y = cpu.spmm(x, values, index)
    assert torch.equal(y.isnan().nonzero(), torch.cartesian_prod(torch.tensor([7]), torch.arange(32)))
