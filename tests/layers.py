"""What the tests of the layers share: patterns and backends to run over, one small layer of every kind, comparison."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparse_kernels import Block, SparseConv1d, SparseConv2d, SparseGRU, SparseLayer, SparseLinear, Unstructured

PATTERNS = [Unstructured(), Block(4, 4), Block(16, 1), Block(16, 16)]
FP64_BUDGET = {"rtol": 1e-9, "atol": 1e-11}

each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
each_execution = pytest.mark.parametrize("execution", ["reference", "densified"])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check_same(sparse: nn.Module, dense: nn.Module, *inputs: Tensor) -> None:
    """Outputs and all gradients of a sparse layer equal those of its dense twin, in fp64."""
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.clone().requires_grad_() for x in inputs]
    ys, yd = sparse(*ours), dense(*theirs)
    ys, yd = (ys if isinstance(ys, tuple) else (ys,)), (yd if isinstance(yd, tuple) else (yd,))
    torch.testing.assert_close(ys, yd, **FP64_BUDGET)
    seeds = [torch.randn(y.shape, dtype=y.dtype, generator=generator(5)) for y in ys]
    torch.autograd.backward(ys, seeds)
    torch.autograd.backward(yd, seeds)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, **FP64_BUDGET)


def make(
    kind: str,
    dtype: torch.dtype = torch.float32,
    seed: int | None = 0,
    pattern: Block = Block(4, 4),  # noqa: B008 (frozen)
    width: int = 16,
) -> SparseLayer:
    drawn = None if seed is None else generator(seed)
    options = {"pattern": pattern, "sparsity": 0.5, "dtype": dtype, "generator": drawn}
    if kind == "linear":
        return SparseLinear(width, 32, **options)
    if kind == "conv1d":
        return SparseConv1d(width, 32, 3, padding=1, **options)
    if kind == "conv2d":
        return SparseConv2d(width, 32, 3, padding="same", **options)
    return SparseGRU(width, 32, batch_first=True, **options)


def example(kind: str, dtype: torch.dtype = torch.float32, width: int = 16) -> Tensor:
    shape = {"conv1d": (2, width, 5), "conv2d": (2, width, 5, 4)}.get(kind, (2, 5, width))
    return torch.randn(shape, dtype=dtype, generator=generator(9))


def first(output: object) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


KINDS = ["linear", "gru", "conv1d", "conv2d"]
