"""Latent Diffusion in three forms: CompVis's `.ckpt`, a folder of diffusers, a checkpoint of ours.

Between them stands `Latent`: dense weights by diffusers' names, with masks where the model is sparse.

    .ckpt        state_dict: model.diffusion_model.*, model_ema.* (names without dots), first_stage_model.*, schedule;
                 masks (ours, where the model is sparse): by the names of the weights, and their pattern
    diffusers    unet/, vqvae/, scheduler/, model_index.json: a pipeline's folder; or a U-Net's or a VQModel's alone
    checkpoint   model, average and topology as a run saves them, the architecture in its state, first_stage/ beside it
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_kernels.patterns import parse_pattern
from sparsediff import checkpoint
from sparsediff.autoencoder import load_autoencoder, vq_f4
from sparsediff.conversion._ckpt import write_ckpt
from sparsediff.conversion._masks import densified, masks_of_zeros, sparsified
from sparsediff.conversion._names import (
    ConversionError,
    Shape,
    check_names,
    shape_of_compvis,
    shape_of_diffusers,
    shown,
    to_compvis,
    to_diffusers,
    unet_pairs,
    vq_pairs,
)
from sparsediff.models._folders import read_config, require_diffusers
from sparsediff.models.unet import load_unet, save_unet, unet
from sparsediff.rebuild import load_sparse

UNET, EMA, FIRST_STAGE = "model.diffusion_model.", "model_ema.", "first_stage_model."
# Buffers of CompVis's modules that follow from the betas, or say what is always so here.
SCHEDULE = frozenset(
    """betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod
    log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance
    posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 logvar scale_factor""".split()  # noqa: SIM905
)
BETAS = (0.0015, 0.0195, 1000)  # of Latent Diffusion's unconditional models, linear in the square root


@dataclass
class Latent:
    """A model between two forms.

    Args:
        shape: of the U-Net; None where there is only a first stage. head_dim, size: what its weights do not tell:
            channels of an attention head, height and width of its input.
        model, average: dense weights by diffusers' names, as trained and averaged.
        masks: bool, by the names of the sparse weights. pattern: their pattern.
        decay, updates: of the average. step: of the training.
        first_stage: a `VQModel`, or None. betas: first, last, count. scale: of the latents.
        notes: what was left out.
    """

    shape: Shape | None = None
    head_dim: int = 32
    size: int = 64
    model: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    pattern: str | None = None
    decay: float = 0.9999
    updates: int = 0
    step: int = 0
    first_stage: Any = None
    betas: tuple[float, float, int] = BETAS
    scale: float = 1.0
    notes: list[str] = field(default_factory=list)

    def build(self, *, empty: bool = False) -> Any:
        """A dense `UNet2DModel` of this architecture; `empty` without content."""
        assert self.shape is not None
        shape = self.shape
        with torch.device("meta" if empty else "cpu"):
            return unet(
                self.size,
                shape.widths,
                blocks=shape.blocks,
                attention=shape.attention,
                channels=shape.channels,
                head_dim=self.head_dim,
            )

    def check(self, where: str) -> None:
        """Raises ConversionError where a weight is missing, unknown or of another shape."""
        expected = self.build(empty=True).state_dict()
        check_names(where, self.model, expected)
        check_names(f"{where}, averaged", self.average, expected)

    def hide_zeros(self, pattern: str) -> None:
        """Takes blocks of zeros for absent ones."""
        self.masks = masks_of_zeros(self.model, self.average, parse_pattern(pattern))
        self.pattern = str(parse_pattern(pattern))

    def state(self, weights: Mapping[str, Tensor], *, index: bool = True) -> dict[str, Tensor]:
        """Sparse where there are masks."""
        if not self.masks:
            return dict(weights)
        assert self.pattern is not None
        return sparsified(weights, self.masks, parse_pattern(self.pattern), index=index)


# CompVis


def from_compvis(where: str, content: Mapping[str, Any], head_dim: int, size: int) -> Latent:
    """From the content of a `.ckpt` file: a latent diffusion model, or a first stage alone.

    Raises:
        ConversionError: naming what is missing, unknown or of another shape.
    """
    state = content.get("state_dict", content)
    state = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    latent = Latent(head_dim=head_dim, size=size, step=int(content.get("global_step", 0)))
    if any(name.startswith("encoder.") for name in state):
        latent.first_stage = _first_stage(where, latent, state)
        return latent

    def below(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

    theirs, averaged, stage = below(UNET), below(EMA), below(FIRST_STAGE)
    known = (UNET, EMA, FIRST_STAGE)
    unknown = [name for name in state if not name.startswith(known) and name not in SCHEDULE]
    if unknown:
        raise ConversionError(f"{where}: tensors of no part of a latent diffusion model: {shown(unknown)}.")
    latent.shape = shape_of_compvis(theirs)
    pairs = unet_pairs(latent.shape)
    latent.model = to_diffusers(theirs, pairs, head_dim)
    check_names(where, latent.model, latent.build(empty=True).state_dict())
    if averaged:
        latent.decay = float(averaged.pop("decay", torch.tensor(latent.decay)))
        latent.updates = int(averaged.pop("num_updates", torch.tensor(0)))
        short = {f"diffusion_model.{name}".replace(".", ""): name for name in theirs}
        lost, extra = short.keys() - averaged.keys(), averaged.keys() - short.keys()
        if lost or extra:
            raise ConversionError(f"{where}, averaged: missing: {shown(list(lost))}; unknown: {shown(list(extra))}.")
        latent.average = to_diffusers({name: averaged[key] for key, name in short.items()}, pairs, head_dim)
    else:
        latent.average = latent.model
        latent.notes.append("the file has no average: the weights as trained stand for it")
    masks = content.get("masks") or {}
    if masks:
        latent.masks = to_diffusers({name.removeprefix(UNET): m.bool() for name, m in masks.items()}, pairs, head_dim)
        latent.pattern = str(parse_pattern(content["mask_pattern"]))
    if "betas" in state:
        latent.betas = _betas(where, state["betas"])
    latent.scale = float(state.get("scale_factor", torch.tensor(1.0)))
    if stage:
        latent.first_stage = _first_stage(where, latent, stage)
    latent.check(where)
    return latent


def to_ckpt(latent: Latent, path: Path) -> Path:
    """Writes a `.ckpt` file that CompVis's code loads."""
    state: dict[str, Tensor] = {}
    content: dict[str, Any] = {"state_dict": state, "global_step": latent.step}
    prefix = ""
    if latent.shape is not None:
        prefix = FIRST_STAGE
        pairs = unet_pairs(latent.shape)
        theirs = to_compvis(latent.model, pairs, latent.head_dim)
        averaged = to_compvis(latent.average, pairs, latent.head_dim)
        first, last, count = latent.betas
        state["betas"] = (torch.linspace(first**0.5, last**0.5, count, dtype=torch.float64) ** 2).float()
        state["scale_factor"] = torch.tensor(latent.scale)
        state |= {UNET + name: tensor for name, tensor in theirs.items()}
        state |= {EMA + "decay": torch.tensor(latent.decay), EMA + "num_updates": torch.tensor(latent.updates).int()}
        state |= {EMA + f"diffusion_model.{name}".replace(".", ""): tensor for name, tensor in averaged.items()}
        if latent.masks:
            masks = to_compvis(latent.masks, pairs, latent.head_dim)
            content |= {"masks": {UNET + name: mask for name, mask in masks.items()}, "mask_pattern": latent.pattern}
    if latent.first_stage is not None:
        config = latent.first_stage.config
        theirs = to_compvis(
            latent.first_stage.state_dict(), vq_pairs(len(config.block_out_channels), config.layers_per_block)
        )
        state |= {prefix + name: tensor for name, tensor in theirs.items()}
    content["state_dict"] = {name: tensor.contiguous() for name, tensor in state.items()}
    return write_ckpt(path, content)


