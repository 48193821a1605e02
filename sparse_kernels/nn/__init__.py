"""Sparse layers with the signatures of their torch.nn twins, and the surgery that puts them into a model."""

from .conv import SparseConv1d, SparseConv2d
from .gru import SparseGRU
from .linear import SparseLinear
from .plan import Plan, PlanRow
from .surgery import densify, sparsify
from .weights import SparseLayer, SparseWeight, sparse_weights

__all__ = [
    "Plan",
    "PlanRow",
    "SparseConv1d",
    "SparseConv2d",
    "SparseGRU",
    "SparseLayer",
    "SparseLinear",
    "SparseWeight",
    "densify",
    "sparse_weights",
    "sparsify",
]
