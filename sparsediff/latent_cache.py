"""Latents on disk: encoded once, mapped into memory, complete or not there at all.

    DIR/latents.bin     [images, views, 3, h, w] float32 or float16, training split first; a view is an image as it is
                        or mirrored (an encoder does not commute with mirroring, so the second one is encoded as well)
    DIR/latents.json    shape, splits, what they were made from, and a SHA-256 of every block

Latents are those before quantisation, at scale 1.0. `latent_build` makes them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsediff import autoencoder as first_stage
from sparsediff.datasets import ImageData

FORMAT = 1
DATA, META = "latents.bin", "latents.json"
SPLITS = ("train", "valid")
# What must be the same for latents to be those that a caller means, and in what words.
IDENTITY = {"images": "images, size or crop", "autoencoder": "autoencoder", "flips": "mirror images", "dtype": "dtype"}
AGAIN = "Make the latents again: sparsediff latents … --overwrite."


class LatentsError(RuntimeError):
    """Latents are missing, damaged, or others than those asked for; the message says what to do."""


class Latents:
    """A split of latents, by number; what `ImageBatches` draws from instead of `Images`.

    Args:
        folder: of the cache. first: row of its first latent. count: how many.
        shape: of the whole file, `(images, views, C, h, w)`. dtype: of the file.
        flip: chance of the mirror image in a batch.
        digest: identifies the whole file.
    """

    def __init__(
        self, folder: Path, first: int, count: int, shape: tuple[int, ...], dtype: str, flip: float, digest: str
    ) -> None:
        self.folder, self.first, self.count, self.file_shape, self.dtype = folder, first, count, shape, dtype
        self.flip, self.digest = flip, digest
        self._mapped: npt.NDArray[Any] | None = None

    def __len__(self) -> int:
        return self.count

    def view(self, i: int, flipped: bool = False) -> Tensor:
        """Latent i, or that of its mirror image: `[C, h, w]` float32.

        Raises:
            LatentsError: the mirror images were not encoded.
        """
        if not 0 <= i < self.count:
            raise IndexError(f"latents: index must be in [0, {self.count}); got {i}.")
        if flipped and self.file_shape[1] < 2:
            raise LatentsError(f"{self.folder}: holds no mirror images; make it again with --flips both --overwrite.")
        if self._mapped is None:
            self._mapped = np.memmap(self.folder / DATA, self.dtype, "r", shape=self.file_shape)
        return torch.from_numpy(np.array(self._mapped[self.first + i, int(flipped)], dtype=np.float32))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a view."""
        return self.file_shape[2:]

    def fingerprint(self) -> dict[str, int | str]:
        """What identifies these latents (JSON-able)."""
        return {"latents": self.count, "first": self.first, "sha256": self.digest}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}  # a worker process maps the file itself; a pickle would hold it all


@dataclass(frozen=True)
class LatentData:
    """Latents of a data set.

    Args:
        folder: where they lie. train, valid: the splits. meta: what `latents.json` says.
    """

    folder: Path
    train: Latents
    valid: Latents
    meta: Mapping[str, Any]

    def summary(self) -> str:
        """One line a person can read."""
        shape, size = self.meta["shape"], (self.folder / DATA).stat().st_size
        views = "images and mirror images" if shape[1] == 2 else "images"
        form = f"{'x'.join(map(str, shape[2:]))} {self.meta['dtype']} of {views}, {size / 1e6:,.1f} MB"
        counts = f"{len(self.train):,} train / {len(self.valid):,} valid latents"
        return f"{self.folder}: {counts} {form}; {self.meta['source']}"


