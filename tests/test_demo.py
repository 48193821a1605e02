"""The demo with a budget of seconds: the race, its summary, its report, Ctrl-C; and the pattern experiment."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsediff import checkpoint, demo
from sparsediff.metrics import read_metrics
from sparsediff.presets import PRESETS
from sparsediff.report import Curve

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--hidden", "16", "--pattern", "block:8x8", "--samples", "4", "--threads", "1"]

PROMISED = """preset method sparsity pattern steps final_loss dense_step_ms sparse_step_ms speedup params_dense
    params_sparse nnz device threads versions memory_dense memory_sparse""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A folder with a few of KanjiVG's characters; prepared drawings are cached beside it, not in the user's folder."""
    folder = tmp_path_factory.mktemp("kanji")
    files = sorted(Path(str(importlib.metadata.distribution("kanjivg").locate_file("kanji"))).glob("*.svg"))
    for file in files[:: len(files) // 150]:
        (folder / file.name).write_bytes(file.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEDIFF_DATA", str(tmp_path_factory.mktemp("cache")))
        yield str(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, characters: str) -> Path:
    """The folder of a finished demo of one second each."""
    out = tmp_path_factory.mktemp("demo")
    assert demo.main([*TINY, "--seconds", "1", "--data", characters, "--out", str(out)]) == 0
    return out


def test_summary_has_what_was_promised(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert set(PROMISED) <= set(summary)
    assert summary["steps"] > 0 and summary["steps_dense"] > 0 and not summary["interrupted"]
    assert summary["dense_step_ms"] == min(summary["step_ms"][f"dense_{form}"] for form in ("packed", "padded"))
    assert summary["params_sparse"] - summary["nnz"] == summary["params_dense"] - demo_numel(finished)
    assert summary["nnz"] < 0.3 * demo_numel(finished)
    assert summary["memory_sparse"]["total"] < 0.5 * summary["memory_dense"]["total"]
    assert summary["seconds"]["sparse"] == pytest.approx(summary["seconds"]["dense"], abs=2)


def demo_numel(folder: Path) -> int:
    """Elements of the counted weights of the demo in a folder."""
    return int(checkpoint.load(folder / "sparse").state["plan"]["numel"])


def test_report_stands_alone_and_has_every_piece(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r"src='([^']*)'", page))
    for title in ("What it draws", "Loss", "Speed", "Memory", "Where the weights are", "The plan", "What ran"):
        assert f"<h2>{title}</h2>" in page
    for text in ("gru.weight_hh_l0", "against seconds", "against training steps", "sparsediff demo", "--hidden 16"):
        assert text in page
    assert "Stopped early" not in page


def test_both_models_leave_metrics_and_a_checkpoint(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    for name, steps in (("sparse", summary["steps"]), ("dense", summary["steps_dense"])):
        saved = checkpoint.load(finished / name)
        assert saved.step == steps
        rows = read_metrics(finished / name / "metrics.jsonl")
        assert sum("loss" in row for row in rows) == steps
        assert [row["validation"] for row in rows if "validation" in row][-1] > 0


def test_a_second_demo_replaces_the_first(finished: Path, characters: str) -> None:
    assert demo.main([*TINY, "--seconds", "0.2", "--data", characters, "--out", str(finished)]) == 0
    summary = json.loads((finished / "summary.json").read_text())
    assert checkpoint.load(finished / "sparse").step == summary["steps"]


def test_ctrl_c_still_writes_the_report(tmp_path: Path, characters: str) -> None:
    options = [*TINY, "--seconds", "600", "--data", characters, "--out", str(tmp_path)]
    command = [sys.executable, "-m", "sparsediff", "demo", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        metrics = tmp_path / "dense" / "metrics.jsonl"
        deadline = time.monotonic() + 600
        # Two records: the training that Ctrl-C is to meet has begun.
        while time.monotonic() < deadline and (not metrics.exists() or metrics.read_bytes().count(b"\n") < 3):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=180)
    assert process.returncode == 128 + signal.SIGINT, output.decode()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["interrupted"] and summary["speedup"] > 0
    assert "Stopped early" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--method", "dense"], "must be a sparse one"), (["--seconds", "0"], "must be positive")],
    ids=["dense", "no-time"],
)
def test_errors(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demo.main(options)


def test_command_repeats_the_options() -> None:
    config = demo.DemoConfig(seconds=60.0, pattern="unstructured", out=Path("runs/my demo"))
    assert demo.command(config) == "sparsediff demo --seconds 60.0 --pattern unstructured --out 'runs/my demo'"
    assert demo.command(demo.DemoConfig()) == "sparsediff demo"


def test_settings_differ_from_the_preset_where_they_say_so() -> None:
    config, preset = demo.settings(demo.DemoConfig()), PRESETS[demo.PRESET]
    changed = {name for name, value in vars(config).items() if value != getattr(preset, name)}
    assert changed == {*demo.SHORT, "method", "out"}


def test_where_curves_meet() -> None:
    slow = Curve(validation=[(0, 0.0, 1.0), (10, 10.0, 0.6), (20, 20.0, 0.5)])
    fast = Curve(validation=[(0, 0.0, 1.0), (40, 10.0, 0.4), (80, 20.0, 0.3)])
    assert demo.seconds_to(fast, 0.5) == pytest.approx(10 * 5 / 6)
    assert demo.seconds_to(slow, 0.3) is None
    common = demo.at_same_steps(fast, slow)
    assert common is not None
    assert common["steps"] == 20 and common["dense"] == 0.5 and common["sparse"] == pytest.approx(0.7)
    assert demo.at_same_steps(Curve(validation=[(0, 0.0, 1.0)]), slow) is None


def test_choose_pattern_runs_continues_and_summarizes(tmp_path: Path, characters: str) -> None:
    def run(*options: str) -> str:
        command = [sys.executable, "-m", "bench.choose_pattern", "--out", str(tmp_path / "out"), *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    small = ["--run", "block:16x16", "--data", characters, "--work", str(tmp_path / "work")]
    run(*small, "--minutes", "0.005")
    rows = read_metrics(tmp_path / "out" / "block-16x16.jsonl")
    table = run(*small, "--minutes", "0.02", "--summarize")
    more = read_metrics(tmp_path / "out" / "block-16x16.jsonl")
    assert more[: len(rows)] == rows and more[-1]["seconds"] >= 1.2 and "block:16x16" in table
    for picture in ("block-16x16.png", "curves.png", "samples.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 0
