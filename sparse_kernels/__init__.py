"""Truly sparse layers for training: block-CSR weights behind autograd ops and torch.nn-like layers."""

from .patterns import Block, Pattern, Unstructured, parse_pattern
from .topology import Topology

__all__ = ["Block", "Pattern", "Topology", "Unstructured", "parse_pattern"]
