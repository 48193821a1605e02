"""Whole models trained on the CPU, sparse against their dense twins: forward, loss, backward, AdamW.

Nothing but `sparsify(model, …, plan="measure")` makes them sparse. Dense is the same model, both in channels_last. A
row's note holds the speedup that the plan predicted before any step was timed, how far the measured one lies from it,
and what the model's FLOPs would allow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.cases.conv import matrix_of
from bench.harness import attempt, check_close
from bench.models import ResNet18, unet
from bench.registry import Case, Ours, Prepared, Problem, Rival, Variant, Wrong, register
from sparse_kernels import Plan, densify, sparsify
from sparse_kernels.nn.measure import timed
from sparse_kernels.nn.weights import sparse_weights

Inputs = tuple[Tensor, ...]


class Training:
    """A model with AdamW, its input and what its output should be.

    Args:
        model: dense or sparse. inputs: arguments of its forward. target: class numbers, or a tensor like the output.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, target: Tensor) -> None:
        self.model, self.inputs, self.target = model, inputs, target
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def output(self) -> Tensor:
        y: Any = self.model(*self.inputs)
        return y if isinstance(y, Tensor) else y.sample

    def loss(self) -> Tensor:
        y = self.output()
        return F.mse_loss(y, self.target) if self.target.is_floating_point() else F.cross_entropy(y, self.target)

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def optimizer_ms(self) -> float:
        """Of one update, once gradients are there."""
        return timed({"": self.optimizer.step}, torch.device("cpu"), rounds=3)[""]


def prepare_with(
    build: Callable[[], tuple[nn.Module, Inputs, Tensor]], allocation: str = "erk"
) -> Callable[[tuple[Variant, ...]], Prepared]:
    def prepare(variants: tuple[Variant, ...]) -> Prepared:
        torch.manual_seed(0)
        model, inputs, target = build()
        inputs = tuple(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs)
        dense = Training(model.to(memory_format=torch.channels_last), inputs, target)  # type: ignore[call-overload]
        dense.step()
        dense_ms = dense.optimizer_ms()

        def ours(variant: Variant) -> Ours:
            sparse = copy.deepcopy(model)
            plan = sparsify(
                sparse,
                sparsity=variant.sparsity,
                pattern=variant.pattern,
                allocation=allocation,
                generator=torch.Generator().manual_seed(0),
                plan="measure",
                example_inputs=inputs,
            )
            return built(variant, Training(sparse, inputs, target), plan, dense_ms)

        rivals = (Rival("dense", "dense twin", ("dense",)),)
        return Prepared(
            {"dense": dense.step}, rivals, {variant: attempt(partial(ours, variant)) for variant in variants}
        )

    return prepare


def built(variant: Variant, training: Training, plan: Plan, dense_ms: float) -> Ours:
    """One sparse model, checked against the dense model that computes the same."""

    def check() -> None:
        training.model.eval()
        twin = densify(copy.deepcopy(training.model))
        dense = Training(twin, training.inputs, training.target)
        with torch.no_grad():
            check_close(training.output(), dense.output(), "the model's output", tolerance=1e-3)
        check_gradients(training, dense)
        training.model.train()
        losses = [float(training.step()) for _ in range(4)]
        if not losses[-1] < losses[0]:
            raise Wrong(f"four steps of training took the loss from {losses[0]:.4f} to {losses[-1]:.4f}")

    training.step()
    predicted = plan.step_speedup(dense_extra_ms=dense_ms, sparse_extra_ms=training.optimizer_ms())
    executions = [one.execution for one in plan.layers]
    counted = {name: executions.count(name) for name in sorted(set(executions))}
    note = f"FLOP bound {plan.flop_bound:.2f}x; layers: " + ", ".join(f"{n} {name}" for name, n in counted.items())
    extra = {"predicted": predicted, "flop_bound": plan.flop_bound, "layers": counted, "rest_ms": plan.rest_ms}
    return Ours(variant, 1 - plan.sparsity, training.step, check, extra=extra, note=note)


def check_gradients(sparse: Training, dense: Training) -> None:
    """Holds the gradient of every sparse weight of linear layers and convolutions against the dense twin's."""
    for one in (sparse, dense):
        one.model.zero_grad()
        one.loss().backward()
    for weight in sparse_weights(sparse.model):
        if weight.key == "values":
            grad = dense.model.get_parameter(f"{weight.name}.weight").grad
            assert grad is not None and weight.values.grad is not None
            expected = weight.topology.gather(matrix_of(grad) if grad.dim() == 4 else grad)
            # Rounding through a whole model, whose activations may even pass a kink.
            check_close(weight.values.grad, expected, f"the gradient of {weight.name}", tolerance=1e-2)


def resnet() -> tuple[nn.Module, Inputs, Tensor]:
    return ResNet18(), (torch.randn(16, 3, 32, 32),), torch.randint(10, (16,))


def diffusion(widths: tuple[int, ...], size: int, batch: int) -> tuple[nn.Module, Inputs, Tensor]:
    x = torch.randn(batch, 3, size, size)
    return unet(widths, size), (x, torch.randint(1000, (batch,))), torch.randn_like(x)


GOAL = {"dense": 1.0}  # trains faster than dense
VARIANTS = tuple(Variant(pattern, 0.75, GOAL) for pattern in ("block:16x16", "block:32x32", "unstructured"))

register(
    Case(
        "end_to_end",
        "whole models: a step of training with AdamW",
        (
            Problem("ResNet-18 32x32 N=16", VARIANTS, prepare_with(resnet), seconds=10.0),
            Problem("ResNet-18 32x32 N=16, uniform", VARIANTS, prepare_with(resnet, "uniform"), seconds=8.0),
            Problem("UNet2D 64-128-192-256 32x32 N=8", VARIANTS,
                    prepare_with(lambda: diffusion((64, 128, 192, 256), 32, 8)), seconds=15.0),
            Problem("UNet2D 224-448-672-896 64x64 N=1", VARIANTS[1:2],
                    prepare_with(lambda: diffusion((224, 448, 672, 896), 64, 1)), seconds=20.0),
        ),
        keeps_freed_memory=True,
    )
)  # fmt: skip
