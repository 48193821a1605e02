"""Timestep rules, DDPM and DDIM against a target whose denoiser is known in closed form, per-sample seeds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsediff.diffusion import Diffusion, linear_betas, scaled_linear_betas
from sparsediff.models.chirodiff import ChiroDiff
from sparsediff.samplers import LengthDistribution, SampleNoise, ddim, ddim_timesteps, ddpm, sample_drawings


def test_timesteps_that_divide_are_those_of_latent_diffusion() -> None:
    assert ddim_timesteps(1000, 100) == list(range(1, 1000, 10))
    assert ddim_timesteps(1000, 50) == list(range(1, 1000, 20))
    assert ddim_timesteps(1000, 1000) == list(range(1000))


@pytest.mark.parametrize("steps", [3, 7, 150, 167, 333, 991, 995, 999])
def test_any_number_of_steps_is_met_exactly(steps: int) -> None:
    visited = ddim_timesteps(1000, steps)
    assert len(visited) == steps == len(set(visited)) and visited == sorted(visited)
    assert (visited[0], visited[-1]) == ((1, 991) if steps <= 991 else (0, 999))


def test_the_historical_150_steps_are_167() -> None:
    assert len(ddim_timesteps(1000, 150, historical=True)) == 167
    assert len(ddim_timesteps(1000, 150)) == 150


@pytest.mark.parametrize("timesteps", [1, 2, 10, 37, 250])
def test_timesteps_stay_in_range(timesteps: int) -> None:
    for steps in range(1, timesteps + 1):
        visited = ddim_timesteps(timesteps, steps)
        assert len(set(visited)) == steps and visited[0] >= 0 and visited[-1] < timesteps


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_step_counts(steps: int) -> None:
    with pytest.raises(ValueError, match=r"steps must be in 1\.\.1000"):
        ddim_timesteps(1000, steps)


# Data N(MEAN, STD²) has the exact noise predictor ε = √(1−ᾱ) (x − √ᾱ MEAN) / (ᾱ STD² + 1 − ᾱ).
MEAN, STD = 2.0, 0.5


def gaussian_predictor(diffusion: Diffusion):  # type: ignore[no-untyped-def]
    def predict(x: Tensor, t: Tensor) -> Tensor:
        level = diffusion.alphas_bar[t].float()[:, None]
        return (1 - level).sqrt() * (x - level.sqrt() * MEAN) / (level * STD**2 + 1 - level)

    return predict


@pytest.mark.parametrize("betas", [linear_betas(), scaled_linear_betas()], ids=["linear", "scaled_linear"])
@pytest.mark.parametrize(("steps", "eta"), [(50, 0.0), (150, 0.0), (250, 1.0), (1000, 0.5)])
def test_ddim_reaches_the_data_distribution(betas: Tensor, steps: int, eta: float) -> None:
    diffusion = Diffusion(betas)
    noise = SampleNoise((4096,), [0])
    x = ddim(gaussian_predictor(diffusion), noise(), diffusion, steps, eta=eta, noise=noise)
    assert abs(x.mean().item() - MEAN) < 0.05 and abs(x.std().item() - STD) < 0.06


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_reaches_the_data_distribution(variance: str) -> None:
    diffusion = Diffusion(linear_betas())
    noise = SampleNoise((4096,), [0])
    x = ddpm(gaussian_predictor(diffusion), noise(), diffusion, noise=noise, variance=variance)  # type: ignore[arg-type]
    assert abs(x.mean().item() - MEAN) < 0.05 and abs(x.std().item() - STD) < 0.05


def test_ddim_with_eta_one_and_all_steps_is_ddpm() -> None:
    diffusion = Diffusion(linear_betas(30, 1e-3, 0.2))
    predict = gaussian_predictor(diffusion)
    a, b = SampleNoise((64,), [5]), SampleNoise((64,), [5])
    x = ddim(predict, a(), diffusion, 30, eta=1.0, noise=a)
    torch.testing.assert_close(x, ddpm(predict, b(), diffusion, noise=b), atol=1e-4, rtol=1e-4)


def test_eta_needs_noise() -> None:
    diffusion = Diffusion(linear_betas(10))
    with pytest.raises(ValueError, match="needs a noise source"):
        ddim(gaussian_predictor(diffusion), torch.zeros(1, 4), diffusion, 5, eta=1.0)


def test_noise_of_a_sample_depends_on_its_seed_alone() -> None:
    both = SampleNoise((9, 3), [1, 2], [4, 9])
    alone = SampleNoise((4, 3), [1])
    for _ in range(2):
        z = both()
        assert torch.equal(z[0, :4], alone()[0]) and not z[0, 4:].any() and bool(z[1].all())


def test_lengths_follow_the_empirical_distribution() -> None:
    distribution = LengthDistribution.of([3, 3, 3, 7])
    drawn = distribution.draw(range(2000))
    assert set(drawn) == {3, 7} and 0.7 < drawn.count(3) / 2000 < 0.8
    assert drawn[:10] == distribution.draw(range(10))
    assert torch.equal(LengthDistribution(distribution.counts).counts, distribution.counts)
    with pytest.raises(ValueError, match="zero for length 0"):
        LengthDistribution.of([0, 3])


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_drawings_come_back_in_order_and_repeat(sampler: str) -> None:
    diffusion = Diffusion(linear_betas(20, 1e-3, 0.2))
    model = ChiroDiff(8, 1, timesteps=20, seed=0).train()
    lengths, seeds = [5, 2, 9, 4], [10, 11, 12, 13]
    all_at_once = sample_drawings(model, diffusion, lengths, seeds, sampler=sampler, steps=5)  # type: ignore[arg-type]
    assert [list(d.shape) for d in all_at_once] == [[n, 3] for n in lengths] and model.training
    by_two = sample_drawings(model, diffusion, lengths, seeds, sampler=sampler, steps=5, batch_size=2)  # type: ignore[arg-type]
    for a, b in zip(all_at_once, by_two, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
