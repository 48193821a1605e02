"""The execution plan of a training run: measured once, written down, carried by the checkpoint, given by a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_run import configured, drawings

from sparse_kernels import backends
from sparse_kernels.nn import Plan
from sparsediff import checkpoint, cli
from sparsediff.build import load_model
from sparsediff.train import Run, describe, start

SPARSE = {"method": "static", "max_steps": 3, "save_every": 1}


def executions(plan: Plan) -> dict[str, str]:
    return {one.layer: one.execution for one in plan.layers}


def test_a_measured_plan_is_written_and_resumed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert start(configured(out, plan="measure", **SPARSE), drawings()) == 0
    plan = Plan.load(out / "plan.json")
    assert plan.source == "measure" and all(one.times is not None for one in plan.layers)
    saved = checkpoint.load(out)
    assert Plan.from_json(saved.state["plan"]) == plan
    # The other form everywhere: a resumed run follows its checkpoint, not the clock.
    other = {"cpu": "densified", "densified": "cpu"}
    for one in saved.state["plan"]["layers"]:
        one["execution"] = other[one["execution"]]
    run = Run(configured(out, plan="measure", **SPARSE), drawings(), saved)
    assert executions(Plan.from_json(run.plan)) == {k: other[v] for k, v in executions(plan).items()}
    for name, execution in executions(Plan.from_json(run.plan)).items():
        assert run.model.get_submodule(name).execution == run.ema.model.get_submodule(name).execution == execution


def test_a_resumed_run_is_planned_anew_where_another_plan_is_asked_for(tmp_path: Path) -> None:
    assert start(configured(tmp_path, plan="measure", **SPARSE), drawings()) == 0
    saved = checkpoint.load(tmp_path)
    for one in saved.state["plan"]["layers"]:
        one["execution"] = "reference"

    def resumed(plan: str | None) -> Plan:
        run = Run(configured(tmp_path, plan=plan, **SPARSE), drawings(), saved)
        found = Plan.from_json(run.plan)
        assert all(run.model.get_submodule(name).execution == how for name, how in executions(found).items())
        return found

    for same in (None, "measure"):
        assert set(executions(resumed(same)).values()) == {"reference"}
    for other in ("auto", "off"):
        found = resumed(other)
        assert found.source == other and "reference" not in executions(found).values()
    path = tmp_path / "saved.json"
    path.write_text(json.dumps(saved.state["plan"]))
    assert set(executions(resumed(str(path))).values()) == {"reference"}


def test_a_plan_of_a_machine_that_has_other_backends_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(configured(tmp_path, plan="auto", **SPARSE), drawings()) == 0
    capsys.readouterr()
    saved = checkpoint.load(tmp_path)
    for one in saved.state["plan"]["layers"]:
        one["execution"] = "reference"
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: saved)
    monkeypatch.setattr(type(backends.get("reference")), "why_unavailable", lambda _: "not built here")
    backends.require.cache_clear()
    more = {**SPARSE, "max_steps": 4, "resume": True}
    try:
        with pytest.raises(RuntimeError, match=r"not built here.* Resume with --plan auto, measure or off"):
            start(configured(tmp_path, **more), drawings())
        for plan in ("auto", "measure", "off"):
            run = Run(configured(tmp_path, plan=plan, **more), drawings(), saved)
            assert "reference" not in executions(Plan.from_json(run.plan)).values()
        assert start(configured(tmp_path, plan="auto", **more), drawings()) == 0
        written = Plan.load(tmp_path / "plan.json")
        assert "reference" not in executions(written).values()
    finally:
        monkeypatch.undo()
        backends.require.cache_clear()


def test_sampling_follows_the_plan_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start(configured(tmp_path, **SPARSE), drawings()) == 0
    saved = checkpoint.load(tmp_path)
    monkeypatch.setattr(checkpoint, "load", lambda _: saved)
    ran = executions(Plan.from_json(saved.state["plan"]))

    def loaded() -> dict[str, str]:
        model = load_model(tmp_path).model
        return {name: model.get_submodule(name).execution for name in ran}

    for one in saved.state["plan"]["layers"]:
        one["execution"] = "reference"
    assert set(loaded().values()) == {"reference"}
    monkeypatch.setattr(type(backends.get("reference")), "why_unavailable", lambda _: "not built here")
    backends.require.cache_clear()
    assert "reference" not in loaded().values()
    monkeypatch.undo()
    backends.require.cache_clear()


def test_a_plan_file_repeats_a_run_to_the_bit(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert start(configured(first, plan="measure", **SPARSE), drawings()) == 0
    assert start(configured(second, plan=str(first / "plan.json"), **SPARSE), drawings()) == 0
    models = [checkpoint.load(out).model for out in (first, second)]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    assert (first / "plan.json").read_text() == (second / "plan.json").read_text()


def test_planning_takes_no_batch_and_no_random_number(tmp_path: Path) -> None:
    runs = [Run(configured(tmp_path, plan=plan, **SPARSE), drawings()) for plan in ("off", "measure")]
    for run in runs:
        assert run.batches.state_dict()["position"] == 0
    states = [{k: g.get_state() for k, g in run.generators.items()} for run in runs]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_dry_run_shows_the_plan_of_its_setting(tmp_path: Path) -> None:
    assert "speedup" in describe(configured(tmp_path, method="rigl"))
    assert "replaced by measured ones" in describe(configured(tmp_path, method="rigl", plan="measure"))


@pytest.mark.parametrize(("content", "message"), [(None, "No such file"), ("{}", "expected a plan of format 1")])
def test_a_plan_that_is_none_is_refused(
    tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_text(json.dumps(json.loads(content)))
    args = ["train", "chirodiff-kanjivg", "--dry-run", "--method", "static", "--plan", str(path)]
    assert cli.main(args) == 1
    assert message in capsys.readouterr().err
