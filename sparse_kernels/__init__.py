"""Truly sparse layers for training: block-CSR weights behind autograd ops and torch.nn-like layers."""

from . import backends, nn, ops
from .allocation import allocate
from .nn import SparseGRU, SparseLayer, SparseLinear, SparseWeight, sparse_weights
from .patterns import Block, Pattern, Unstructured, parse_pattern
from .topology import Topology

__all__ = [
    "Block",
    "Pattern",
    "SparseGRU",
    "SparseLayer",
    "SparseLinear",
    "SparseWeight",
    "Topology",
    "Unstructured",
    "allocate",
    "backends",
    "nn",
    "ops",
    "parse_pattern",
    "sparse_weights",
]
