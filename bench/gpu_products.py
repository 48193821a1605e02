"""One product of a sparse layer on a GPU beside the dense library's: the forward, a gradient, or the growth scores.

    forward            Y = gather(X) · Wᵀ          input gradient     dX = scatter(dY · W)
    weight gradient    dW = dYᵀ · gather(X)        scores             ‖dW of every block‖²

Both sides compute in bf16 from bf16 operands, weights included, at the level of a kernel call: what autograd and a
layer add is a matter of whole steps. Every call reads other activations than the one before.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases.conv import matrix_of, products, tap_nonzeros
from bench.harness import attempt, check_close
from bench.registry import Ours, Prepared, Rival, Variant
from sparse_kernels import backends, parse_pattern
from sparse_kernels.backends.registry import Backend, ConvGeometry
from sparse_kernels.topology import Topology

FORWARD, INPUT, WEIGHT, SCORES = PASSES = ("forward", "input gradient", "weight gradient", "scores")
ROTATED_BYTES = 2 * 60 * 2**20  # twice an H200's L2 cache
MOST_SETS = 64
TOLERANCE = 1.5e-2  # of the largest element: operands are bf16 on both sides, sums fp32
LIMIT_MIB = 16.0  # of the scores
TORCH_BSR = "torch BSR (Triton)"


@dataclasses.dataclass(frozen=True)
class Product:
    """What is multiplied.

    Args:
        batch, channels, side: of a square image, in and out; of a linear layer `batch` rows and side 1.
        kernel: side of a convolution's, half of it as padding; 0 for a linear layer.
        passes: one of `PASSES`. stride: of a convolution.
    """

    batch: int
    channels: int
    side: int
    kernel: int
    passes: str
    stride: int = 1

    @property
    def conv(self) -> ConvGeometry | None:
        if not self.kernel:
            return None
        return ConvGeometry(
            (self.kernel, self.kernel), (self.stride, self.stride), (self.kernel // 2, self.kernel // 2)
        )

    def activations(self, device: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random bf16 input and gradient of the output: `[batch, channels]` each, or channels_last images."""
        conv = self.conv
        sides: list[tuple[int, ...]] = [(), ()]
        if conv is not None:
            sides = [(self.side, self.side), conv.output_size(self.side, self.side)]
        x, dy = (
            torch.randn(self.batch, self.channels, *side, generator=generator, device=device).bfloat16()
            for side in sides
        )
        if conv is None:
            return x, dy
        return x.contiguous(memory_format=torch.channels_last), dy.contiguous(memory_format=torch.channels_last)


@dataclasses.dataclass(frozen=True)
class Operands:
    """Rotated activations and what is multiplied with them."""

    product: Product
    x: Sequence[Tensor]
    dy: Sequence[Tensor]
    alone: bool

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """`(x, dy)`, endlessly."""
        return itertools.cycle(zip(self.x, self.dy, strict=True))


