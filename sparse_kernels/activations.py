"""The activations that a product's epilogue can apply, each with torch's own definition and derivative.

relu(x) = max(x, 0)      silu(x) = x · sigmoid(x)      gelu(x) = x · Φ(x)      gelu_tanh: GELU's tanh approximation
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Activation(NamedTuple):
    """One activation: in torch, its derivative, as a module, and its number in csrc/api.h."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]  # (dy, saved) → gradient of what it was given
    from_output: bool  # whether `saved` is the activation's result; else it is what the activation was given
    module: Callable[[], nn.Module]
    code: int


_aten = torch.ops.aten

ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(F.relu, lambda dy, y: _aten.threshold_backward(dy, y, 0), True, nn.ReLU, 1),
    "silu": Activation(F.silu, lambda dy, x: _aten.silu_backward(dy, x), False, nn.SiLU, 2),
    "gelu": Activation(F.gelu, lambda dy, x: _aten.gelu_backward(dy, x), False, nn.GELU, 3),
    "gelu_tanh": Activation(
        partial(F.gelu, approximate="tanh"),
        lambda dy, x: _aten.gelu_backward(dy, x, approximate="tanh"),
        False,
        partial(nn.GELU, "tanh"),
        4,
    ),
}


def check_activation(what: str, name: str | None) -> None:
    """Raises ValueError for a name that is neither None nor an activation."""
    if name is not None and name not in ACTIVATIONS:
        raise ValueError(f"{what}: activation must be None or one of {', '.join(ACTIVATIONS)}; got {name!r}.")
