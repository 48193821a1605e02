"""`SparseLinear`, forward and backward, against dense.

    y = x · Wᵀ      dx = dy · W      dW = dyᵀ · x          x [P, K], W [K, K], fp32

D1 is `F.linear` under autograd, as a user writes it. D2 is the best dense that the machine has for each of the three
products: MKL through `torch.mm` or oneDNN through `torch.ops.mkldnn._linear_pointwise`, whichever is quicker here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness import Row, check_close, compare, interleave
from sparse_kernels import SparseLinear

BLOCK_GOALS = {0.5: 2.0, 0.75: 3.7, 0.9: 8.0}
UNSTRUCTURED_GOALS = {0.5: 2.1, 0.75: 4.0, 0.9: 8.0, 0.98: 18.0}


def onednn(x: Tensor, weight: Tensor) -> Tensor:
    """`x · weightᵀ` by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def dense_products(x: Tensor, weight: Tensor, dy: Tensor) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Every way to form the three dense products that may be the best here."""
    return {
        "y": {"mkl": lambda: x @ weight.T, "onednn": lambda: onednn(x, weight)},
        "dx": {"mkl": lambda: dy @ weight, "onednn": lambda: onednn(dy, weight.T.contiguous())},
        "dw": {"mkl": lambda: dy.T @ x, "onednn": lambda: onednn(dy.T.contiguous(), x.T.contiguous())},
    }


def best_dense(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Callable[[], None], str]:
    """D2: the three products, each by whichever library is quicker here, and which those are."""
    chosen, names = [], []
    for product, ways in dense_products(x, weight, dy).items():
        samples = interleave(ways, rounds=5)
        name = min(ways, key=lambda way: sorted(samples[way])[2])
        chosen.append(ways[name])
        names.append(f"{product}:{name}")

    def run() -> None:
        for product in chosen:
            product()

    return run, " ".join(names)


def sparse_step(layer: SparseLinear, x: Tensor, dy: Tensor) -> Callable[[], Tensor]:
    """Forward and backward through the public layer."""

    def run() -> Tensor:
        x.grad = layer.values.grad = None
        y = layer(x)
        y.backward(dy)
        return y

    return run


def rows_of(positions: int, size: int, patterns: dict[str, dict[float, float]], rounds: int) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(size, size, generator=generator) / size**0.5).requires_grad_()
    x = torch.randn(positions, size, generator=generator).requires_grad_()
    dy = torch.randn(positions, size, generator=generator)
    x_sparse = x.detach().clone().requires_grad_()

    def d1() -> None:
        x.grad = weight.grad = None
        F.linear(x, weight).backward(dy)

    d2, chosen = best_dense(x.detach(), weight.detach(), dy)
    functions: dict[str, Callable[[], object]] = {"D1": d1, "D2": d2}
    layers = {}
    for pattern, goals in patterns.items():
        for sparsity in goals:
            layer = SparseLinear(size, size, bias=False, pattern=pattern, sparsity=sparsity, generator=generator)
            run = sparse_step(layer, x_sparse, dy)
            name = f"{pattern} {sparsity}"
            _check(layer, x_sparse, dy, run)
            layers[name], functions[name] = (layer, pattern, sparsity), run
    samples = interleave(functions, rounds=rounds)
    for name, (layer, pattern, sparsity) in layers.items():
        density = layer.topology.density
        flops = 3 * 2.0 * positions * layer.topology.nnz
        block = pattern != "unstructured"
        goal = patterns[pattern][sparsity]
        goal = 6.0 if block and sparsity == 0.9 and size < 1024 else goal
        goals = {"D1": None if block else goal, "D2": goal if block else (1.0 if sparsity == 0.5 else None)}
        for rival, described in (("D1", "D1 F.linear"), ("D2", "D2 best dense")):
            yield compare(
                "linear", f"P={positions} K={size}", pattern, sparsity, density, described, samples[name],
                samples[rival], nonzero_flops=flops, goal=goals[rival], note=chosen if rival == "D2" else "",
            )  # fmt: skip


def _check(layer: SparseLinear, x: Tensor, dy: Tensor, run: Callable[[], Tensor]) -> None:
    y = run()
    weight = layer.topology.scatter(layer.values.detach())
    assert x.grad is not None and layer.values.grad is not None
    check_close(y.detach(), x.detach() @ weight.T, "linear forward")
    check_close(x.grad, dy @ weight, "linear input gradient")
    check_close(layer.values.grad, layer.topology.gather(dy.T @ x.detach()), "linear weight gradient")


def run(quick: bool) -> Iterator[Row]:
    """Block 16 and 32 at P = 1024…4096, K = 512…2048; unstructured at P <= 1024 <= K."""
    blocks = {"block:16x16": BLOCK_GOALS, "block:32x32": BLOCK_GOALS}
    sizes = (
        [(1024, 512)] if quick else [(1024, 512), (4096, 512), (1024, 1024), (4096, 1024), (1024, 2048), (2048, 2048)]
    )
    for positions, size in sizes:
        yield from rows_of(positions, size, blocks, rounds=5 if quick else 11)
    for positions, size in [(512, 1024)] if quick else [(512, 1024), (1024, 1024), (512, 2048), (1024, 2048)]:
        yield from rows_of(positions, size, {"unstructured": UNSTRUCTURED_GOALS}, rounds=5 if quick else 11)
