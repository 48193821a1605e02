"""The forward alone, as in inference, beside every peer that serves it: most public ones have no backward.

    y = x · Wᵀ          or a 3x3 convolution, fp32

Dense is the quicker of `F.linear` and oneDNN, or oneDNN channels_last. No goals: these rows place ours among peers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import peers
from bench.cases.conv import BATCH, products, tap_nonzeros
from bench.cases.linear import onednn
from bench.harness import attempt, check_close, native
from bench.registry import Case, Ours, Prepared, Problem, Rival, Variant, register
from sparse_kernels import SparseConv2d, SparseLinear

LINEAR = tuple(Variant(p, s) for p in ("block:32x32", "unstructured") for s in (0.5, 0.75, 0.9, 0.98))
CONV = tuple(Variant(p, s) for p in ("block:32x32", "unstructured") for s in (0.75, 0.9))


def prepare_linear(positions: int, size: int, variants: tuple[Variant, ...]) -> Prepared:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator) / size**0.5
    x = torch.randn(positions, size, generator=generator)
    dense: dict[str, Callable[[], Tensor]] = {
        "F.linear": lambda: F.linear(x, weight),
        "oneDNN": lambda: onednn(x, weight),
    }
    named: dict[str, str] = {}

    def build(variant: Variant) -> Ours:
        layer = SparseLinear(size, size, bias=False, pattern=variant.pattern, sparsity=variant.sparsity)
        job = peers.Job(variant.pattern, peers.FORWARD, layer.dense_weight().detach(), x, x)
        return _ours(variant, layer, x, job, named)

    ours = {variant: attempt(partial(build, variant)) for variant in variants}
    return Prepared(dense, (Rival("D2", "D2 {}", tuple(dense)),), ours, named=named)


def prepare_conv(channels: int, side: int, variants: tuple[Variant, ...]) -> Prepared:
    generator = torch.Generator().manual_seed(0)
    last = torch.channels_last
    x = torch.randn(BATCH, channels, side, side, generator=generator).contiguous(memory_format=last)
    weight = (torch.randn(channels, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5).contiguous(
        memory_format=last
    )
    named: dict[str, str] = {}

    def build(variant: Variant) -> Ours:
        layer = SparseConv2d(
            channels, channels, 3, padding=1, bias=False, pattern=variant.pattern, sparsity=variant.sparsity
        )
        own = x.contiguous() if variant.pattern == "unstructured" else x
        job = peers.Job(variant.pattern, peers.FORWARD, layer.dense_weight().detach(), own, own, padding=1)
        return _ours(variant, layer, own, job, named)

    ours = {variant: attempt(partial(build, variant)) for variant in variants}
    rivals = (Rival("D1", "D1 oneDNN channels_last", ("conv",)),)
    return Prepared({"conv": lambda: F.conv2d(x, weight, padding=1)}, rivals, ours, named=named)


def _ours(
    variant: Variant, layer: SparseLinear | SparseConv2d, x: Tensor, job: peers.Job, named: dict[str, str]
) -> Ours:
    """`named` takes what the peers that do not take part say."""
    native(layer).requires_grad_(False)

    def run() -> Tensor:
        return layer(x)

    def check() -> None:
        check_close(run(), job.dense(), "forward")

    others, reasons = peers.contenders(job)
    named.update({f"{name}, {variant.name}": reason for name, reason in reasons.items()})
    return Ours(
        variant,
        layer.topology.density,
        run,
        check,
        flops=2.0 * products(x, tap_nonzeros(layer.topology)),
        moved=2.0 * x.nbytes + layer.values.nbytes,
        peers=others,
    )


register(
    Case(
        "forward",
        "the forward alone beside every peer",
        (
            Problem("linear P=1024 K=1024", LINEAR, partial(prepare_linear, 1024, 1024), quick=True, seconds=4.0,
                    passes=peers.FORWARD),
            Problem(f"conv 3x3 N={BATCH} C=448 32x32", CONV, partial(prepare_conv, 448, 32), seconds=6.0,
                    passes=peers.FORWARD),
        ),
    )
)  # fmt: skip
