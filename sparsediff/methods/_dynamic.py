"""What methods that change the topology have in common: when to regrow, how many blocks, and what follows along."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_kernels import Topology
from sparse_kernels.nn import sparse_weights
from sparse_kernels.regrow import Candidates, StatePolicy, inactive_blocks, quota, regrow
from sparsediff.methods import Method

Anneal = Literal["constant", "cosine"]


@dataclass(frozen=True)
class _Average:
    """Averages of one weight's values, and their topology where it may be a copy of the weight's."""

    values: list[Tensor]
    topology: Topology | None = None


class DynamicMethod(Method):
    """Every `every` steps, moves the fraction p of each weight's blocks to where a subclass says.

        step t regrows where t mod every = 0 and t < T_end;  k = floor(p_t · n + carry) of n blocks, per weight
        p_t = drop (constant), or drop/2 · (1 + cos(π t / T_end)) (cosine)

    Weights that do not require a gradient keep their topology. A step whose gradients are not finite (AMP) is not used:
    the regrow is postponed to the next step, and counted.

    Args:
        model: with sparse layers. optimizer: holds all their trainable values; its state follows.
        total_steps, ema, generator: see `Method`.
        every: ΔT, steps between regrows. drop: p, in (0, 1].
        anneal: how p develops; "cosine" needs an end.
        t_end: T_end, a step (int), or a fraction of `total_steps` (float in (0, 1]); without `total_steps` a fraction
            means no end. Default 1.0: the topology moves throughout, as in the paper; RigL's own runs have 0.75.
        state_policy: what a grown weight's optimizer state begins with, see `sparse_kernels.regrow.regrow`.
        regrow_dropped: whether just dropped blocks may win their place back, likewise. Default False.

    Raises:
        ValueError: options out of range, no sparse weight in the model, or one that the optimizer does not hold.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        total_steps: int | None = None,
        ema: Any = None,
        generator: torch.Generator | None = None,
        every: int = 800,
        drop: float = 0.05,
        anneal: Anneal = "constant",
        t_end: int | float = 1.0,
        state_policy: StatePolicy = "score",
        regrow_dropped: bool = False,
    ) -> None:
        if generator is None:
            generator = torch.Generator()
            generator.manual_seed(torch.initial_seed())
        super().__init__(model, optimizer, total_steps=total_steps, ema=ema, generator=generator)
        name = type(self).__name__
        if every < 1:
            raise ValueError(f"{name}: every must be at least 1 step; got {every}.")
        if not 0 < drop <= 1:
            raise ValueError(f"{name}: drop must lie in (0, 1]; got {drop}.")
        if anneal not in ("constant", "cosine"):
            raise ValueError(f"{name}: anneal must be 'constant' or 'cosine'; got {anneal!r}.")
        self.every, self.drop, self.anneal = every, drop, anneal
        self.end = _end(name, t_end, total_steps)
        if anneal == "cosine" and math.isinf(self.end):
            raise ValueError(f"{name}: anneal='cosine' needs an end; give total_steps, or t_end as a step.")
        self.state_policy, self.regrow_dropped = state_policy, regrow_dropped
        self.weights = [weight for weight in sparse_weights(model) if weight.values.requires_grad]
        self._check_weights()
        self.steps = 0
        self.pending = False  # a regrow was postponed
        self.postponed = 0
        self.regrows = 0
        self.carries = {weight.name: 0.0 for weight in self.weights}

    # The loop

    def step(self) -> dict[str, Any] | None:
        """Called after `optimizer.step()` of every iteration, skipped ones included; regrows where it is time.

        Returns:
            None, or `{"moved": blocks, "drop": p}` after a regrow, or `{"postponed": how often so far}`.
        """
        self.steps += 1
        if not self._due(self.steps):
            return None
        counts = self._counts(self.steps)
        candidates = self._candidates(counts)
        if candidates is None:
            self.pending = True
            self.postponed += 1
            return {"postponed": self.postponed}
        self.pending = False
        self.regrows += 1
        reports = []
        for weight, growing, average in zip(self.weights, candidates, self._averages(), strict=True):
            count, carry = counts[weight.name]
            if growing is None and self.scored:
                continue  # no gradient reached this weight
            self.carries[weight.name] = carry
            report = regrow(
                weight,
                self.optimizer,
                count=count,
                scores=growing,
                generator=self.generator,
                state_policy=self.state_policy,
                follow=average.values,
                regrow_dropped=self.regrow_dropped,
            )
            if average.topology is not None and average.topology is not weight.topology:
                average.topology.rewrite(report.slots, report.rows, report.cols)
            reports.append(report)
        moved = sum(report.slots.numel() for report in reports)
        returned = [report.kept.sum() for report in reports if report.kept is not None]
        if returned:
            moved -= int(_on_one_device(returned).sum())
        return {"moved": moved, "drop": self.fraction(self.steps)}

    def fraction(self, step: int) -> float:
        """p at a step."""
        if self.anneal == "constant":
            return self.drop
        return self.drop / 2 * (1 + math.cos(math.pi * min(step / self.end, 1.0)))

    def _due(self, step: int) -> bool:
        return self.pending or (step % self.every == 0 and step < self.end)

    def _counts(self, step: int) -> dict[str, tuple[int, float]]:
        """Blocks to move of each weight, and its next carry."""
        p = self.fraction(step)
        counts = {}
        for weight in self.weights:
            topology = weight.topology
            limit = topology.nnzb if self.regrow_dropped else min(topology.nnzb, inactive_blocks(topology))
            counts[weight.name] = quota(topology.nnzb, p, self.carries[weight.name], limit)
        return counts

    # What a subclass grows

    scored = False  # whether growth goes by scores, or at random

    def _candidates(self, counts: Mapping[str, tuple[int, float]]) -> Sequence[Candidates | None] | None:
        """What each weight may grow, in the order of `self.weights` (None: at random, or without scores not at all);
        None where this step's gradients are not finite."""
        raise NotImplementedError

    # The average

    def _averages(self) -> list[_Average]:
        """What has to follow each weight, in the order of `self.weights`.

        Looked up at each regrow, since the tensors of a dict may be replaced meanwhile.
        """
        if self.ema is None:
            return [_Average([]) for _ in self.weights]
        if isinstance(self.ema, nn.Module):
            mine, theirs = sparse_weights(self.model), sparse_weights(self.ema)
            if [weight.values.shape for weight in mine] != [weight.values.shape for weight in theirs]:
                raise ValueError(f"{type(self).__name__}: ema must be a copy of the model; its sparse weights differ.")
            copies = {weight.name: copy for weight, copy in zip(mine, theirs, strict=True)}
            found = [copies[weight.name] for weight in self.weights]
            return [_Average([copy.values], copy.topology) for copy in found]
        if isinstance(self.ema, Mapping):
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            return [_Average([self.ema[names[id(weight.values)]]]) for weight in self.weights]
        return [_Average([self.ema.shadow_of(weight.values)]) for weight in self.weights]

    # State

    def state_dict(self) -> dict[str, Any]:
        assert self.generator is not None
        return {
            "steps": self.steps,
            "pending": self.pending,
            "postponed": self.postponed,
            "regrows": self.regrows,
            "carries": dict(self.carries),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`'s result; the topologies are in the model's state dict.

        Raises:
            ValueError: it belongs to a model with other sparse weights.
        """
        if set(state["carries"]) != set(self.carries):
            raise ValueError(
                f"{type(self).__name__}: this state is of a model with the sparse weights "
                f"{', '.join(sorted(state['carries']))}; expected {', '.join(sorted(self.carries))}."
            )
        assert self.generator is not None
        self.steps, self.pending = int(state["steps"]), bool(state["pending"])
        self.postponed, self.regrows = int(state["postponed"]), int(state["regrows"])
        self.carries = {name: float(state["carries"][name]) for name in self.carries}
        self.generator.set_state(state["generator"].cpu())

    def _check_weights(self) -> None:
        name = type(self).__name__
        if not self.weights:
            raise ValueError(
                f"{name}: the model has no trainable sparse weight; call sparse_kernels.nn.sparsify on it first, with "
                "a sparsity above 0 and a pattern that its weights can be cut by."
            )
        if self.optimizer is None:
            return
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        lost = [weight.name for weight in self.weights if id(weight.values) not in held]
        if lost:
            raise ValueError(
                f"{name}: the optimizer does not hold the values of {', '.join(lost)}, so their state could not "
                "follow; make the optimizer after sparsify, or freeze them with requires_grad_(False)."
            )


def _end(name: str, t_end: int | float, total_steps: int | None) -> float:
    """T_end as a step, or infinity."""
    if isinstance(t_end, int):
        if t_end < 1:
            raise ValueError(f"{name}: t_end as a step must be at least 1; got {t_end}.")
        return t_end
    if not 0 < t_end <= 1:
        raise ValueError(f"{name}: t_end as a fraction must lie in (0, 1]; got {t_end}; write a step as an int.")
    return math.inf if total_steps is None else t_end * total_steps


def all_true(flags: Sequence[Tensor]) -> bool:
    """Whether all of some bool `[]` hold, at one synchronisation."""
    return not flags or bool(_on_one_device(flags).all())


def _on_one_device(scalars: Sequence[Tensor]) -> Tensor:
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars])
