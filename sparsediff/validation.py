"""The loss on held-out drawings at fixed timesteps and noise, so that models and moments compare."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from sparsediff.datasets import Strokes, collate
from sparsediff.diffusion import Diffusion


class Validation:
    """A fixed set of noisy drawings.

    Timesteps are spread evenly over 0 … T−1, one a drawing, in random order.

    Args:
        strokes: held-out drawings; at most `count` of them are used, evenly spaced.
        diffusion: the schedule. seed: of the noise. form: what is diffused, as in `collate`.

    Raises:
        ValueError: there are no drawings.
    """

    def __init__(
        self,
        strokes: Strokes,
        diffusion: Diffusion,
        *,
        count: int = 256,
        batch_size: int = 128,
        seed: int = 0,
        form: Literal["delta", "position"] = "delta",
    ) -> None:
        if len(strokes) == 0:
            raise ValueError("validation: needs at least one held-out drawing; raise the limit of drawings.")
        self.diffusion = diffusion
        generator = torch.Generator().manual_seed(seed)
        count = min(count, len(strokes))
        chosen = np.arange(count) * len(strokes) // count
        # Drawings of similar length share a batch, which saves padding.
        chosen = chosen[np.argsort(strokes.lengths[chosen], kind="stable")]
        t = (torch.randperm(count, generator=generator) * 2 + 1) * diffusion.timesteps // (2 * count)
        self.parts: list[tuple[Tensor, ...]] = []  # x0 [B, T, 3], t [B], noise [B, T, 3], lengths [B]
        for start in range(0, count, batch_size):
            batch = collate(strokes, chosen[start : start + batch_size], form=form)
            noise = torch.randn(batch.x.shape, generator=generator)
            self.parts.append((batch.x, t[start : start + batch_size], noise, batch.lengths))
        self.count = count

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Mean of `Diffusion.loss` over the drawings, the model as it is on its device."""
        device = next(model.parameters()).device
        total = 0.0
        for part in self.parts:
            total += self.diffusion.loss(model, *(tensor.to(device) for tensor in part)).item() * len(part[0])
        return total / self.count
