"""`SparseGRU`, 3 layers, bidirectional, input 13, T = 64, B = 128, lengths that vary; forward and backward.

D1 is `nn.GRU` on a PackedSequence, as published code runs it. D2 is the faster of that and of padded `nn.GRU` layers
whose reverse direction is flipped within each length.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bench.harness import Row, check_close, compare, interleave
from sparse_kernels import SparseGRU
from sparsediff.models.chirodiff import GRUForm, run_gru

BATCH, STEPS, FEATURES, LAYERS = 128, 64, 13, 3
GOALS = {
    "block:16x16": {0.0: 2.4, 0.5: 3.8, 0.75: 6.0, 0.9: 9.0, 0.95: 12.0},
    "unstructured": {0.5: None, 0.75: None, 0.9: 6.0},
}


def inputs(hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """`x [B, T, 13]`, lengths between T/4 and T with their maximum T, and the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, STEPS, FEATURES, generator=generator)
    lengths = torch.randint(STEPS // 4, STEPS + 1, (BATCH,), generator=generator, dtype=torch.int32)
    lengths[0] = STEPS
    dy = torch.randn(BATCH, STEPS, 2 * hidden, generator=generator)
    dy[torch.arange(STEPS)[None] >= lengths[:, None]] = 0
    return x, lengths, dy


def step(gru: nn.Module, x: Tensor, lengths: Tensor, dy: Tensor, form: GRUForm = "packed") -> Callable[[], Tensor]:
    """Forward and backward; the input needs no gradient, as in training."""
    parameters = list(gru.parameters())

    def run() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        y = run_gru(gru, x, lengths, form)
        y.backward(dy)
        return y

    return run


def macs(weights: dict[str, int], positions: int) -> float:
    """Multiply-adds of one forward over `positions` real points, from the nonzeros of each weight."""
    return float(positions * sum(weights.values()))


def nonzeros(gru: SparseGRU) -> dict[str, int]:
    return {name: gru.topologies[name].nnz if name in gru.topologies else w.numel() for name, w in gru.weights.items()}


def run(quick: bool) -> Iterator[Row]:
    """H = 96 and 128; every sparsity of the goals, beside S = 0."""
    for hidden in (96,) if quick else (96, 128):
        torch.manual_seed(0)
        dense = nn.GRU(FEATURES, hidden, LAYERS, batch_first=True, bidirectional=True)
        x, lengths, dy = inputs(hidden)
        functions: dict[str, Callable[[], object]] = {
            "packed": step(dense, x, lengths, dy, "packed"),
            "padded": step(copy.deepcopy(dense), x, lengths, dy, "padded"),
        }
        layers = {}
        for pattern, goals in GOALS.items():
            for sparsity, goal in goals.items():
                generator = torch.Generator().manual_seed(1)
                layer = SparseGRU.from_dense(dense, pattern=pattern, sparsity=sparsity, generator=generator)
                run_sparse = step(layer, x, lengths, dy)
                _check(layer, x, lengths, dy, run_sparse)
                functions[f"{pattern} {sparsity}"] = run_sparse
                layers[f"{pattern} {sparsity}"] = (layer, pattern, sparsity, goal)
        samples = interleave(functions, rounds=3 if quick else 9, warmup=1)
        faster = min(("packed", "padded"), key=lambda form: statistics.median(samples[form]))
        total = sum(parameter.numel() for name, parameter in dense.named_parameters() if "weight" in name)
        for name, (layer, pattern, sparsity, goal) in layers.items():
            kept = nonzeros(layer)
            # The first layer forms no input gradient.
            first = sum(count for key, count in kept.items() if key.startswith("weight_ih_l0"))
            flops = 2.0 * (3 * macs(kept, int(lengths.sum())) - int(lengths.sum()) * first)
            density = sum(kept.values()) / total
            for rival, form, wanted in (("D1 packed", "packed", goal), (f"D2 {faster}", faster, None)):
                yield compare(
                    "gru", f"H={hidden} L=3 bi B={BATCH} T={STEPS}", pattern, sparsity, density, rival, samples[name],
                    samples[form], nonzero_flops=flops, goal=wanted,
                )  # fmt: skip


def _check(layer: SparseGRU, x: Tensor, lengths: Tensor, dy: Tensor, sparse: Callable[[], Tensor]) -> None:
    y = sparse()
    twin = layer.to_dense()
    expected = step(twin, x, lengths, dy)()
    check_close(y.detach(), expected.detach(), "gru forward")
    for name, weight in layer.weights.items():
        grad = getattr(twin, name).grad
        if name in layer.topologies:
            grad = layer.topologies[name].gather(grad)
        assert weight.grad is not None
        check_close(weight.grad, grad, f"gru gradient of {name}")
