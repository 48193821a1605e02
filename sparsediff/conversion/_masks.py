"""Sparse weights as dense ones with masks, and back: the form in which they cross from one layout to another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_kernels import Block, Topology
from sparsediff.conversion._names import ConversionError


def densified(
    state: Mapping[str, Tensor], shapes: Mapping[str, Tensor], indices: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], str | None]:
    """A sparse state dict as a dense one.

    Args:
        state: of a model whose layers may be sparse: `<layer>.values` in the place of `<layer>.weight`.
        shapes: the dense model's state dict, for its shapes (it may lie on the meta device).
        indices: where the topologies are, if not in `state` (an average has none).

    Returns:
        The dense state dict; bool masks of the sparse weights by their names; the pattern's text, None without any.

    Raises:
        ConversionError: a layer that the dense model does not have, or two patterns. ValueError: a broken index.
    """
    indices = state if indices is None else indices
    dense: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    patterns = set()
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        if layer.endswith(".topology"):
            continue
        if leaf != "values":
            dense[name] = tensor
            continue
        weight = f"{layer}.weight"
        if weight not in shapes or f"{layer}.topology.col" not in indices:
            raise ConversionError(f"{name}: expected a sparse layer of the model, with its topology; there is none.")
        crow, col, slot = (indices[f"{layer}.topology.{part}"].long() for part in ("crow", "col", "slot"))
        pattern = Block(*tensor.shape[1:])
        patterns.add(str(pattern))
        out, in_, *kernel = shapes[weight].shape
        order = slot.argsort()
        rows = torch.repeat_interleave(torch.arange(len(crow) - 1), crow.diff())
        topology = Topology(out, in_, pattern, rows[order], col[order], taps=_taps(kernel))
        dense[weight] = _weight(topology.scatter(tensor), in_, kernel)
        masks[weight] = _weight(topology.scatter(torch.ones_like(tensor)), in_, kernel) != 0
    if len(patterns) > 1:
        raise ConversionError(f"the sparse layers have several patterns: {', '.join(sorted(patterns))}; expected one.")
    return dense, masks, next(iter(patterns), None)


def sparsified(
    dense: Mapping[str, Tensor], masks: Mapping[str, Tensor], pattern: Block, *, index: bool = True
) -> dict[str, Tensor]:
    """The inverse of `densified`; slots are in the order of the index.

    Args:
        index: whether the topologies are part of the result (not for an average).

    Raises:
        ConversionError: a mask of no weight, or one that is not made of whole blocks.
    """
    state = dict(dense)
    for name, mask in masks.items():
        if name not in dense or dense[name].shape != mask.shape:
            raise ConversionError(f"the mask {name} {list(mask.shape)} belongs to no weight of this shape.")
        if mask.all():
            continue
        layer = name.removesuffix(".weight")
        weight = state.pop(name)
        out, in_, *kernel = weight.shape
        elements = _matrix(mask.to(torch.float32))
        whole = Topology.full(out, in_, pattern, taps=_taps(kernel))
        active = whole.gather(elements).flatten(1).amax(1).view(whole.row_blocks, whole.col_blocks) > 0
        topology = Topology.from_mask(active, out, in_, pattern, taps=_taps(kernel))
        values = topology.gather(_matrix(weight))
        if not torch.equal(topology.scatter(topology.gather(torch.ones_like(elements))), elements):
            raise ConversionError(f"the mask {name} is not made of whole blocks of {pattern}; say --pattern.")
        state[f"{layer}.values"] = values
        if index:
            state |= {f"{layer}.topology.{part}": getattr(topology, part) for part in ("crow", "col", "slot")}
    return state


def masks_of_zeros(dense: Mapping[str, Tensor], average: Mapping[str, Tensor], pattern: Block) -> dict[str, Tensor]:
    """Masks of the blocks that hold a nonzero in the weights or in their average, where some do not."""
    masks = {}
    for name, weight in dense.items():
        if not name.endswith(".weight") or weight.dim() < 2:
            continue
        out, in_, *kernel = weight.shape
        if pattern.why_not(out, in_) is not None:
            continue
        present = _matrix(((weight != 0) | (average[name] != 0)).to(torch.float32))
        whole = Topology.full(out, in_, pattern, taps=_taps(kernel))
        active = whole.gather(present).flatten(1).amax(1) > 0
        if not active.all():
            filled = whole.gather(torch.ones_like(present)) * active[:, None, None]
            masks[name] = _weight(whole.scatter(filled), in_, kernel) != 0
    return masks


def _taps(kernel: list[int]) -> int:
    taps = 1
    for size in kernel:
        taps *= size
    return taps


def _matrix(weight: Tensor) -> Tensor:
    """`[out, in, *kernel]` as `[out, taps · in]`, tap-major."""
    return weight if weight.dim() == 2 else weight.flatten(2).transpose(1, 2).flatten(1)


def _weight(matrix: Tensor, in_: int, kernel: list[int]) -> Tensor:
    """The inverse of `_matrix`."""
    if not kernel:
        return matrix
    return matrix.unflatten(1, (-1, in_)).transpose(1, 2).unflatten(2, kernel).contiguous()
