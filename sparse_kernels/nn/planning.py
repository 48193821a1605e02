"""`replan`: which form runs each sparse layer of a model, by the cost table, by measuring, or by a saved plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import nn

from . import measure
from .costs import Times, cost_table, decide, why_no_times
from .measure import Call
from .plan import LayerPlan, Plan, PlanRow, active_blocks
from .weights import ASKED_FOR, SPARSE_KERNEL, SparseLayer

MODES = ("auto", "measure", "off")


def check_mode(where: str, mode: str | Plan, example_inputs: Any) -> None:
    """Raises ValueError for an unknown way to plan, and where measuring lacks its inputs."""
    if not isinstance(mode, Plan) and mode not in MODES:
        raise ValueError(f"{where}: plan must be one of {', '.join(MODES)}, or a Plan; got {mode!r}.")
    if mode == "measure" and example_inputs is None:
        raise ValueError(f"{where}: plan='measure' needs example_inputs, a batch as the model's forward takes it.")


def replan(model: nn.Module, plan: Plan, mode: str | Plan = "measure", *, example_inputs: Any = None) -> Plan:
    """Decides anew which form runs each sparse layer, and lets the layers run so. Do it before `torch.compile`,
    and within `torch.autocast` where training runs under it.

    A layer runs *densified* exactly where its sparse kernel is predicted, or measured, to be slower than that; what no
    sparse backend serves runs densified too. A layer whose `execution` was asked for by name keeps it. Layers that no
    example reached are decided for `costs.DEFAULT_POSITIONS` rows.

    Args:
        model: what `sparsify` made, already on its device. plan: what it returned.
        mode: `"auto"` asks the cost table of this kind of machine, which is deterministic; `"measure"` times every
            form of every layer, and the model's own forward and backward, once; `"off"` runs the sparse kernel
            wherever there is one; a `Plan`, from `plan.json` perhaps, is applied as it is.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments of the size that training will
            have. The model runs on them, in its present mode to be measured and else in eval mode without gradients; it
            keeps its mode, its buffers and the random state.

    Returns:
        The new plan, with the rows of `plan`.

    Raises:
        ValueError: an unknown mode, `"measure"` without inputs, or a Plan of another model.
        RuntimeError: a Plan names a backend that cannot run here.
    """
    check_mode("replan", mode, example_inputs)
    calls: dict[str, Call] = {}
    if example_inputs is not None and not isinstance(mode, Plan):
        modules = dict(model.named_modules())
        counted = {path: modules[path] for row in plan.rows if row.counted and (path := _path(row, modules))}
        calls = measure.observe(model, example_inputs, training=mode == "measure", others=counted)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, SparseLayer)}
    rest_ms = None
    if isinstance(mode, Plan):
        mode.apply(model)
        decided, source, rest_ms = {one.layer: one for one in mode.layers}, mode.source, mode.rest_ms
    else:
        source = mode
        called = {path: call for path, call in calls.items() if path in layers}
        times = _measured(layers, called) if mode == "measure" else {}
        decided = {
            path: _decided(path, layer, mode, calls.get(path), times.get(path)) for path, layer in layers.items()
        }
        for path, layer in layers.items():
            if layer.asked_for is None:
                layer.follow(decided[path].execution, decided[path].reason, decided[path].positions)
    if mode == "measure":
        inside = [one.times.of(one.execution) for one in decided.values() if one.times is not None]
        rest_ms = max(0.0, measure.model_ms(model, example_inputs) - sum(inside))
    new = dataclasses.replace(
        plan,
        layers=tuple(decided.values()),
        source=source,
        device=_device(layers),
        threads=mode.threads if isinstance(mode, Plan) else torch.get_num_threads(),
        rest_ms=rest_ms,
    )
    rows = {path: call.rows for path, call in calls.items()}
    if isinstance(mode, Plan):
        rows = {_path(row, decided) or row.layer: row.positions for row in mode.rows if row.positions is not None}
    return dataclasses.replace(new, rows=tuple(_row(row, decided, rows) for row in plan.rows))


def _measured(layers: Mapping[str, SparseLayer], calls: Mapping[str, Call]) -> dict[str, Times | None]:
    """Times of every layer that was called, over all its uses; those of one kind and bucket are measured once."""
    known: dict[Any, tuple[Times | None, float]] = {}
    times = {}
    for path, call in calls.items():
        kind = measure.kind_of(layers[path], call)
        if kind not in known:
            known[kind] = measure.layer_times(layers[path], call), call.positions
        one, positions = known[kind]
        times[path] = None if one is None else one.scaled(call.uses * call.positions / positions)
    return times


def _decided(path: str, layer: SparseLayer, mode: str, call: Call | None, times: Times | None) -> LayerPlan:
    """The layer's form; its times are those `times` that were measured over all uses, or the cost table's."""
    probe, asked = layer._probe(), layer.asked_for
    native, why, _ = layer.native()
    table, work = cost_table(probe.device), layer.work()
    work = dataclasses.replace(work, positions=work.positions if call is None else call.positions)
    one, source = times, "measured"
    if one is None and table is not None and asked in (None, "densified", native):
        one, source = table.predict(work), f"cost table {table.kind}"
        if one is not None and why != SPARSE_KERNEL:
            one = dataclasses.replace(one, sparse=None)
        times = None if one is None or call is None else one.scaled(call.uses)
    if asked is not None:
        name, reason = asked, ASKED_FOR
    elif why != SPARSE_KERNEL:
        name, reason = native, why
    elif mode == "off":
        name, reason = native, ""
    elif one is None:
        name, reason = native, f"{SPARSE_KERNEL}; {why_no_times(work, probe.device)}"
    else:
        name, reason = decide(one, native, source)
    positions = None if call is None else call.positions
    return LayerPlan(path, layer.op, str(layer.pattern), active_blocks(layer), name, reason, positions, times)


def _row(row: PlanRow, decided: Mapping[str, LayerPlan], rows: Mapping[str, float]) -> PlanRow:
    """The row with the execution of its layer, and with as many positions as `rows` has for it."""
    path = _path(row, decided)
    row = dataclasses.replace(row, positions=rows.get(path or _path(row, rows) or "", row.positions))
    if path is None:
        return row
    one = decided[path]
    sparse = row.pattern != "dense"
    reason = one.reason if sparse and row.counted else row.reason
    speedup = None if one.times is None else one.times.speedup(one.execution)
    return dataclasses.replace(row, execution=one.execution, reason=reason, speedup=speedup)


def _path(row: PlanRow, paths: Container[str]) -> str | None:
    """Which of `paths` is the layer of a row; the row of a GRU's weight is named after both."""
    return next((path for path in (row.layer, row.layer.rpartition(".")[0]) if path and path in paths), None)


def _device(layers: Mapping[str, SparseLayer]) -> str:
    return next((layer._probe().device.type for layer in layers.values()), "cpu")
