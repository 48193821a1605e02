"""Measured plans: each call is a step of its own, every layer has its times, and counts are those of the whole step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_kernels import Block, Plan, SparseLinear, backends, replan, sparsify
from sparse_kernels.backends import Backend, registry
from sparse_kernels.nn import costs, measure
from sparse_kernels.nn.costs import Times, decide


class Stack(nn.Module):
    """A layer that runs twice, and two that 32x32 blocks cannot cut."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.plain, self.last = nn.Linear(64, 64), nn.Linear(64, 20), nn.Linear(20, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.plain(torch.relu(self.twice(torch.relu(self.twice(x))))))


def planned(plan: str = "auto", rows: int = 24, **kwargs: Any) -> tuple[Stack, Plan]:
    model = Stack()
    options = {"sparsity": 0.3, "pattern": "8x8", "allocation": "uniform", **kwargs}
    return model, sparsify(model, plan=plan, example_inputs=torch.randn(rows, 64), **options)


class Casts(TorchDispatchMode):
    """Counts what is cast to bf16, by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_every_measured_step_casts_its_weights() -> None:
    layer, x = nn.Linear(24, 16), torch.randn(4, 24)
    with torch.autocast("cpu", torch.bfloat16):
        step = measure.training_step(layer, layer, (x,), {})
        with Casts() as casts:
            for _ in range(3):
                step()
    assert casts.shapes.count((16, 24)) == 3


def test_rows_count_every_use_of_every_layer() -> None:
    model, plan = planned()
    rows = {row.layer: row.positions for row in plan}
    assert rows == {"twice": 48, "plain": 24, "last": 24}
    assert {one.layer: one.positions for one in plan.layers} == {"twice": 24, "plain": 24, "last": 24}
    wider = replan(model, plan, "auto", example_inputs=torch.randn(48, 64))
    assert {row.layer: row.positions for row in wider} == {"twice": 96, "plain": 48, "last": 48}
    kept = sum(row.nonzeros * rows[row.layer] for row in plan)
    everything = sum(row.numel * rows[row.layer] for row in plan)
    assert plan.flop_bound == wider.flop_bound == pytest.approx(everything / kept)
    again = replan(model, planned()[1], wider)
    assert [row.positions for row in again] == [row.positions for row in wider]


def test_dense_layers_count_in_the_bound_of_a_plan_made_anew() -> None:
    model = Stack()
    fresh = sparsify(model, sparsity=0.3, pattern="32x32")
    assert [row.pattern for row in fresh] == ["block:32x32", "dense", "dense"] and fresh.flop_bound is None
    plan = replan(model, fresh, "auto", example_inputs=torch.randn(24, 64))
    assert {row.layer: row.positions for row in plan} == {"twice": 48, "plain": 24, "last": 24}
    kept = fresh.rows[0].nonzeros * 48 + 2 * 1280 * 24
    assert plan.flop_bound == pytest.approx((4096 * 48 + 2 * 1280 * 24) / kept)


def test_layers_asked_for_by_name_keep_it_and_have_the_times_of_their_form() -> None:
    model, plan = planned()
    model.twice.execution, model.last.execution = "reference", "densified"
    by_name = {one.layer: one for one in replan(model, plan, "auto", example_inputs=torch.randn(24, 64)).layers}
    assert by_name["twice"].times is None  # no table knows the reference
    table = costs.cost_table(torch.device("cpu"))
    assert (by_name["last"].times is None) == (table is None)
    measured = replan(model, plan, "measure", example_inputs=torch.randn(24, 64))
    by_name = {one.layer: one for one in measured.layers}
    for name, execution in (("twice", "reference"), ("last", "densified")):
        one = by_name[name]
        assert model.get_submodule(name).execution == one.execution == execution and one.reason == "asked for"
        assert one.times.of(execution) == (one.times.densified if execution == "densified" else one.times.sparse)
    assert measured.step_speedup() > 0
    assert model.twice.asked_for == "reference" and model.plain.asked_for is None


def test_a_layer_is_timed_by_the_backend_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SparseLinear(32, 32, pattern="8x8", sparsity=0.5)
    layer.execution = "reference"
    ran = []
    for name in ("cpu", "reference", "densified"):
        backend = backends.get(name)
        monkeypatch.setattr(backend, "spmm", lambda *args, n=name, run=backend.spmm: (ran.append(n), run(*args))[1])
    times = measure.layer_times(layer, measure.Call((torch.randn(4, 32),), {}, 4.0, 1.0), rounds=1)
    assert set(ran) == {"reference", "densified"} and times.sparse > 0 and layer.execution == "reference"


def test_layers_without_a_sparse_kernel_are_timed_too() -> None:
    model, plan = planned()
    model.double()
    plan = replan(model, plan, "measure", example_inputs=torch.randn(24, 64, dtype=torch.float64))
    assert all(one.execution == "densified" and one.times.sparse is None for one in plan.layers)
    assert plan.step_speedup() > 0 and Plan.from_json(plan.to_json()) == plan
    assert decide(Times(1.0, 1.0, None), "cpu", "measured") == ("densified", "no sparse kernel (measured)")
    assert Times(1.0, 2.0, None).scaled(3.0) == Times(3.0, 6.0, None)


class HalfOnly(Backend):
    """Kernels as GPUs have them: in half precision alone."""

    name = "half-only"

    def why_unsupported(self, op: str, *, pattern: Block, dtype: torch.dtype, device: torch.device) -> str | None:
        return None if dtype in (torch.bfloat16, torch.float16) else f"its kernels are bfloat16, not {dtype}"

    def deriver(self, op: str, pattern: Block) -> None:
        asked.append(op)

    def spmm(self, x: Tensor, values: Tensor, index: Any, bias: Any = None, conv: Any = None) -> Tensor:
        return backends.get("reference").spmm(x, values, index, bias, conv)


asked: list[str] = []


def test_kernels_in_half_precision_are_planned_inside_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = {
        "half-only": HalfOnly(),
        "reference": backends.get("reference"),
        "densified": backends.get("densified"),
    }
    monkeypatch.setattr(registry, "_BACKENDS", registered)
    monkeypatch.setattr(costs, "_load", lambda kind: None)
    registry.require.cache_clear()
    try:
        layer, x = SparseLinear(32, 32, pattern="8x8", sparsity=0.5), torch.randn(4, 32)
        assert layer.execution == "densified" and not asked
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.native() == ("half-only", "sparse kernel", torch.bfloat16)
            assert layer.work().dtype == torch.bfloat16
            layer.execution = "auto"
            assert layer.execution == "half-only" and layer(x).dtype == torch.bfloat16
        layer.execution = "half-only"  # for training under autocast; its index buffers are made
        assert asked and layer.execution_reason == "asked for"
        with pytest.raises(RuntimeError, match=r"its kernels are bfloat16, not torch.float32"):
            layer(x)
        with pytest.raises(RuntimeError, match=r"its kernels are bfloat16, not torch.float64"):
            layer.double().execution = "half-only"
    finally:
        monkeypatch.undo()
        registry.require.cache_clear()


@pytest.mark.parametrize(
    ("major", "minor", "name", "kind"),
    [
        (9, 0, "NVIDIA H200", "cuda-sm90-h200"),
        (8, 0, "NVIDIA A100-SXM4-80GB", "cuda-sm80-a100-sxm4-80gb"),
        (7, 0, "Tesla V100-PCIE-16GB", "cuda-sm70-tesla-v100-pcie-16gb"),
    ],
)
def test_gpus_have_tables_of_their_own(major: int, minor: int, name: str, kind: str) -> None:
    assert costs.gpu_kind(major, minor, name) == kind


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_gpu_is_timed_by_its_events() -> None:
    device = torch.device("cuda")
    assert costs.machine_kind(device).startswith("cuda-sm")
    x = torch.randn(1024, 1024, device=device)
    ms = measure.timed({"small": lambda: x[:64] @ x, "large": lambda: x @ x @ x}, device, rounds=3)
    assert 0 < ms["small"] < ms["large"]
