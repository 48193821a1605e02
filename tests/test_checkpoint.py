"""Checkpoints: exact round trips, atomic writes, and messages; the metrics log across resumed runs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from sparsediff import checkpoint
from sparsediff.metrics import MetricsLog, read_metrics


def write(folder: Path, step: int, **state: Any) -> Path:
    model = {"a.weight": torch.arange(6.0).view(2, 3), "a.index": torch.arange(4, dtype=torch.int32)}
    return checkpoint.save(folder, step, model=model, ema={"a.weight": torch.ones(2, 3)}, state=state)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def test_round_trip_is_exact(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp": torch.randn(2, 2)}},
            "groups": [{"betas": (0.9, 0.1)}],
        },
        "generator": torch.Generator().manual_seed(3).get_state(),
        "carry": {"gru.weight_ih_l0": 0.1 + 0.2, "odd": float("inf")},
        "empty": {},
        "none": None,
        "flags": [True, 1, "x"],
        "big": 2**63 + 1,
        "half": torch.randn(3).bfloat16(),
        "rows": list(torch.arange(4.0).view(2, 2)),  # two views of one storage
    }
    path = write(tmp_path, 7, **state)
    loaded = checkpoint.load(path)
    assert loaded.step == 7 and equal(loaded.state, state)
    assert equal(loaded.model["a.index"], torch.arange(4, dtype=torch.int32))
    assert equal(loaded.ema, {"a.weight": torch.ones(2, 3)})


def test_the_newest_complete_one_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (5, 100, 20):
        write(folder, step)
    (folder / ".step-00000200.partial").mkdir()  # a writer that was killed
    shutil.copytree(folder / "step-00000100", folder / "step-00000300.bak")  # a person's copy
    found = checkpoint.find(tmp_path)
    assert found is not None and found.name == "step-00000100" and checkpoint.find(folder) == found
    assert checkpoint.load(found).step == checkpoint.load(tmp_path).step == 100
    checkpoint.prune(folder, keep=2)
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000020", "step-00000100", "step-00000300.bak"]


@pytest.mark.parametrize("calls_survived", range(9))
def test_a_kill_at_any_point_leaves_the_one_before(
    tmp_path: Path, calls_survived: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1, mark=1)
    before = checkpoint.flush
    calls = 0

    def flush(path: Path) -> None:
        nonlocal calls
        if calls == calls_survived:
            raise KeyboardInterrupt
        calls += 1
        before(path)

    monkeypatch.setattr(checkpoint, "flush", flush)
    with contextlib.suppress(KeyboardInterrupt):
        write(tmp_path, 2, mark=2)
    monkeypatch.undo()
    newest = checkpoint.load(tmp_path)
    assert newest.step == newest.state["mark"] == (1 if calls_survived < 5 else 2)
    write(tmp_path, 2, mark=2)  # the next attempt is not disturbed by what is left
    assert checkpoint.load(tmp_path).step == 2


def test_nothing_is_renamed_before_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    flush, replace = checkpoint.flush, os.replace

    def noted_flush(path: Path) -> None:
        events.append(path.name)
        flush(path)

    def noted_replace(a: Path, b: Path) -> None:
        events.append("rename")
        replace(a, b)

    monkeypatch.setattr(checkpoint, "flush", noted_flush)
    monkeypatch.setattr(os, "replace", noted_replace)
    write(tmp_path, 3)
    files = ["model.safetensors", "ema.safetensors", "train.safetensors", "state.json"]
    assert events == [*files, ".step-00000003.partial", "rename", tmp_path.name]


def test_unsavable_state_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"method\.x\.1 must be a tensor or a JSON value; got object"):
        write(tmp_path, 1, method={"x": [1, object()]})
    assert checkpoint.find(tmp_path) is None


def test_a_full_disk_is_an_error_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(checkpoint.CheckpointError, match="No space left on device.*; make room"):
        write(tmp_path, 2)
    assert checkpoint.load(tmp_path).step == 1


def test_messages(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint in"):
        checkpoint.load(tmp_path)
    path = write(tmp_path, 1)
    (path / "ema.safetensors").write_bytes(b"torn")
    with pytest.raises(checkpoint.CheckpointError, match="is damaged"):
        checkpoint.load(path)
    shutil.rmtree(path)
    path = write(tmp_path, 1)
    document = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**document, "format": 99}))
    with pytest.raises(checkpoint.CheckpointError, match="has format 99"):
        checkpoint.load(path)


def test_log_drops_what_lies_past_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (10, 20, 30):
        log.write(step, loss=1.0 / step)
    log.close()
    with path.open("ab") as file:
        file.write(b'{"step": 40, "lo')  # killed in the middle of a line
    log = MetricsLog(path, step=20)
    log.write(30, loss=0.5)
    log.sync()
    log.close()
    records = read_metrics(path)
    assert [r["step"] for r in records] == [10, 20, 30] and records[-1]["loss"] == 0.5
    MetricsLog(path).close()
    assert read_metrics(path) == []
