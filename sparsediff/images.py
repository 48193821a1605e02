"""Image models: the data that they train on, and pictures of what they draw.

A U-Net diffuses pixels in [-1, 1], or latents of an autoencoder: precomputed ones, or encoded in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sparsediff import autoencoder as first_stage
from sparsediff.datasets import DataError, ImageData, load_images
from sparsediff.diffusion import Diffusion
from sparsediff.latent_cache import LatentData, open_latents
from sparsediff.presets import TrainConfig
from sparsediff.samplers import SampleNoise, ddim, ddpm

OPTIONS = ("size", "flip", "train_count", "valid_count", "train_list", "valid_list", "convert", "max_pixels")


def load_first_stage(config: TrainConfig) -> Any:
    """The autoencoder of the settings, or None.

    Raises:
        WeightsError: its folder cannot be used.
    """
    return None if config.autoencoder is None else first_stage.load_autoencoder(config.autoencoder)


def load_items(config: TrainConfig, autoencoder: Any = None) -> ImageData | LatentData:
    """The images or latents of the settings.

    Args:
        config: the settings.
        autoencoder: that latents must have been made with; None: any.

    Raises:
        DataError: images are missing or cannot be used.
        LatentsError: the latents are missing, damaged, or others.
    """
    if config.latents is not None:
        return open_latents(config.latents, autoencoder=autoencoder, flip=config.flip)
    options = {name: getattr(config, name) for name in OPTIONS}
    choice = "refuse" if config.on_bad == "error" else config.on_bad
    return load_images(config.dataset, path=config.data, threads=config.threads, on_bad_image=choice, **options)


def check_size(model: Any, shape: Sequence[int], config: TrainConfig) -> None:
    """Refuses items of another shape than the U-Net takes.

    Args:
        model: the U-Net. shape: `(C, h, w)` of what it is to diffuse. config: the settings.

    Raises:
        DataError: with the remedy.
    """
    size, channels = model.config.sample_size, model.config.in_channels
    if tuple(shape) == (channels, size, size):
        return
    kind = "images" if config.latents is None and config.autoencoder is None else "latents"
    remedy = f"choose another --size, or the other U-Net (--unet, here {config.unet})"
    if kind == "images" and config.unet == "paper":
        remedy = (
            "train on latents (--latents FOLDER, made by `sparsediff latents`), encode the images in every step "
            f"(--autoencoder FOLDER), or train on pixels with --size {size}"
        )
    found = "x".join(map(str, shape))
    raise DataError(f"{config.model}: the U-Net takes {channels}x{size}x{size}; the {kind} are {found}: {remedy}.")


@torch.no_grad()
def draw_images(
    model: nn.Module,
    diffusion: Diffusion,
    seeds: Sequence[int],
    *,
    sampler: Literal["ddim", "ddpm"] = "ddim",
    steps: int = 100,
    eta: float = 0.0,
    batch_size: int = 128,
) -> Tensor:
    """Generates one image, or latent, for every seed.

    Args:
        model: a `UNet2DModel`; its device is where sampling runs.
        diffusion: the schedule it was trained with.
        seeds: one an image; the same seed gives the same image in every batch, up to the rounding of products.
        sampler: "ddim" (`steps`, `eta`) or "ddpm" (all T steps).
        steps, eta: of DDIM. batch_size: images a forward.

    Returns:
        `[n, C, h, w]` float32 on the CPU, in the model's data space.
    """
    if batch_size < 1:
        raise ValueError(f"sampling: batch_size must be at least 1; got {batch_size}.")
    if sampler not in ("ddim", "ddpm"):
        raise ValueError(f"sampler must be 'ddim' or 'ddpm'; got {sampler!r}.")
    device = next(model.parameters()).device
    config: Any = model.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    predict = Noise(model)
    was_training = model.training
    model.eval()
    parts = []
    for start in range(0, len(seeds), batch_size):
        noise = SampleNoise(shape, seeds[start : start + batch_size], device=device)
        if sampler == "ddim":
            x = ddim(predict, noise(), diffusion, steps, eta=eta, noise=noise)
        else:
            x = ddpm(predict, noise(), diffusion, noise=noise)
        parts.append(x.float().contiguous().cpu())
    model.train(was_training)
    return torch.cat(parts)


class Noise:
    """A U-Net as a predictor, `(x_t, t [B]) -> eps`; images go in and out with their channels last in memory.

    Args:
        model: a `UNet2DModel`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        eps: Tensor = self.model(x.contiguous(memory_format=torch.channels_last), t).sample
        return eps


def pixels(x: Tensor, autoencoder: Any = None, *, batch_size: int = 16) -> npt.NDArray[np.uint8]:
    """Pictures of what `draw_images` returns.

    Args:
        x: `[n, 3, h, w]` in [-1, 1], clamped; or latents.
        autoencoder: that decodes latents; without it latents show as they are, colours for channels.
        batch_size: of decoding.

    Returns:
        `[n, H, W, 3]` uint8; values that are not finite are grey.
    """
    if autoencoder is not None:
        x = torch.cat([first_stage.decode(autoencoder, part).float().cpu() for part in x.split(batch_size)])
    x = (x.nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1) + 1) * 127.5
    return x.round().byte().permute(0, 2, 3, 1).contiguous().numpy()