def prepare(
    product: Product, backend: str, variants: tuple[Variant, ...], *, device: str = "cuda", alone: bool = False
) -> Prepared:
    """Builds a product for some variants; `alone` leaves peers out and takes the CPU for what is expected, so that on
    the GPU little runs but the kernels.

    Raises:
        RuntimeError: there is no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("no GPU: torch.cuda.is_available() is False; GPU cases need an NVIDIA GPU and its driver.")
    generator = torch.Generator(device).manual_seed(0)
    first, _ = product.activations(device, generator)
    sets = max(2, min(MOST_SETS, -(-ROTATED_BYTES // first.nbytes))) if device == "cuda" and not alone else 2
    x, dy = zip(*[product.activations(device, generator) for _ in range(sets)], strict=True)
    operands = Operands(product, x, dy, alone)
    dense = _dense(operands, generator)
    label = "cuDNN channels_last" if product.kernel else "cuBLAS"
    name = "dW" if product.passes == SCORES else label
    named: dict[str, str] = {}
    ours = {
        variant: attempt(partial(_ours, operands, backends.get(backend), variant, generator, named))
        for variant in variants
    }
    rivals = (Rival("D1", f"D1 {name}", (name,), label),)
    return Prepared({name: dense}, rivals, ours, named=named, device=device, calls=sets)


def _dense(operands: Operands, generator: torch.Generator) -> Callable[[], Tensor]:
    """The dense library on the rotated operands; the weight gradient where scores are asked for."""
    product, pairs = operands.product, operands.pairs()
    first, side = operands.x[0], product.kernel
    shape = (product.channels, product.channels) + ((side, side) if side else ())
    weight = torch.randn(shape, generator=generator, device=first.device).bfloat16()
    which = FORWARD if product.passes == FORWARD else INPUT if product.passes == INPUT else WEIGHT
    if not side:

        def multiply() -> Tensor:
            x, dy = next(pairs)
            return x @ weight.T if which == FORWARD else dy @ weight if which == INPUT else dy.T @ x

        return multiply
    weight = weight.contiguous(memory_format=torch.channels_last)
    pad = [side // 2, side // 2]
    mask = [which == INPUT, which == WEIGHT, False]

    def convolve() -> Tensor:
        x, dy = next(pairs)
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            if which == FORWARD:
                return F.conv2d(x, weight, None, product.stride, side // 2)
            given = ([product.stride] * 2, pad, [1, 1], False, [0, 0], 1)
            grads = torch.ops.aten.convolution_backward(dy, x, weight, None, *given, mask)
            return grads[0] if which == INPUT else grads[1]

    return convolve


def _ours(
    operands: Operands, backend: Backend, variant: Variant, generator: torch.Generator, named: dict[str, str]
) -> Ours:
    """`named` takes the peers that do not take part, and why."""
    product, device = operands.product, operands.x[0].device
    pattern = parse_pattern(variant.pattern)
    op = "conv" if product.kernel else "linear"
    reason = backend.why_unavailable() or backend.why_unsupported(
        op, pattern=pattern, dtype=torch.bfloat16, device=device
    )
    if reason is not None:
        raise RuntimeError(f"backend {backend.name!r} cannot run this: {reason}")
    side = max(1, product.kernel)
    rows, columns = pattern.grid(product.channels, product.channels)
    nnzb = round((1 - variant.sparsity) * rows * side**2 * columns)
    topology = Topology.random(
        product.channels, product.channels, pattern, nnzb, taps=side**2, generator=generator, device=device
    )
    if (deriver := backend.deriver(op, pattern)) is not None:
        topology.attach(deriver)
    values = torch.randn(topology.nnzb, pattern.bh, pattern.bw, generator=generator, device=device)
    values = topology.gather(topology.scatter(values / (product.channels * side**2) ** 0.5)).bfloat16()
    index = topology.weight_index(backend.name)
    conv, pairs = product.conv, operands.pairs()

    def run() -> Tensor:
        x, dy = next(pairs)
        if product.passes == FORWARD:
            return backend.spmm(x, values, index, None, conv)
        if product.passes == INPUT:
            return backend.spmm_t(dy, values, index, conv, x if product.kernel else None)
        if product.passes == WEIGHT:
            return backend.sddmm(dy, x, index, conv)
        return backend.block_scores(dy, x, index, conv)

    def check() -> None:
        nonlocal pairs
        pairs = operands.pairs()
        made = run()
        pairs = operands.pairs()
        x, dy, weights, where = operands.x[0], operands.dy[0], values, topology
        if operands.alone:
            made, x, dy, weights, where = made.cpu(), x.cpu(), dy.cpu(), weights.cpu(), copy.deepcopy(topology).cpu()
        check_close(made, _expected(product, where, weights, x, dy), product.passes, TOLERANCE)

    peer, reason = (None, "") if operands.alone else torch_bsr(operands, topology, values)
    if reason:
        named[f"{TORCH_BSR}, {variant.name}"] = reason
    scores = product.passes == SCORES
    nonzeros = [topology.out * topology.in_] * topology.taps if scores else tap_nonzeros(topology)
    weights = 4 * topology.row_blocks * topology.col_blocks if scores else values.nbytes
    return Ours(
        variant,
        1.0 if scores else topology.density,
        run,
        check,
        flops=2.0 * products(operands.x[0], nonzeros) if product.stride == 1 else None,
        moved=float(2 * operands.x[0].nbytes + (2 * weights if product.passes == WEIGHT else weights)),
        limit_mib=LIMIT_MIB if scores else None,
        peers={} if peer is None else {TORCH_BSR: peer},
        extra={"backend": backend.name},
    )


def torch_bsr(operands: Operands, topology: Topology, values: Tensor) -> tuple[Callable[[], Tensor] | None, str]:
    """The product by torch's BSR tensors (Triton kernels on a GPU), checked and to be timed; or None, and why not."""
    product, pairs = operands.product, operands.pairs()
    if product.kernel or product.passes == SCORES:
        return None, f"torch.sparse has no {'convolution' if product.kernel else 'scores'}"
    block = (topology.pattern.bh, topology.pattern.bw)
    dense = topology.scatter(values)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta", category=UserWarning)
            weight = dense.to_sparse_bsr(block) if product.passes != INPUT else dense.T.to_sparse_bsr(block[::-1])

        def run() -> Tensor:
            x, dy = next(pairs)
            if product.passes == WEIGHT:
                return torch.sparse.sampled_addmm(weight, dy.T, x, beta=0.0).values()
            return F.linear(x if product.passes == FORWARD else dy, weight)

        made = run()
        expected = _expected(product, topology, values, operands.x[0], operands.dy[0])
        if product.passes == WEIGHT:  # its values are in row-major order of the blocks
            expected = expected[topology.slot.long()]
        check_close(made, expected, f"{TORCH_BSR}'s {product.passes}", TOLERANCE)
    # A peer that breaks is named with what it said; it must not end the measurement of ours.
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return run, ""


def _expected(product: Product, topology: Topology, values: Tensor, x: Tensor, dy: Tensor) -> Tensor:
    """The result in fp32 of the same bf16 operands, by the dense library."""
    x, dy = x.float().requires_grad_(), dy.float()
    matrix = topology.scatter(values.float()).detach()
    side = product.kernel
    shape = (topology.out, side, side, topology.in_)
    weight = (matrix.view(shape).permute(0, 3, 1, 2) if side else matrix).contiguous().requires_grad_()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        y = F.conv2d(x, weight, None, product.stride, side // 2) if side else F.linear(x, weight)
        if product.passes == FORWARD:
            return y.detach()
        (gradient,) = torch.autograd.grad(y, x if product.passes == INPUT else weight, dy)
    if product.passes == INPUT:
        return gradient
    gradient = matrix_of(gradient) if side else gradient
    if product.passes == WEIGHT:
        return topology.gather(gradient)
    blocks = topology.weight_index().blocks(gradient)
    return blocks.square().sum((1, 2)).view(topology.row_blocks, topology.col_blocks)
