"""The first stage of Latent Diffusion, VQ-f4: 256x256 pixels to 64x64x3 latents and back; pretrained, frozen, dense.

    z = quant_conv(encoder(x))                        before quantisation: what the U-Net is trained on, scale 1.0
    x = decoder(post_quant_conv(nearest code to z))   a codebook of 8192 vectors of 3 numbers

It is diffusers' `VQModel` (55,322,782 parameters), read from a folder that the user gives.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022, table 8, f = 4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsediff.models._folders import WeightsError, load_dense, require_diffusers

SOURCE = (
    "VQ-f4 is the folder `vqvae` of https://huggingface.co/CompVis/ldm-celebahq-256: put its config.json and "
    "diffusion_pytorch_model.safetensors (or .bin) into one folder and give that folder's path"
)
FACTOR = 4  # pixels of an image's side to one of its latent


def vq_f4(
    *, widths: Sequence[int] = (128, 256, 512), blocks: int = 2, codes: int = 8192, size: int = 256, groups: int = 32
) -> Any:
    """A fresh `VQModel` in the configuration of VQ-f4, which the defaults are; smaller ones for tests.

    Args:
        widths: channels of the levels; all but the last halve the resolution.
        blocks: residual blocks of a level.
        codes: vectors of the codebook.
        size: height and width of the images.
        groups: of the group norms.
    """
    return require_diffusers("the autoencoder").VQModel(
        sample_size=size,
        block_out_channels=tuple(widths),
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=blocks,
        latent_channels=3,
        vq_embed_dim=3,
        num_vq_embeddings=codes,
        norm_num_groups=groups,
        scaling_factor=1.0,
    )


def load_autoencoder(folder: str | Path) -> Any:
    """The autoencoder in a folder of diffusers, or in the `vqvae` of a pipeline's folder; frozen, in evaluation mode.

    Its `scaling_factor` is 1.0 whatever the file says: the published files leave it out, and diffusers' default is that
    of another autoencoder.

    Raises:
        WeightsError: it is not there, with where to get it; or it is damaged or another model.
        RuntimeError: diffusers is not installed.
    """
    folder = Path(folder).expanduser()
    found = next((f for f in (folder, folder / "vqvae", folder / "vae") if (f / "config.json").is_file()), None)
    if found is None:
        raise WeightsError(f"autoencoder: expected config.json of a VQModel in {folder}; there is none. {SOURCE}.")
    model = load_dense(require_diffusers("the autoencoder").VQModel, found)
    model.register_to_config(scaling_factor=1.0)
    return model.requires_grad_(False).eval()


def factor(autoencoder: Any) -> int:
    """How many pixels of an image's side make one of its latent's."""
    return int(2 ** (len(autoencoder.config.block_out_channels) - 1))


@torch.no_grad()
def encode(autoencoder: Any, images: Tensor) -> Tensor:
    """Latents before quantisation: `[B, 3, H, W]` in [-1, 1] to `[B, 3, H/f, W/f]`, the dtype of the autoencoder."""
    parameter = next(autoencoder.parameters())
    latents: Tensor = autoencoder.encode(images.to(parameter.device, parameter.dtype)).latents
    return latents


@torch.no_grad()
def decode(autoencoder: Any, latents: Tensor) -> Tensor:
    """Images about [-1, 1] of latents, which are quantised first: `[B, 3, h, w]` to `[B, 3, f·h, f·w]`."""
    parameter = next(autoencoder.parameters())
    images: Tensor = autoencoder.decode(latents.to(parameter.device, parameter.dtype)).sample
    return images


def fingerprint(autoencoder: Any) -> dict[str, Any]:
    """What identifies an autoencoder: its parameters' number and a digest of their names, shapes and bits."""
    digest = hashlib.sha256()
    total = 0
    for name, tensor in sorted(autoencoder.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
        total += tensor.numel()
    return {"class": type(autoencoder).__name__, "numbers": total, "sha256": digest.hexdigest()[:20]}
