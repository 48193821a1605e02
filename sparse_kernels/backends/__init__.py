"""Backends that execute the sparse ops. Importing this package registers those that ship with it."""

from . import cpu, cuda, densified, reference, triton
from .registry import Backend, ConvGeometry, GruGrads, GruWeight, choose, get, names, register, require, why_not

__all__ = [
    "Backend",
    "ConvGeometry",
    "GruGrads",
    "GruWeight",
    "choose",
    "cpu",
    "cuda",
    "densified",
    "get",
    "names",
    "reference",
    "register",
    "require",
    "triton",
    "why_not",
]
