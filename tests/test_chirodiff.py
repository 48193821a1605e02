"""ChiroDiff: parameter counts, features, time embedding, and the two dense forms of its GRU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sparsediff.models import MODELS
from sparsediff.models.chirodiff import ChiroDiff, features, run_gru, time_embedding


@pytest.mark.parametrize(
    ("hidden", "layers", "parameters"),
    [(128, 3, 736_027), (96, 3, 416_859), (48, 2, 65_019)],
    ids=["quickdraw", "kanjivg", "vmnist"],
)
def test_parameter_counts_of_the_paper(hidden: int, layers: int, parameters: int) -> None:
    model = ChiroDiff(hidden, layers)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert "time_weight" in model.state_dict()  # persistent: a checkpoint without it could not be sampled


def drawings(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(lengths), max(lengths), 3, generator=generator), torch.tensor(lengths)


def test_features_are_recomputed_from_the_noisy_drawing() -> None:
    x, _ = drawings([5, 5])
    position, velocity = features(x, "delta")
    assert torch.equal(velocity, x)
    for n in range(5):
        torch.testing.assert_close(position[:, n], x[:, : n + 1, :2].sum(1))
    absolute = torch.cat([position, x[..., 2:]], -1)
    same_position, same_velocity = features(absolute, "position")
    assert torch.equal(same_position, absolute)
    torch.testing.assert_close(same_velocity, x[..., :2])


def test_time_embedding_formula() -> None:
    weight = torch.randn(4, 1, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 499, 999])
    expected = [
        [f(2 * math.pi * 4 * w * int(step) / 1000) for f in (math.sin, math.cos) for w in weight[:, 0].tolist()]
        for step in t
    ]
    torch.testing.assert_close(time_embedding(t, weight, 1000), torch.tensor(expected), atol=2e-5, rtol=0)


@pytest.mark.parametrize("form", ["delta", "position"])
def test_packed_and_padded_forms_are_one_function(form: str) -> None:
    x, lengths = drawings([7, 1, 12, 12, 3])
    t = torch.tensor([0, 10, 999, 5, 500])
    model = ChiroDiff(16, 2, form=form, seed=1).double()  # type: ignore[arg-type]
    inside = torch.arange(x.shape[1]) < lengths[:, None]
    results = {}
    for gru_form in ("packed", "padded"):
        model.gru_form = gru_form  # type: ignore[assignment]
        model.zero_grad()
        eps = model(x.double(), t, lengths)
        eps[inside].square().sum().backward()
        results[gru_form] = [eps[inside].detach(), *(p.grad.clone() for p in model.parameters())]  # type: ignore[union-attr]
    for packed, padded in zip(results["packed"], results["padded"], strict=True):
        torch.testing.assert_close(packed, padded, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_gru_ignores_the_padding(form: str) -> None:
    gru = nn.GRU(4, 8, 2, batch_first=True, bidirectional=True)
    x = torch.randn(3, 9, 4)
    lengths = torch.tensor([4, 9, 1])
    inside = torch.arange(9) < lengths[:, None]
    poisoned = x.masked_fill(~inside[..., None], 1e4)
    y = run_gru(gru, x, lengths, form)  # type: ignore[arg-type]
    torch.testing.assert_close(run_gru(gru, poisoned, lengths, form), y)  # type: ignore[arg-type]
    assert not y[~inside].any()
    alone = gru(x[:1, :4])[0]
    torch.testing.assert_close(y[:1, :4], alone)


def test_prediction_of_a_drawing_does_not_depend_on_its_batch() -> None:
    x, lengths = drawings([6, 11])
    t = torch.tensor([3, 700])
    model = ChiroDiff(16, 2, seed=0)
    both = model(x, t, lengths)
    alone = model(x[:1, :6], t[:1], lengths[:1])
    torch.testing.assert_close(both[:1, :6], alone, atol=1e-5, rtol=1e-5)


def test_seed_decides_the_weights_and_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, second, other = ChiroDiff(8, 1, seed=3), ChiroDiff(8, 1, seed=3), ChiroDiff(8, 1, seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.time_weight, other.time_weight)


def test_messages() -> None:
    with pytest.raises(ValueError, match="form must be"):
        ChiroDiff(8, 1, form="polar")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[B, T, 3\]; got \[2, 5, 2\]"):
        ChiroDiff(8, 1)(torch.zeros(2, 5, 2), torch.zeros(2), torch.tensor([5, 5]))
    with pytest.raises(ValueError, match=r"unknown model 'chirodif'.*Did you mean 'chirodiff'"):
        MODELS.get("chirodif")
