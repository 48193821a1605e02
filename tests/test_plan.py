"""The execution plan: the decision rule, the cost table, measuring, plan.json, and layers that run as planned."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparse_kernels import Block, Plan, SparseConv2d, SparseLinear, Unstructured, backends, replan, sparsify
from sparse_kernels.nn import costs, measure
from sparse_kernels.nn.costs import CostTable, Times, Work, decide


class Mixed(nn.Module):
    """A convolution, a norm, a GRU and a linear layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.gru = nn.GRU(32, 32, batch_first=True)
        self.twice = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        rows = self.norm(self.conv(x)).flatten(2).transpose(1, 2)  # [N, H·W, 32]
        states, _ = self.gru(rows)
        return {"sample": self.twice(torch.relu(self.twice(states)))}


def made(plan: str | Plan = "auto", **kwargs: object) -> tuple[Mixed, Plan]:
    torch.manual_seed(0)
    model = Mixed()
    options = {"sparsity": 0.5, "pattern": "block:4x4", "generator": torch.Generator().manual_seed(1), **kwargs}
    return model, sparsify(model, plan=plan, **options)


def images() -> Tensor:
    return torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(2))


def work(**changes: object) -> Work:
    fields = {"op": "linear", "pattern": Block(16, 16), "dtype": torch.float32, "numel": 2**20, "taps": 1,
              "density": 0.5, "positions": 1024, "threads": 1}  # fmt: skip
    return Work(**{**fields, **changes})


def table(sparse_ms: dict[float, float], **changes: object) -> CostTable:
    """One shape; 10 ms dense, 11 ms densified, and the sparse kernel by density."""
    rows = [(work(density=density, **changes), Times(10.0, 11.0, ms)) for density, ms in sparse_ms.items()]
    return CostTable("cpu-test", rows)


@pytest.fixture
def slow_kernels(monkeypatch: pytest.MonkeyPatch) -> CostTable:
    """A machine whose sparse linear is slower than dense down to S = .75; nothing else was measured."""
    slow = table({0.25: 10.0, 0.5: 20.0})
    monkeypatch.setattr(costs, "_load", lambda kind: slow)
    return slow


# The rule and the table


def test_densified_exactly_where_the_sparse_kernel_is_slower() -> None:
    assert decide(Times(10, 10, 9.99), "cpu", "measured") == ("cpu", "")
    assert decide(Times(10, 10, 10), "cpu", "measured") == ("cpu", "")
    execution, reason = decide(Times(10, 10, 15), "cpu", "measured")
    assert execution == "densified" and reason == "1.50x faster than the sparse kernel (measured)"
    assert Times(10, 11, 5).speedup("cpu") == 2.0 and Times(10, 11, 5).speedup("densified") == 10 / 11


def test_a_prediction_repeats_what_was_measured_and_is_linear_between() -> None:
    measured = table({0.1: 2.0, 0.5: 6.0, 0.9: 10.0})
    assert measured.predict(work(density=0.5)).sparse == pytest.approx(6.0)
    between = measured.predict(work(density=0.3))
    assert between.sparse == pytest.approx(4.0) and between.dense == pytest.approx(10.0)
    assert measured.predict(work(density=1.0)).sparse == pytest.approx(11.0)
    assert 0 < measured.predict(work(density=0.0)).sparse < measured.predict(work(density=0.05)).sparse < 2.0
    twice = measured.predict(work(density=0.5, positions=2048))
    assert twice.sparse == pytest.approx(12.0) and twice.densified == pytest.approx(22.0)


def test_a_prediction_takes_the_nearest_shapes_pattern_and_threads() -> None:
    small, large = work(positions=64, numel=2**12), work(positions=4096)
    rows = [(small, Times(1.0, 1.0, 2.0)), (large, Times(40.0, 40.0, 10.0))]
    rows += [(work(pattern=Unstructured()), Times(10.0, 10.0, 30.0)), (work(threads=8), Times(2.0, 2.0, 2.0))]
    costs_ = CostTable("cpu-test", rows)
    near_small = costs_.predict(work(positions=128, numel=2**13, pattern=Block(32, 32)))
    near_large = costs_.predict(work(positions=2048, pattern=Block(8, 8)))
    assert near_small.sparse > near_small.dense and near_large.sparse < near_large.dense
    assert costs_.predict(work(pattern=Block(1, 4))).sparse == pytest.approx(30.0)
    assert costs_.predict(work(threads=6)).sparse == pytest.approx(2.0)
    assert costs_.predict(work(op="conv")) is None and costs_.predict(work(dtype=torch.bfloat16)) is None


