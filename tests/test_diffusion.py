"""Schedules and the loss against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsediff.diffusion import Diffusion, linear_betas, scaled_linear_betas


def test_linear_schedule() -> None:
    betas = linear_betas()
    assert betas.shape == (1000,) and betas[0].item() == 1e-4 and betas[-1].item() == 2e-2
    torch.testing.assert_close(betas.diff(), torch.full((999,), (2e-2 - 1e-4) / 999, dtype=torch.float64))


def test_scaled_linear_is_linear_in_the_root() -> None:
    betas = scaled_linear_betas()
    torch.testing.assert_close(betas[[0, -1]], torch.tensor([1.5e-3, 1.95e-2], dtype=torch.float64))
    roots = betas.sqrt().diff()
    torch.testing.assert_close(roots, roots[:1].expand(999))


def test_q_sample_has_the_levels_of_the_schedule() -> None:
    diffusion = Diffusion(linear_betas())
    x0, noise = torch.ones(3, 2, 4), torch.zeros(3, 2, 4)
    t = torch.tensor([0, 500, 999])
    level = torch.cumprod(1 - linear_betas(), 0)[t]
    for x, want in ((diffusion.q_sample(x0, t, noise), level), (diffusion.q_sample(noise, t, x0), 1 - level)):
        torch.testing.assert_close(x, want.sqrt().float()[:, None, None].expand_as(x))


def test_loss_without_lengths_is_the_mean_square() -> None:
    diffusion = Diffusion(linear_betas(10))
    noise = torch.randn(4, 3, 8, 8)
    loss = diffusion.loss(lambda x, t: torch.zeros_like(x), torch.randn(4, 3, 8, 8), torch.arange(4), noise)
    torch.testing.assert_close(loss, noise.square().mean())


def test_each_drawing_counts_by_its_own_length() -> None:
    diffusion = Diffusion(linear_betas(10))
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([2, 5, 1])
    noise = torch.randn(3, 5, 3, generator=generator)
    x0 = torch.randn(3, 5, 3, generator=generator)
    prediction = torch.randn(3, 5, 3, generator=generator)
    per_drawing = [(prediction[b, :n] - noise[b, :n]).square().mean() for b, n in enumerate(lengths.tolist())]
    expected = torch.stack(per_drawing).mean()
    inside = (torch.arange(5) < lengths[:, None])[..., None]

    def model(x: Tensor, t: Tensor, lengths: Tensor) -> Tensor:
        return prediction.masked_fill(~inside, float("nan"))  # what lies past a length is unspecified

    torch.testing.assert_close(diffusion.loss(model, x0, torch.arange(3), noise, lengths), expected)


def test_gradient_does_not_leak_from_the_padding() -> None:
    diffusion = Diffusion(linear_betas(10))
    lengths = torch.tensor([2, 4])
    eps = torch.randn(2, 4, 3, requires_grad=True)
    x0 = torch.randn(2, 4, 3)
    diffusion.loss(lambda x, t, n: eps, x0, torch.arange(2), torch.randn(2, 4, 3), lengths).backward()
    assert eps.grad is not None and not eps.grad[0, 2:].any() and bool(eps.grad[0, :2].all())


def test_bad_betas() -> None:
    with pytest.raises(ValueError, match="lie in"):
        Diffusion(torch.tensor([0.1, 1.5]))
