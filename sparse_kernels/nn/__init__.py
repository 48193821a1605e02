"""Sparse layers with the signatures of their torch.nn twins, and the surgery that puts them into a model."""

from .gru import SparseGRU
from .linear import SparseLinear
from .weights import SparseLayer, SparseWeight, sparse_weights

__all__ = [
    "SparseGRU",
    "SparseLayer",
    "SparseLinear",
    "SparseWeight",
    "sparse_weights",
]
