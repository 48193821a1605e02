"""RigL-DM: drop by magnitude, grow where the gradient is largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from sparse_kernels.nn import SparseWeight
from sparse_kernels.regrow import Candidates
from sparsediff.methods import METHODS
from sparsediff.methods._dynamic import DynamicMethod, all_true


@METHODS.register("rigl")
class RigL(DynamicMethod):
    """Every `every` steps drops the fraction `drop` of each weight's blocks with the smallest norm and grows the
    inactive ones with the highest score, Σ over micro-batches of ‖∂L/∂block‖²_F.

    The scores come from the same backward that trains (`begin_step()` opens the score taps), and the regrow follows the
    optimizer step of that backward. This is ITOP's order; in RigL's code the regrow takes the optimizer step's place.
    In both of them grown weights begin at zero; RigL also zeroes their momenta, ITOP resets nothing: see
    `state_policy`. Both let just dropped weights return at once (`regrow_dropped=True`).

    Memory: for patterns whose scores outgrow the values (Unstructured), a layer's scores are reduced to the best
    candidates as soon as its last backward has made them, so that with one micro-batch a single layer's are alive at a
    time. With several they have to be summed first, and every layer's are alive between the micro-batches of a growth
    step.

    For arguments see `DynamicMethod`.

    Sources: Evci et al., "Rigging the Lottery", ICML 2020, Algorithm 1; Oliveira, Mocanu, Leiva, "Sparse-to-Sparse
    Training of Diffusion Models", TMLR 2025, RigL-DM; Liu et al., "Do We Actually Need Dense Over-Parameterization?",
    ICML 2021 (ITOP).
    """

    scored = True

    _open = False  # whether scores of the coming step are being taken
    _reduced: dict[str, Candidates]  # by weight name, what the hooks have made of them

    @classmethod
    def training_flops(cls, sparse: float, dense: float, *, every: int) -> float:
        """`(3 f_S ΔT + 2 f_S + f_D) / (ΔT + 1)`: a growth step has the gradient of every weight."""
        return (3 * sparse * every + 2 * sparse + dense) / (every + 1)

    def begin_step(self, micro_batches: int = 1) -> None:
        """Opens the score taps where the coming `step()` will regrow; before the first forward of the iteration.

        Args:
            micro_batches: how many backwards the iteration has.
        """
        if self._open or not self._due(self.steps + 1):
            return
        self._open, self._reduced = True, {}
        counts = self._counts(self.steps + 1)
        for weight in self.weights:
            tap = weight.open_tap()
            if tap.numel() > weight.values.numel():
                reduce = partial(self._reduce, weight, counts[weight.name][0], micro_batches)
                tap.register_post_accumulate_grad_hook(_AfterBackwards(micro_batches, reduce))

    def _reduce(self, weight: SparseWeight, count: int, micro_batches: int, tap: Tensor) -> None:
        if weight.name in self._reduced:
            raise RuntimeError(
                f"RigL: a backward more than the {micro_batches} announced reached {weight.name} on a growth step; "
                f"say begin_step(micro_batches=...)."
            )
        assert tap.grad is not None
        self._reduced[weight.name] = Candidates.best(
            tap.grad, weight.topology, count, active=self.regrow_dropped, overwrite=True
        )
        tap.grad = None

    def _candidates(self, counts: Mapping[str, tuple[int, float]]) -> Sequence[Candidates | None] | None:
        if not self._open:
            raise RuntimeError(
                "RigL: this step regrows but no scores were taken; call begin_step() before the forward of every step."
            )
        found: list[Candidates | None] = []
        for weight in self.weights:
            candidates = self._reduced.get(weight.name)
            scores = weight.tap_scores() if candidates is None else None
            if scores is not None:
                candidates = Candidates.best(
                    scores, weight.topology, counts[weight.name][0], active=self.regrow_dropped, overwrite=True
                )
            weight.close_tap()
            found.append(candidates)
        self._open, self._reduced = False, {}
        scored = [candidates for candidates in found if candidates is not None]
        if not scored:
            raise RuntimeError(
                "RigL: this step regrows but no backward reached any sparse weight since begin_step(); call "
                "begin_step() before the forward, and step() after the backward."
            )
        return found if all_true([candidates.finite for candidates in scored]) else None


class _AfterBackwards:
    """A hook that calls `act(tap)` from the `count`-th backward on; the taps sum up until then."""

    def __init__(self, count: int, act: partial[None]) -> None:
        self.count = count
        self.act = act

    def __call__(self, tap: Tensor) -> None:
        self.count -= 1
        if self.count <= 0:
            self.act(tap)