def open_latents(
    folder: str | os.PathLike[str],
    *,
    data: ImageData | None = None,
    autoencoder: Any = None,
    flip: float | None = None,
    verify: bool = True,
) -> LatentData:
    """The latents in a folder that `build` made.

    Args:
        folder: of the latents.
        data: the images that they should be of; None: any.
        autoencoder: that they should be made with (a model, or its `fingerprint`); None: any.
        flip: chance of a mirror image in a batch; None: that of the data set.
        verify: compare every block with its checksum, at the speed of the disk.

    Raises:
        LatentsError: they are not there, not finished, damaged, or made from something else.
    """
    folder = Path(folder).expanduser()
    if not (folder / META).is_file():
        begun = folder.with_name(f".{folder.name}.partial").is_dir()
        hint = "is not finished: run `sparsediff latents` again" if begun else "holds none: run `sparsediff latents`"
        raise LatentsError(f"{folder}: expected latents; the folder {hint} with --out {folder}.")
    meta = read_json(folder / META)
    if meta.get("format") != FORMAT:
        raise LatentsError(f"{folder}: has format {meta.get('format')}; this version reads {FORMAT}. Make it again.")
    expected: dict[str, Any] = {}
    if data is not None:
        expected["images"] = {part: getattr(data, part).fingerprint() for part in SPLITS}
    if autoencoder is not None:
        known = isinstance(autoencoder, Mapping)
        expected["autoencoder"] = dict(autoencoder) if known else first_stage.fingerprint(autoencoder)
    compare(folder, meta, expected, " (another --out keeps these)")
    shape, dtype = tuple(meta["shape"]), meta["dtype"]
    size = (folder / DATA).stat().st_size if (folder / DATA).is_file() else -1
    if size != byte_count(meta):
        raise LatentsError(f"{folder / DATA}: expected {byte_count(meta):,} bytes; got {max(size, 0):,}. {AGAIN}")
    if verify:
        for block, digest in enumerate(digests(folder, meta)):
            if digest != meta["blocks"][block]:
                raise LatentsError(f"{folder / DATA}: block {block} is damaged, its checksum differs. {AGAIN}")
    flip = meta["flip"] if flip is None else flip
    if flip > 0 and shape[1] < 2:
        if meta["flip"] != flip:
            raise LatentsError(f"{folder}: holds no mirror images; make it again with --flips both --overwrite.")
        flip = 0.0  # made without, on purpose
    digest = hashlib.sha256("".join(meta["blocks"]).encode()).hexdigest()[:20]
    train, valid = (meta["images"][part]["images"] for part in SPLITS)
    parts = (
        Latents(folder, 0, train, shape, dtype, flip, digest),
        Latents(folder, train, valid, shape, dtype, flip, digest),
    )
    return LatentData(folder, *parts, meta)


def compare(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any], hint: str = "") -> None:
    """Raises LatentsError unless what was `found` in a folder is, as far as `expected` says, what is expected."""
    different = [key for key in IDENTITY if key in expected and found.get(key) != expected[key]]
    if different:
        listing = "; ".join(f"{IDENTITY[k]}: there {found.get(k)}, asked for {expected[k]}" for k in different)
        raise LatentsError(
            f"{folder}: holds latents made with other {' and '.join(IDENTITY[k] for k in different)} ({listing}). "
            f"Give what they were made with, or make them again with --overwrite{hint}."
        )


def digests(folder: Path, job: Mapping[str, Any]) -> Iterator[str]:
    """SHA-256 of every block of the file."""
    size = job["batch_size"] * row_bytes(job)
    with open(folder / DATA, "rb") as stream:
        for start in range(0, byte_count(job), size):
            yield hashlib.sha256(stream.read(min(size, byte_count(job) - start))).hexdigest()


def row_bytes(job: Mapping[str, Any]) -> int:
    """Of one image's views."""
    return int(np.prod(job["shape"][1:])) * np.dtype(job["dtype"]).itemsize


def byte_count(job: Mapping[str, Any]) -> int:
    """Of the whole file."""
    return int(job["shape"][0]) * row_bytes(job)


def read_json(path: Path) -> dict[str, Any]:
    """A description of latents.

    Raises:
        LatentsError: it is missing or damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LatentsError(f"{path}: expected the description of latents; cannot be read ({error}). {AGAIN}") from None
    if not isinstance(found, dict):
        raise LatentsError(f"{path}: expected the description of latents; got {type(found).__name__}. {AGAIN}")
    return found
