"""The backends that execute sparse ops, and which of them serves a given layer.

A backend implements some of the primitives for some patterns, dtypes and devices, and says in words what it does not
serve. It is one file that ends in `register(...)`; the parametrised tests, the plan and `sparsediff doctor` know it
from then on. All tensors that reach a primitive have been checked by the op above it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..patterns import Block
from ..topology import Deriver, WeightIndex

OPS = ("linear", "conv", "gru")


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution gathers its input: kernel `(R, S)`, stride, padding and dilation as (vertical, horizontal)."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Spatial size of the output for an input of `height x width`."""
        return (
            (height + 2 * self.padding[0] - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1,
            (width + 2 * self.padding[1] - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.stride[1] + 1,
        )


class ProductGrads(NamedTuple):
    """What the backward of a product returns: None where it was not asked for."""

    x: Tensor | None  # as the input
    values: Tensor | None  # [nnzb, bh, bw]
    bias: Tensor | None  # [out]
    scores: Tensor | None  # [row_blocks, col_blocks]


def score_dtype(x: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs: what gradients of weights and biases and scores are returned in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class GruWeight:
    """One weight of a GRU layer: block-sparse `values [nnzb, bh, bw]` with its `index`, or a dense `[3H, in]`."""

    tensor: Tensor
    index: WeightIndex | None


@dataclass(frozen=True)
class GruGrads:
    """What the backward of one GRU layer returns; `weights` as `GruWeight.tensor`, `biases` [3H] each or empty,
    `scores` [row_blocks, col_blocks] for the weights asked for, None for the others."""

    x: Tensor
    h0: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    scores: list[Tensor | None]


class Backend:
    """Base of every backend: what it is called and what it serves.

    Shapes of the primitives. Linear: `x [P, in]`, `dy [P, out]`, rows of unit inner stride. Convolution (`conv` given):
    `x [N, C, H, W]`, `dy [N, C_out, H', W']`, of any memory format. Values are `[nnzb, bh, bw]` by slot, their padding
    zero; a gradient of values has zero padding too. The compute dtype is that of `x`; `sddmm` and `block_scores`
    return fp32 (fp64 for fp64 inputs).
    """

    name: str

    def why_unavailable(self) -> str | None:
        """Why this backend cannot run on this machine, with the remedy; None where it can."""
        return None

    def why_unsupported(self, op: str, *, pattern: Block, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it does not serve this op, pattern, dtype and device; None where it does."""
        raise NotImplementedError(f"backend {self.name!r} does not say what it serves")

    def deriver(self, op: str, pattern: Block) -> Deriver | None:
        """Builder of the further index buffers its kernels want from each topology of this pattern, if any."""
        return None

    def spmm(
        self,
        x: Tensor,
        values: Tensor,
        index: WeightIndex,
        bias: Tensor | None = None,
        conv: ConvGeometry | None = None,
    ) -> Tensor:
        """`Y = gather(X) · Wᵀ + bias`: `[P, out]`, or `[N, out, H', W']` in the memory format of `x`."""
        raise self._missing("spmm")

    def spmm_t(
        self,
        dy: Tensor,
        values: Tensor,
        index: WeightIndex,
        conv: ConvGeometry | None = None,
        x_like: Tensor | None = None,
    ) -> Tensor:
        """`dX = scatter(dY · W)`: `[P, in]`, or the shape and memory format of `x_like` for a convolution."""
        raise self._missing("spmm_t")

    def sddmm(self, dy: Tensor, x: Tensor, index: WeightIndex, conv: ConvGeometry | None = None) -> Tensor:
        """`dW = dYᵀ · gather(X)` at the active blocks: `[nnzb, bh, bw]` by slot."""
        raise self._missing("sddmm")

    def block_scores(self, dy: Tensor, x: Tensor, index: WeightIndex, conv: ConvGeometry | None = None) -> Tensor:
        """Squared Frobenius norm of every block of `dYᵀ · gather(X)`: `[row_blocks, col_blocks]`."""
        raise self._missing("block_scores")

    def product_forward(
        self,
        x: Tensor,
        values: Tensor,
        index: WeightIndex,
        bias: Tensor | None,
        activation: str,
        keep: bool,
        conv: ConvGeometry | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`activation(spmm(…))`, an epilogue where a backend has it.

        Args:
            activation: a key of `ACTIVATIONS`. keep: whether a backward will want what the activation is given.

        Returns:
            The result and, where kept, what the activation was given, both as from `spmm`; else an empty second.
        """
        pre = self.spmm(x, values, index, bias, conv)
        return ACTIVATIONS[activation].forward(pre), pre if keep else pre.new_empty(0)

    def product_backward(
        self,
        dy: Tensor,
        x: Tensor,
        values: Tensor,
        index: WeightIndex,
        needs: Sequence[bool],
        conv: ConvGeometry | None = None,
    ) -> ProductGrads:
        """Every gradient of `spmm` that one backward wants; each from its primitive unless a backend shares work.

        Args:
            dy, x, values, index, conv: as for the primitives; `dy` in the dtype of `x`.
            needs: whether `x`, `values`, the bias and the scores are wanted.

        Returns:
            The wanted gradients; None for the others. That of the bias is `[out]`, in the dtype of `score_dtype(x)`.
        """
        need_x, need_values, need_bias, need_scores = needs
        # torch's sum adds in chunks: `ones @ dy` is up to twice as fast and ten times less accurate.
        positions = 0 if conv is None else (0, 2, 3)
        return ProductGrads(
            self.spmm_t(dy, values, index, conv, None if conv is None else x) if need_x else None,
            self.sddmm(dy, x, index, conv) if need_values else None,
            dy.sum(positions, dtype=score_dtype(x)) if need_bias else None,
            self.block_scores(dy, x, index, conv) if need_scores else None,
        )

    def gru_forward(
        self,
        x: Tensor,
        h0: Tensor,
        lengths: Tensor | None,
        weights: Sequence[GruWeight],
        biases: Sequence[Tensor],
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One GRU layer over whole sequences, all directions.

        Args:
            x: `[B, T, F]`. h0: `[D, B, H]`. lengths: int32 `[B]` or None for T everywhere.
            weights: `[ih, hh]` for each of the D directions, flattened: 2·D. biases: likewise, `[3H]` each, or empty.
            save: whether a backward will follow.

        Returns:
            `y [B, T, D·H]` (zero past each length), `h_n [D, B, H]`, and an opaque `reserve` (empty unless `save`).
        """
        raise self._missing("gru_forward")

    def gru_backward(
        self,
        dy: Tensor,
        dh_n: Tensor,
        x: Tensor,
        h0: Tensor,
        lengths: Tensor | None,
        weights: Sequence[GruWeight],
        biases: Sequence[Tensor],
        y: Tensor,
        reserve: Tensor,
        want_scores: Sequence[bool],
        need_dx: bool,
    ) -> GruGrads:
        """Gradients of `gru_forward`; `want_scores[k]` asks for the block scores of weight k. Without `need_dx` the
        input's gradient may be left out (`GruGrads.x` of no elements)."""
        raise self._missing("gru_backward")

    def gru_reserve_shape(self, batch: int, steps: int, hidden: int, directions: int) -> list[int]:
        """Shape of the `reserve` that `gru_forward(save=True)` returns, for the fake kernel."""
        raise self._missing("gru_reserve_shape")

    def _missing(self, what: str) -> NotImplementedError:
        return NotImplementedError(f"backend {self.name!r} has no {what}: ask why_unsupported() before calling it")


_BACKENDS: dict[str, Backend] = {}


def register(backend: Backend) -> Backend:
    """Makes a backend known under its name."""
    _BACKENDS[backend.name] = backend
    require.cache_clear()
    return backend


def names() -> list[str]:
    """Every registered backend, available or not."""
    return list(_BACKENDS)


def get(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: for a name that is not registered.
    """
    try:
        return _BACKENDS[name]
    except KeyError:
        raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}; got {name!r}.") from None


def why_not(name: str, op: str, *, pattern: Block, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why backend `name` cannot serve this, available or not; None where it can."""
    backend = get(name)
    return backend.why_unavailable() or backend.why_unsupported(op, pattern=pattern, dtype=dtype, device=device)


@functools.cache
def require(name: str, op: str, *, pattern: Block, dtype: torch.dtype, device: torch.device) -> Backend:
    """The backend of that name, or an error with its reason: never another one in its place.

    Raises:
        RuntimeError: where it is unavailable here or does not serve this.
    """
    reason = why_not(name, op, pattern=pattern, dtype=dtype, device=device)
    if reason is not None:
        able = [k for k in _BACKENDS if why_not(k, op, pattern=pattern, dtype=dtype, device=device) is None]
        remedy = f"execution={' or '.join(map(repr, able))} can run it as it is" if able else "no other backend can"
        raise RuntimeError(f"{op}: backend {name!r} cannot run this: {reason}; {remedy}.")
    return get(name)


def choose(op: str, *, pattern: Block, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """The default backend for a layer, and why.

    Returns:
        The name of the first native backend that serves it, else `"densified"`; and the reason in words.

    Warns:
        RuntimeWarning: a backend that would serve it is unavailable, so that it will run at dense speed.
    """
    reasons = []
    for name, backend in _BACKENDS.items():
        if name in ("reference", "densified"):
            continue
        unsupported = backend.why_unsupported(op, pattern=pattern, dtype=dtype, device=device)
        unavailable = backend.why_unavailable()
        if unsupported is None and unavailable is None:
            return name, "sparse kernel"
        if unsupported is None:
            warnings.warn(
                f"{op}: layers run densified, at dense speed: backend {name!r} is unavailable: {unavailable}.",
                RuntimeWarning,
                stacklevel=2,
            )
        reasons.append(f"{name}: {unsupported or unavailable}")
    return "densified", "; ".join(reasons) or "no sparse backend is registered"