def _first_stage(where: str, latent: Latent, theirs: dict[str, Tensor]) -> Any:
    """The `VQModel` of CompVis's tensors."""
    loss = [name for name in theirs if name.startswith("loss.")]
    if loss:
        latent.notes.append(f"left out: {len(loss)} tensors of the first stage's training loss ({shown(loss)})")
    theirs = {name: tensor for name, tensor in theirs.items() if not name.startswith("loss.")}
    widths: list[int] = []
    blocks = 0
    while f"encoder.down.{len(widths)}.block.0.norm2.weight" in theirs:
        blocks = sum(f"encoder.down.{len(widths)}.block.{k}.norm2.weight" in theirs for k in range(100))
        widths.append(len(theirs[f"encoder.down.{len(widths)}.block.0.norm2.weight"]))
    codebook = theirs.get("quantize.embedding.weight")
    if not widths or codebook is None:
        raise ConversionError(f"{where}: the first stage is no VQ autoencoder; got {shown(theirs)}.")
    model = vq_f4(widths=widths, blocks=blocks, codes=len(codebook), size=latent.size * 2 ** (len(widths) - 1))
    model.register_to_config(scaling_factor=latent.scale)
    ours = to_diffusers(theirs, vq_pairs(len(widths), blocks))
    check_names(f"{where}, first stage", ours, model.state_dict())
    model.load_state_dict(ours)
    return model.eval()


def _betas(where: str, betas: Tensor) -> tuple[float, float, int]:
    first, last, count = float(f"{float(betas[0]):.6g}"), float(f"{float(betas[-1]):.6g}"), len(betas)
    expected = torch.linspace(first**0.5, last**0.5, count, dtype=torch.float64) ** 2
    if not torch.allclose(betas.double(), expected, rtol=1e-4):
        raise ConversionError(
            f"{where}: the betas are not linear in their square root; other schedules are not served."
        )
    return first, last, count


