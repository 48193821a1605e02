"""`sparsediff demo`: a sparse ChiroDiff and its dense twin train side by side on KanjiVG; a report says how it went.

Both get the same wall-clock time for training, the same data in the same order, the same noise, seeds, settings and
threads, and take turns of a few seconds, so that whatever else the machine does meets both. Dense is `nn.GRU` in the
faster of its two forms on this machine. Afterwards both forms and the sparse model are timed step by step in turns.

Under `out`: report.html, summary.json, and for each model metrics.jsonl and a checkpoint for `sparsediff sample`.

Exit codes: 0 done; 130 and 143 stopped by Ctrl-C and SIGTERM, after writing the report of what there was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import tyro
from tqdm import tqdm

from sparse_kernels import _native
from sparse_kernels.nn import sparse_weights
from sparsediff import __version__
from sparsediff.accounting import training_bytes
from sparsediff.build import draw
from sparsediff.datasets import StrokeData
from sparsediff.doctor import cpu_name
from sparsediff.files import write_atomically
from sparsediff.methods import METHODS
from sparsediff.methods._dynamic import DynamicMethod
from sparsediff.metrics import MetricsLog
from sparsediff.presets import PRESETS, MethodName, TrainConfig
from sparsediff.report import NAMES, Change, Curve, Result, faster, plural, write_report
from sparsediff.timing import interleave, ratios
from sparsediff.train import Run, interruption, load_data
from sparsediff.validation import Validation

PRESET = "chirodiff-kanjivg"

# What the demo sets differently from the preset, because it trains for minutes where the paper trains for days.
SHORT: dict[str, Any] = {
    "rdp": 0.02,  # 31 points a drawing instead of 89: the same characters, steps a third as long
    "lr": 1e-2,  # after 45 CPU seconds better than 3e-3 and 6e-3 for sparse, and than 5e-3 for dense
    "grad_clip": 1.0,  # the preset's 0.1 is far below the norms of the first thousand steps
    "ema_decay": 0.999,  # averages over about 1,000 steps instead of 10,000
    "every": 400,  # regrows in a run of some thousand steps; the paper's 800 would leave two or three
}

TURN_SECONDS = 5.0
VALIDATIONS = 12
# Part of the time after which the topology stays as it is (RigL's T_end): what a regrow disturbs takes a hundred steps
# to heal, and a race must not end on one.
SETTLED = 0.75
ROUNDS = 15  # of the timing, fewer where they would take longer than this
TIMING_SECONDS = 30.0
# η = 1: without fresh noise on the way, the errors of a model this young add up to strokes that fly off the paper.
SAMPLING: dict[str, Any] = {"sampler": "ddim", "steps": 100, "eta": 1.0}


@dataclass(frozen=True)
class DemoConfig:
    """Trains a sparse ChiroDiff and its dense twin on KanjiVG, each for the same time, and writes a report."""

    seconds: float = 120.0
    """Training time of each of the two models."""
    method: MethodName = "rigl"
    """Sparse training method."""
    sparsity: float = 0.75
    """S: the fraction of the network's weights that is absent."""
    pattern: str = "block:16x16"
    """unstructured, or block:HxW with sides of 1, 4, 8, 16, 32, 64."""
    allocation: Literal["erk", "uniform", "flops"] = "erk"
    """How S is spread over the layers."""
    hidden: int = 96
    """Units of each direction of each GRU layer."""
    seed: int = 0
    """Seed of everything random."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""
    data: str | None = None
    """Folder of KanjiVG's SVG files; those of the package kanjivg if not given."""
    limit: int | None = None
    """At most this many drawings."""
    samples: int = 36
    """Drawings of each sample sheet."""
    out: Path = Path("runs/demo")
    """Folder of the report."""


def settings(config: DemoConfig) -> TrainConfig:
    """The training settings of the sparse model; the dense one's differ in the method alone.

    Raises:
        ValueError: the method is not a sparse one, or the time is not positive.
    """
    if not METHODS.get(config.method).sparse:
        raise ValueError(f"demo: method must be a sparse one, its twin is dense anyway; got {config.method!r}.")
    if not config.seconds > 0:
        raise ValueError(f"demo: seconds must be positive; got {config.seconds:g}.")
    shared = {
        name: getattr(config, name)
        for name in ("method", "sparsity", "pattern", "allocation", "hidden", "seed", "threads", "data", "limit")
    }
    changed: dict[str, Any] = {**SHORT, **shared, "out": str(config.out / "sparse")}
    return dataclasses.replace(PRESETS[PRESET], **changed)


