"""The U-Net of Latent Diffusion: diffusers' `UNet2DModel`, as it is, in the paper's configuration and a small one.

    224-448-672-896 channels at 64² - 32² - 16² - 8², two residual blocks a level, attention below the first level in
    heads of 32 channels: 274,056,163 parameters

`sparse_kernels.sparsify` takes it as it stands: 155 weights, of which to_q, to_k and to_v of an attention are allocated
as one (123). A sparse one runs inside diffusers' own pipelines: `DDIMPipeline(unet, scheduler)`.

A folder of a dense model is diffusers' own. The weights of a sparse one lie in `sparse_model.safetensors`, a name that
diffusers does not look for, because its `from_pretrained` would fill the dense weights, which are not there, at random;
a pipeline takes it as an argument: `DDIMPipeline.from_pretrained(folder, unet=load_unet(folder / "unet"))`.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022, table 12.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparse_kernels.nn import Plan
from sparsediff.files import replaced
from sparsediff.models import MODELS
from sparsediff.models._folders import DENSE_FILE, WeightsError, load_dense, read_config, require_diffusers
from sparsediff.rebuild import is_sparse, load_sparse

SPARSE_FILE, PLAN_FILE = "sparse_model.safetensors", "plan.json"

# Arguments of `unet` by size: the paper's, and one for 32x32 pixels or latents on a laptop (7.4 M parameters).
SIZES: dict[str, dict[str, Any]] = {
    "paper": {"size": 64, "widths": (224, 448, 672, 896), "blocks": 2, "attention": (False, True, True, True)},
    "small": {"size": 32, "widths": (64, 128, 192), "blocks": 1, "attention": (False, True, True)},
}


@MODELS.register("unet")
def unet(
    size: int = 64,
    widths: Sequence[int] = (224, 448, 672, 896),
    *,
    blocks: int = 2,
    attention: Sequence[bool] = (False, True, True, True),
    channels: int = 3,
    head_dim: int = 32,
    groups: int = 32,
    seed: int | None = None,
) -> Any:
    """A `UNet2DModel` that predicts the noise in `[B, channels, size, size]`; the defaults are the paper's.

    Args:
        size: height and width of its input, pixels or latents.
        widths: channels of each level; a level has half the resolution of the one before.
        blocks: residual blocks of a level.
        attention: which levels have attention.
        channels: of its input and output.
        head_dim: channels of an attention head.
        groups: of the group norms.
        seed: seed of the initial weights; None takes torch's global generator.

    Raises:
        ValueError: sizes that do not fit.
        RuntimeError: diffusers is not installed.
    """
    levels = len(widths)
    if len(attention) != levels or levels == 0:
        raise ValueError(f"unet: attention must say yes or no for each of the {levels} levels; got {attention}.")
    if size % 2 ** (levels - 1):
        raise ValueError(f"unet: size must be a multiple of {2 ** (levels - 1)} for {levels} levels; got {size}.")
    wrong = [w for w, a in zip(widths, attention, strict=True) if w % groups or (a and w % head_dim)]
    if wrong or widths[-1] % head_dim:  # the middle block has attention, always
        raise ValueError(
            f"unet: widths must be multiples of groups, {groups}, and with attention of head_dim, {head_dim}; "
            f"got {tuple(widths)}."
        )
    model_class = require_diffusers("the U-Net").UNet2DModel
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return model_class(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=tuple(widths),
            layers_per_block=blocks,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
            attention_head_dim=head_dim,
            norm_num_groups=groups,
        )


def example_inputs(model: Any, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Arguments (x, t) of a forward of `batch` images, for whoever has to see one run."""
    parameter = next(model.parameters())
    size, channels = model.config.sample_size, model.config.in_channels
    x = torch.zeros(batch, channels, size, size, device=parameter.device, dtype=parameter.dtype)
    return x, torch.zeros(batch, dtype=torch.long, device=parameter.device)


def save_unet(model: Any, folder: Path, plan: Plan | None = None) -> Path:
    """Writes a dense or sparse U-Net: `config.json` and one weight file, each whole or not at all.

    Args:
        model: a `UNet2DModel`, whose layers may be sparse.
        folder: made if need be. Weights of an earlier model in it are replaced.
        plan: what `sparsify` returned, or `replan`, so that the layers run in the same forms, to the same bits, when
            they come back; without it they choose for themselves.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Copies, because safetensors refuses views of one storage, such as those of the index.
    state = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
    name, other = (SPARSE_FILE, DENSE_FILE) if is_sparse(state) else (DENSE_FILE, SPARSE_FILE)
    with replaced(folder / name) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
        model.save_config(folder)
    (folder / other).unlink(missing_ok=True)
    if plan is None:
        (folder / PLAN_FILE).unlink(missing_ok=True)
    else:
        plan.save(folder / PLAN_FILE)
    return folder


def load_unet(folder: Path) -> Any:
    """Reads a dense or sparse U-Net, written by `save_unet` or by diffusers; on the CPU, in evaluation mode.

    A plan for the CPU that was saved with it is applied, where its backends run here; one for another device is left to
    the caller, after moving the model: `Plan.load(folder / "plan.json").apply(model)`.

    Raises:
        WeightsError: files are missing, damaged or of another architecture.
        RuntimeError: diffusers is not installed.
    """
    model_class = require_diffusers("the U-Net").UNet2DModel
    file = next((folder / name for name in (SPARSE_FILE, DENSE_FILE) if (folder / name).is_file()), None)
    if file is None:
        return load_dense(model_class, folder)  # an older file of diffusers, or none, which it says
    config = read_config(folder, "UNet2DModel")
    try:
        state = load_file(file)
        if not is_sparse(state):
            return load_dense(model_class, folder)
        model: nn.Module = load_sparse(model_class.from_config(config), state)
        plan = Plan.load(folder / PLAN_FILE) if (folder / PLAN_FILE).is_file() else None
        if plan is not None and plan.device == "cpu":
            with contextlib.suppress(RuntimeError):  # a backend of the plan's machine is missing on this one
                plan.apply(model)
    except WeightsError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{file}: cannot be loaded ({type(error).__name__}: {error}). Get it again.") from error
    return model.eval()
