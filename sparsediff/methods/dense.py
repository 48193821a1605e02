"""Dense training: the model stays as it was built. The baseline."""

from __future__ import annotations

from sparsediff.methods import METHODS, Method


@METHODS.register("dense")
class Dense(Method):
    """No weight is absent."""

    sparse = False
