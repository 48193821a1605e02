"""The loop: it learns, logs, samples, stops cleanly, and continues to the bit whatever stopped it."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import configured, drawings

from sparse_kernels.nn import sparse_weights
from sparsediff import checkpoint
from sparsediff.build import load_model
from sparsediff.ema import EMA
from sparsediff.metrics import read_metrics
from sparsediff.models.chirodiff import ChiroDiff
from sparsediff.presets import LATER_SETTINGS, PRESETS, RUN_SETTINGS, TrainConfig, differences
from sparsediff.train import Run, TrainError, interruption, load_data, start

STEPS = 5 * (70 // 8)

VARIANTS = [
    pytest.param({"method": "dense"}, id="dense"),
    pytest.param({"method": "dense", "form": "position", "gru_form": "packed"}, id="dense-position-packed"),
    pytest.param({"method": "static"}, id="static"),
    pytest.param({"method": "magran"}, id="magran"),
    pytest.param({"method": "rigl"}, id="rigl"),
    pytest.param({"method": "rigl", "pattern": "unstructured", "anneal": "cosine"}, id="rigl-unstructured"),
]
SLOW_DENSE = pytest.param({"method": "dense"}, id="dense", marks=pytest.mark.slow)


def contents(out: Path) -> dict[str, bytes]:
    """The newest checkpoint's tensors, as bytes by file."""
    found = checkpoint.find(out)
    assert found is not None
    return {name: (found / f"{name}.safetensors").read_bytes() for name in checkpoint.PARTS}


