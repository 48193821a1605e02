"""Sparse training methods, one file each: they watch a training loop and change which weights exist.

    method = RigL(model, optimizer, every=800, drop=0.05)
    for batch in batches:
        method.begin_step()        # before the forward: may ask the layers for growth scores of this backward
        loss(model, batch).backward()
        optimizer.step()
        method.step()              # may regrow
        optimizer.zero_grad()

They need nothing else of the loop: any model, any optimizer, with or without a GradScaler (call `step()` also where it
skipped `optimizer.step()`).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from sparsediff.registry import Registry


class Method:
    """The method that changes nothing; base of all others.

    Args:
        model: the trained model.
        optimizer: the optimizer of its parameters; None where a method does not need one.
        total_steps: length of the whole run, which schedules are relative to; None for an open-ended one.
        ema: an average of the model that has to follow the topology: an object with `shadow_of(parameter) -> Tensor`, a
            copy of the model (`torch.optim.swa_utils.AveragedModel`), or a dict of tensors by parameter name.
        generator: source of every random choice; None: an own one, seeded with `torch.initial_seed()`.
    """

    sparse = True  # whether the model is made sparse before training

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        total_steps: int | None = None,
        ema: Any = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.total_steps = total_steps
        self.ema = ema
        self.generator = generator

    def begin_step(self, micro_batches: int = 1) -> None:
        """Called before the first forward of every step; `micro_batches` backwards will accumulate their gradients."""

    def step(self) -> dict[str, Any] | None:
        """Called after `optimizer.step()`; what it did, for the log (JSON values), or None if nothing."""
        return None

    @classmethod
    def training_flops(cls, sparse: float, dense: float, *, every: int) -> float:
        """FLOPs of one training step on one sample: the forward, and twice as many for the gradients.

        Args:
            sparse, dense: f_S and f_D, FLOPs of a forward of the trained model and of its dense twin.
            every: ΔT, the mean number of steps from one growth step to the next.

        Source: Evci et al., "Rigging the Lottery", ICML 2020, appendix on FLOPs.
        """
        return 3 * sparse

    def state_dict(self) -> dict[str, Any]:
        """State beyond the model's: nested dicts of tensors and JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`'s result."""


METHODS: Registry[type[Method]] = Registry("method", __name__)


def names() -> list[str]:
    """Every method's name."""
    return METHODS.names()


def build(
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    total_steps: int | None = None,
    ema: Any = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Method:
    """The method called `name`.

    Args:
        options: settings of methods. This one gets those that its constructor names; the rest must be another method's,
            so that one set of settings serves all of them.

    Raises:
        ValueError: no such method. TypeError: an option that no method has.
    """
    method = METHODS.get(name)
    accepted = {entry: set(inspect.signature(METHODS.get(entry)).parameters) for entry in names()}
    known = set().union(*accepted.values())
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(f"no method has the option {', '.join(unknown)}; expected some of {', '.join(sorted(known))}.")
    chosen = {key: value for key, value in options.items() if key in accepted[name]}
    return method(model, optimizer, total_steps=total_steps, ema=ema, generator=generator, **chosen)
