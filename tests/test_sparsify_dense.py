"""What `sparsify` leaves dense, and why: what it cannot cut, what it must not, and what is excluded."""

from __future__ import annotations

import warnings

import pytest
import torch
from sparsified import check_totals, row
from torch import Tensor, nn

from sparse_kernels import (
    SparseLinear,
    sparse_weights,
    sparsify,
)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.body = nn.Linear(32, 512)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OwnName(nn.Linear):
    """A subclass that computes what nn.Linear does."""


def test_tied_weights_stay_dense() -> None:
    model = Tied()
    plan = sparsify(model, sparsity=0.5, pattern="4x4")
    assert isinstance(model.body, SparseLinear) and model.head.weight is model.embed.weight
    assert row(plan, "head").reason == "tied: shared by embed.weight and head.weight"
    check_totals(model, plan, 0.5, 16)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)), "parametrized"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(32, 32, 3)), "parametrized"),
        (lambda: nn.utils.spectral_norm(nn.Linear(32, 32)), "parametrized"),
        (lambda: OwnForward(32, 32), "OwnForward has its own forward"),
        (lambda: nn.Conv2d(32, 32, 3, groups=2), "groups=2"),
        (lambda: nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
        (lambda: nn.LSTM(32, 32), "LSTM has no sparse twin"),
        (lambda: nn.RNN(32, 32), "RNN has no sparse twin"),
        (lambda: nn.GRUCell(32, 32), "GRUCell has no sparse twin"),
        (lambda: nn.ConvTranspose2d(32, 32, 3), "ConvTranspose2d has no sparse twin"),
        (lambda: nn.Conv3d(32, 32, 3), "Conv3d has no sparse twin"),
        (lambda: nn.Bilinear(8, 8, 8), "Bilinear has no sparse twin"),
        (lambda: nn.Embedding(32, 32), "Embedding has no sparse twin"),
        (lambda: nn.Linear(3, 3), "pads"),
        (lambda: nn.Linear(32, 32, dtype=torch.complex64), "its dtype is torch.complex64"),
    ],
)
def test_stays_dense_with_the_reason(build: object, reason: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        odd = build()
    model = nn.ModuleDict({"odd": odd, "plain": nn.Linear(256, 256)})
    kind, state = type(odd), [id(parameter) for parameter in odd.parameters()]
    plan = sparsify(model, sparsity=0.5, pattern="16x16")
    assert type(model.odd) is kind and [id(parameter) for parameter in model.odd.parameters()] == state
    assert isinstance(model.plain, SparseLinear)
    assert reason in next(row for row in plan.rows if row.layer.startswith("odd")).reason
    check_totals(model, plan, 0.5, 256)


def test_a_subclass_that_computes_the_same_is_exchanged() -> None:
    model = nn.Sequential(OwnName(32, 32))
    sparsify(model, sparsity=0.5, pattern="4x4")
    assert isinstance(model[0], SparseLinear)


def test_a_patched_forward_is_respected() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[0].forward = lambda x: x
    plan = sparsify(model, sparsity=0.3, pattern="4x4")
    assert row(plan, "0").reason == "its forward was replaced"


# exclude


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        self.gru = nn.GRU(32, 32)
        self.decoder = nn.Linear(32, 32)


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("decoder", {"encoder.0", "encoder.1", "gru.weight_ih_l0", "gru.weight_hh_l0"}),
        (["encoder"], {"gru.weight_ih_l0", "gru.weight_hh_l0", "decoder"}),
        (["*.0", "gru"], {"encoder.1", "decoder"}),
        (nn.GRU, {"encoder.0", "encoder.1", "decoder"}),
        ([nn.Sequential, "gru.weight_ih*"], {"gru.weight_hh_l0", "decoder"}),
        (["decoder.weight"], {"encoder.0", "encoder.1", "gru.weight_ih_l0", "gru.weight_hh_l0"}),
    ],
    ids=["name", "prefix", "globs", "type", "type and weights", "weight"],
)
def test_exclude(exclude: object, left: set[str]) -> None:
    model = Body()
    plan = sparsify(model, sparsity=0.5, pattern="4x4", allocation="uniform", exclude=exclude)
    assert {weight.name for weight in sparse_weights(model)} == left
    assert {row.layer for row in plan.rows if row.counted} == left
    check_totals(model, plan, 0.5, 16)


def test_exclude_a_module_and_typos() -> None:
    model = Body()
    sparsify(model, sparsity=0.5, pattern="4x4", exclude=(model.decoder,))
    assert type(model.decoder) is nn.Linear
    with pytest.raises(ValueError, match="exclude names 'decodre', which matches no module"):
        sparsify(Body(), sparsity=0.5, pattern="4x4", exclude=["decodre"])
