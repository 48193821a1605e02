"""Sparse layers with the signatures of their torch.nn twins, and the surgery that puts them into a model."""

from .conv import SparseConv1d, SparseConv2d
from .gru import SparseGRU
from .linear import SparseLinear
from .plan import LayerPlan, Plan, PlanRow
from .planning import replan
from .surgery import densify, sparsify
from .weights import SparseLayer, SparseWeight, sparse_weights

__all__ = [
    "LayerPlan",
    "Plan",
    "PlanRow",
    "SparseConv1d",
    "SparseConv2d",
    "SparseGRU",
    "SparseLayer",
    "SparseLinear",
    "SparseWeight",
    "densify",
    "replan",
    "sparse_weights",
    "sparsify",
]
