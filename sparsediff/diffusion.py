"""The Gaussian diffusion in equations: schedules, the forward process and the noise-prediction loss.

    ᾱ_t = Π_{s ≤ t} (1 − β_s)         t = 0 … T−1
    x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε,   ε ~ N(0, 1)
    L   = E ‖ε − ε_θ(x_t, t)‖²

Source: Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020, equations 4 and 14.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Predictor = Callable[..., Tensor]  # (x_t, t [B], *conditions) -> eps


def linear_betas(timesteps: int = 1000, start: float = 1e-4, end: float = 2e-2) -> Tensor:
    """β linear in t, `[T]` float64 (DDPM, section 4)."""
    return torch.linspace(start, end, timesteps, dtype=torch.float64)


def scaled_linear_betas(timesteps: int = 1000, start: float = 1.5e-3, end: float = 1.95e-2) -> Tensor:
    """√β linear in t, `[T]` float64: what the Latent Diffusion code calls "linear"."""
    return torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64).square()


SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
}


class Diffusion:
    """Forward process and loss for one schedule.

    Args:
        betas: `[T]`, each in (0, 1); kept in float64 for the samplers.
    """

    def __init__(self, betas: Tensor) -> None:
        betas = betas.double()
        if betas.dim() != 1 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("diffusion: betas must be one-dimensional and lie in (0, 1).")
        self.betas = betas
        self.alphas_bar = torch.cumprod(1 - betas, 0)  # [T]
        self.signal = self.alphas_bar.sqrt().float()  # √ᾱ
        self.noise = (1 - self.alphas_bar).sqrt().float()  # √(1 − ᾱ)

    @property
    def timesteps(self) -> int:
        """T."""
        return len(self.betas)

    def to(self, device: torch.device | str) -> Diffusion:
        """Moves the tables that training reads to `device`; the float64 ones stay on the CPU."""
        self.signal, self.noise = self.signal.to(device), self.noise.to(device)
        return self

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t of every sample: x0 and noise `[B, …]`, t `[B]`."""
        shape = (-1, *(1,) * (x0.dim() - 1))
        return self.signal[t].view(shape) * x0 + self.noise[t].view(shape) * noise

    def loss(self, model: Predictor, x0: Tensor, t: Tensor, noise: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mean squared error of the predicted noise, a scalar.

        With `lengths` `[B]` the samples are padded sequences `[B, T, F]` and each counts by its own length:
        L = mean_b (1/n_b) Σ_{i < n_b} mean_f (ε − ε_θ)²; the padding of x0 and noise does not matter.
        """
        x_t = self.q_sample(x0, t, noise)
        if lengths is None:
            return (model(x_t, t) - noise).square().mean()
        error = (model(x_t, t, lengths) - noise).square().sum(-1)  # [B, T]
        inside = torch.arange(x0.shape[1], device=x0.device) < lengths[:, None]
        weight = inside / (lengths[:, None] * (x0.shape[0] * x0.shape[2]))
        # Not error * weight: what lies past a length is unspecified, and NaN * 0 is NaN.
        return torch.where(inside, error * weight, 0.0).sum()
