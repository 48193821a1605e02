"""Truly sparse layers for training: block-CSR weights behind autograd ops and torch.nn-like layers."""

# Submodules are not in __all__: after `import *`, nn must still be torch.nn.
from . import backends, nn, ops, regrow  # noqa: F401
from .allocation import allocate
from .nn import (
    Plan,
    SparseConv1d,
    SparseConv2d,
    SparseGRU,
    SparseLayer,
    SparseLinear,
    SparseWeight,
    densify,
    replan,
    sparse_weights,
    sparsify,
)
from .patterns import Block, Pattern, Unstructured, parse_pattern
from .topology import Topology

__all__ = [
    "Block",
    "Pattern",
    "Plan",
    "SparseConv1d",
    "SparseConv2d",
    "SparseGRU",
    "SparseLayer",
    "SparseLinear",
    "SparseWeight",
    "Topology",
    "Unstructured",
    "allocate",
    "densify",
    "parse_pattern",
    "replan",
    "sparse_weights",
    "sparsify",
]