def test_the_committed_tables_are_sound() -> None:
    folder = Path(costs.__file__).parent / "cost_tables"
    files = sorted(folder.glob("*.json"))
    assert files
    for path in files:
        found = CostTable.from_json(json.loads(path.read_text()))
        assert found.kind == path.stem and found.rows
        for row, times in found.rows:
            assert 0 < row.density <= 1 and min(times.dense, times.densified, times.of("sparse")) > 0
            predicted = found.predict(row)
            assert predicted.of("sparse") == pytest.approx(times.of("sparse"), rel=0.02), row


@pytest.mark.parametrize("kind", ["cpu-avx512", "cpu-avx2"])
def test_what_is_planned_is_hardly_slower_than_dense(kind: str) -> None:
    path = Path(costs.__file__).parent / "cost_tables" / f"{kind}.json"
    for row, times in CostTable.from_json(json.loads(path.read_text())).rows:
        # Where dense takes less, a step's fixed costs decide; of few nonzeros a row, copying the weights.
        if row.dtype == torch.float32 and times.dense >= 2:
            planned = times.of(decide(times, "cpu", "")[0])
            assert planned <= times.dense * (1.25 if row.pattern == Unstructured() else 1.03), row


# Layers


def test_a_layer_alone_follows_the_table(slow_kernels: CostTable) -> None:
    dense, sparse = (SparseLinear(64, 64, pattern="16x16", sparsity=s) for s in (0.25, 0.9375))
    assert dense.execution == "densified" and sparse.execution == "cpu"
    assert dense.execution_reason.endswith("faster than the sparse kernel (cost table cpu-test)")
    dense.execution = "cpu"  # asked for by name
    assert dense.execution == "cpu" and copy.deepcopy(dense).execution == "cpu"
    gru = SparseConv2d(16, 16, 3, pattern="16x16", sparsity=0.5)
    served = backends.why_not("cpu", "conv", pattern=Block(16, 16), dtype=torch.float32, device=torch.device("cpu"))
    assert gru.execution == ("cpu" if served is None else "densified")


def test_a_plan_holds_until_the_layer_moves(slow_kernels: CostTable) -> None:
    layer = SparseLinear(64, 64, pattern="16x16", sparsity=0.25)
    layer.follow("cpu", "")
    assert layer.execution == "cpu" and layer.execution_reason == "sparse kernel"
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert layer.execution == "cpu"
    assert layer.double().execution == "densified" and layer.float().execution == "densified"
    with pytest.raises(RuntimeError, match="cannot run this"):
        layer.double().follow("cpu", "")
    layer.float().follow("cpu", "")
    assigned = {name: t.double() if t.is_floating_point() else t for name, t in layer.state_dict().items()}
    layer.load_state_dict(assigned, assign=True)
    assert layer.execution == "densified"
    assert layer(torch.randn(3, 64, dtype=torch.float64)).dtype == torch.float64


