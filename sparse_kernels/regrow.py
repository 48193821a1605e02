"""Regrow: drop the smallest active blocks of a weight, grow as many inactive ones, in place.

    dropped = the k active blocks with the smallest ‖block‖_RMS        grown = the k inactive ones with the best score
    k = floor(p · n + carry),  carry ← p · n + carry − floor(p · n + carry)

The grown blocks move into the slots of the dropped ones, so the number of blocks is conserved exactly and nothing
changes its shape or address: values, gradient, optimizer state and averages are overwritten at k slots, the index is
rewritten by `Topology.rewrite`. Without the carry, p = 0.05 of 12 blocks would round to nothing at every step.

Every choice is deterministic: among equals the lower position (row-major) is taken, whatever slot it lives in.

Sources: Evci et al., "Rigging the Lottery", ICML 2020, Algorithm 1 (RigL); Mocanu et al., "Scalable training of
artificial neural networks with adaptive sparse connectivity", Nature Communications 2018 (random growth).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from .topology import Topology

Policy = Literal["score", "mean", "zero", "keep"]
StatePolicy = Policy | Mapping[str, Policy]
POLICIES = ("score", "mean", "zero", "keep")

# What the optimizers of torch call the state that has a direction; it starts anew under every policy but "keep".
# Anything else that is never negative is a scale (second moments, step sizes).
DIRECTIONS = frozenset(["exp_avg", "momentum_buffer", "grad_avg", "ax", "prev"])

# What they call averages of squared gradients, which a block's own score can stand in for.
SQUARES = frozenset(["exp_avg_sq", "max_exp_avg_sq", "square_avg", "row_var", "col_var", "variance"])


class Weight(Protocol):
    """What `regrow` needs of a sparse weight; `sparse_kernels.nn.SparseWeight` is one."""

    @property
    def name(self) -> str: ...
    @property
    def values(self) -> nn.Parameter: ...
    @property
    def topology(self) -> Topology: ...


@dataclass(frozen=True)
class Candidates:
    """The inactive blocks that a weight may grow, reduced from scores of all its blocks.

    Args:
        positions: `row * col_blocks + col`, int64 `[m]`, ascending. scores: of those blocks, `[m]`.
        active: scores of the active blocks by slot `[nnzb]`, or None where dropped blocks may not return.
        total: of the active blocks' scores, fp64 `[]`.
        finite: bool `[]`, on the device: whether all scores were finite.
    """

    positions: Tensor
    scores: Tensor
    active: Tensor | None
    total: Tensor
    finite: Tensor

    @classmethod
    def best(
        cls, scores: Tensor, topology: Topology, count: int, *, active: bool = False, overwrite: bool = False
    ) -> Candidates:
        """The `count` best inactive blocks (all of them where there are fewer).

        Args:
            scores: of every block, `[row_blocks, col_blocks]`, contiguous where `overwrite`.
            active: keep the active blocks' scores too. overwrite: `scores` may be used as scratch memory.
        """
        expected = [topology.row_blocks, topology.col_blocks]
        if list(scores.shape) != expected:
            raise ValueError(f"regrow: scores must be [row_blocks, col_blocks] = {expected}; got {list(scores.shape)}.")
        flat = scores.detach().flatten() if overwrite else scores.detach().flatten().clone()
        finite = flat.isfinite().all()
        rows, cols = topology.coords()
        present = rows * topology.col_blocks + cols
        kept = flat[present]
        flat.index_fill_(0, present, -math.inf)
        positions = best_positions(flat, min(count, inactive_blocks(topology)), largest=True)
        return cls(positions, flat[positions], kept if active else None, kept.sum(dtype=torch.float64), finite)


@dataclass(frozen=True)
class RegrowReport:
    """What one regrow did to one weight. All tensors are int64 `[k]`, on the weight's device.

    Args:
        name: the weight's. slots: those that were dropped. rows, cols: where their blocks lie now.
        kept: bool `[k]`, dropped blocks that won their place back and were left as they were; None: there are none.
    """

    name: str
    slots: Tensor
    rows: Tensor
    cols: Tensor
    kept: Tensor | None = None

    @property
    def moved(self) -> int:
        """Blocks that really moved (synchronises where dropped blocks may return)."""
        return self.slots.numel() - (0 if self.kept is None else int(self.kept.sum()))


def inactive_blocks(topology: Topology) -> int:
    """Number of blocks that are absent."""
    return topology.row_blocks * topology.col_blocks - topology.nnzb


def quota(blocks: int, fraction: float, carry: float, limit: int) -> tuple[int, float]:
    """How many of `blocks` to move, and the carry for next time, in [0, 1).

    What exceeds `limit` (there are no more blocks to grow) is lost, not carried: else a nearly dense weight would pile
    up a debt that it can never pay.
    """
    want = fraction * blocks + carry
    count = math.floor(want)
    return min(count, limit), want - count


def best_positions(key: Tensor, count: int, *, largest: bool) -> Tensor:
    """Ascending positions of the `count` largest (or smallest) elements of `key [n]`; among equals the lower position.

    Neither synchronises nor sorts: topk, whose choice among equals is arbitrary, only finds the bound.
    """
    if count in (0, key.numel()):
        return torch.arange(count, device=key.device)
    found = torch.topk(key, count, largest=largest, sorted=False).values
    bound = found.min() if largest else found.max()
    better = key > bound if largest else key < bound
    tied = key == bound
    taken = better | (tied & (tied.cumsum(0) <= count - better.sum()))
    return torch.nonzero_static(taken, size=count).squeeze(1)


@torch.no_grad()
def regrow(
    weight: Weight,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    count: int,
    scores: Tensor | Candidates | None = None,
    generator: torch.Generator | None = None,
    state_policy: StatePolicy = "score",
    follow: Iterable[Tensor] = (),
    regrow_dropped: bool = False,
) -> RegrowReport:
    """Moves `count` blocks of one weight, between `optimizer.step()` and the next forward.

    Grown values and their gradient are zero. Their optimizer state follows `state_policy`:

    - "score" (default): momenta zero, second moments v = max(v̄, ḡ²) of the weight's surviving mean v̄ and the block's
      own mean squared gradient ḡ² = c · score / elements; c = Σ‖values.grad‖² / Σ score over the active blocks accounts
      for clipping and unscaling. Growth picks blocks for their large gradient, so v̄ alone is far too small for them.
      Zeroing both moments under a global step count would make Adam's first update `(1 − β1) / sqrt(1 − β2)` = 3.16
      learning rates whatever the gradient, and v̄ alone nearly as much; with v it is 0.1 while the gradient is what it
      was, and the updates after it grow to one. Random growth and a missing `values.grad` leave v̄.
    - "mean": the same with v = v̄. State of an unknown name takes it under both policies if it is nowhere negative.
    - "zero": everything zero, as in RigL's code.
    - "keep": what the slot held, which belongs to the dropped block.

    Args:
        weight: a sparse weight: `name`, `values` and `topology`.
        optimizer: whose per-element state (any tensor of the values' shape, and factors of it that keep the slot
            dimension) is carried along; scalar state such as `step` is untouched.
        count: k; at most the number of active blocks, and of inactive ones unless `regrow_dropped`.
        scores: of every block `[row_blocks, col_blocks]`, or `Candidates` for at least `count` (whoever made them has
            looked at their `finite`); None: growth at random.
        generator: source of the random growth, drawn on its own device; None is torch's global one.
        state_policy: one of the names above, or a dict from state names to them ("score" for those it leaves out).
        follow: further tensors `[nnzb, bh, bw]` that share the topology, such as an EMA of the values; zeroed alike.
        regrow_dropped: let the just dropped blocks compete for the free places, with their own scores. One that wins
            is left as it was, value and state included (as in RigL's code), so fewer than `count` blocks move. Default
            False: exactly `count` blocks move.

    Raises:
        ValueError: a count out of range, scores of another shape or not finite, a tensor in `follow` of another shape,
            an unknown policy. TypeError: optimizer state that cannot follow a regrow. Nothing has been changed then.
    """
    topology, values = weight.topology, weight.values
    limit = topology.nnzb if regrow_dropped else min(topology.nnzb, inactive_blocks(topology))
    if not 0 <= count <= limit:
        raise ValueError(
            f"regrow: count must lie in 0..{limit} for {weight.name} ({topology.nnzb} active, "
            f"{inactive_blocks(topology)} inactive blocks); got {count}."
        )
    states = _slot_states(weight.name, values, optimizer, state_policy)
    followers = list(follow)
    for tensor in followers:
        if tensor.shape != values.shape:
            raise ValueError(
                f"regrow: what follows {weight.name} must be {list(values.shape)}; got {list(tensor.shape)}."
            )
    candidates = _candidates(weight, scores, generator, count, regrow_dropped)

    rows, cols = topology.coords()
    slots = _smallest(values, topology, rows, cols, count)
    positions = rows[slots] * topology.col_blocks + cols[slots]
    kept = None
    if not regrow_dropped:
        best = best_positions(candidates.scores, count, largest=True)
        grown, won = candidates.positions[best], candidates.scores[best]
    else:
        grown, won, kept = _compete(positions, slots, candidates, count)
    report = RegrowReport(weight.name, slots, grown // topology.col_blocks, grown % topology.col_blocks, kept)

    square = None if scores is None else _squared_gradients(values, topology, report, won, candidates.total)
    for state, start in states:
        if start == "zero" or count == 0:
            content = state.new_zeros(())
        else:
            content = _survivors_mean(state, topology, slots, rows, cols)
            if start == "score" and square is not None:
                content = torch.maximum(content, square.to(state.dtype)[:, None, None])
        _write(state, slots, content, kept)
    zeroed = [values, *followers] if values.grad is None else [values, *followers, values.grad]
    for tensor in zeroed:
        _write(tensor, slots, tensor.new_zeros(()), kept)
    topology.rewrite(slots, report.rows, report.cols)
    return report


def _candidates(
    weight: Weight, scores: Tensor | Candidates | None, generator: torch.Generator | None, count: int, active: bool
) -> Candidates:
    topology = weight.topology
    if scores is None:
        # Random keys and their best `count` are a uniform draw without replacement, on any device from one generator.
        where = generator.device if generator is not None else torch.device("cpu")
        grid = topology.row_blocks, topology.col_blocks
        keys = torch.rand(grid, generator=generator, device=where).to(topology.crow.device)
        return Candidates.best(keys, topology, count, active=active, overwrite=True)
    if isinstance(scores, Tensor):
        found = Candidates.best(scores, topology, count, active=active)
        if not bool(found.finite):
            raise ValueError(f"regrow: scores of {weight.name} must be finite; got inf or NaN; postpone the regrow.")
        return found
    if scores.positions.numel() < min(count, inactive_blocks(topology)) or (active and scores.active is None):
        raise ValueError(
            f"regrow: {weight.name} needs {count} candidates{' and active scores' if active else ''}; "
            f"got {scores.positions.numel()}."
        )
    return scores


def _smallest(values: Tensor, topology: Topology, rows: Tensor, cols: Tensor, count: int) -> Tensor:
    """Slots of the `count` blocks with the smallest RMS, in the order of their positions."""
    squares = values.detach().square().sum(dim=(1, 2))
    if topology.out % topology.bh or topology.in_ % topology.bw:
        heights, widths = topology.weight_index().block_areas()
        squares = squares / (heights[rows] * widths[cols])
    # NaN would hide from every comparison; a diverged block counts as large.
    squares = squares.nan_to_num(nan=math.inf, posinf=math.inf)
    by_position = topology.slot.long()
    return by_position[best_positions(squares[by_position], count, largest=False)]


def _compete(positions: Tensor, slots: Tensor, candidates: Candidates, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best `count` of the dropped and the inactive blocks: new position of every dropped slot, the score that the block
    has there, and which of the dropped ones won."""
    assert candidates.active is not None
    # In the order of positions, so that ties go to the lower one.
    order = torch.cat([positions, candidates.positions]).argsort()
    scores = torch.cat([candidates.active[slots], candidates.scores])[order]
    won = torch.zeros_like(order, dtype=torch.bool)
    won[best_positions(scores, count, largest=True)] = True
    mine = torch.empty_like(won).scatter_(0, order, won)
    kept, new = mine[:count], mine[count:]
    # The i-th loser's slot goes to the i-th newcomer; both are equally many, and only the device knows how many.
    newcomers = torch.nonzero_static(new, size=count, fill_value=0).squeeze(1)
    rank = (~kept).cumsum(0) - 1
    own = candidates.active[slots]
    if not candidates.positions.numel():
        return positions, own, kept
    chosen = newcomers[rank.clamp(min=0)]
    taken, theirs = candidates.positions[chosen], candidates.scores[chosen]
    return torch.where(kept, positions, taken), torch.where(kept, own, theirs), kept


def _squared_gradients(
    values: nn.Parameter, topology: Topology, report: RegrowReport, scores: Tensor, total: Tensor
) -> Tensor | None:
    """Mean squared gradient of each grown block `[k]`, in the scale of `values.grad`; None where there is none.

    Args:
        scores: of the grown blocks `[k]`. total: of the active blocks' scores.
    """
    if values.grad is None:
        return None
    scale = values.grad.detach().square().sum(dtype=torch.float64) / total
    heights, widths = topology.weight_index().block_areas()
    elements = heights[report.rows] * widths[report.cols]
    # No active block had a gradient: their ratio says nothing.
    return (torch.where(total > 0, scale, 1.0) * scores / elements).nan_to_num(nan=0.0, posinf=0.0)


# Optimizer state


def _slot_states(
    name: str, values: nn.Parameter, optimizer: torch.optim.Optimizer | None, policy: StatePolicy
) -> list[tuple[Tensor, Policy]]:
    """The state tensors that are to be overwritten, and what each begins with: "score", "mean" or "zero"."""
    named = policy if isinstance(policy, Mapping) else {}
    default: Policy = "score" if isinstance(policy, Mapping) else policy
    for rule in (default, *named.values()):
        if rule not in POLICIES:
            raise ValueError(f"regrow: a state policy is one of {', '.join(POLICIES)}; got {rule!r}.")
    found: list[tuple[Tensor, Policy]] = []
    state: Mapping[str, Any] = {} if optimizer is None else optimizer.state.get(values, {})
    for key, item in state.items():
        rule = named.get(key, default)
        if rule == "keep" or not _has_elements(item):
            continue
        fits = isinstance(item, Tensor) and item.dim() == 3 and item.shape[0] == values.shape[0]
        if not fits or any(n not in (1, full) for n, full in zip(item.shape[1:], values.shape[1:], strict=True)):
            kind = f"{list(item.shape)}" if isinstance(item, Tensor) else type(item).__name__
            raise TypeError(
                f"regrow: state {key!r} of {type(optimizer).__name__} for {name} has no slot dimension and cannot "
                f"follow a regrow; expected [{values.shape[0]}, {values.shape[1]} or 1, {values.shape[2]} or 1], got "
                f"{kind}; use another optimizer, or state_policy={{{key!r}: 'keep'}} to leave it as it is."
            )
        if key in DIRECTIONS:
            rule = "zero"
        elif rule == "score" and key not in SQUARES:
            rule = "mean"
        found.append((item, rule))
    return found


def _has_elements(item: Any) -> bool:
    """Whether a piece of state is more than a scalar."""
    if isinstance(item, Tensor):
        return item.dim() == 3 or item.numel() > 1
    return isinstance(item, (list, tuple, dict)) and any(
        isinstance(part, Tensor) and part.numel() > 1 for part in (item.values() if isinstance(item, dict) else item)
    )


def _survivors_mean(state: Tensor, topology: Topology, slots: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """The mean of `state` over the real elements of the surviving blocks, or zero where state has both signs: `[]`.

    Padding may get it too: with a zero gradient and momentum it moves nothing. `rows`, `cols`: coordinates by slot.
    """
    counted = torch.ones(topology.nnzb, 1, 1, dtype=torch.bool, device=slots.device)
    if slots.numel() < topology.nnzb:  # where nothing survives, the mean of all that was
        counted.index_fill_(0, slots, False)
    heights, widths = topology.weight_index().block_areas()
    # A factor of the state (one value per row of a block, say) has only that dimension's padding.
    if topology.out % topology.bh and state.shape[1] == topology.bh:
        counted = counted & (torch.arange(topology.bh, device=slots.device) < heights[rows, None])[:, :, None]
    if topology.in_ % topology.bw and state.shape[2] == topology.bw:
        counted = counted & (torch.arange(topology.bw, device=slots.device) < widths[cols, None])[:, None, :]
    total = torch.where(counted, state, 0).sum(dtype=torch.promote_types(state.dtype, torch.float32))
    mean = (total / counted.expand_as(state).sum()).to(state.dtype)
    return torch.where(state.amin() >= 0, mean, torch.zeros_like(mean))


def _write(tensor: Tensor, slots: Tensor, content: Tensor, kept: Tensor | None) -> None:
    """Writes `content` (broadcast) into the slots, except where `kept`."""
    blocks = content.expand(slots.numel(), *tensor.shape[1:])
    if kept is not None:
        blocks = torch.where(kept[:, None, None], tensor.index_select(0, slots), blocks)
    tensor.index_copy_(0, slots, blocks)
