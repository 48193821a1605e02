"""From settings to objects: model, diffusion, device; and back from a checkpoint to a model that samples."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sparse_kernels.nn import Plan, replan, sparsify
from sparsediff import checkpoint as checkpoints
from sparsediff import datasets
from sparsediff.diffusion import SCHEDULES, Diffusion
from sparsediff.methods import METHODS
from sparsediff.models import MODELS
from sparsediff.models import unet as unets
from sparsediff.presets import TrainConfig
from sparsediff.rebuild import load_sparse
from sparsediff.samplers import LengthDistribution, sample_drawings


def device_of(name: str) -> torch.device:
    """The device called `name`.

    Raises:
        ValueError: there is no such device here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be like 'cpu', 'cuda' or 'cuda:1'; got {name!r}.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} does not exist: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
            "use --device cpu or install a torch with CUDA."
        )
    return device


def build_diffusion(config: TrainConfig) -> Diffusion:
    """The diffusion of the settings."""
    return Diffusion(SCHEDULES[config.schedule](config.timesteps, config.beta_start, config.beta_end))


def build_dense_model(config: TrainConfig) -> Any:
    """The dense model of the settings, its weights drawn from the seed; a U-Net's channels are last in memory.

    Raises:
        DataError: the data set holds no data of its kind.
    """
    wanted, held = (
        "images" if images else "drawings"
        for images in (config.model == "unet", issubclass(datasets.get(config.dataset), datasets.ImageDataset))
    )
    if wanted != held:
        raise datasets.DataError(
            f"model {config.model!r} diffuses {wanted}, and data set {config.dataset!r} holds {held}; choose another "
            "--dataset or --model."
        )
    if config.model == "unet":
        model: Any = MODELS.get("unet")(**unets.SIZES[config.unet], seed=config.seed)
        return model.to(memory_format=torch.channels_last)
    return MODELS.get(config.model)(
        config.hidden,
        config.layers,
        form=config.form,
        timesteps=config.timesteps,
        gru_form=config.gru_form,
        seed=config.seed,
    )


def example_inputs(config: TrainConfig, model: Any, batch: int) -> tuple[Tensor, ...]:
    """Arguments of a forward of `batch` samples of the model of the settings."""
    inputs = unets.example_inputs(model, batch) if config.model == "unet" else model.example_inputs(batch)
    return tuple(inputs)


def autocast(config: TrainConfig) -> contextlib.AbstractContextManager[Any]:
    """What forwards and the planning of a run happen in."""
    if config.precision == "fp32":
        return contextlib.nullcontext()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    return torch.autocast(torch.device(config.device).type, dtype=dtype)


