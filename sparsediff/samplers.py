"""DDPM and DDIM sampling, with the noise of every sample drawn from its own seed.

A sampler walks a noisy batch `[B, …]` down to data through a predictor `(x_t, t [B]) -> eps`; the samples of one
seed are the same drawings whichever batch they are generated in (up to the rounding of batched products).

Sources: DDPM, algorithm 2; Song et al., "Denoising Diffusion Implicit Models", ICLR 2021, equations 12 and 16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from sparsediff.diffusion import Diffusion, Predictor
from sparsediff.seeds import stream_seed

Noise = Callable[[], Tensor]  # the next draw for the whole batch


def ddim_timesteps(timesteps: int, steps: int, *, historical: bool = False) -> list[int]:
    """The ascending subset of 0 … T−1 that a DDIM sampler of `steps` steps visits.

    {1, 1 + T/n, …} where n divides T; round(linspace(1, T − T/100 + 1, n)) where it does not, which is {1, …, 991} at
    T = 1000; all T when n = T. `historical=True` gives the Latent Diffusion code's range(1, T + 1, T // n), which has
    167 steps when 150 were asked.

    Raises:
        ValueError: steps is not in 1 … T.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"ddim: steps must be in 1..{timesteps} (the diffusion's timesteps); got {steps}.")
    if steps == timesteps:
        return list(range(timesteps))
    if historical or timesteps % steps == 0:
        return list(range(1, timesteps, timesteps // steps))
    last = timesteps - max(1, timesteps // 100) + 1
    first, last = (1, last) if steps <= last < timesteps else (0, timesteps - 1)
    return torch.linspace(first, last, steps, dtype=torch.float64).round().long().tolist()


@torch.no_grad()
def ddim(
    predict: Predictor,
    x: Tensor,
    diffusion: Diffusion,
    steps: int = 50,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    historical: bool = False,
) -> Tensor:
    """Samples with a DDIM of `steps` steps.

        σ = η √((1 − ᾱ') / (1 − ᾱ)) √(1 − ᾱ / ᾱ')
        x' = √ᾱ' (x − √(1 − ᾱ) ε) / √ᾱ + √(1 − ᾱ' − σ²) ε + σ z

    with ᾱ' the level of the next visited timestep; after the last one it is ᾱ_0, or 1 if timestep 0 was itself visited.

    Args:
        predict: `(x_t, t [B]) -> eps`.
        x: pure noise `[B, …]`.
        diffusion: the schedule.
        steps: number of denoising steps.
        eta: 0 is deterministic, 1 has DDPM's variance.
        noise: draws z `[B, …]`; needed when eta > 0.
        historical: see `ddim_timesteps`.

    Returns:
        x_0 `[B, …]`.
    """
    if not eta >= 0:
        raise ValueError(f"ddim: eta must be at least 0; got {eta}.")
    if eta > 0 and noise is None:
        raise ValueError("ddim: eta > 0 needs a noise source; pass noise=SampleNoise(...).")
    visited = ddim_timesteps(diffusion.timesteps, steps, historical=historical)
    levels = diffusion.alphas_bar.tolist()
    after = [1.0 if visited[0] == 0 else levels[0], *(levels[t] for t in visited[:-1])]
    for t, level_after in zip(reversed(visited), reversed(after), strict=True):
        level = levels[t]
        eps = predict(x, torch.full((len(x),), t, device=x.device))
        sigma = eta * ((1 - level_after) / (1 - level) * (1 - level / level_after)) ** 0.5
        x0 = (x - (1 - level) ** 0.5 * eps) / level**0.5
        x = level_after**0.5 * x0 + max(1 - level_after - sigma**2, 0.0) ** 0.5 * eps
        if sigma > 0 and noise is not None:
            x = x + sigma * noise()
    return x


@torch.no_grad()
def ddpm(
    predict: Predictor,
    x: Tensor,
    diffusion: Diffusion,
    *,
    noise: Noise,
    variance: Literal["small", "large"] = "small",
) -> Tensor:
    """Samples through all T steps.

        x' = (x − β_t / √(1 − ᾱ_t) · ε) / √(1 − β_t) + σ_t z,   no z at t = 0

    Args:
        predict: `(x_t, t [B]) -> eps`.
        x: pure noise `[B, …]`.
        diffusion: the schedule.
        noise: draws z `[B, …]`.
        variance: σ² = β_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t) ("small") or β_t ("large").
    """
    levels, betas = diffusion.alphas_bar.tolist(), diffusion.betas.tolist()
    for t in reversed(range(diffusion.timesteps)):
        eps = predict(x, torch.full((len(x),), t, device=x.device))
        x = (x - betas[t] / (1 - levels[t]) ** 0.5 * eps) / (1 - betas[t]) ** 0.5
        if t > 0:
            shrink = (1 - levels[t - 1]) / (1 - levels[t]) if variance == "small" else 1.0
            x = x + (betas[t] * shrink) ** 0.5 * noise()
    return x


class SampleNoise:
    """Standard normal draws `[B, *shape]`, row b from the generator of its own seed.

    Args:
        shape: of one sample.
        seeds: one a sample.
        lengths: where given, row b draws only its first lengths[b] entries and is zero past them, so that it does not
            depend on how far its batch is padded.
        device: of the result; the numbers are always drawn on the CPU.
    """

    def __init__(
        self,
        shape: Sequence[int],
        seeds: Sequence[int],
        lengths: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape = tuple(shape)
        self.lengths = [self.shape[0]] * len(seeds) if lengths is None else list(lengths)
        self.device = device
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self) -> Tensor:
        z = torch.zeros(len(self.generators), *self.shape)
        for row, length, generator in zip(z, self.lengths, self.generators, strict=True):
            row[:length] = torch.randn(length, *self.shape[1:], generator=generator)
        return z.to(self.device)


class LengthDistribution:
    """How long the training drawings are; a checkpoint carries it, because generation starts from a length.

    Args:
        counts: `[N]` int64, how many drawings have length 0, 1, …, N−1.
    """

    def __init__(self, counts: Tensor) -> None:
        if counts.dim() != 1 or int(counts.sum()) == 0 or int(counts[0]) != 0:
            raise ValueError("length distribution: counts must be [N], not all zero, and zero for length 0.")
        self.counts = counts.long().cpu()

    @classmethod
    def of(cls, lengths: Sequence[int] | Tensor) -> LengthDistribution:
        """The distribution of the given lengths, all >= 1."""
        return cls(torch.bincount(torch.as_tensor(lengths, dtype=torch.long).cpu()))

    def draw(self, seeds: Sequence[int]) -> list[int]:
        """One length for every seed."""
        bounds = self.counts.cumsum(0)
        # Not the seed itself, which the drawing's noise begins with.
        generators = [torch.Generator().manual_seed(stream_seed(seed, "length")) for seed in seeds]
        picks = [torch.randint(int(bounds[-1]), (), generator=generator) for generator in generators]
        return torch.searchsorted(bounds, torch.stack(picks), right=True).tolist() if picks else []


@torch.no_grad()
def sample_drawings(
    model: nn.Module,
    diffusion: Diffusion,
    lengths: Sequence[int],
    seeds: Sequence[int],
    *,
    sampler: Literal["ddim", "ddpm"] = "ddim",
    steps: int = 50,
    eta: float = 0.0,
    batch_size: int = 128,
) -> list[Tensor]:
    """Generates drawings of given lengths.

    Args:
        model: `(x [B, T, 3], t [B], lengths [B]) -> eps`; its device is where sampling runs.
        diffusion: the schedule it was trained with.
        lengths: points of each drawing.
        seeds: one a drawing; the same seed and length give the same drawing.
        sampler: "ddim" (`steps`, `eta`) or "ddpm" (all T steps).
        steps: DDIM steps.
        eta: DDIM's η.
        batch_size: drawings a forward; drawings of similar length are batched together.

    Returns:
        A `[lengths[i], 3]` CPU tensor for every i, in the model's data space.
    """
    if batch_size < 1:
        raise ValueError(f"sampling: batch_size must be at least 1; got {batch_size}.")
    device = next(model.parameters()).device
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    drawings: dict[int, Tensor] = {}
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        own = [lengths[i] for i in picked]
        noise = SampleNoise((max(own), 3), [seeds[i] for i in picked], own, device)
        own_tensor = torch.tensor(own, dtype=torch.int32, device=device)

        def predict(x: Tensor, t: Tensor, own: Tensor = own_tensor) -> Tensor:
            return model(x, t, own)

        if sampler == "ddim":
            x = ddim(predict, noise(), diffusion, steps, eta=eta, noise=noise)
        elif sampler == "ddpm":
            x = ddpm(predict, noise(), diffusion, noise=noise)
        else:
            raise ValueError(f"sampler must be 'ddim' or 'ddpm'; got {sampler!r}.")
        drawings.update({i: row[:n].cpu() for i, row, n in zip(picked, x, own, strict=True)})
    model.train(was_training)
    return [drawings[i] for i in range(len(lengths))]