def test_a_layer_says_where_nobody_measured(slow_kernels: CostTable, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = made()
    assert model.gru.execution_reason == "sparse kernel; gru in float32 was not measured"
    alone = SparseLinear(64, 64, pattern="16x16", sparsity=0.25, dtype=torch.bfloat16)
    assert alone.execution_reason == "sparse kernel; linear in bfloat16 was not measured"
    assert {row.reason for row in plan if row.layer.startswith("gru.")} == {model.gru.execution_reason}
    monkeypatch.setattr(costs, "_load", lambda kind: None)
    plan = replan(model, plan, "auto")
    kind = costs.machine_kind(torch.device("cpu"))
    assert {one.reason for one in plan.layers} == {f"sparse kernel; no cost table for {kind}"}
    assert SparseLinear(64, 64, pattern="16x16", sparsity=0.25).execution_reason == plan.layers[0].reason
    assert {one.reason for one in replan(model, plan, "off").layers} == {""}


def test_autocast_is_planned_in_the_dtype_that_the_op_computes_in() -> None:
    model, _ = made()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.twice.work().dtype == torch.bfloat16 and model.gru.work().dtype == torch.float32
    assert model.twice.work().dtype == torch.float32


# Plans of models


def test_auto_is_the_same_every_time_and_says_why(slow_kernels: CostTable) -> None:
    model, plan = made(example_inputs=images())
    assert plan.to_json() == made(example_inputs=images())[1].to_json()
    assert model.twice.execution == "densified" and model.gru.execution == "cpu"
    by_name = {one.layer: one for one in plan.layers}
    assert by_name["twice"].positions == 72 and by_name["gru"].positions == 72 and by_name["conv"].positions == 72
    assert by_name["twice"].times.dense > 0 and by_name["gru"].times is None
    rows = {row.layer: row for row in plan}
    assert rows["twice"].execution == "densified" and "cost table cpu-test" in rows["twice"].reason
    assert rows["twice"].speedup == pytest.approx(10 / 11) and rows["gru.weight_ih_l0"].speedup is None
    assert plan.step_speedup() is None and plan.flop_bound == pytest.approx(2.0, rel=0.2)
    assert "0.91x" in str(plan)


def test_off_runs_every_sparse_kernel_there_is(slow_kernels: CostTable) -> None:
    model, plan = made("off")
    assert model.twice.execution == model.gru.execution == "cpu" and plan.source == "off"


def test_measuring_times_every_form_and_leaves_the_model_as_it_was() -> None:
    model, fresh = made()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    plan = replan(model, fresh, "measure", example_inputs=images())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    by_name = {one.layer: one for one in plan.layers}
    for name in ("twice", "gru"):
        times, layer = by_name[name].times, model.get_submodule(name)
        assert min(times.dense, times.densified, times.sparse) > 0
        assert layer.execution == by_name[name].execution == decide(times, "cpu", "measured")[0]
    assert plan.source == "measure" and plan.rest_ms >= 0
    if all(one.times is not None for one in plan.layers):
        assert plan.step_speedup() > 0 and "predicted" in str(plan)


def test_layers_of_one_kind_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def fake(layer: nn.Module, call: measure.Call) -> Times:
        timed.append(layer)
        return Times(8.0, 8.0, 2.0)

    monkeypatch.setattr(measure, "layer_times", fake)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)), nn.Linear(32, 16))
    plan = sparsify(
        model,
        sparsity=0.5,
        pattern="4x4",
        allocation="uniform",
        plan="measure",
        example_inputs=torch.randn(64, 32),
    )
    # The first wants no gradient of its input, the last has another shape.
    assert timed == [model[0], model[1], model[3]]
    assert plan.sparse_layers_ms() == (32.0, 8.0)
    assert plan.step_speedup() == pytest.approx((32 + plan.rest_ms) / (8 + plan.rest_ms))
    extra = plan.step_speedup(dense_extra_ms=40, sparse_extra_ms=10)
    assert extra == pytest.approx((72 + plan.rest_ms) / (18 + plan.rest_ms))


def test_layers_that_differ_in_bias_training_or_arguments_are_of_two_kinds() -> None:
    def kind(bias: bool = True, frozen: bool = False, **kwargs: object) -> tuple[object, ...]:
        layer = SparseLinear(32, 32, bias, pattern="4x4", sparsity=0.5).requires_grad_(not frozen)
        return measure.kind_of(layer, measure.Call((torch.zeros(8, 32),), kwargs, 8.0, 1.0))

    kinds = [kind(), kind(bias=False), kind(frozen=True), kind(lengths=torch.ones(8))]
    assert len(set(kinds)) == 4 and kind() == kinds[0]


