"""What the tests of kernels share: topologies at the edges, error budgets from data, poisoned buffers.

The budget has one definition for every machine: twice torch's own error at the same precision plus one rounding, both
against an fp64 reference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .patterns import Block, Unstructured
from .topology import Topology

# One of every kind: unstructured, square, tall, wide, with a side of 1, and larger than most test weights.
PATTERNS: tuple[Block, ...] = (
    Unstructured(),
    Block(4, 4),
    Block(8, 8),
    Block(16, 16),
    Block(32, 32),
    Block(64, 64),
    Block(16, 1),
    Block(1, 16),
    Block(4, 32),
    Block(64, 8),
)


def _one_row(out: int, in_: int, pattern: Block, taps: int) -> Topology:
    row_blocks, cols_per_tap = pattern.grid(out, in_)
    mask = torch.zeros(row_blocks, taps * cols_per_tap, dtype=torch.bool)
    mask[row_blocks // 2] = True
    return Topology.from_mask(mask, out, in_, pattern, taps=taps)


def _random(out: int, in_: int, pattern: Block, taps: int) -> Topology:
    row_blocks, cols_per_tap = pattern.grid(out, in_)
    count = max(1, row_blocks * cols_per_tap * taps // 4)
    generator, device = torch.Generator().manual_seed(0), torch.get_default_device()
    topology = Topology.random(out, in_, pattern, count, taps=taps, generator=generator, device=device)
    # Slots out of order, as after a regrow.
    rows, cols = topology.coords()
    shuffle = torch.randperm(count, generator=torch.Generator().manual_seed(1), device="cpu").to(device)
    return Topology(out, in_, pattern, rows[shuffle], cols[shuffle], taps=taps)


def _empty(out: int, in_: int, pattern: Block, taps: int) -> Topology:
    none = torch.empty(0, dtype=torch.int64)
    return Topology(out, in_, pattern, none, none, taps=taps)


# On torch's default device, the same ones on each.
TOPOLOGIES: dict[str, Callable[[int, int, Block, int], Topology]] = {
    "random": _random,
    "one_row": _one_row,
    "empty": _empty,
    "full": lambda out, in_, pattern, taps: Topology.full(out, in_, pattern, taps=taps),
}


def random_values(topology: Topology, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Values `[nnzb, bh, bw]` of a normal dense weight, padding zero, scaled by the fan-in."""
    shape, generator = (topology.out, topology.taps * topology.in_), torch.Generator().manual_seed(seed)
    dense = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(topology.crow.device)
    return topology.gather(dense / (topology.taps * topology.in_) ** 0.5).to(dtype).contiguous()


def error_budget(expected: Tensor, dense: Tensor, roundings: int = 1) -> float:
    """The largest error that a kernel may make.

    Args:
        expected: the fp64 reference. dense: torch's own dense result at the kernel's precision.
        roundings: of the largest expected element that are allowed beside that: one, or one a step of a recurrence.

    Returns:
        Twice (the largest error of `dense` + the roundings). In fp64 the error of
        `dense` cannot be seen against the reference; eight roundings stand for it.
    """
    if expected.numel() == 0:
        return 0.0
    largest = expected.abs().max().item()
    rounding = torch.finfo(dense.dtype).eps * largest
    own = 8 * rounding if dense.dtype == torch.float64 else (dense.double() - expected).abs().max().item()
    return 2.0 * (own + roundings * rounding)


def assert_within_budget(
    actual: Tensor, expected: Tensor, dense: Tensor, what: str = "result", *, roundings: int = 1
) -> None:
    """Raises AssertionError where `actual` strays further from `expected` (fp64) than the budget allows."""
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    if expected.numel() == 0:
        return
    error = (actual.double() - expected).abs().max().item()
    budget = error_budget(expected, dense, roundings)
    assert error <= budget, f"{what}: error {error:.3g} exceeds the budget {budget:.3g}"


@contextlib.contextmanager
def poisoned_buffers() -> Iterator[None]:
    """Every tensor that torch allocates uninitialised inside holds NaN (or the largest integer), so that an element
    which a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
