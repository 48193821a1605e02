"""The `latents` command: encodes a data set of images once, so that no training step has to.

Nothing here imports torch before the command runs, so that help is quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparsediff.presets import PRESETS


@dataclass(frozen=True)
class LatentsConfig:
    """Encodes a data set of images with a frozen autoencoder into a folder that training reads. The same command again
    continues where it was stopped, killed or cut off."""

    dataset: str
    """Data set of images, by its registered name."""
    data: Path | None = None
    """File or folder of the images."""
    autoencoder: Path | None = None
    """Folder of the autoencoder (VQ-f4), as diffusers has it: config.json and its weights."""
    out: Path = Path("latents")
    """Folder of the latents; it appears when they are complete."""
    size: int | None = None
    """Height and width of the images after crop and resize; the data set's own if not given."""
    flips: Literal["auto", "both", "none"] = "auto"
    """both: an image and its mirror image are encoded, because the latent of one is not the mirrored latent of the
    other; auto: both where the data set is mirrored in training (lsun)."""
    train_count: int | None = None
    """Images for training; 0: all that validation leaves. The data set's own number if not given."""
    valid_count: int | None = None
    """Images for validation; 0: none. The data set's own number if not given."""
    train_list: Path | None = None
    """Text file that names the images for training, one a line."""
    valid_list: Path | None = None
    """Text file that names the images for validation, one a line."""
    on_bad_image: Literal["refuse", "skip"] = "refuse"
    """What happens if images cannot be used: end with a list of them, or leave them out and name them."""
    convert: bool = False
    """Use images with a palette, transparency, CMYK, 16 bits, several frames or an EXIF orientation, converted."""
    max_pixels: int = 64_000_000
    """Images of more pixels cannot be used."""
    check: bool = False
    """Check the images, name those that cannot be used, and stop; needs no autoencoder."""
    dtype: Literal["float32", "float16"] = "float32"
    """How latents are stored."""
    batch_size: int = 8
    """Images a step of the encoder."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""
    overwrite: bool = False
    """Replace what is in `out`, finished or not."""

    def summary(self) -> str:
        """One line for help."""
        return f"latents of {self.dataset}" + (f" at {self.size} pixels" if self.size else "")


# The data sets under their own names, and under those of the presets that train on them.
LATENTS: dict[str, LatentsConfig] = {
    **{name: LatentsConfig(name) for name in ("celebahq", "emoji", "imagefolder", "imagenette", "lsun")},
    **{
        name: LatentsConfig(
            preset.dataset,
            # What the autoencoder makes of them, a quarter of that in height and width, is what the U-Net takes.
            size=128 if preset.unet == "small" else None,
            out=Path("latents", name.removeprefix("ldm-")),
        )
        for name, preset in PRESETS.items()
        if preset.model == "unet"
    },
}


def run(config: LatentsConfig) -> int:
    """Loads and checks the images, encodes them, and says what is there; returns the exit code.

    Raises:
        DataError: the images cannot be used. WeightsError: the autoencoder cannot.
        LatentsError: `out` holds other latents.
    """
    import torch

    from sparsediff.autoencoder import SOURCE, load_autoencoder
    from sparsediff.build import device_of
    from sparsediff.datasets import load_images
    from sparsediff.latent_build import build
    from sparsediff.latent_cache import open_latents
    from sparsediff.models._folders import WeightsError

    device = device_of(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    if not config.check and config.autoencoder is None:
        raise WeightsError(f"latents: give the autoencoder's folder with --autoencoder. {SOURCE}.")
    # A check names all bad images, which "refuse" would end at ten.
    choice = "skip" if config.check else config.on_bad_image
    names = "size train_count valid_count train_list valid_list convert max_pixels".split()  # noqa: SIM905
    options = {name: getattr(config, name) for name in names}
    data = load_images(config.dataset, path=config.data, threads=config.threads, on_bad_image=choice, **options)
    print(data.summary(), flush=True)
    for name, why in data.skipped.items():
        print(f"{name}: {why}")
    if config.check or config.autoencoder is None:
        return int(bool(data.skipped) and config.on_bad_image == "refuse")
    model = load_autoencoder(config.autoencoder).to(device)
    both = data.train.flip > 0 if config.flips == "auto" else config.flips == "both"
    build(
        data,
        model,
        config.out,
        both_flips=both,
        dtype=config.dtype,
        batch_size=config.batch_size,
        overwrite=config.overwrite,
    )
    print(open_latents(config.out).summary())
    return 0
