"""From a state dict back to the sparse model that it was saved from: which layers are sparse is read off its keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from sparse_kernels import Block
from sparse_kernels.nn import SparseConv1d, SparseConv2d, SparseGRU, SparseLinear

M = TypeVar("M", bound=nn.Module)

_TWINS: dict[type[nn.Module], Any] = {nn.Linear: SparseLinear, nn.Conv1d: SparseConv1d, nn.Conv2d: SparseConv2d}


def load_sparse(model: M, saved: Mapping[str, Tensor]) -> M:
    """Makes the same layers of a dense model sparse as in the saved one, with as many blocks, and loads its parameters.

    Args:
        model: the dense model of the same architecture; changed in place.
        saved: the state dict; `<layer>.topology.*` and `<layer>.topologies.<weight>.*` tell what is sparse.

    Returns:
        `model`.

    Raises:
        RuntimeError: the state dict is of another architecture.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.GRU):
            names = [name for name, _ in module.named_parameters() if f"{path}.topologies.{name}.col" in saved]
            kept = {name: saved[f"{path}.weights.{name}"] for name in names}
        else:
            kept = {"weight": saved[f"{path}.values"]} if f"{path}.topology.col" in saved else {}
        if kept:
            model.set_submodule(path, _sparse_like(module, kept))
    model.load_state_dict(saved)
    return model


def is_sparse(saved: Mapping[str, Tensor]) -> bool:
    """Whether a state dict was saved from a model with sparse layers."""
    return any(key.endswith(".col") and (".topology." in key or ".topologies." in key) for key in saved)


def _sparse_like(module: nn.Module, kept: dict[str, Tensor]) -> nn.Module:
    """A sparse layer with the shapes of `module`, each weight with as many blocks as its values in `kept`."""
    pattern = Block(*next(iter(kept.values())).shape[1:])
    sparsity = {}
    for name, values in kept.items():
        out, in_, *kernel = module.get_parameter(name).shape
        rows, cols = pattern.grid(out, in_)
        sparsity[name] = 1 - len(values) / (rows * cols * math.prod(kernel))
    if isinstance(module, nn.GRU):
        return SparseGRU.from_dense(module, pattern=pattern, sparsity=sparsity)
    layer: nn.Module = _TWINS[type(module)].from_dense(module, pattern=pattern, sparsity=sparsity["weight"])
    return layer
