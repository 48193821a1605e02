"""The command line: quick help, choices from the registries, overrides, messages and exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_run import configured, drawings

from sparsediff import cli
from sparsediff.presets import PRESETS
from sparsediff.registry import entry_names
from sparsediff.train import start


def test_help_knows_every_entry_and_does_not_load_torch() -> None:
    code = "import sys; from sparsediff.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    text = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    for name in [*cli.COMMANDS, *PRESETS, *entry_names("sparsediff.methods"), *entry_names("sparsediff.datasets")]:
        assert name in text


def test_help_of_train_lists_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["train", "chirodiff-kanjivg", "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for word in ["--method", *entry_names("sparsediff.methods"), "--sparsity", "--pattern", "--allocation", "--resume"]:
        assert word in text


@pytest.mark.parametrize("preset", [name for name in PRESETS if PRESETS[name].unet == "small" or "chiro" in name])
def test_dry_run_shows_every_value(preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert cli.main(["train", preset, "--dry-run", "--lr", "0.5", "--epochs", "7", "--out", str(out)]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
    assert shown["lr"] == "0.5" and shown["epochs"] == "7" and shown["hidden"] == str(PRESETS[preset].hidden)
    assert not out.exists()


@pytest.mark.parametrize("allocation", ["erk", "uniform", "flops"])
def test_dry_run_shows_the_plan(allocation: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--dry-run",
        "--method",
        "rigl",
        "--sparsity",
        "0.75",
        "--pattern",
        "block:16x16",
        "--allocation",
        allocation,
    ]
    assert cli.main(["train", "chirodiff-kanjivg", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    total = next(line for line in lines if line.startswith("total")).split()
    assert total[:2] == ["total", "413,304"] and 0.749 < float(total[2]) < 0.751 and total[-1] == allocation


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["tain"], 2, "unknown command 'tain'; expected one of train, sample"),
        (["sample", "nowhere"], 1, "no checkpoint in nowhere"),
        (["train", "chirodiff-kanjivg", "--dry-run", "--device", "cuda:99"], 1, "device 'cuda:99' does not exist"),
        (["train", "chirodiff-kanjivg", "--dry-run", "--device", "abacus"], 1, "device must be like"),
        (
            ["train", "chirodiff-kanjivg", "--dry-run", "--method", "static", "--pattern", "17x4"],
            1,
            "sides must be one of",
        ),
        (["train", "chirodiff-vmnist", "--data", "nowhere.pkl"], 1, "nowhere.pkl"),
        (["sample", "nowhere", "--out", "samples.jpg"], 1, "out must end in .png (a picture) or .npz"),
    ],
    ids=["command", "checkpoint", "cuda", "device", "pattern", "data", "out"],
)
def test_errors(args: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        ["train", "chirodiff-kanji"],
        ["train", "chirodiff-kanjivg", "--method", "rigel"],
        ["train", "chirodiff-kanjivg", "--dry-run", "--drop", "7.5"],
    ],
    ids=["preset", "method", "range"],
)
def test_wrong_choices_exit_with_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(args)
    assert exit_info.value.code == 2
    assert args[-1] in capsys.readouterr().err


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_sample_writes_pictures_and_drawings(tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    start(configured(tmp_path / "run", max_steps=2), drawings())
    options = ["--steps", "5", "--weights", weights]
    for n in (3, 5):
        out = tmp_path / f"{n}.npz"
        assert cli.main(["sample", str(tmp_path / "run"), "--n", str(n), "--out", str(out), *options]) == 0
    three, five = np.load(tmp_path / "3.npz"), np.load(tmp_path / "5.npz")
    end = three["offsets"][-1]
    assert len(three["offsets"]) == 4 and end == len(three["points"])
    np.testing.assert_allclose(three["points"], five["points"][:end], atol=1e-3)
    picture = tmp_path / "new" / "grid.png"
    assert cli.main(["sample", str(tmp_path / "run"), "--n", "4", "--out", str(picture), *options]) == 0
    assert picture.stat().st_size > 0 and str(picture) in capsys.readouterr().out
    folder = tmp_path / "pictures"
    assert cli.main(["sample", str(tmp_path / "run"), "--n", "2", "--seed", "3", "--out", str(folder), *options]) == 0
    assert sorted(p.name for p in folder.iterdir()) == ["00000003.png", "00000004.png", "samples.json"]


def test_ctrl_c_outside_training_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "sample", (interrupted, ""))
    assert cli.main(["sample", "x"]) == 130
    assert capsys.readouterr().err == "sparsediff sample: interrupted.\n"