def build_model(config: TrainConfig, generator: torch.Generator | None = None) -> tuple[nn.Module, Plan | None]:
    """A fresh model of the settings, sparse where its method is, and the plan of its layers.

    Args:
        config: the settings.
        generator: source of the topology.
    """
    model = build_dense_model(config)
    if not METHODS.get(config.method).sparse:
        return model, None
    with autocast(config):
        plan = sparsify(
            model,
            sparsity=config.sparsity,
            pattern=config.pattern,
            allocation=config.allocation,
            rescale=config.rescale,
            generator=generator,
            plan=plan_mode(config),
            example_inputs=example_inputs(config, model, -(-config.batch_size // config.micro_batches)),
        )
    return model, plan


def plan_mode(config: TrainConfig) -> str | Plan:
    """How layers are planned before there is a batch: as the settings say, by the cost table where they say "measure".

    Raises:
        ValueError, OSError: the setting names a file that is no plan.
    """
    if config.plan in (None, "auto", "measure"):
        return "auto"
    return "off" if config.plan == "off" else Plan.load(str(config.plan))


def plan_execution(
    model: nn.Module,
    plan: Plan,
    config: TrainConfig,
    inputs: tuple[Tensor, ...],
    *,
    saved: Mapping[str, Any] | None = None,
) -> Plan:
    """Plans the layers of a run on its own device: of a fresh run by measuring, if so set; of a resumed one as saved,
    unless the settings ask for another plan or the saved one is of another kind of device.

    Args:
        model: on its device. plan: what `build_model` returned, or what the checkpoint holds.
        config: the settings. inputs: of the first batch's forward. saved: the checkpoint's settings, of a resumed run.

    Raises:
        RuntimeError: the saved plan cannot run on this machine, and the settings do not say how to plan instead.
    """
    device = next(model.parameters()).device
    here = plan.device == device.type
    if saved is not None and here and config.plan in (None, saved.get("plan")):
        try:
            return replan(model, plan, plan)
        except RuntimeError as error:
            if config.plan is None:
                raise RuntimeError(
                    f"the plan of the checkpoint does not fit this machine: {error} Resume with --plan auto, measure "
                    "or off to plan the run for this machine."
                ) from error
    mode = "measure" if config.plan == "measure" else plan_mode(config)
    if saved is None and mode != "measure" and here:
        return plan  # made by `build_model`
    with autocast(config):
        return replan(model, plan, mode, example_inputs=tuple(tensor.to(device) for tensor in inputs))


def rebuild_model(config: TrainConfig, saved: Mapping[str, Tensor], made: Mapping[str, Any] | None = None) -> nn.Module:
    """The model that a state dict was saved from: the same layers sparse, with as many blocks, and its parameters.

    Args:
        config: the settings of the saved run.
        saved: the state dict, as `load_sparse` reads it.
        made: a U-Net's architecture, as `architecture` says it; None: that of the settings.
    """
    if made is None:
        return load_sparse(build_dense_model(config), saved)
    names = ("size", "widths", "blocks", "attention", "channels", "head_dim")
    model: Any = MODELS.get("unet")(**{name: made[name] for name in names})
    dense: nn.Module = model.to(memory_format=torch.channels_last)
    return load_sparse(dense, saved)


def architecture(config: TrainConfig, model: Any) -> dict[str, Any]:
    """What a checkpoint of a U-Net says about it, JSON-able: to rebuild it without the settings, and to convert it."""
    made = model.config
    return {
        "size": made.sample_size,
        "head_dim": made.attention_head_dim,
        "widths": list(made.block_out_channels),
        "blocks": made.layers_per_block,
        "attention": [kind.startswith("Attn") for kind in made.down_block_types],
        "channels": made.in_channels,
        "betas": [config.beta_start, config.beta_end, config.timesteps],
        "scale": 1.0,
        "ema_decay": config.ema_decay,
        "latent": config.latents is not None or config.autoencoder is not None,
    }


@dataclass(frozen=True)
class Sampleable:
    """A trained model with what sampling needs.

    Args:
        model: the network, in evaluation mode.
        diffusion: its schedule.
        lengths: the training drawings' length distribution; None: it draws images.
        config: the run's settings.
        step: training steps it saw.
        latent: whether it draws latents.
        first_stage: folder of their autoencoder, where the run had or has one.
    """

    model: nn.Module
    diffusion: Diffusion
    lengths: LengthDistribution | None
    config: TrainConfig
    step: int
    latent: bool = False
    first_stage: Path | None = None


def load_model(path: Path, *, weights: str = "ema", device: str = "cpu") -> Sampleable:
    """The model of a checkpoint, or of a run's newest one; its layers run by the checkpoint's plan where they can here.

    Args:
        path: a checkpoint or a run's folder.
        weights: "ema" (averaged) or "model" (as trained).
        device: where it goes.

    Raises:
        CheckpointError: there is no intact checkpoint.
    """
    if weights not in ("ema", "model"):
        raise ValueError(f"weights must be 'ema' or 'model'; got {weights!r}.")
    saved = checkpoints.load(path)
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    config = TrainConfig(**{key: value for key, value in saved.state["config"].items() if key in names})
    made = saved.state.get("unet")
    if made is not None and not saved.state["config"]:  # converted from elsewhere: it has no settings
        start, end, timesteps = made["betas"]
        changes = {"schedule": "scaled_linear", "beta_start": start, "beta_end": end, "timesteps": timesteps}
        config = dataclasses.replace(config, model="unet", **changes)
    model = rebuild_model(config, {**saved.model, **saved.ema} if weights == "ema" else saved.model, made)
    lengths = LengthDistribution(saved.state["lengths"]) if made is None else None
    model.to(device_of(device)).eval()
    plan = None if saved.state.get("plan") is None else Plan.from_json(saved.state["plan"])
    if plan is not None and plan.device == next(model.parameters()).device.type:
        # RuntimeError: a backend of the run's machine is missing on this one, where the layers choose for themselves.
        with contextlib.suppress(RuntimeError):
            plan.apply(model)
    latent = made is not None and bool(made.get("latent", True))
    stages = [folder / "first_stage" for folder in (path, *path.parents[:2])]
    stages += [] if config.autoencoder is None else [Path(config.autoencoder)]
    stage = next((folder for folder in stages if folder.is_dir()), None) if latent else None
    return Sampleable(model, build_diffusion(config), lengths, config, saved.step, latent, stage)


def draw(
    model: nn.Module,
    diffusion: Diffusion,
    lengths: LengthDistribution,
    seeds: Sequence[int],
    *,
    form: str = "delta",
    **options: Any,
) -> list[npt.NDArray[np.float32]]:
    """Generates one drawing for every seed, its length drawn from `lengths`.

    Args:
        form: what the model diffuses; drawings come back as steps either way.
        options: further arguments of `samplers.sample_drawings`.

    Returns:
        `[T_i, 3]` float32 arrays (dx, dy, lift), lift still a real number.
    """
    drawings = [d.numpy() for d in sample_drawings(model, diffusion, lengths.draw(seeds), seeds, **options)]
    if form == "position":
        for drawing in drawings:
            drawing[1:, :2] = np.diff(drawing[:, :2], axis=0)
    return drawings
