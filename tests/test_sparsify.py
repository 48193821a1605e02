"""`sparsify` and `densify`: values, flags and hooks that carry over, allocation, errors, edges, the plan's text."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from layers import generator
from sparsified import SmallResNet, row
from torch import Tensor, nn

from sparse_kernels import (
    SparseGRU,
    SparseLayer,
    SparseLinear,
    densify,
    sparse_weights,
    sparsify,
)


@pytest.mark.parametrize("init", ["random", "magnitude"])
def test_active_weights_keep_their_values(init: str) -> None:
    model = SmallResNet().double()
    dense = copy.deepcopy(model)
    sparsify(model, sparsity=0.8, pattern="4x4", init=init)
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            weight, original = module.dense_weight(), dense.get_submodule(name).weight
            kept = weight != 0
            assert torch.equal(weight[kept], original[kept])
            if init == "magnitude":
                assert original[kept].abs().mean() > original[~kept].abs().mean()


def test_rescaling_is_an_option() -> None:
    plain, scaled = nn.Sequential(nn.Linear(64, 64)), None
    scaled = copy.deepcopy(plain)
    sparsify(plain, sparsity=0.75, pattern="4x4", generator=generator())
    sparsify(scaled, sparsity=0.75, pattern="4x4", generator=generator(), rescale=True)
    torch.testing.assert_close(scaled[0].values, 2 * plain[0].values)
    assert torch.equal(scaled[0].bias, plain[0].bias)


def test_a_seed_gives_one_topology() -> None:
    models = [nn.Sequential(nn.Linear(64, 64), nn.GRU(64, 64)) for _ in range(2)]
    for model in models:
        sparsify(model, sparsity=0.9, pattern="16x1", generator=generator(3))
    for a, b in zip(*map(sparse_weights, models), strict=True):
        assert torch.equal(a.topology.col, b.topology.col) and torch.equal(a.topology.crow, b.topology.crow)


def test_flags_and_hooks_survive_both_ways() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).to(torch.bfloat16)
    model[0].weight.requires_grad_(False)
    model[1].eval()
    calls: list[int] = []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 32, dtype=torch.bfloat16)
    sparsify(model, sparsity=0.5, pattern="4x4")
    model(x)
    assert not model[0].values.requires_grad and model[0].bias.requires_grad and model[1].values.requires_grad
    assert model[0].training and not model[1].training and model[0].values.dtype == torch.bfloat16
    densify(model)
    model(x)
    assert not model[0].weight.requires_grad and not model[1].training and len(calls) == 2
    handle.remove()
    model(x)
    assert len(calls) == 2


def test_a_module_used_twice_stays_one() -> None:
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared, nn.Linear(32, 32)])})
    plan = sparsify(model, sparsity=0.5, pattern="4x4")
    assert isinstance(model.a, SparseLinear) and model.a is model.b[0]
    assert [row.layer for row in plan.rows] == ["a", "b.1"]
    densify(model)
    assert type(model.a) is nn.Linear and model.a is model.b[0]


# Errors, edges, output


@pytest.mark.parametrize(
    ("model", "kwargs", "message"),
    [
        (nn.Linear(32, 32), {}, r"itself a layer \(Linear\).*SparseLinear.from_dense"),
        (nn.GRU(32, 32), {}, r"itself a layer \(GRU\)"),
        (nn.Sequential(nn.ReLU()), {}, "nothing in this Sequential can be sparse. It has no linear"),
        (nn.Sequential(nn.LSTM(4, 4)), {}, "0.weight_ih_l0: LSTM has no sparse twin"),
        (nn.Sequential(nn.LazyLinear(32)), {}, "'0' is a lazy layer without its sizes; run one forward"),
        (nn.Sequential(nn.Linear(32, 32)), {"sparsity": 1.0}, "below 1"),
        (nn.Sequential(nn.Linear(32, 32)), {"sparsity": -0.1}, r"in \[0, 1\]; got -0.1"),
        (nn.Sequential(nn.Linear(32, 32)), {"init": "best"}, "init must be one of random, magnitude"),
        (nn.Sequential(nn.Linear(32, 32)), {"allocation": "er"}, "allocation must be one of erk, uniform, flops"),
        (nn.Sequential(nn.Linear(32, 32)), {"allocation": "flops"}, "example_inputs="),
        (nn.Sequential(nn.Linear(32, 3), nn.Linear(16, 16)), {"sparsity": 0.9}, "lowest reachable total is 96"),
    ],
)
def test_sparsify_rejects(model: nn.Module, kwargs: dict, message: str) -> None:
    before = [id(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        sparsify(model, **{"sparsity": 0.5, "pattern": "16x16", **kwargs})
    assert [id(module) for module in model.modules()] == before


def test_densify_rejects_a_bare_layer() -> None:
    with pytest.raises(ValueError, match="itself a SparseLinear; call its to_dense"):
        densify(SparseLinear(16, 16, pattern="4x4", sparsity=0.5))


def test_sparsity_zero_changes_nothing() -> None:
    model = SmallResNet()
    modules = [id(module) for module in model.modules()]
    plan = sparsify(model, sparsity=0.0, pattern="16x16")
    assert [id(module) for module in model.modules()] == modules and plan.sparsity == 0.0


def test_sparsify_twice_leaves_the_sparse_layers() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.GRU(32, 32))
    sparsify(model, sparsity=0.5, pattern="4x4", exclude=nn.GRU)
    first = model[0]
    plan = sparsify(model, sparsity=0.75, pattern="4x4")
    assert model[0] is first and isinstance(model[1], SparseGRU)
    assert row(plan, "0").reason == "already sparse" and not row(plan, "0").counted
    check = [r for r in plan.rows if r.counted]
    assert abs(sum(r.nonzeros for r in check) - 0.25 * sum(r.numel for r in check)) <= 16


def test_flops_empties_what_is_used_most() -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.often, self.seldom = nn.Linear(64, 64), nn.Linear(64, 64)
            self.norm, self.drop = nn.BatchNorm1d(64), nn.Dropout()

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.seldom(self.drop(self.norm(self.often(x).mean(1) * scale)))

    model, state = Uneven(), torch.get_rng_state()
    running = model.norm.running_mean.clone()
    plan = sparsify(
        model,
        sparsity=0.5,
        pattern="4x4",
        allocation="flops",
        example_inputs={"x": torch.ones(2, 3, 64), "scale": 2.0},
        generator=generator(),
    )
    assert model.training and model.drop.training and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.norm.running_mean, running)
    ratio = row(plan, "seldom").nonzeros / row(plan, "often").nonzeros
    assert math.isclose(ratio, 3.0, rel_tol=0.05)


def test_queries_keys_values_share_one_allocation() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_k, self.to_v = (nn.Linear(64, 64) for _ in range(3))
            self.to_out = nn.Linear(64, 64)

    plan = sparsify(Attention(), sparsity=0.8, pattern="unstructured")
    three = [row(plan, f"to_{name}").nonzeros for name in "qkv"]
    assert max(three) - min(three) <= 1
    # ERK gives a stacked [192, 64] tensor (192 + 64) shares and [64, 64] (64 + 64), not three times 128.
    assert math.isclose(sum(three) / row(plan, "to_out").nonzeros, 2.0, rel_tol=0.01)


def test_plan_prints_and_serialises() -> None:
    model = nn.ModuleDict({"gru": nn.GRU(32, 32), "head": nn.Linear(32, 3), "embed": nn.Embedding(4, 4)})
    plan = sparsify(model, sparsity=0.5, pattern="16x16")
    text = str(plan)
    for cell in ("layer", "gru.weight_hh_l0", "96x32", "block:16x16", "nonzeros", "execution", "reason", "total"):
        assert cell in text
    assert "(not counted) Embedding has no sparse twin" in text
    data = json.loads(json.dumps(plan.to_json()))
    assert data["nonzeros"] == plan.nonzeros and data["rows"][0]["layer"] == "gru.weight_ih_l0"
    assert plan.numel == 96 * 32 * 2 + 96
    assert len(plan) == 4 and [row.layer for row in plan] == [row["layer"] for row in data["rows"]]


def test_a_star_import_leaves_torch_nn_alone() -> None:
    names: dict[str, object] = {}
    exec("from torch import nn\nfrom sparse_kernels import *", names)
    assert names["nn"] is nn and names["SparseLinear"] is SparseLinear
