"""The native unstructured linear kernels against dense fp64, primitive by primitive, on every instruction set."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_kernels import _native
from sparse_kernels.backends import get
from sparse_kernels.ops.linear import linear
from sparse_kernels.patterns import Unstructured
from sparse_kernels.topology import Topology

pytestmark = pytest.mark.skipif(_native.why_unavailable() is not None, reason=str(_native.why_unavailable()))

PATTERN = Unstructured()

# (positions, out, in, density, threads, gap between rows): every panel width and tail, one tile and several, a row with
# more nonzeros than a tile has columns, more threads than panels, no work at all.
CASES = [
    (37, 100, 75, 0.4, 1, 0),
    (1, 64, 128, 0.5, 2, 3),
    (0, 64, 64, 0.5, 2, 0),
    (150, 70, 333, 0.1, 2, 5),
    (13, 64, 64, 0.0, 1, 0),
    (65, 66, 67, 1.0, 3, 0),
    (520, 130, 90, 0.3, 2, 1),
    (96, 17, 1, 0.5, 2, 0),
    (64, 1, 2100, 0.9, 1, 2),
    (130, 300, 1500, 0.01, 2, 0),
    (300, 31, 160, 0.25, 12, 0),
]


def make(out: int, in_: int, density: float, seed: int = 0) -> tuple[Topology, Tensor, Tensor]:
    """A random topology with shuffled slots and the derived index, its values, and the dense fp64 weight."""
    rng = torch.Generator().manual_seed(seed)
    flat = torch.randperm(out * in_, generator=rng)[: round(density * out * in_)]
    topology = Topology(out, in_, PATTERN, flat // in_, flat % in_)
    deriver = get("cpu").deriver("linear", PATTERN)
    assert deriver is not None
    topology.attach(deriver)
    values = torch.randn(topology.nnzb, 1, 1, generator=rng)
    return topology, values, topology.scatter(values).double()


def view(rows: int, cols: int, gap: int, seed: int) -> Tensor:
    """A random matrix with `gap` NaNs after every row and before the first."""
    buffer = torch.full((rows * (cols + gap) + gap,), float("nan"))[gap:].view(rows, cols + gap)
    buffer[:, :cols] = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return buffer[:, :cols]


def assert_close(got: Tensor, exact: Tensor, terms: Tensor) -> None:
    """|got - exact| within the rounding of dot products whose absolute terms sum to `terms`."""
    assert got.shape == exact.shape and got.dtype == torch.float32
    assert torch.isfinite(got).all(), "an output was not written, or memory outside the operands was read"
    assert ((got - exact).abs() <= 1e-6 * terms + 1e-30).all()


@functools.lru_cache(maxsize=len(CASES))
def problem(case: tuple[int, int, int, float, int, int]) -> dict[str, Any]:
    """Operands of one case, its exact products and the sums of their absolute terms, shared by the instruction sets."""
    positions, out, in_, density, _, gap = case
    topology, values, dense = make(out, in_, density)
    x, dy, bias = view(positions, in_, gap, 1), view(positions, out, gap, 2), view(1, out, 0, 3)[0]
    x64, dy64 = x.double(), dy.double()
    return {
        "operands": (topology, values, x, dy, bias),
        "y": (x64 @ dense.T + bias, x64.abs() @ dense.abs().T + bias.abs()),
        "dx": (dy64 @ dense, dy64.abs() @ dense.abs()),
        "dw": (topology.gather(dy64.T @ x64), topology.gather(dy64.abs().T @ x64.abs())),
    }


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_products_match_dense(isa: str, case: tuple[int, int, int, float, int, int]) -> None:
    exact, cpu = problem(case), get("cpu")
    topology, values, x, dy, bias = exact["operands"]
    index = topology.weight_index("cpu")
    assert len(index.derived) == 2
    torch.set_num_threads(case[4])
    y, dx, dw = cpu.spmm(x, values, index, bias), cpu.spmm_t(dy, values, index), cpu.sddmm(dy, x, index)
    without_bias = cpu.spmm(x, values, index)
    again = cpu.spmm(x, values, index, bias), cpu.spmm_t(dy, values, index), cpu.sddmm(dy, x, index)
    assert_close(y, *exact["y"])
    assert_close(dx, *exact["dx"])
    assert_close(dw, *exact["dw"])
    assert_close(without_bias, exact["y"][0] - bias, exact["y"][1])
    assert all(torch.equal(first, second) for first, second in zip((y, dx, dw), again, strict=True))


def test_inputs_wider_than_16_bits_of_columns(isa: str) -> None:
    topology, values, dense = make(3, 70000, 0.001)
    index, cpu = topology.weight_index("cpu"), get("cpu")
    x, dy = view(20, 70000, 0, 1), view(20, 3, 0, 2)
    assert_close(cpu.spmm(x, values, index), x.double() @ dense.T, x.double().abs() @ dense.abs().T)
    assert_close(cpu.spmm_t(dy, values, index), dy.double() @ dense, dy.double().abs() @ dense.abs())
    exact, terms = dy.double().T @ x.double(), dy.double().abs().T @ x.double().abs()
    assert_close(cpu.sddmm(dy, x, index), topology.gather(exact), topology.gather(terms))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_reach_the_active_weights_and_nothing_else(isa: str, bad: float) -> None:
    topology, values, _ = make(70, 400, 0.3)
    index, cpu, mask = topology.weight_index("cpu"), get("cpu"), topology.mask()  # [out, in]
    x, dy = view(30, 400, 0, 1), view(30, 70, 0, 2)
    x[7, 144], dy[9, 69] = bad, bad

    expected = torch.zeros(30, 70, dtype=torch.bool)
    expected[7] = mask[:, 144]
    assert torch.equal(~torch.isfinite(cpu.spmm(x, values, index)), expected)
    expected = torch.zeros(30, 400, dtype=torch.bool)
    expected[9] = mask[69]
    assert torch.equal(~torch.isfinite(cpu.spmm_t(dy, values, index)), expected)
    hit = torch.zeros(70, 400)
    hit[69], hit[:, 144] = 1, 1
    assert torch.equal(~torch.isfinite(cpu.sddmm(dy, x, index)), topology.gather(hit).bool())


def test_a_rewritten_topology_keeps_the_buffers_and_their_addresses() -> None:
    topology, values, _ = make(64, 300, 0.2)
    index = topology.weight_index("cpu")
    before = [t.data_ptr() for t in index.derived]
    free = (~topology.mask()).nonzero()[::7][:500]
    topology.rewrite(torch.arange(free.shape[0]), free[:, 0], free[:, 1])
    topology.validate()
    assert [t.data_ptr() for t in topology.weight_index("cpu").derived] == before
    dense, x = topology.scatter(values).double(), view(50, 300, 0, 1)
    assert_close(get("cpu").spmm(x, values, index), x.double() @ dense.T, x.double().abs() @ dense.abs().T)


def test_the_capacity_depends_on_the_shape_and_the_count_alone() -> None:
    deriver = get("cpu").deriver("linear", PATTERN)
    assert deriver is not None
    rows = torch.arange(200) // 100
    together = Topology(100, 1000, PATTERN, rows, torch.arange(200) % 100)
    spread = Topology.random(100, 1000, PATTERN, 200)
    assert dict(deriver.capacity(together)) == dict(deriver.capacity(spread))
    x = view(20, 1000, 0, 1)
    values = torch.randn(200, 1, 1)
    for topology in (together, spread):
        topology.attach(deriver)
        y = get("cpu").spmm(x, values, topology.weight_index("cpu"))
        torch.testing.assert_close(y, F.linear(x, topology.scatter(values)))


def test_a_forward_never_derives() -> None:
    topology = Topology(40, 50, PATTERN, torch.arange(40), torch.arange(40))
    with pytest.raises(ValueError, match=r"call topology\.attach"):
        linear(torch.randn(9, 50), torch.randn(40, 1, 1), topology, backend="cpu")


def test_launchers_refuse_a_broken_index() -> None:
    native = _native.native()
    for out, bh, threads in [(64, 8, 1), (0, 1, 1), (64, 1, 0)]:
        index = native.BlockIndex(out, 64, bh, 1, 0, 0, 0, 0, 0, 0, 0)
        assert native.unstructured_spmm(index, 0, 0, 0, 64, 0, 0, 0, 0, 64, 1, threads, 0) != 0
        assert native.unstructured_spmm_t(index, 0, 0, 0, 64, 0, 64, 1, threads, 0) != 0
        assert native.unstructured_sddmm(index, 0, 0, 64, 0, 64, 0, 1, threads, 0) != 0
        assert native.unstructured_spmm_workspace_bytes(index, 1, threads) == 0
    assert native.unstructured_derive(native.BlockIndex(64, 64, 8, 8, 0, 0, 0, 0, 0, 0, 0), False, 0, 0) != 0
