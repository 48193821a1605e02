"""`SparseLinear`, forward and backward, against dense.

    y = x · Wᵀ      dx = dy · W      dW = dyᵀ · x          x [P, K], W [K, K], fp32

D1 is `F.linear` under autograd, as a user writes it. D2 is the best dense that the machine has for each of the three
products: MKL through `torch.mm` or oneDNN through `torch.ops.mkldnn._linear_pointwise`, whichever is quicker here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import peers
from bench.harness import attempt, check_close, interleave, native
from bench.registry import Case, Ours, Prepared, Problem, Rival, Variant, register
from sparse_kernels import SparseLinear

BLOCK_GOALS = {0.5: 2.0, 0.75: 3.7, 0.9: 8.0}
SMALL_BLOCK_GOALS = {**BLOCK_GOALS, 0.9: 6.0}  # K = 512
UNSTRUCTURED_GOALS = {0.5: 2.1, 0.75: 4.0, 0.9: 8.0, 0.98: 18.0}
BREAK_EVEN = {0.5: 1.0}  # unstructured against D2


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


def quicker(ways: Mapping[str, Callable[[], Tensor]]) -> str:
    """The name of the way that is quickest here."""
    samples = interleave(ways, seconds=0.3, fewest=5)
    return min(ways, key=lambda way: statistics.median(samples[way].values()))


def best_dense(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Callable[[], None], str]:
    """D2: the three products, each by whichever library is quicker here, and which those are."""
    chosen, names = [], []
    for product, ways in dense_products(x, weight, dy).items():
        name = quicker(ways)
        chosen.append(ways[name])
        names.append(f"{product}:{name}")

    def run() -> None:
        for product in chosen:
            product()

    return run, " ".join(names)


def prepare(positions: int, size: int, with_peers: bool, variants: tuple[Variant, ...]) -> Prepared:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(size, size, generator=generator) / size**0.5).requires_grad_()
    x = torch.randn(positions, size, generator=generator).requires_grad_()
    dy = torch.randn(positions, size, generator=generator)

    def d1() -> None:
        x.grad = weight.grad = None
        F.linear(x, weight).backward(dy)

    d2, chosen = best_dense(x.detach(), weight.detach(), dy)
    rivals = (Rival("D1", "D1 F.linear", ("D1",)), Rival("D2", "D2 best dense", ("D2",), chosen))
    named: dict[str, str] = {}
    x_ours = x.detach().clone().requires_grad_()

    def build(variant: Variant) -> Ours:
        layer = native(
            SparseLinear(
                size, size, bias=False, pattern=variant.pattern, sparsity=variant.sparsity, generator=generator
            )
        )
        made = sparse_step(variant, layer, x_ours, dy)
        if with_peers:
            job = peers.Job(variant.pattern, peers.TRAINING, layer.dense_weight().detach(), x.detach(), dy)
            made.peers, reasons = peers.contenders(job)
            named.update({f"{name}, {variant.name}": reason for name, reason in reasons.items()})
        return made

    ours = {variant: attempt(partial(build, variant)) for variant in variants}
    return Prepared({"D1": d1, "D2": d2}, rivals, ours, named=named)


def sparse_step(variant: Variant, layer: SparseLinear, x: Tensor, dy: Tensor) -> Ours:
    """Forward and backward through the public layer."""

    def run() -> Tensor:
        x.grad = layer.values.grad = None
        y = layer(x)
        y.backward(dy)
        return y

    def check() -> None:
        y = run()
        weight = layer.dense_weight().detach()
        assert x.grad is not None and layer.values.grad is not None
        check_close(y.detach(), x.detach() @ weight.T, "linear forward")
        check_close(x.grad, dy @ weight, "linear input gradient")
        check_close(layer.values.grad, layer.topology.gather(dy.T @ x.detach()), "linear weight gradient")

    operands = 2 * x.nbytes + 2 * dy.nbytes + 2 * layer.values.nbytes
    return Ours(
        variant,
        layer.topology.density,
        run,
        check,
        flops=3 * 2.0 * x.shape[0] * layer.topology.nnz,
        # y = x W': x, W, y. dx = dy W and dW = dy' x, in one pass over dy at best: dy, W, dx, x, dW.
        moved=3.0 * x.nbytes + 2 * dy.nbytes + 3 * layer.values.nbytes,
        footprint=operands,
    )


def _block(goals: Mapping[float, float]) -> tuple[Variant, ...]:
    return tuple(
        Variant(pattern, sparsity, {"D2": goal})
        for pattern in ("block:16x16", "block:32x32")
        for sparsity, goal in goals.items()
    )


UNSTRUCTURED = tuple(
    Variant("unstructured", s, {"D1": goal, **({"D2": BREAK_EVEN[s]} if s in BREAK_EVEN else {})})
    for s, goal in UNSTRUCTURED_GOALS.items()
)
BLOCK_SHAPES = ((1024, 512), (4096, 512), (1024, 1024), (4096, 1024), (1024, 2048), (2048, 2048))
UNSTRUCTURED_SHAPES = ((512, 1024), (1024, 1024), (512, 2048), (1024, 2048))


def problems() -> tuple[Problem, ...]:
    """Block 16 and 32 at P = 1024…4096, K = 512…2048; unstructured at P <= 1024 <= K."""
    shapes = sorted({*BLOCK_SHAPES, *UNSTRUCTURED_SHAPES}, key=lambda shape: (shape[1], shape[0]))
    made = []
    for positions, size in shapes:
        variants: tuple[Variant, ...] = ()
        if (positions, size) in BLOCK_SHAPES:
            variants += _block(SMALL_BLOCK_GOALS if size < 1024 else BLOCK_GOALS)
        if (positions, size) in UNSTRUCTURED_SHAPES:
            variants += UNSTRUCTURED
        build = partial(prepare, positions, size, (positions, size) == (1024, 1024))
        quick = (positions, size) == (1024, 512)
        made.append(Problem(f"P={positions} K={size}", variants, build, quick=quick, seconds=4.0))
    return tuple(made)


register(Case("linear", "SparseLinear against F.linear and the best dense products", problems()))