def test_a_plan_file_gives_the_same_bits(tmp_path: Path, slow_kernels: CostTable) -> None:
    model, plan = made("measure", example_inputs=images())
    path = plan.save(tmp_path / "deep" / "plan.json")
    loaded = Plan.load(path)
    assert loaded == plan and [p.name for p in path.parent.iterdir()] == ["plan.json"]
    again, second = made(loaded)
    assert second.layers == plan.layers and second.source == "measure" and second.rest_ms == plan.rest_ms
    results = []
    for one in (model, again):
        one(images())["sample"].square().sum().backward()
        results.append([parameter.grad for parameter in one.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_layer_asked_for_by_name_keeps_its_backend(slow_kernels: CostTable) -> None:
    model, plan = made()
    model.twice.execution = "reference"
    plan = replan(model, plan, "auto")
    assert model.twice.execution == "reference" and next(r for r in plan if r.layer == "twice").reason == "asked for"


def test_plans_are_refused_with_the_reason(tmp_path: Path) -> None:
    model, plan = made()
    with pytest.raises(ValueError, match=r"'conv' is conv, block:4x4 with \d+ blocks in the plan and conv, block"):
        made(sparsity=0.75)[1].apply(model)
    other = nn.Sequential(nn.Linear(32, 32))
    sparsify(other, sparsity=0.5, pattern="4x4")
    with pytest.raises(ValueError, match="layer '0': the plan does not name it"):
        plan.apply(other)
    with pytest.raises(ValueError, match="plan must be one of auto, measure, off"):
        made("fastest")
    with pytest.raises(ValueError, match="plan must be one of auto, measure, off, or a Plan; got None"):
        made(None)
    with pytest.raises(ValueError, match="'measure' needs example_inputs"):
        made("measure")
    (tmp_path / "old.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match=r"old.json: plan: expected a plan of format 1; got 0"):
        Plan.load(tmp_path / "old.json")
    (tmp_path / "half.json").write_text(json.dumps({**plan.to_json(), "layers": [{"layer": "x"}]}))
    with pytest.raises(ValueError, match="does not parse"):
        Plan.load(tmp_path / "half.json")
    doubled = made()[0].double()
    if any(one.execution == "cpu" for one in plan.layers):
        with pytest.raises(RuntimeError, match="cannot run this"):
            plan.apply(doubled)


def test_buckets_are_powers_of_two() -> None:
    assert [measure.bucket(n) for n in (1, 2, 3, 64, 65, 1000.0)] == [1, 2, 4, 64, 128, 1024]
    assert math.log2(measure.bucket(5000)).is_integer()


# Models that cannot be planned, or not in every way


def normed() -> nn.Sequential:
    """Trains on no batch of one."""
    return nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 32))


def test_auto_observes_in_eval_mode_without_gradients() -> None:
    seen = []
    model = normed()
    model[2].register_forward_pre_hook(lambda module, args: seen.append((module.training, args[0].requires_grad)))
    plan = sparsify(model, sparsity=0.5, pattern="4x4", plan="auto", example_inputs=torch.randn(1, 32))
    assert [one.positions for one in plan.layers] == [1, 1] and set(seen) == {(False, False)}
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_observed_holds_no_graph() -> None:
    model, _ = made()
    calls = measure.observe(model, images(), training=True)
    x, h = calls["twice"].args[0], calls["conv"].args[0]
    assert x.is_leaf and x.requires_grad and not h.requires_grad


def test_a_plan_that_fails_leaves_the_model_as_it_was() -> None:
    model = normed()
    removed = model[0].register_forward_hook(lambda *_: None)
    before = list(model)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        sparsify(model, sparsity=0.5, pattern="4x4", plan="measure", example_inputs=torch.randn(1, 32))
    assert all(a is b for a, b in zip(before, model, strict=True)) and len(model[0]._forward_hooks) == 1
    removed.remove()
    assert not model[0]._forward_hooks and all(module.training for module in model.modules())
    encoder = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True))
    modules, fused = list(encoder.modules()), encoder[0].activation_relu_or_gelu
    with pytest.raises(ValueError, match="the plan does not name it"):
        sparsify(encoder, sparsity=0.5, pattern="4x4", plan=made()[1])
    assert list(encoder.modules()) == modules and encoder[0].activation_relu_or_gelu == fused != 0


@pytest.mark.parametrize("frozen", [True, False])
def test_a_model_that_wants_no_gradient_is_measured_forward(frozen: bool) -> None:
    model, fresh = made()
    model.requires_grad_(not frozen)
    with torch.set_grad_enabled(frozen):
        plan = replan(model, fresh, "measure", example_inputs=images())
    assert plan.rest_ms >= 0 and all(one.times.sparse > 0 for one in plan.layers)


def test_a_plan_is_applied_whole_or_not_at_all() -> None:
    model, plan = made("off")
    before = {one.layer: one.execution for one in plan.layers}
    last = dataclasses.replace(plan.layers[-1], execution="abacus")
    broken = dataclasses.replace(
        plan, layers=(*(dataclasses.replace(one, execution="reference") for one in plan.layers[:-1]), last)
    )
    with pytest.raises(ValueError, match="got 'abacus'"):
        broken.apply(model)
    assert {name: model.get_submodule(name).execution for name in before} == before
