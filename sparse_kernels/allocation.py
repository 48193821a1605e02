"""How a model-wide sparsity is spread over the weights of a model.

Each method gives every weight a score `raw_l`; the density of weight l is `min(1, ε · raw_l)`, with one ε for all,
solved so that the nonzeros of the whole model are `(1 − S)` of its weights:

    erk      raw = (out + in + Σ kernel) / (out · in · Π kernel)     convolutions; linear and GRU weights have no kernel
    uniform  raw = 1
    flops    raw = (out + in + Σ kernel) / (positions · out · in · Π kernel): what costs most FLOPs empties first

Weights that saturate at density 1 leave the sum and ε is solved again; weights that must stay dense enter it at
density 1. All of this works on scalar shapes; rounding to whole blocks comes last, by largest remainder, so that the
model's total is met within one block.

Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity", 2018 (ER);
Evci et al., "Rigging the Lottery", ICML 2020, section 3 and its published code (ERK, saturation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .patterns import Block

# A product of floats may miss an integer by a few ulps; that must not decide a rounding.
_SLACK = 1e-9


@dataclass(frozen=True)
class WeightShape:
    """What the allocation needs to know about one weight.

    Args:
        name: for messages.
        out: output features. in_: input features (of one tap).
        kernel: kernel size of a convolution, `(R, S)` or `(R,)`; empty for linear and GRU weights.
        dense: the weight must stay dense; it enters at density 1.
        positions: how many times one forward multiplies by it (rows of the matrix product); `flops` needs it.
        group: weights of one group are allocated as if they were stacked along `out` (q, k, v of one attention).
    """

    name: str
    out: int
    in_: int
    kernel: tuple[int, ...] = ()
    dense: bool = False
    positions: float | None = None
    group: str | None = None

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def numel(self) -> int:
        return self.out * self.in_ * self.taps

    def blocks(self, pattern: Block) -> int:
        """How many blocks cover it."""
        rows, cols = pattern.grid(self.out, self.in_)
        return rows * cols * self.taps


def _erk(weight: WeightShape) -> float:
    return (weight.out + weight.in_ + sum(weight.kernel)) / weight.numel


def _uniform(weight: WeightShape) -> float:
    return 1.0


def _flops(weight: WeightShape) -> float:
    if weight.positions is None:
        raise ValueError(
            f"allocation 'flops' must know how often a forward uses each weight, and for {weight.name!r} it does not; "
            "pass example_inputs= to sparsify (or positions= to WeightShape)."
        )
    if not weight.positions > 0:
        # Without FLOPs it would be filled first, at the cost of every other weight.
        raise ValueError(
            f"allocation 'flops': no forward uses {weight.name!r} (positions {weight.positions:g}); pass "
            "example_inputs= that reach it, or exclude it."
        )
    return _erk(weight) / weight.positions


METHODS: dict[str, Callable[[WeightShape], float]] = {"erk": _erk, "uniform": _uniform, "flops": _flops}


def check_sparsity(sparsity: float, where: str) -> float:
    """The sparsity as a float in [0, 1].

    Raises:
        ValueError: for anything else, `where` naming who asked.
    """
    value = float(sparsity)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{where}: sparsity is the fraction of absent weights, in [0, 1]; got {sparsity!r}.")
    return value


def block_count(blocks: int, sparsity: float) -> int:
    """Active blocks of a single weight that has `blocks` of them: `(1 − S) · blocks`, rounded, a half upwards."""
    return math.floor((1.0 - check_sparsity(sparsity, "block_count")) * blocks + 0.5 + _SLACK)


def densities(weights: Sequence[WeightShape], sparsity: float, method: str = "erk") -> list[float]:
    """Density of every weight before rounding, in [0, 1].

    Args:
        weights: shapes; those with `dense` are fixed at 1.
        sparsity: S, the fraction of the weights' elements that is absent in total, in [0, 1].
        method: a name in `METHODS`.

    Raises:
        ValueError: for an unknown method or where the dense weights alone exceed `(1 − S)` of the total.
    """
    if method not in METHODS:
        raise ValueError(f"allocation must be one of {', '.join(METHODS)}; got {method!r}.")
    sparsity = check_sparsity(sparsity, "allocation")
    total = sum(weight.numel for weight in weights)
    target = (1.0 - sparsity) * total
    stuck = sum(weight.numel for weight in weights if weight.dense)
    # Half a weight of slack: S = 0.1 times an integer total need not be an integer.
    if stuck > target + 0.5:
        names = [weight.name for weight in sorted(weights, key=lambda w: -w.numel) if weight.dense]
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        raise ValueError(
            f"allocation: sparsity {sparsity:g} leaves {target:.0f} of {total} weights, but {stuck} of them must stay "
            f"dense ({shown}), so the lowest reachable total is {stuck} (sparsity {1 - stuck / total:.4f}); lower the "
            "sparsity, choose a smaller block, or exclude weights to take them out of the total."
        )
    if sparsity == 0.0:
        return [1.0] * len(weights)
    merged = _merge(weights)
    scores = {name: METHODS[method](weight) for name, weight in merged.items() if not weight.dense}
    full = {name for name, weight in merged.items() if weight.dense}
    epsilon = 0.0
    while True:
        free = [name for name in merged if name not in full]
        budget = target - sum(merged[name].numel for name in full)
        if not free:
            break
        epsilon = max(0.0, budget) / sum(scores[name] * merged[name].numel for name in free)
        saturated = {name for name in free if epsilon * scores[name] >= 1.0}
        if not saturated:
            break
        full |= saturated
    result = {name: 1.0 if name in full else epsilon * scores[name] for name in merged}
    return [result[_key(weight)] for weight in weights]


def allocate(weights: Sequence[WeightShape], sparsity: float, pattern: Block, method: str = "erk") -> list[int]:
    """Active blocks of every weight, such that the model's total meets the sparsity within one block.

    A weight that the pattern cannot cut (`pattern.why_not`) or that is marked dense gets all of its blocks.

    Args:
        weights: shapes, in the model's order. sparsity: S over the elements of all of them, in [0, 1].
        pattern: how the weights are cut. method: `"erk"`, `"uniform"` or `"flops"`.

    Returns:
        Block counts, one a weight. An element counts as present or absent with its block; where blocks stick out of
        the weight, a block counts as its mean number of real elements.

    Raises:
        ValueError: for an unknown method, an unreachable sparsity, or `"flops"` without positions above 0.
    """
    marked = [
        weight if weight.dense or pattern.why_not(weight.out, weight.in_) is None else _as_dense(weight)
        for weight in weights
    ]
    wanted = densities(marked, sparsity, method)
    blocks = [weight.blocks(pattern) for weight in marked]
    exact = [density * count for density, count in zip(wanted, blocks, strict=True)]
    counts = [min(math.floor(value + _SLACK), count) for value, count in zip(exact, blocks, strict=True)]
    sizes = [weight.numel / count for weight, count in zip(marked, blocks, strict=True)]
    missing = sum((value - count) * size for value, count, size in zip(exact, counts, sizes, strict=True))
    order = sorted(range(len(marked)), key=lambda k: (counts[k] - exact[k], k))
    for k in order:
        if missing < sizes[k] / 2 or exact[k] - counts[k] <= _SLACK:
            continue
        counts[k] += 1
        missing -= sizes[k]
    return counts


def _key(weight: WeightShape) -> str:
    return weight.name if weight.group is None or weight.dense else f"group {weight.group}"


def _as_dense(weight: WeightShape) -> WeightShape:
    return WeightShape(weight.name, weight.out, weight.in_, weight.kernel, True, weight.positions, weight.group)


def _merge(weights: Sequence[WeightShape]) -> dict[str, WeightShape]:
    """Weights by key, those of one group stacked along `out`."""
    merged: dict[str, WeightShape] = {}
    for weight in weights:
        key = _key(weight)
        first = merged.get(key)
        if first is None:
            merged[key] = weight
            continue
        if weight.group is None or weight.dense:
            raise ValueError(f"allocation: names must be unique; got {weight.name!r} twice.")
        if (first.in_, first.kernel) != (weight.in_, weight.kernel):
            raise ValueError(
                f"allocation: group {weight.group!r} stacks weights along their outputs, so their inputs must agree; "
                f"{first.name!r} has {first.in_} inputs and {weight.name!r} has {weight.in_}."
            )
        merged[key] = WeightShape(
            first.name, first.out + weight.out, first.in_, first.kernel, False, first.positions, first.group
        )
    return merged
