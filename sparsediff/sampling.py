"""The `sample` command: a checkpoint's drawings or images as one picture, as arrays, or as a folder of pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tqdm import tqdm

from sparsediff.autoencoder import load_autoencoder
from sparsediff.build import Sampleable, device_of, draw, load_model
from sparsediff.files import write_atomically
from sparsediff.images import draw_images, pixels
from sparsediff.rendering import RENDERER, grid, image_grid, render, save_png

META = "samples.json"


def sample_checkpoint(
    checkpoint: Path,
    *,
    n: int,
    out: Path,
    seed: int = 0,
    weights: str = "ema",
    device: str = "cpu",
    threads: int = 0,
    autoencoder: Path | None = None,
    batch_size: int = 128,
    **options: Any,
) -> Path:
    """Draws `n` drawings or images with the seeds seed … seed + n − 1 and saves them.

    Args:
        checkpoint: a checkpoint or a run's folder.
        n: number of drawings.
        out: a .png file; or an .npz file with points `[N, 3]` and offsets `[n + 1]` of drawings, or with images
            `[n, H, W, 3]` uint8, or with latents `[n, C, h, w]` float32 where there is no autoencoder to decode them;
            or, without a suffix, a folder (see `write_folder`).
        seed, weights, device, threads: see `load_model`; 0 threads is torch's choice.
        autoencoder: folder of the autoencoder of latents; None: that of the run.
        batch_size: drawings a forward.
        options: of `samplers.sample_drawings` or `images.draw_images`.

    Returns:
        `out`.
    """
    if n < 1:
        raise ValueError(f"sample: n must be at least 1; got {n}.")
    if out.suffix not in (".png", ".npz", ""):
        raise ValueError(
            f"sample: out must end in .png (a picture) or .npz (the drawings), or be a folder; got {str(out)!r}."
        )
    if threads:
        torch.set_num_threads(threads)
    run = load_model(checkpoint, weights=weights, device=device)
    folder = autoencoder or run.first_stage
    if run.latent and folder is None and out.suffix != ".npz":
        raise ValueError(
            f"sample: {checkpoint} draws latents: give the folder of their autoencoder (--autoencoder), or an --out "
            "that ends in .npz, which gets the latents."
        )
    stage = load_autoencoder(folder).to(device_of(device)) if run.latent and folder is not None else None
    seeds = range(seed, seed + n)
    options["batch_size"] = batch_size
    if out.suffix == "":
        made: dict[str, Any] = {"checkpoint": str(checkpoint.resolve()), "step": run.step, "weights": weights}
        return write_folder(run, out, seeds, stage, made, **options)
    arrays: dict[str, Any]
    if run.lengths is not None:
        drawings = draw(run.model, run.diffusion, run.lengths, seeds, form=run.config.form, **options)
        if out.suffix == ".png":
            return save_png(grid(drawings), out)
        arrays = {"points": np.concatenate(drawings), "offsets": np.cumsum([0, *map(len, drawings)])}
    else:
        x = draw_images(run.model, run.diffusion, seeds, **options)
        arrays = {"latents": x.numpy()} if run.latent and stage is None else {"images": pixels(x, stage)}
    if out.suffix == ".png":
        return save_png(image_grid(arrays["images"]), out)
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, **arrays)
    return out


def write_folder(
    run: Sampleable, folder: Path, seeds: Sequence[int], stage: Any, made: dict[str, Any], **options: Any
) -> Path:
    """One PNG a sample, called by its seed: what scores are computed on. What is there already is not drawn again.

    Args:
        run: the model.
        folder: made if need be. `samples.json` in it says what the samples were made with.
        seeds: one a sample.
        stage: the autoencoder of latents, or None.
        made: what identifies the model.
        options: as for `sample_checkpoint`; `batch_size` samples are drawn, and kept in memory, at a time.

    Returns:
        `folder`.

    Raises:
        ValueError: it holds samples that were made with something else.
    """
    made = made | {key: value for key, value in options.items() if key != "batch_size"}
    if run.lengths is not None:
        made["renderer"] = RENDERER
    try:
        there = json.loads((folder / META).read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = None
    if there not in (None, made) or (there is None and folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"sample: {folder} holds other files than samples of {made}; choose another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / META, json.dumps(made, indent=1) + "\n")
    missing = [seed for seed in seeds if not (folder / f"{seed:08d}.png").is_file()]
    size = options["batch_size"]
    with tqdm(total=len(seeds), initial=len(seeds) - len(missing), unit="sample", disable=None) as bar:
        for start in range(0, len(missing), size):
            part = missing[start : start + size]
            for seed, picture in zip(part, _pictures(run, part, stage, options), strict=True):
                save_png(Image.fromarray(picture), folder / f"{seed:08d}.png")
            bar.update(len(part))
    return folder


def _pictures(
    run: Sampleable, seeds: Sequence[int], stage: Any, options: dict[str, Any]
) -> list[npt.NDArray[np.uint8]]:
    if run.lengths is None:
        return list(pixels(draw_images(run.model, run.diffusion, seeds, **options), stage))
    return [render(d) for d in draw(run.model, run.diffusion, run.lengths, seeds, form=run.config.form, **options)]
