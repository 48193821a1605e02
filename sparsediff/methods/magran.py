"""MagRan-DM: drop by magnitude, grow at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparse_kernels.regrow import Candidates
from sparsediff.methods import METHODS
from sparsediff.methods._dynamic import DynamicMethod, all_true


@METHODS.register("magran")
class MagRan(DynamicMethod):
    """Every `every` steps drops the fraction `drop` of each weight's blocks with the smallest norm and grows as many,
    drawn uniformly from the inactive ones with `generator` (so a seed gives one topology on every device).

    For arguments see `DynamicMethod`.

    Sources: Oliveira, Mocanu, Leiva, "Sparse-to-Sparse Training of Diffusion Models", TMLR 2025, MagRan-DM; Mocanu et
    al., Nature Communications 2018 (SET).
    """

    def _candidates(self, counts: Mapping[str, tuple[int, float]]) -> Sequence[Candidates | None] | None:
        grads = [weight.values.grad for weight in self.weights if weight.values.grad is not None]
        return [None] * len(self.weights) if all_true([grad.isfinite().all() for grad in grads]) else None
