"""Training: the parts of a run, one training step, and the loop.

A step draws a batch and timesteps, goes through `diffusion.loss` and the model's (sparse) layers, and back; then clips,
steps AdamW, lets the method regrow and averages. Everything random comes from generators of the run, which a checkpoint
holds, so a resumed run continues to the bit.

Exit codes: 0 finished; 130 and 143 stopped by Ctrl-C (SIGINT) and SIGTERM, after saving a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparse_kernels.nn import Plan
from sparsediff import checkpoint, methods
from sparsediff.autoencoder import encode, fingerprint
from sparsediff.build import (
    architecture,
    autocast,
    build_diffusion,
    build_model,
    device_of,
    draw,
    plan_execution,
    rebuild_model,
)
from sparsediff.datasets import Batch, Batches, ImageBatch, ImageBatches, ImageData, StrokeData, load
from sparsediff.diffusion import Predictor
from sparsediff.ema import EMA
from sparsediff.files import write_atomically
from sparsediff.images import Noise, check_size, draw_images, load_first_stage, load_items, pixels
from sparsediff.latent_cache import LatentData
from sparsediff.metrics import MetricsLog
from sparsediff.presets import TrainConfig, differences
from sparsediff.rendering import grid, image_grid, save_png
from sparsediff.samplers import LengthDistribution
from sparsediff.seeds import stream_seed

Data: TypeAlias = StrokeData | ImageData | LatentData
STREAMS = ("topology", "diffusion", "growth")  # one generator each; the order of the data has its own seed


class TrainError(RuntimeError):
    """A run cannot start or go on; the message says why and what to do."""


class Run:
    """The parts of a training run and its state.

    Args:
        config: the settings.
        data: drawings, images or latents; only their training split is used.
        saved: the checkpoint to continue from.

    Raises:
        TrainError: the checkpoint was made with other settings or other data.
        RuntimeError: its plan cannot run on this machine, and no other was asked for.
        ValueError: a setting that cannot be, such as a device that does not exist.
    """

    def __init__(self, config: TrainConfig, data: Data, saved: checkpoint.Checkpoint | None = None) -> None:
        self.config = config
        self.device = device_of(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.generators = {
            name: torch.Generator(self.device if name == "diffusion" else "cpu").manual_seed(
                stream_seed(config.seed, name)
            )
            for name in STREAMS
        }
        self.batches: Batches | ImageBatches
        self.fingerprint: dict[str, Any] = dict(data.train.fingerprint())
        self.lengths: LengthDistribution | None = None  # of drawings
        self.autoencoder: Any = None
        if isinstance(data, StrokeData):
            self.batches = Batches(data.train, config.batch_size, seed=config.seed, form=config.form)
            self.lengths = LengthDistribution(torch.from_numpy(data.train.length_histogram()))
        else:
            self.batches = ImageBatches(data.train, config.batch_size, seed=config.seed, workers=config.workers)
            self.autoencoder = load_first_stage(config)
        self.encodes = self.autoencoder is not None and isinstance(data, ImageData)
        if self.autoencoder is not None:
            self.autoencoder.to(self.device)
        if self.encodes:
            self.fingerprint |= {"autoencoder": fingerprint(self.autoencoder)["sha256"]}
        origin = data.meta if isinstance(data, LatentData) else data.provenance
        self.provenance = {key: value for key, value in origin.items() if key != "blocks"}  # a checksum each
        self.total_steps = config.epochs * len(self.batches)
        self.parts = min(config.micro_batches, self.batches.batch_size)

        self.plan: dict[str, Any] | None  # what became of every layer, as `sparse_kernels.nn.Plan.to_json` says it
        if saved is None:
            self.model, plan = build_model(config, self.generators["topology"])
        else:
            self._check(saved)
            self.model = rebuild_model(config, saved.model, saved.state.get("unet"))
            plan = None if saved.state["plan"] is None else Plan.from_json(saved.state["plan"])
        self.model.to(self.device)
        self.predict: Predictor = Noise(self.model) if config.model == "unet" else self.model
        first = self._forward_inputs(self.batches.peek())
        if config.model == "unet":
            check_size(self.model, first[0].shape[1:], config)
        if plan is not None:
            settings = None if saved is None else saved.state["config"]
            plan = plan_execution(self.model, plan, config, first, saved=settings)
        if config.recompute:
            cast(Any, self.model).enable_gradient_checkpointing()
        self.plan = plan.to_json() if plan is not None else None
        self.diffusion = build_diffusion(config).to(self.device)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, weight_decay=config.weight_decay, fused=self.device.type in ("cpu", "cuda")
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.ema = EMA(self.model, config.ema_decay)
        names = ("every", "drop", "anneal", "t_end", "state_policy", "regrow_dropped")
        options = {name: getattr(config, name) for name in names}
        self.method = methods.build(
            config.method,
            self.model,
            self.optimizer,
            total_steps=self.total_steps,
            ema=self.ema,
            generator=self.generators["growth"],
            **options,
        )
        self.step = 0
        self.seconds = 0.0  # of training: without sampling and saving
        self.loss_sum = torch.zeros((), device=self.device)  # since the last record
        self.loss_count = 0
        self.finite_until = 0  # the last step whose loss is known to be finite
        if saved is not None:
            self._take_over(saved)

    def training_step(self) -> dict[str, Any] | None:
        """One step on the next batch; returns what the method did, None if nothing."""
        self.method.begin_step(self.parts)
        batch = cast(Batch | ImageBatch, next(self.batches)).to(self.device, non_blocking=True)
        x = self._clean(batch)
        generator = self.generators["diffusion"]
        t = torch.randint(self.diffusion.timesteps, (len(x),), generator=generator, device=self.device)
        noise = torch.randn(x.shape, generator=generator, device=self.device)
        self.optimizer.zero_grad()
        for part in self._split(x, t, noise, batch.lengths):
            with autocast(self.config):
                loss = self.diffusion.loss(self.predict, *part)
            if self.parts > 1:
                loss = loss * (len(part[0]) / len(x))
            self.scaler.scale(loss).backward()
            self.loss_sum += loss.detach()
        self.scaler.unscale_(self.optimizer)
        if self.config.grad_clip:
            nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        done = self.method.step()
        self.ema.update()
        self.loss_count += 1
        self.step += 1
        return done

    def _clean(self, batch: Batch | ImageBatch) -> Tensor:
        """x_0 of a batch on the run's device."""
        return encode(self.autoencoder, batch.x).float() if self.encodes else batch.x

    def _split(
        self, x: Tensor, t: Tensor, noise: Tensor, lengths: Tensor | None
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """The parts that a batch is computed in."""
        if self.parts == 1:
            return [(x, t, noise, lengths)]
        split = [tensor.tensor_split(self.parts) for tensor in (x, t, noise)]
        own = (None,) * self.parts if lengths is None else lengths.tensor_split(self.parts)
        return list(zip(*split, own, strict=True))

    def _forward_inputs(self, batch: Batch | ImageBatch) -> tuple[Tensor, ...]:
        """Arguments of the model's forward of a batch, of its first part where it is computed in several."""
        x = self._clean(batch)
        x, t, _, lengths = self._split(x, torch.zeros(len(x), dtype=torch.long), x, batch.lengths)[0]
        return (x.contiguous(memory_format=torch.channels_last), t) if lengths is None else (x, t, lengths)

    def summary(self) -> str:
        """What runs, in a line."""
        config, stored = self.config, sum(p.numel() for p in self.parameters)
        text = f"{config.summary()}; {config.method}, {stored:,} parameters"
        if self.plan is not None:
            text += f", {self.plan['pattern']}, sparsity {self.plan['sparsity']:.4f} ({config.allocation})"
        return f"{text}; {self.total_steps:,} steps on {self.device}, {torch.get_num_threads()} threads"

    def mean_loss(self) -> float:
        """Mean loss since the last call.

        Raises:
            TrainError: it is not finite.
        """
        loss = self.loss_sum.item() / max(1, self.loss_count)
        if not math.isfinite(loss):
            raise self._diverged(f"the loss became {loss}")
        self.finite_until = self.step
        self.loss_sum.zero_()
        self.loss_count = 0
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Everything a checkpoint needs beside the parameters and their averages."""
        own: dict[str, Any] = {} if self.lengths is None else {"lengths": self.lengths.counts}
        if self.config.model == "unet":
            own["unet"] = architecture(self.config, self.model)
        if self.scaler.is_enabled():
            own["scaler"] = self.scaler.state_dict()
        return own | {
            "config": dataclasses.asdict(self.config),
            "data": self.fingerprint,
            "provenance": self.provenance,
            "plan": self.plan,
            "optimizer": self.optimizer.state_dict(),
            "ema_updates": self.ema.updates,
            "method": self.method.state_dict(),
            "generators": {name: generator.get_state() for name, generator in self.generators.items()},
            "batches": self.batches.state_dict(),
            "seconds": self.seconds,
            "loss_sum": self.loss_sum,
            "loss_count": self.loss_count,
        }

    def _diverged(self, what: str) -> TrainError:
        first = min(self.finite_until + 1, self.step)
        return TrainError(
            f"{what} within steps {first}..{self.step}; lower --lr, set --grad-clip, or look at the data. "
            "The newest checkpoint is from before."
        )

    def save(self) -> Path:
        """Writes a checkpoint of this moment.

        Raises:
            TrainError: the loss or a parameter is not finite; the checkpoint before must stay the newest.
        """
        norms = torch._foreach_norm(tuple(self.parameters))
        if not torch.stack([*norms, self.loss_sum]).isfinite().all():
            raise self._diverged("the loss or a parameter ceased to be finite")
        self.finite_until = self.step
        folder = Path(self.config.out) / "checkpoints"
        averages = self.ema.state_dict()["parameters"]
        path = checkpoint.save(folder, self.step, model=self.model.state_dict(), ema=averages, state=self.state_dict())
        checkpoint.prune(folder, self.config.keep)
        return path

    def _check(self, saved: checkpoint.Checkpoint) -> None:
        state = saved.state
        changed = differences(state["config"], self.config)
        if changed:
            listing = "; ".join(f"{name}: saved {old!r}, given {new!r}" for name, (old, new) in sorted(changed.items()))
            raise TrainError(
                f"{saved.path} was made with other settings ({listing}); repeat them, or choose another --out."
            )
        if state["data"] != self.fingerprint:
            raise TrainError(
                f"{saved.path} was made with other data: {state['data']}, now {self.fingerprint}; "
                "give the same --data, or choose another --out."
            )

    def _take_over(self, saved: checkpoint.Checkpoint) -> None:
        state = saved.state
        self.ema.load_state_dict({"updates": state["ema_updates"], "parameters": saved.ema})
        self.optimizer.load_state_dict(state["optimizer"])
        restride(self.optimizer)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.method.load_state_dict(state["method"])
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name].cpu())
        self.batches.load_state_dict(state["batches"])
        self.step = self.finite_until = saved.step
        self.seconds = state["seconds"]
        self.loss_sum.copy_(state["loss_sum"])
        self.loss_count = state["loss_count"]


def train(run: Run) -> int:
    """Trains until the run's end, a limit or a signal; returns the exit code."""
    config, out = run.config, Path(run.config.out)
    last = min(run.total_steps, config.max_steps or run.total_steps)
    budget = config.max_seconds or math.inf
    with (
        contextlib.closing(MetricsLog(out / "metrics.jsonl", run.step)) as metrics,
        interruption() as interrupted,
        tqdm(total=last, initial=run.step, unit="it", dynamic_ncols=True) as bar,
    ):
        clock = time.perf_counter()
        while run.step < last and run.seconds < budget and not interrupted:
            done = run.training_step()
            record: dict[str, Any] = {"method": done} if done else {}
            if run.step % config.log_every == 0:
                record |= {"epoch": run.batches.epoch, "loss": run.mean_loss()}  # waits for the device
                bar.set_postfix(loss=f"{record['loss']:.4f}", epoch=record["epoch"], refresh=False)
            now = time.perf_counter()
            run.seconds += now - clock
            if record:
                record["seconds"] = round(run.seconds, 4)
                metrics.write(run.step, **record)
            if config.sample_every and run.step % config.sample_every == 0:
                save_grid(run)
            if run.step % config.save_every == 0:
                metrics.sync()
                run.save()
            bar.update()
            clock = time.perf_counter()  # sampling and saving are not training
        metrics.sync()
        run.save()
    if interrupted:
        print(f"stopped by {signal.Signals(interrupted[0]).name} at step {run.step}; --resume continues.")
        return 128 + interrupted[0]
    if config.sample_every:
        save_grid(run)
    return 0


def save_grid(run: Run) -> Path:
    """Draws `sample_count` samples of the averaged model and saves their picture; the same seeds every time."""
    path = Path(run.config.out) / "samples" / f"step-{run.step:08d}.png"
    seeds = range(run.config.seed, run.config.seed + run.config.sample_count)
    if run.lengths is None:
        size = run.config.batch_size
        x = draw_images(run.ema.model, run.diffusion, seeds, steps=run.config.sample_steps, batch_size=size)
        return save_png(image_grid(pixels(x, run.autoencoder)), path)
    drawings = draw(
        run.ema.model, run.diffusion, run.lengths, seeds, form=run.config.form, steps=run.config.sample_steps
    )
    return save_png(grid(drawings), path)


def restride(optimizer: torch.optim.Optimizer) -> None:
    """Lays the optimizer's state out in memory as its parameters are.

    Checkpoints hold contiguous tensors, and the fused AdamW pairs elements by place in memory, not by index.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def start(config: TrainConfig, data: Data | None = None) -> int:
    """The `train` command: builds the run, or resumes it where `out` has one, and trains.

    Args:
        config: the settings.
        data: drawings, images or latents; loaded as the settings say by default.

    Returns:
        The exit code.

    Raises:
        TrainError: `out` holds a run and `resume` was not asked for, or it was made with other settings or data.
    """
    out = Path(config.out)
    newest = checkpoint.find(out)
    if not config.resume and (newest is not None or (out / "metrics.jsonl").exists()):
        raise TrainError(f"{out} holds a run already; --resume continues it, another --out keeps it.")
    saved = None if newest is None else checkpoint.load(newest)
    if data is None:
        data = load_items(config, load_first_stage(config)) if config.model == "unet" else load_data(config)
    print(data.summary(), flush=True)
    run = Run(config, data, saved)
    print(run.summary() if saved is None else f"continuing {saved.path}", flush=True)
    write_atomically(out / "config.json", json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    if run.plan is not None:
        write_atomically(out / "plan.json", json.dumps(run.plan, indent=1) + "\n")
    return train(run)


def describe(config: TrainConfig) -> str:
    """What `--dry-run` prints: every setting, the model's size and the sparse plan; loads no data."""
    settings = dataclasses.asdict(config)
    width = max(map(len, settings))
    device_of(config.device)
    model, plan = build_model(config, torch.Generator().manual_seed(stream_seed(config.seed, "topology")))
    stored = sum(p.numel() for p in model.parameters())
    lines = [f"{name:<{width}}  {value}" for name, value in settings.items()]
    lines += ["", f"{stored:,} parameters stored"]
    if plan is not None:
        lines += [str(plan)]
        if config.plan == "measure":
            lines += ["before the first step the executions and times above are replaced by measured ones"]
    return "\n".join(lines)


def load_data(config: TrainConfig) -> StrokeData:
    """The drawings of the settings, prepared as they say."""
    return load(
        config.dataset,
        path=config.data,
        category=config.category,
        limit=config.limit,
        resample=config.resample,
        rdp=config.rdp,
        max_points=config.max_points,
        scale=config.scale,
        split=config.split,
        on_bad=config.on_bad,
        **config.data_options,
    )


@contextlib.contextmanager
def interruption() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in the list it yields; the second one acts as it would without us."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        received.append(number)
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()