# diffusers


def from_diffusers(folder: Path) -> Latent:
    """From the folder of a pipeline, of a U-Net or of a first stage.

    Raises:
        ConversionError, WeightsError: files are missing, damaged or of another kind.
    """
    pipeline = (folder / "model_index.json").is_file()
    kind = "" if pipeline else json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    latent = Latent()
    stage = next((f for f in (folder / "vqvae", folder / "vae") if f.is_dir()), None) if pipeline else None
    if kind == "VQModel" or stage is not None:
        latent.first_stage = load_autoencoder(folder if stage is None else stage)
    if kind == "VQModel":
        return latent
    source = folder / "unet" if pipeline else folder
    config = read_config(source, "UNet2DModel")
    model = load_unet(source)
    state = model.state_dict()
    latent.shape = shape_of_diffusers(state)
    latent.head_dim, latent.size = config["attention_head_dim"], config["sample_size"]
    latent.model, latent.masks, latent.pattern = densified(state, latent.build(empty=True).state_dict())
    latent.average = latent.model
    latent.check(str(folder))
    if (folder / "scheduler" / "scheduler_config.json").is_file():
        schedule = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        if schedule.get("beta_schedule") != "scaled_linear":
            raise ConversionError(
                f"{folder}: beta_schedule is {schedule.get('beta_schedule')!r}, expected scaled_linear."
            )
        latent.betas = (schedule["beta_start"], schedule["beta_end"], schedule["num_train_timesteps"])
    return latent


def to_folder(latent: Latent, folder: Path, *, weights: str) -> None:
    """Writes a pipeline's folder: DDIM as Latent Diffusion samples, the U-Net with the averaged or trained weights."""
    diffusers = require_diffusers("conversion")
    if latent.shape is None:
        latent.first_stage.save_pretrained(folder)
        return
    model = latent.build()
    load_sparse(model, latent.state(latent.average if weights == "ema" else latent.model))
    save_unet(model.eval(), folder / "unet")
    first, last, count = latent.betas
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=count,
        beta_start=first,
        beta_end=last,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": "DDIMPipeline", "_diffusers_version": diffusers.__version__}
    index |= {"scheduler": ["diffusers", "DDIMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    if latent.first_stage is not None:
        latent.first_stage.save_pretrained(folder / "vqvae")
        index |= {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# Ours


def from_checkpoint(path: Path, head_dim: int, size: int) -> Latent:
    """From a checkpoint of a U-Net, or a run's newest one.

    Raises:
        CheckpointError: there is none. ConversionError: it is of another model.
    """
    saved = checkpoint.load(path)
    schedule = saved.state.get("config", {}).get("schedule", "scaled_linear")
    if "unet" in saved.state and schedule != "scaled_linear":
        raise ConversionError(f"{saved.path}: its schedule is {schedule}; expected scaled_linear, others have no form.")
    made = saved.state.get("unet") or {"head_dim": head_dim, "size": size}
    latent = Latent(shape_of_diffusers(saved.model), made["head_dim"], made["size"], step=saved.step)
    shapes = latent.build(empty=True).state_dict()
    latent.model, latent.masks, latent.pattern = densified(saved.model, shapes)
    latent.average, _, _ = densified(saved.ema, shapes, saved.model)
    latent.decay = made.get("ema_decay", latent.decay)
    latent.updates = int(saved.state.get("ema_updates", 0))
    latent.betas, latent.scale = tuple(made.get("betas", BETAS)), made.get("scale", 1.0)
    latent.check(str(saved.path))
    stage = next((f / "first_stage" for f in (path, *path.parents[:2]) if (f / "first_stage").is_dir()), None)
    if stage is not None:
        latent.first_stage = load_autoencoder(stage)
    return latent


def to_checkpoint(latent: Latent, folder: Path, settings: dict[str, Any], source: str) -> None:
    """Writes a run's folder with one checkpoint: to sample, evaluate and convert from; it has no optimizer state."""
    if latent.shape is None:
        raise ConversionError("a first stage alone is no checkpoint; convert it --to diffusers.")
    made = {
        "size": latent.size,
        "head_dim": latent.head_dim,
        "widths": list(latent.shape.widths),
        "blocks": latent.shape.blocks,
        "attention": list(latent.shape.attention),
        "channels": latent.shape.channels,
        "betas": list(latent.betas),
        "scale": latent.scale,
        "ema_decay": latent.decay,
    }
    checkpoint.save(
        folder / "checkpoints",
        latent.step,
        model=latent.state(latent.model),
        ema=latent.state(latent.average, index=False),
        state={"config": settings, "unet": made, "plan": None, "ema_updates": latent.updates, "converted_from": source},
    )
    if latent.first_stage is not None:
        latent.first_stage.save_pretrained(folder / "first_stage")
