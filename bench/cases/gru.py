"""`SparseGRU`, 3 layers, bidirectional, input 13, T = 64, B = 128, lengths that vary; forward and backward.

D1 is `nn.GRU` on a PackedSequence, as published code runs it. D2 is the faster of that and of padded `nn.GRU` layers
whose reverse direction is flipped within each length.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from bench.harness import attempt, check_close, native
from bench.registry import Case, Ours, Prepared, Problem, Rival, Variant, register
from sparse_kernels import SparseGRU
from sparsediff.models.chirodiff import GRUForm, run_gru

BATCH, STEPS, FEATURES, LAYERS = 128, 64, 13, 3
GOALS: dict[str, dict[float, float | None]] = {
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


def nonzeros(gru: SparseGRU) -> dict[str, int]:
    """Real elements of every weight, the dense ones included."""
    counts = {name: weight.numel() for name, weight in gru.weights.items()}
    return {**counts, **{name: topology.nnz for name, _, topology in gru.sparse_items()}}


def prepare(hidden: int, variants: tuple[Variant, ...]) -> Prepared:
    torch.manual_seed(0)
    dense = nn.GRU(FEATURES, hidden, LAYERS, batch_first=True, bidirectional=True)
    x, lengths, dy = inputs(hidden)
    functions: dict[str, Callable[[], object]] = {
        "packed": step(dense, x, lengths, dy, "packed"),
        "padded": step(copy.deepcopy(dense), x, lengths, dy, "padded"),
    }
    rivals = (Rival("D1", "D1 packed", ("packed",)), Rival("D2", "D2 {}", ("packed", "padded")))
    ours = {variant: attempt(partial(_ours, variant, dense, x, lengths, dy)) for variant in variants}
    return Prepared(functions, rivals, ours)


def _ours(variant: Variant, dense: nn.GRU, x: Tensor, lengths: Tensor, dy: Tensor) -> Ours:
    generator = torch.Generator().manual_seed(1)
    layer = native(SparseGRU.from_dense(dense, pattern=variant.pattern, sparsity=variant.sparsity, generator=generator))
    kept, positions = nonzeros(layer), int(lengths.sum())
    # The first layer forms no input gradient.
    first = sum(count for key, count in kept.items() if key.startswith("weight_ih_l0"))
    total = sum(parameter.numel() for name, parameter in dense.named_parameters() if "weight" in name)
    run = step(layer, x, lengths, dy)
    return Ours(
        variant,
        sum(kept.values()) / total,
        run,
        partial(_check, layer, x, lengths, dy, run),
        flops=2.0 * positions * (3 * sum(kept.values()) - first),
    )


def _check(layer: SparseGRU, x: Tensor, lengths: Tensor, dy: Tensor, sparse: Callable[[], Tensor]) -> None:
    y = sparse()
    twin = layer.to_dense()
    expected = step(twin, x, lengths, dy)()
    check_close(y.detach(), expected.detach(), "gru forward", 1e-3)
    topologies = {name: topology for name, _, topology in layer.sparse_items()}
    for name, weight in layer.weights.items():
        grad = getattr(twin, name).grad
        if name in topologies:
            grad = topologies[name].gather(grad)
        assert weight.grad is not None
        check_close(weight.grad, grad, f"gru gradient of {name}", 1e-3)
    for name, bias in layer.biases.items():
        assert bias.grad is not None
        check_close(bias.grad, getattr(twin, name).grad, f"gru gradient of {name}", 1e-3)


VARIANTS = tuple(
    Variant(pattern, sparsity, {} if goal is None else {"D1": goal})
    for pattern, goals in GOALS.items()
    for sparsity, goal in goals.items()
)

register(
    Case(
        "gru",
        "SparseGRU against nn.GRU, packed and padded",
        tuple(
            Problem(f"H={hidden} L={LAYERS} bi B={BATCH} T={STEPS}", VARIANTS, partial(prepare, hidden),
                    quick=hidden == 96, seconds=8.0)
            for hidden in (96, 128)
        ),
    )
)  # fmt: skip
