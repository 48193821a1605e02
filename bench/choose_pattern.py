"""Which pattern the demo should have: dense and four patterns at S = 0.75, each trained for the same CPU time.

    python -m bench.choose_pattern --run block:16x16 --minutes 30        one process a run; again: continues it
    python -m bench.choose_pattern --summarize                           the table and the pictures of all runs

Every run has the demo's settings, data, seed and one thread. The budget is the process's CPU time inside training
steps, so that other guests of the machine do not decide. Rows (validation loss against CPU seconds and steps) and
samples go to `bench/results/choose_pattern/`, checkpoints to `runs/choose_pattern/`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

from bench.harness import RESULTS, machine
from sparsediff import checkpoint
from sparsediff.demo import DemoConfig, drawings_of, settings, settle
from sparsediff.metrics import MetricsLog, read_metrics
from sparsediff.presets import TrainConfig
from sparsediff.rendering import grid, save_png
from sparsediff.report import figure_png
from sparsediff.train import Run, load_data
from sparsediff.validation import Validation

RUNS = ("dense", "unstructured", "block:8x8", "block:16x1", "block:16x16")
POINTS = 24  # of a run's validation curve


def slug(name: str) -> str:
    """A run's name as a file name."""
    return name.replace(":", "-")


def cpu_ms(function: Callable[[], Any], rounds: int) -> float:
    """Median CPU milliseconds of a call."""
    samples = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        samples.append((time.process_time() - start) * 1e3)
    return statistics.median(samples)


def configured(name: str, data: str | None = None, **changes: Any) -> TrainConfig:
    """The demo's settings for a run: "dense" or a pattern."""
    base = settings(DemoConfig(threads=1, data=data))
    chosen = {"method": "dense"} if name == "dense" else {"pattern": name}
    return dataclasses.replace(base, **{**chosen, **changes})


def train(name: str, minutes: float, out: Path, work: Path, data_folder: str | None = None) -> None:
    """Trains one run to `minutes` of CPU time, from its newest checkpoint if it has one; writes rows and samples."""
    torch.set_num_threads(1)
    folder = work / slug(name)
    config = configured(name, data_folder, out=str(folder))
    data = load_data(config)
    newest = checkpoint.find(folder)
    saved = None if newest is None else checkpoint.load(newest)
    if name == "dense":
        if saved is None:
            forms = {form: dataclasses.replace(config, gru_form=form) for form in ("packed", "padded")}
            config = min(forms.values(), key=lambda form: cpu_ms(Run(form, data).training_step, 4))
        else:
            config = dataclasses.replace(config, gru_form=saved.state["config"]["gru_form"])
    run = Run(config, data, saved)
    validation = Validation(data.valid, run.diffusion, count=512)
    out.mkdir(parents=True, exist_ok=True)
    budget = minutes * 60
    with contextlib.closing(MetricsLog(out / f"{slug(name)}.jsonl", run.step)) as log:
        if saved is None:
            about = {"settings": dataclasses.asdict(config), "machine": machine()}
            stored = sum(p.numel() for p in run.parameters)
            log.write(0, run=name, seconds=0.0, validation=validation.loss(run.ema.model), parameters=stored, **about)
        point = int(run.seconds / budget * POINTS) + 1
        while run.seconds < budget:
            settle(run, budget)
            start = time.process_time()
            run.training_step()
            run.seconds += time.process_time() - start
            if run.seconds >= budget * point / POINTS:
                point = int(run.seconds / budget * POINTS) + 1
                log.write(
                    run.step,
                    run=name,
                    seconds=round(run.seconds, 3),
                    loss=run.mean_loss(),
                    validation=validation.loss(run.ema.model),
                    step_ms=round(run.seconds * 1e3 / run.step, 3),
                )
                log.sync()
                run.save()
                print(f"{name}: {run.seconds:.0f} of {budget:.0f} s, step {run.step}", flush=True)
    save_png(grid(drawings_of(run, 36)), out / f"{slug(name)}.png")


def summarize(out: Path) -> str:
    """The table of the runs in a folder; draws curves.png and samples.png there.

    Raises:
        ValueError: there is no run.
    """
    runs = {name: read_metrics(out / f"{slug(name)}.jsonl") for name in RUNS}
    runs = {name: rows for name, rows in runs.items() if rows}
    if not runs:
        raise ValueError(f"{out} holds no run; begin with --run {RUNS[0]}.")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, over in zip(figure.subplots(1, 2), ("seconds", "step"), strict=True):
        for name, rows in runs.items():
            axes.plot([r[over] for r in rows[1:]], [r["validation"] for r in rows[1:]], label=name, marker=".")
        axes.set_xlabel("CPU seconds of training, one thread" if over == "seconds" else "training steps")
        axes.set_ylabel("validation loss")
        axes.grid(color="#e3e7ed")
        axes.legend(frameon=False)
    (out / "curves.png").write_bytes(figure_png(figure))
    sheets = {name: out / f"{slug(name)}.png" for name in runs}
    sheets = {name: path for name, path in sheets.items() if path.exists()}
    if sheets:
        figure = Figure(figsize=(4 * len(sheets), 4.3), layout="constrained")
        row = figure.subplots(1, len(sheets), squeeze=False)[0]
        for axes, (name, path) in zip(row, sheets.items(), strict=True):
            with Image.open(path) as sheet:
                axes.imshow(sheet.convert("L"), cmap="gray", vmin=0, vmax=255)
            axes.set_title(name)
            axes.set_axis_off()
        (out / "samples.png").write_bytes(figure_png(figure))
    head = f"{'run':<14} {'CPU s':>7} {'steps':>7} {'step ms':>8} {'parameters':>11} {'validation':>11}"
    lines = [head, "-" * len(head)]
    for name, rows in sorted(runs.items(), key=lambda item: item[1][-1]["validation"]):
        last, ms = rows[-1], rows[-1].get("step_ms", float("nan"))
        lines.append(
            f"{name:<14} {last['seconds']:>7.0f} {last['step']:>7,} {ms:>8.1f} {rows[0]['parameters']:>11,} "
            f"{last['validation']:>11.5f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.choose_pattern", description=__doc__.splitlines()[0])
    parser.add_argument("--run", choices=RUNS, help="train this one (again: continue it)")
    parser.add_argument("--minutes", type=float, default=30.0, help="CPU time of its training")
    parser.add_argument("--summarize", action="store_true", help="table and pictures of all runs in --out")
    parser.add_argument("--out", type=Path, default=RESULTS / "choose_pattern", help="rows and pictures")
    parser.add_argument("--work", type=Path, default=Path("runs/choose_pattern"), help="checkpoints")
    parser.add_argument("--data", help="folder of KanjiVG's SVG files; default: those of the package kanjivg")
    options = parser.parse_args(arguments)
    if options.run is None and not options.summarize:
        parser.error("give --run PATTERN or --summarize")
    if options.run is not None:
        train(options.run, options.minutes, options.out, options.work, options.data)
    if options.summarize:
        print(summarize(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