class Racer:
    """One of the two models: its run, its clock and its curve.

    Args:
        config: its settings; metrics and checkpoint go to `config.out`.
        data: the drawings. validation: what its average is judged on.
    """

    def __init__(self, config: TrainConfig, data: StrokeData, validation: Validation) -> None:
        self.run = Run(config, data)
        self.validation = validation
        self.curve = Curve()
        self.folder = Path(config.out)
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)  # an earlier demo's, made with other settings
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics = MetricsLog(self.folder / "metrics.jsonl")

    def train(self, until: float, budget: float, interrupted: Sequence[int], progress: Callable[[], None]) -> None:
        """Trains until its clock shows `until` of its `budget` seconds or a signal came."""
        run = self.run
        while run.seconds < until and not interrupted:
            settle(run, budget)
            start = time.perf_counter()
            done = run.training_step()
            loss = run.mean_loss()
            run.seconds += time.perf_counter() - start
            if done and done.get("moved"):
                self.curve.regrows.append((run.step, run.seconds))
            self.curve.steps.append(run.step)
            self.curve.seconds.append(run.seconds)
            self.curve.losses.append(loss)
            self.metrics.write(run.step, loss=loss, seconds=round(run.seconds, 4), **({"method": done} if done else {}))
            progress()

    def validate(self) -> float:
        """Adds a point to the validation curve, off the clock."""
        loss = self.validation.loss(self.run.ema.model)
        self.curve.validation.append((self.run.step, self.run.seconds, loss))
        self.metrics.write(self.run.step, validation=loss, seconds=round(self.run.seconds, 4))
        return loss

    @property
    def recent_loss(self) -> float | None:
        """Mean training loss of the last hundred steps."""
        return statistics.fmean(self.curve.losses[-100:]) if self.curve.losses else None


def settle(run: Run, budget: float) -> None:
    """Ends the regrowing of a run whose clock shows the part `SETTLED` of its `budget` seconds."""
    if run.seconds >= SETTLED * budget and isinstance(run.method, DynamicMethod):
        run.method.end = min(run.method.end, run.step)


def race(racers: dict[str, Racer], seconds: float, interrupted: Sequence[int]) -> None:
    """Trains both for `seconds` each in turns, judging them a dozen times on the way."""
    turns = max(1, round(seconds / TURN_SECONDS))
    judged = {round(turns * (i + 1) / VALIDATIONS) for i in range(VALIDATIONS)} | {1, turns}
    with contextlib.ExitStack() as stack:
        bars = {
            name: stack.enter_context(
                tqdm(
                    desc=f"{name:<6}",
                    total=seconds,
                    position=position,
                    disable=None,  # where nobody watches, lines are printed instead
                    bar_format="{desc} |{bar}| {n:.0f} of {total:.0f} s{postfix}",
                )
            )
            for position, name in enumerate(racers)
        }

        def progress(name: str) -> None:
            racer, bar = racers[name], bars[name]
            bar.n = min(racer.run.seconds, seconds)
            bar.set_postfix_str(f"{racer.run.step} steps, loss {racer.recent_loss:.4f}", refresh=False)
            bar.update(0)

        for racer in racers.values():
            racer.validate()
        for turn in range(1, turns + 1):
            names = list(racers) if turn % 2 else list(reversed(racers))
            for name in names:
                racers[name].train(seconds * turn / turns, seconds, interrupted, partial(progress, name))
            if turn in judged or interrupted:
                losses = {name: racer.validate() for name, racer in racers.items()}
                if all(bar.disable for bar in bars.values()):
                    print(
                        "; ".join(
                            f"{name} {racers[name].run.seconds:.0f} s, {plural(racers[name].run.step, 'step')}, "
                            f"validation loss {loss:.4f}"
                            for name, loss in losses.items()
                        ),
                        flush=True,
                    )
            if interrupted:
                return


def step_times(configs: dict[str, TrainConfig], data: StrokeData, rounds: int) -> tuple[dict[str, list[float]], Any]:
    """Milliseconds of whole training steps, by name, from fresh runs that take turns on the same batches.

    Returns:
        The samples by name, and the runs.
    """
    runs = {name: Run(config, data) for name, config in configs.items()}
    return interleave({name: run.training_step for name, run in runs.items()}, rounds=rounds, shortest_ms=0), runs


