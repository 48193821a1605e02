"""The `convert` command: pretrained models in and trained ones out, sparse ones with their masks.

Every target is written under another name and renamed: it is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from sparsediff.checkpoint import find, flush
from sparsediff.conversion._chirodiff import convert_chirodiff, is_chirodiff
from sparsediff.conversion._ckpt import read_ckpt
from sparsediff.conversion._latent import (
    Latent,
    from_checkpoint,
    from_compvis,
    from_diffusers,
    to_checkpoint,
    to_ckpt,
    to_folder,
)
from sparsediff.conversion._names import ConversionError
from sparsediff.presets import PRESETS
from sparsediff.samplers import LengthDistribution

__all__ = ["ConversionError", "convert"]

Form = Literal["ckpt", "diffusers", "checkpoint"]


def convert(
    source: Path,
    target: Path,
    *,
    to: Form | None = None,
    weights: Literal["ema", "model"] = "ema",
    head_dim: int = 32,
    size: int = 64,
    dense: bool = False,
    zeros: str | None = None,
    preset: str = "chirodiff-kanjivg",
    data: str | None = None,
) -> str:
    """Converts a model; its kind is found out from the files.

    Args:
        source: a `.ckpt` file, a folder of diffusers, or a checkpoint of ours or a run's folder.
        target: what is made; it must not exist.
        to: its form; a name that ends in `.ckpt` says so itself.
        weights: which ones a folder of diffusers gets, the averaged or those of the last step.
        head_dim, size: channels of an attention head, and height of the U-Net's input, which a `.ckpt` does not tell.
        dense: write absent weights as zeros, without masks.
        zeros: a pattern by which blocks of zeros in the source are taken for absent ones, where it has no masks.
        preset, data: for ChiroDiff's checkpoints: settings that they do not hold, and the data set whose drawings'
            lengths sampling draws from.

    Returns:
        What was done, in lines.

    Raises:
        ConversionError, CheckpointError, WeightsError, DataError, OSError: with the remedy; there is no target then.
    """
    form: Form | None = to or ("ckpt" if target.suffix == ".ckpt" else None)
    if form is None:
        raise ConversionError(f"{target}: say what it is to be: --to ckpt, diffusers or checkpoint.")
    if target.exists():
        raise ConversionError(f"{target} exists already; choose another target, or remove it.")
    content = read_ckpt(source) if source.is_file() else None
    if content is not None and is_chirodiff(content):
        if form != "checkpoint":
            raise ConversionError(f"{source}: ChiroDiff's checkpoints convert --to checkpoint only.")
        from sparsediff.train import load_data

        config = dataclasses.replace(PRESETS[preset], data=data, out=str(target))
        lengths = LengthDistribution(torch.from_numpy(load_data(config).train.length_histogram()))
        with _whole(target) as folder:
            text = convert_chirodiff(str(source), content, folder, config, lengths)
        return f"{target}: ChiroDiff, {text}, lengths of {config.dataset}; sparsediff sample {target} draws from it"
    if content is not None:
        latent = from_compvis(str(source), content, head_dim, size)
    elif find(source) is not None:
        latent = from_checkpoint(source, head_dim, size)
    elif (source / "model_index.json").is_file() or (source / "config.json").is_file():
        latent = from_diffusers(source)
    else:
        raise ConversionError(
            f"{source}: expected a .ckpt file, a folder of diffusers (with model_index.json or config.json) or a "
            "checkpoint; it is none of them."
        )
    if zeros is not None and not latent.masks and latent.shape is not None:
        latent.hide_zeros(zeros)
    if dense:
        latent.masks, latent.pattern = {}, None
    if form == "ckpt":
        to_ckpt(latent, target)
    else:
        with _whole(target) as folder:
            if form == "diffusers":
                to_folder(latent, folder, weights=weights)
            else:
                to_checkpoint(latent, folder, {}, str(source))
    return "\n".join([f"{target}: {_described(latent)}", *latent.notes])


def _described(latent: Latent) -> str:
    parts = []
    if latent.shape is not None:
        parts.append(f"U-Net of {sum(tensor.numel() for tensor in latent.model.values()):,} parameters")
    if latent.masks:
        numel = sum(mask.numel() for mask in latent.masks.values())
        absent = numel - sum(int(mask.sum()) for mask in latent.masks.values())
        parts.append(f"{len(latent.masks)} sparse weights ({latent.pattern}), {absent:,} of their {numel:,} absent")
    if latent.first_stage is not None:
        parts.append("first stage")
    return ", ".join(parts)


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` where nothing went wrong, and vanishes otherwise."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            flush(path)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