def history(out: Path) -> list[dict[str, Any]]:
    """The log without its clock."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_metrics(out / "metrics.jsonl")]


@pytest.mark.parametrize("settings", VARIANTS)
def test_a_stopped_run_continues_to_the_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert start(configured(tmp_path / "whole", **settings), drawings()) == 0
    for last in (1, 14, 15, 33, None):  # 8 steps an epoch, a checkpoint every 4
        assert start(configured(tmp_path / "parts", **settings, max_steps=last, resume=True), drawings()) == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert history(tmp_path / "parts") == history(tmp_path / "whole")
    assert [r["step"] for r in history(tmp_path / "parts")] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("settings", [pytest.param({"method": "rigl"}, id="rigl"), SLOW_DENSE])
def test_kill_9_at_any_moment_loses_nothing(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert start(configured(tmp_path / "whole", **settings), drawings()) == 0
    child = subprocess.Popen(command(tmp_path / "killed", settings), stderr=subprocess.DEVNULL)
    try:
        log = tmp_path / "killed" / "metrics.jsonl"
        wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") >= 17)
    finally:
        child.kill()
        child.wait()
    reached = checkpoint.find(tmp_path / "killed")
    assert reached is not None and 12 <= checkpoint.load(reached).step < STEPS
    assert start(configured(tmp_path / "killed", **settings, resume=True), drawings()) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert history(tmp_path / "killed") == history(tmp_path / "whole")


def command(out: Path, settings: dict[str, Any]) -> list[str]:
    pairs = [f'{key}="{value}"' for key, value in settings.items()]
    pairs += ["sample_every=1", "sample_steps=12"]  # slows it down, so that it is not done before it is killed
    return [sys.executable, str(Path(__file__).with_name("tiny_run.py")), str(out), *pairs]


def wait_until(condition: Any, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the child process made no progress"
        time.sleep(0.001)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_leave(tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Run.training_step

    def interrupted(run: Run) -> Any:
        if run.step == 9:
            os.kill(os.getpid(), number)
        return step(run)

    before = signal.getsignal(number)
    monkeypatch.setattr(Run, "training_step", interrupted)
    assert start(configured(tmp_path / "a"), drawings()) == 128 + number
    monkeypatch.undo()
    assert signal.getsignal(number) is before
    assert checkpoint.load(tmp_path / "a").step == 10
    assert start(configured(tmp_path / "a", resume=True), drawings()) == 0
    assert start(configured(tmp_path / "b"), drawings()) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_second_interrupt_is_not_swallowed() -> None:
    # A shell's background job is born with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _interrupt_twice()
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt_twice() -> None:
    with pytest.raises(KeyboardInterrupt), interruption() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)


def test_random_streams_of_a_run_are_different(tmp_path: Path) -> None:
    runs = [Run(configured(tmp_path, method="magran", seed=seed), drawings()) for seed in (0, 1, 2**32)]
    first = [torch.rand(4, generator=generator).tolist() for run in runs for generator in run.generators.values()]
    first += [torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist() for seed in (0, 1)]  # of samples
    assert len({tuple(numbers) for numbers in first}) == len(first)


def test_it_learns(tmp_path: Path) -> None:
    config = configured(tmp_path, epochs=20, lr=2e-2, grad_clip=1.0, save_every=1000, log_every=40)
    assert start(config, drawings()) == 0
    losses = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[0] > 0.8 and losses[-1] < 0.75


def test_sampling_while_training_changes_nothing(tmp_path: Path) -> None:
    start(configured(tmp_path / "with", sample_every=16), drawings())
    start(configured(tmp_path / "without"), drawings())
    assert contents(tmp_path / "with") == contents(tmp_path / "without")
    names = sorted(p.name for p in (tmp_path / "with" / "samples").iterdir())
    assert names == ["step-00000016.png", "step-00000032.png", f"step-{STEPS:08d}.png"]


def test_limits_stop_with_a_checkpoint(tmp_path: Path) -> None:
    assert start(configured(tmp_path / "steps", max_steps=5), drawings()) == 0
    assert checkpoint.load(tmp_path / "steps").step == 5
    assert start(configured(tmp_path / "time", max_seconds=1e-9), drawings()) == 0
    assert checkpoint.load(tmp_path / "time").step == 1


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    start(configured(tmp_path, max_steps=1), drawings())
    with pytest.raises(TrainError, match="holds a run already; --resume continues it"):
        start(configured(tmp_path), drawings())


def test_resuming_with_other_settings_says_which(tmp_path: Path) -> None:
    start(configured(tmp_path, max_steps=1), drawings())
    with pytest.raises(TrainError, match=r"hidden: saved 16, given 24; lr: saved 0.001, given 0.1\)"):
        start(configured(tmp_path, resume=True, lr=0.1, hidden=24, epochs=9), drawings())
    with pytest.raises(TrainError, match="was made with other data"):
        start(configured(tmp_path, resume=True), drawings(seed=1))


@pytest.mark.parametrize(
    ("spoilt_at", "log_every", "message"),
    [
        (10, 1, r"the loss became nan within steps 11\.\.11; lower --lr"),
        (10, 100, r"ceased to be finite within steps 9\.\.12; lower --lr"),
        (12, 1, r"ceased to be finite within steps 12\.\.12; lower --lr"),  # the update spoilt it, the loss was fine
    ],
)
def test_a_run_that_diverges_stops_with_a_sound_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt_at: int, log_every: int, message: str
) -> None:
    step = Run.training_step

    def spoilt(run: Run) -> Any:
        done = step(run)
        if run.step == spoilt_at:
            next(run.model.parameters()).data.fill_(float("nan"))
        return done

    monkeypatch.setattr(Run, "training_step", spoilt)
    with pytest.raises(TrainError, match=message):
        start(configured(tmp_path, log_every=log_every), drawings())
    assert checkpoint.load(tmp_path).step == 8


def test_a_run_in_position_form_sees_running_sums(tmp_path: Path) -> None:
    data = drawings()
    batch = next(Run(configured(tmp_path, form="position"), data).batches)
    for x, length, index in zip(batch.x, batch.lengths.tolist(), batch.indices.tolist(), strict=True):
        expected = np.cumsum(data.train[index][:, :2].astype(np.float64), axis=0)
        np.testing.assert_allclose(x[:length, :2].numpy(), expected, rtol=1e-6)


def test_a_checkpoint_says_where_its_data_come_from(tmp_path: Path) -> None:
    data = dataclasses.replace(drawings(), provenance={"source": "random walks"})
    start(configured(tmp_path, max_steps=1), data)
    assert checkpoint.load(tmp_path).state["provenance"] == {"source": "random walks"}


@pytest.mark.parametrize("method", ["dense", "rigl"])
def test_a_checkpoint_is_a_model_that_samples(tmp_path: Path, method: str) -> None:
    start(configured(tmp_path, method=method), drawings())
    averaged, last = load_model(tmp_path), load_model(tmp_path, weights="model")
    saved = checkpoint.load(tmp_path)
    for run, parameters in ((averaged, saved.ema), (last, {k: saved.model[k] for k in saved.ema})):
        for name, parameter in run.model.named_parameters():
            assert torch.equal(parameter, parameters[name])
    assert averaged.step == STEPS and set(averaged.lengths.draw(range(50))) <= set(range(2, 13))
    with pytest.raises(ValueError, match="weights must be"):
        load_model(tmp_path, weights="best")


def test_ema_warms_up_to_its_decay() -> None:
    model = ChiroDiff(4, 1, seed=0)
    ema = EMA(model, decay=0.5)
    expected = [p.detach().clone() for p in model.parameters()]
    for n in range(1, 12):
        decay = min(0.5, (1 + n) / (10 + n))
        with torch.no_grad():
            for shadow, p in zip(expected, model.parameters(), strict=True):
                p.add_(torch.randn_like(p))
                shadow.mul_(decay).add_(p, alpha=1 - decay)
        ema.update()
        for shadow, averaged in zip(expected, ema.model.parameters(), strict=True):
            torch.testing.assert_close(averaged, shadow)
    other = EMA(model, decay=0.5)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 11 and all(map(torch.equal, other.model.parameters(), ema.model.parameters()))
    parameter = next(model.parameters())
    assert ema.shadow_of(parameter) is next(ema.model.parameters()) and not ema.shadow_of(parameter).requires_grad
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
        EMA(model, decay=1.0)


@pytest.mark.parametrize("method", ["rigl", "magran"])
def test_the_average_follows_a_regrow(tmp_path: Path, method: str) -> None:
    run = Run(configured(tmp_path, method=method, ema_decay=0.5), drawings())
    moved = [run.training_step() for _ in range(4)][-1]  # regrows every 4 steps
    assert moved is not None and moved["moved"] > 0
    grown = 0
    for weight, average in zip(sparse_weights(run.model), sparse_weights(run.ema.model), strict=True):
        assert average.topology is weight.topology and average.values is run.ema.shadow_of(weight.values)
        empty = ~weight.values.flatten(1).any(1)  # grown at this step: zero, and the average of what was there is gone
        grown += int(empty.sum())
        assert not average.values[empty].any() and bool(average.values[~empty].any())
    assert grown == moved["moved"]


def test_presets_have_the_settings_of_the_paper() -> None:
    drawing = {name: preset for name, preset in PRESETS.items() if preset.model == "chirodiff"}
    sizes = {name: (preset.hidden, preset.layers) for name, preset in drawing.items()}
    assert sizes == {"chirodiff-kanjivg": (96, 3), "chirodiff-quickdraw": (128, 3), "chirodiff-vmnist": (48, 2)}
    for preset in drawing.values():
        assert (preset.epochs, preset.batch_size, preset.lr, preset.weight_decay) == (600, 128, 1e-3, 1e-2)
        assert (preset.timesteps, preset.beta_start, preset.beta_end, preset.schedule) == (1000, 1e-4, 2e-2, "linear")
        assert (preset.every, preset.sample_steps, preset.ema_decay, preset.grad_clip) == (800, 50, 0.9999, 0.1)
    papers = {name: preset for name, preset in PRESETS.items() if preset.unet == "paper" and name not in drawing}
    rates = {name: (preset.dataset, preset.lr) for name, preset in papers.items()}
    assert rates == {
        "ldm-celebahq": ("celebahq", 2.0e-6),
        "ldm-bedrooms": ("lsun", 2.4e-5),
        "ldm-imagenette": ("imagenette", 2.4e-5),
    }
    for preset in papers.values():
        assert (preset.epochs, preset.batch_size, preset.weight_decay, preset.grad_clip) == (150, 12, 1e-2, 0.0)
        assert (preset.timesteps, preset.beta_start, preset.beta_end) == (1000, 0.0015, 0.0195)
        assert (preset.schedule, preset.every, preset.sample_steps) == ("scaled_linear", 1100, 100)
        assert preset.ema_decay == 0.9999


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"save_every": 0, "lr": float("nan")}, r"lr must be positive; got nan"),
        ({"save_every": 0, "lr": float("nan")}, r"save_every must be at least 1; got 0"),
        ({"max_steps": 0}, r"max_steps must be at least 1; got 0"),
        ({"threads": -1}, r"threads must be at least 0; got -1"),
        ({"drop": 7.0}, r"drop must be in \(0, 1\]; got 7.0"),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\); got 1.0"),
        ({"timesteps": 20}, r"sample_steps must be at most timesteps, 20, or sample_every 0; got 50"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)
    assert TrainConfig(timesteps=20, sample_every=0).sample_steps == 50


def test_settings_reach_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEDIFF_DATA", str(tmp_path))
    file = tmp_path / "cat.ndjson"
    good = '{"word": "cat", "recognized": %s, "drawing": [[[0, 1, 2], [0, 3, 1]]]}'
    file.write_text("\n".join([*[good % "true"] * 8, *[good % "false"] * 8, '{"word": "cat"}']))
    config = TrainConfig(dataset="quickdraw", category="cat", data=str(file), split=(1.0, 0.0, 0.0))
    with pytest.raises(ValueError, match="--on-bad skip"):
        load_data(config)
    config = dataclasses.replace(config, on_bad="skip")
    assert len(load_data(config).train) == 16
    config = dataclasses.replace(config, data_options={"recognized_only": "true"})
    assert len(load_data(config).train) == 8
    with pytest.raises(ValueError, match="recognized_only must be one of False, True; got 'maybe'"):
        load_data(dataclasses.replace(config, data_options={"recognized_only": "maybe"}))


def test_only_run_settings_may_differ_on_resume() -> None:
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert names >= RUN_SETTINGS
    config = TrainConfig()
    saved = dataclasses.asdict(config)
    assert differences(saved, dataclasses.replace(config, out="x", epochs=1, threads=3)) == {}
    assert differences(saved, dataclasses.replace(config, seed=1)) == {"seed": (0, 1)}
    assert differences({k: v for k, v in saved.items() if k != "seed"}, config) == {"seed": (None, 0)}
    assert names >= LATER_SETTINGS
    first = {k: v for k, v in saved.items() if k not in LATER_SETTINGS}  # as the first versions saved it
    assert differences(first, config) == {}
    assert differences(first, dataclasses.replace(config, size=16)) == {"size": (None, 16)}