def demo(config: DemoConfig) -> int:
    """Runs the demo; returns the exit code."""
    sparse = settings(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    started = time.perf_counter()
    print("preparing KanjiVG (about 15 s the first time, then it is cached) ...", flush=True)
    data = load_data(sparse)
    print(
        f"{len(data.train):,} drawings to train on, {data.train.lengths.mean():.0f} points each on average", flush=True
    )
    forms: dict[str, TrainConfig] = {
        f"dense_{form}": dataclasses.replace(sparse, method="dense", gru_form=form, out=str(config.out / "dense"))
        for form in ("packed", "padded")
    }
    first, _ = step_times(forms, data, rounds=3)
    trained_form = min(forms, key=lambda name: statistics.median(first[name]))
    configs = {"dense": forms[trained_form], "sparse": sparse}
    print(f"dense trains with the {forms[trained_form].gru_form} nn.GRU, the faster one here", flush=True)

    validation = Validation(data.valid, Run(sparse, data).diffusion, seed=config.seed)
    racers = {name: Racer(settings, data, validation) for name, settings in configs.items()}
    weights = sparse_weights(racers["sparse"].run.model)
    before = [weight.topology.mask().numpy().copy() for weight in weights]
    with interruption() as interrupted:
        race(racers, config.seconds, interrupted)
    if interrupted:
        print("\nstopped; writing the report of what there is (once more leaves at once) ...", flush=True)
    for racer in racers.values():
        racer.metrics.close()
        racer.run.save()
    round_seconds = sum(map(statistics.median, first.values())) / 1e3
    rounds = 5 if interrupted else max(5, min(ROUNDS, int(TIMING_SECONDS / round_seconds)))
    print("timing steps of both in turns ...", flush=True)
    times, runs = step_times({**forms, "sparse": sparse}, data, rounds)
    memory = {
        name: training_bytes(run.model, run.optimizer, run.ema.model)
        for name, run in (("dense", runs[trained_form]), ("sparse", runs["sparse"]))
    }

    print("drawing ...", flush=True)
    chosen = np.arange(config.samples) * len(data.valid) // config.samples
    drawings = {"real": [data.valid[int(i)] for i in chosen]}
    for name, racer in racers.items():
        drawings[name] = drawings_of(racer.run, config.samples)
    changes = [
        Change(weight.name, mask, weight.topology.mask().numpy().copy())
        for weight, mask in zip(weights, before, strict=True)
    ]
    plan = racers["sparse"].run.plan
    assert plan is not None
    summary = summarise(config, racers, times, memory, bool(interrupted))
    summary["total_seconds"] = round(time.perf_counter() - started, 1)
    curves = {name: racer.curve for name, racer in racers.items()}
    write_atomically(config.out / "summary.json", json.dumps(summary, indent=1) + "\n")
    report = Result(summary, what_ran(summary, sparse, data), curves, drawings, plan, changes)
    path = write_report(report, config.out / "report.html")
    print(f"\n{in_short(summary)}\n\nreport: {path}")
    return 128 + interrupted[0] if interrupted else 0


def drawings_of(run: Run, count: int) -> list[npt.NDArray[np.float32]]:
    """Samples of a run's averaged model, from the same noise and lengths for every run of a seed."""
    seeds = range(run.config.seed, run.config.seed + count)
    assert run.lengths is not None
    return draw(run.ema.model, run.diffusion, run.lengths, seeds, form=run.config.form, **SAMPLING)


def summarise(
    config: DemoConfig,
    racers: dict[str, Racer],
    times: dict[str, list[float]],
    memory: dict[str, dict[str, int]],
    interrupted: bool,
) -> dict[str, Any]:
    """The content of summary.json; `dense_*` of a step is the faster form of the dense model.

    Args:
        times: milliseconds of the rounds of "dense_packed", "dense_padded" and "sparse".
        memory: bytes by model and kind.
    """
    step_ms = {name: statistics.median(samples) for name, samples in times.items()}
    rival = min(("dense_packed", "dense_padded"), key=step_ms.__getitem__)
    speedups = ratios(times[rival], times["sparse"])
    sparse, dense = racers["sparse"], racers["dense"]
    plan = sparse.run.plan
    assert plan is not None
    params_dense = sum(p.numel() for p in dense.run.parameters)
    native = _native.why_unavailable()
    return {
        "preset": PRESET,
        "method": config.method,
        "sparsity": config.sparsity,
        "sparsity_reached": plan["sparsity"],
        "pattern": plan["pattern"],
        "allocation": config.allocation,
        "seed": config.seed,
        "device": str(sparse.run.device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "kernels": _native.native().isa_name() if native is None else f"none: {native}",
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command(config),
        "out": str(config.out),
        "interrupted": interrupted,
        "budget_seconds": config.seconds,
        "seconds": {name: round(racer.run.seconds, 2) for name, racer in racers.items()},
        "steps": sparse.run.step,
        "steps_dense": dense.run.step,
        "regrows": len(sparse.curve.regrows),
        "final_loss": sparse.curve.validation[-1][2],
        "final_loss_dense": dense.curve.validation[-1][2],
        "train_loss": sparse.recent_loss,
        "train_loss_dense": dense.recent_loss,
        "at_same_steps": at_same_steps(sparse.curve, dense.curve),
        "seconds_to_dense_loss": seconds_to(sparse.curve, dense.curve.validation[-1][2]),
        "dense_step_ms": round(step_ms[rival], 3),
        "sparse_step_ms": round(step_ms["sparse"], 3),
        "dense_form": rival.removeprefix("dense_"),
        "trained_dense_form": dense.run.config.gru_form,
        "step_ms": {name: round(value, 3) for name, value in step_ms.items()},
        "rounds": len(speedups),
        "speedup": round(statistics.median(speedups), 3),
        "speedup_range": [round(float(np.quantile(speedups, q)), 3) for q in (0.2, 0.8)],
        "params_dense": params_dense,
        "params_sparse": params_dense - plan["numel"] + plan["nonzeros"],
        "nnz": plan["nonzeros"],
        **{f"memory_{name}": {**memory[name], "total": sum(memory[name].values())} for name in NAMES},
        "sampling": SAMPLING,
    }


def at_same_steps(sparse: Curve, dense: Curve) -> dict[str, Any] | None:
    """Both validation losses at the last step that both reached, read off the curves; None before any step."""
    steps = min(sparse.validation[-1][0], dense.validation[-1][0])
    if steps == 0:
        return None
    return {
        "steps": steps,
        **{
            name: float(np.interp(steps, [v[0] for v in curve.validation], [v[2] for v in curve.validation]))
            for name, curve in (("sparse", sparse), ("dense", dense))
        },
    }


def seconds_to(curve: Curve, loss: float) -> float | None:
    """When the validation curve first crosses `loss` downwards, between its points; None if it never does."""
    for (_, start, high), (_, end, low) in zip(curve.validation, curve.validation[1:], strict=False):
        if low <= loss < high:
            return start + (end - start) * (high - loss) / (high - low)
    return None


def versions() -> dict[str, str]:
    """Of what computes here."""
    return {
        "sparsediff": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def command(config: DemoConfig) -> str:
    """The command that repeats this."""
    words = ["sparsediff", "demo"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            words += [f"--{field.name}", str(value)]
    return shlex.join(words)


def what_ran(summary: dict[str, Any], config: TrainConfig, data: StrokeData) -> list[tuple[str, str]]:
    """The lines of the report's table of settings and versions."""
    preset = dataclasses.asdict(PRESETS[PRESET])
    given = dataclasses.asdict(config)
    skipped = {"out", "data", "seed", "threads", "device", "method", "sparsity", "pattern", "allocation"}
    changed = ", ".join(f"{name} {given[name]} ({old})" for name, old in preset.items()
                        if name not in skipped and given[name] != old)  # fmt: skip
    return [
        ("machine", f"{summary['cpu']}, {platform.system()}, {platform.machine()}"),
        ("threads", str(summary["threads"])),
        ("kernels", str(summary["kernels"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in summary["versions"].items())),
        ("data", f"{data.provenance['source']}, {data.provenance['licence']}; {len(data.train):,} drawings to train on"
                 if data.provenance else data.name),
        ("model", f"ChiroDiff, {config.layers} bidirectional GRU layers of {config.hidden}, batch {config.batch_size}"),
        ("sparse", f"{config.method}, sparsity {config.sparsity:g}, {config.pattern}, {config.allocation}"),
        ("dense", f"nn.GRU, {summary['trained_dense_form']} (the faster form when training began)"),
        ("settings", f"preset {PRESET} with (preset's value in brackets) {changed}"),
        ("time", f"{summary['budget_seconds']:g} s of training for each model, {summary['total_seconds']:g} s in all"),
        ("seed", str(summary["seed"])),
        ("date", str(summary["date"])),
    ]  # fmt: skip


def in_short(summary: dict[str, Any]) -> str:
    """What is printed in the end."""
    memory = summary["memory_sparse"]["total"], summary["memory_dense"]["total"]
    return "\n".join(
        [
            f"                     {'dense':>10} {'sparse':>10}",
            f"step                 {summary['dense_step_ms']:>7.1f} ms {summary['sparse_step_ms']:>7.1f} ms   "
            f"{faster(summary['speedup'])}",
            f"memory of training   {memory[1] / 2**20:>6.2f} MiB {memory[0] / 2**20:>6.2f} MiB   "
            f"{memory[0] / memory[1]:.0%}",
            f"parameters           {summary['params_dense']:>10,} {summary['params_sparse']:>10,}",
            f"steps in the time    {summary['steps_dense']:>10,} {summary['steps']:>10,}",
            f"validation loss      {summary['final_loss_dense']:>10.4f} {summary['final_loss']:>10.4f}",
        ]
    )


def main(args: Sequence[str] | None = None) -> int:
    """The `demo` command; returns the exit code."""
    config = tyro.cli(DemoConfig, args=None if args is None else list(args), prog="sparsediff demo")
    return demo(config)


if __name__ == "__main__":
    sys.exit(main())
