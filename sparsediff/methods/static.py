"""Static-DM: sparse from the first step, with the topology that the run began with."""

from __future__ import annotations

from sparsediff.methods import METHODS, Method


@METHODS.register("static")
class Static(Method):
    """The topology is random (or by magnitude, for a pretrained model) and never changes.

    Source: Oliveira, Mocanu, Leiva, "Sparse-to-Sparse Training of Diffusion Models", TMLR 2025, Static-DM.
    """
