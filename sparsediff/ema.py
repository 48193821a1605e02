"""Exponential moving average of a model's parameters, with warm-up.

    d_n = min(decay, (1 + n) / (10 + n)),   shadow ← d_n · shadow + (1 − d_n) · parameter

A sparse layer's copy shares the layer's Topology, so it follows a regrow of the index set by itself; the values of the
slots that the regrow overwrites are carried along by whoever regrows, through `shadow_of`.

Source: the LitEma of the Latent Diffusion code, whose warm-up this is (also `tf.train.ExponentialMovingAverage`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels import Topology


class EMA:
    """The average of `model`, itself a model: `ema.model`.

    Args:
        model: the trained model; its parameters keep their identity for life.
        decay: the limit of d_n, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay must be in [0, 1); got {decay}.")
        self.decay = decay
        self.updates = 0
        # Topologies, and buffers for they are not averaged, are the trained model's own objects.
        shared = [m for m in model.modules() if isinstance(m, Topology)]
        memo: dict[int, Any] = {id(item): item for item in [*shared, *model.buffers()]}
        self.model = copy.deepcopy(model, memo).requires_grad_(False)
        self.model.zero_grad(set_to_none=True)
        self._sources = [p.detach() for p in model.parameters()]
        self._shadows: list[Tensor] = list(self.model.parameters())
        self._shadow_of = dict(zip(model.parameters(), self._shadows, strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the model's present parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._shadows, self._sources, 1 - decay)

    def shadow_of(self, parameter: nn.Parameter) -> Tensor:
        """The average of one parameter of the trained model, to be written in place where its slots are reused."""
        return self._shadow_of[parameter]

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter name, and the number of updates."""
        return {"updates": self.updates, "parameters": dict(self.model.named_parameters())}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`'s result in place."""
        own, given = dict(self.model.named_parameters()), state["parameters"]
        if own.keys() != given.keys():
            missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
            raise ValueError(f"EMA: parameters differ from the model's; missing {missing}, unexpected {extra}.")
        for name, shadow in own.items():
            shadow.copy_(given[name])
        self.updates = state["updates"]
