"""The native block-CSR linear kernels against dense fp64, primitive by primitive, on every instruction set."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_kernels import _native, ops
from sparse_kernels.backends import get
from sparse_kernels.patterns import Block, Unstructured
from sparse_kernels.topology import Topology

pytestmark = pytest.mark.skipif(_native.why_unavailable() is not None, reason=str(_native.why_unavailable()))

SIDES = (1, 4, 8, 16, 32, 64)
BLOCKS = [Block(bh, bw) for bh, bw in itertools.product(SIDES, SIDES) if bh * bw > 1]

# (positions, out, in, density, threads, gap between rows): tails of every tile, tasks in both directions, no work.
CASES = [
    (37, 100, 75, 0.4, 1, 0),
    (1, 64, 128, 0.5, 2, 3),
    (0, 64, 64, 0.5, 2, 0),
    (150, 70, 130, 0.1, 2, 5),
    (13, 64, 64, 0.0, 1, 0),
    (65, 66, 67, 1.0, 3, 0),
    (520, 130, 90, 0.3, 2, 1),
    (30, 300, 1024, 0.05, 1, 0),
]


def make(pattern: Block, out: int, in_: int, density: float, seed: int = 0) -> tuple[Topology, Tensor, Tensor]:
    """A random topology whose slots are shuffled, its values, and the dense fp64 weight."""
    rng = torch.Generator().manual_seed(seed)
    rows, cols = pattern.grid(out, in_)
    flat = torch.randperm(rows * cols, generator=rng)[: round(density * rows * cols)]
    topology = Topology(out, in_, pattern, flat // cols, flat % cols)
    values = topology.gather(torch.randn(out, in_, generator=rng))
    return topology, values, topology.scatter(values).double()


def view(rows: int, cols: int, gap: int, seed: int) -> Tensor:
    """A random matrix with `gap` NaNs after every row and before the first."""
    buffer = torch.full((rows * (cols + gap) + gap,), float("nan"))[gap:].view(rows, cols + gap)
    buffer[:, :cols] = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return buffer[:, :cols]


def assert_close(got: Tensor, exact: Tensor, terms: Tensor) -> None:
    """|got - exact| <= 2 n eps sum|terms| for n-term dot products, far below what a missing or doubled term costs."""
    assert got.shape == exact.shape and got.dtype == torch.float32
    budget = 1e-6 * terms + 1e-30
    assert torch.isfinite(got).all(), "an output was not written, or memory outside the operands was read"
    assert ((got - exact).abs() <= budget).all()


@functools.lru_cache(maxsize=len(CASES) * len(BLOCKS))
def problem(pattern: Block, case: tuple[int, int, int, float, int, int]) -> dict[str, Any]:
    """Operands of one case, its exact products and the sums of their absolute terms, shared by the instruction sets."""
    positions, out, in_, density, _, gap = case
    topology, values, dense = make(pattern, out, in_, density)
    x, dy, bias = view(positions, in_, gap, 1), view(positions, out, gap, 2), view(1, out, 0, 3)[0]
    x64, dy64 = x.double(), dy.double()
    return {
        "operands": (topology.weight_index(), values, x, dy, bias),
        "y": (x64 @ dense.T + bias, x64.abs() @ dense.abs().T + bias.abs()),
        "dx": (dy64 @ dense, dy64.abs() @ dense.abs()),
        "dw": (topology.gather(dy64.T @ x64), topology.gather(dy64.abs().T @ x64.abs())),
    }


@pytest.mark.parametrize("pattern", BLOCKS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_products_match_dense(isa: str, pattern: Block, case: tuple[int, int, int, float, int, int]) -> None:
    exact, cpu = problem(pattern, case), get("cpu")
    index, values, x, dy, bias = exact["operands"]
    torch.set_num_threads(case[4])
    y, dx, dw = cpu.spmm(x, values, index, bias), cpu.spmm_t(dy, values, index), cpu.sddmm(dy, x, index)
    without_bias = cpu.spmm(x, values, index)
    again = cpu.spmm(x, values, index, bias), cpu.spmm_t(dy, values, index), cpu.sddmm(dy, x, index)
    torch.set_num_threads(1)
    assert_close(y, *exact["y"])
    assert_close(dx, *exact["dx"])
    assert_close(dw, *exact["dw"])
    assert_close(without_bias, exact["y"][0] - bias, exact["y"][1])
    assert all(torch.equal(first, second) for first, second in zip((y, dx, dw), again, strict=True))


@pytest.mark.parametrize("pattern", [Block(32, 32), Block(16, 16), Block(8, 8), Block(16, 1), Block(4, 64)], ids=str)
def test_the_thread_count_does_not_change_activations(isa: str, pattern: Block) -> None:
    topology, values, _ = make(pattern, 96, 130, 0.4)
    index, cpu = topology.weight_index(), get("cpu")
    x, dy = view(201, 130, 0, 1), view(201, 96, 0, 2)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append((cpu.spmm(x, values, index), cpu.spmm_t(dy, values, index)))
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(dx, results[0][1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("pattern", [Block(32, 32), Block(16, 16), Block(8, 8), Block(16, 1), Block(1, 4)], ids=str)
def test_nan_and_inf_reach_the_active_blocks_and_nothing_else(isa: str, pattern: Block, bad: float) -> None:
    topology, values, _ = make(pattern, 70, 75, 0.3)
    index, cpu = topology.weight_index(), get("cpu")
    x, dy = view(30, 75, 0, 1), view(30, 70, 0, 2)
    x[7, 74], dy[9, 69] = bad, bad
    reach = topology.scatter(topology.gather(torch.ones(70, 75))).bool()  # [out, in]

    y = cpu.spmm(x, values, index)
    expected = torch.zeros(30, 70, dtype=torch.bool)
    expected[7] = reach[:, 74]
    assert torch.equal(~torch.isfinite(y), expected)
    dx = cpu.spmm_t(dy, values, index)
    expected = torch.zeros(30, 75, dtype=torch.bool)
    expected[9] = reach[69]
    assert torch.equal(~torch.isfinite(dx), expected)
    dw = cpu.sddmm(dy, x, index)
    hit = torch.zeros(70, 75)
    hit[69], hit[:, 74] = 1, 1
    assert torch.equal(~torch.isfinite(dw), topology.gather(hit).bool())
    assert (dw[topology.gather(torch.ones(70, 75)) == 0] == 0).all(), "padding must stay zero"


@pytest.mark.parametrize("shape", [(70, 75), (512, 8200)], ids=str)
@pytest.mark.parametrize("pattern", [Block(32, 32), Block(64, 16), Block(16, 1), Block(8, 8), Unstructured()], ids=str)
def test_block_scores_are_the_squared_norms_of_every_block(pattern: Block, shape: tuple[int, int]) -> None:
    out, in_ = shape
    topology, _, _ = make(pattern, out, in_, 0.1)
    x, dy = view(20, in_, 2, 1), view(20, out, 1, 2)
    index = topology.weight_index()
    scores = get("cpu").block_scores(dy, x, index)
    exact = index.blocks(dy.double().T @ x.double()).square().sum(dim=(1, 2))
    torch.testing.assert_close(scores.double(), exact.view(index.row_blocks, index.col_blocks), rtol=1e-5, atol=1e-6)


def test_what_is_not_served_says_why() -> None:
    cpu, device = get("cpu"), torch.device("cpu")
    assert cpu.why_unsupported("linear", pattern=Block(32, 32), dtype=torch.float32, device=device) is None
    reason = cpu.why_unsupported("linear", pattern=Block(32, 32), dtype=torch.float64, device=device)
    assert reason is not None and "float32" in reason
    reason = cpu.why_unsupported("linear", pattern=Block(32, 32), dtype=torch.float32, device=torch.device("meta"))
    assert reason is not None and "meta" in reason


def test_launchers_refuse_a_broken_index() -> None:
    native = _native.native()
    for out, bh, threads in [(64, 5, 1), (0, 8, 1), (64, 8, 0)]:
        index = native.BlockIndex(out, 64, bh, 8, 0, 0, 0, 0, 0, 0, 0)
        assert native.block_spmm(index, 0, 0, 64, 0, 0, 0, 0, 64, 1, threads, 0) != 0
        assert native.block_spmm_t(index, 0, 0, 64, 0, 64, 1, threads, 0) != 0
        assert native.block_sddmm(index, 0, 64, 0, 64, 0, 1, threads, 0) != 0
    assert Unstructured() not in BLOCKS


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu_tanh"])
def test_activations_of_extreme_inputs(isa: str, activation: str) -> None:
    topology = Topology.random(32, 32, Block(32, 32), 1)
    extremes = torch.tensor([-3e38, -1e32, -1e4, -200.0, -89.0, -20.0, -0.0, 0.0, 20.0, 1e4, 3e38])
    x = torch.zeros(extremes.numel() + 3, 32)
    x[:, 5] = torch.cat([extremes, torch.tensor([float("inf"), -float("inf"), float("nan")])])
    identity = torch.zeros(1, 32, 32)
    identity[0, 5, 5] = 1.0
    y = ops.linear(x, identity, topology, activation=activation, backend="cpu")[:, 5]
    name, _, approximation = activation.partition("_")
    options = {"approximate": approximation or "none"} if name == "gelu" else {}
    want = getattr(F, name)(x[:, 5], **options)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("side", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_results_past_the_caches(isa: str, dtype: torch.dtype, side: int, more: int) -> None:
    """Of 4 MiB and more, whole vectors and ragged ones; rows that begin anywhere are stored as usual."""
    half, threads = dtype == torch.bfloat16, torch.get_num_threads()
    positions, out = (2003, 1056 + more) if half else (1030, 1040 + more)
    topology = Topology.random(out, 64, Block(side, side), 50, generator=torch.Generator().manual_seed(0))
    values = topology.gather(torch.randn(out, 64).to(dtype).float())
    x = torch.randn(positions, 64).to(dtype)
    torch.set_num_threads(2)
    y = get("cpu").spmm(x, values, topology.weight_index())
    torch.set_num_threads(threads)
    assert y.dtype == dtype and y.nbytes >= 4 << 20
    want = (x.float() @ topology.scatter(values).T).to(dtype)
    torch.testing.assert_close(y, want, rtol=1.6e-2 if half else 1.3e-6, atol=1e-5)
