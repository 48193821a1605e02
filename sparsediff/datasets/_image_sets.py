"""Data sets of images: `load_images(name, …)` finds, checks and splits them; decoding comes when asked for."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _cache as caching
from ._image_check import Verdict, check
from ._image_entry import ImageDataset, ImagePreparation, deal, listed
from ._image_sources import ImageSource, printable
from ._images import VERSION, BadImage, Rules, UInt8, crop_resize
from ._registry import get
from ._strokes import DataError, Int64


class Images:
    """A split: images of one size, by number.

    Args:
        source: where they are.
        chosen: `[n]` which of them.
        verdicts: of the check, one for each.
        rules: as they were checked under.
        size: height and width after `crop_resize`.
        flip: chance of being mirrored in a batch.
        labels: `[n]` int64 classes, -1 where there are none.
    """

    def __init__(
        self,
        source: ImageSource,
        chosen: Sequence[int],
        verdicts: Sequence[Verdict],
        rules: Rules,
        size: int,
        flip: float,
        labels: Int64,
    ) -> None:
        self.source, self.rules, self.size, self.flip, self.labels = source, rules, size, flip, labels
        self.chosen: Int64 = np.asarray(chosen, dtype=np.int64)
        self.digests = [verdict.digest for verdict in verdicts]

    def __len__(self) -> int:
        return len(self.chosen)

    def name(self, i: int) -> str:
        """What image i is called in its source."""
        return printable(self.source.names[self.chosen[i]])

    def picture(self, i: int) -> UInt8:
        """Image i after crop and resize, never mirrored: `[size, size, 3]` uint8.

        Raises:
            DataError: it cannot be read any more.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"images: index must be in [0, {len(self)}); got {i}.")
        at = int(self.chosen[i])
        try:
            return crop_resize(self.source.picture(at, self.rules), self.size)
        except BadImage as error:
            raise DataError(
                f"{self.source.where(at)}: {error}. It was in order when the images were checked; put it back, and "
                "resume."
            ) from None

    def view(self, i: int, flipped: bool = False) -> Tensor:
        """Image i, or its mirror image, as `[3, size, size]` float32 in [-1, 1]: `pixels / 127.5 - 1`."""
        picture = self.picture(i)
        if flipped:
            picture = picture[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))).float() / 127.5 - 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a view."""
        return (3, self.size, self.size)

    def fingerprint(self) -> dict[str, int | str]:
        """What identifies these images, prepared: number, size, digest of contents and rules (JSON-able)."""
        digest = hashlib.sha256(f"{VERSION} {self.size} {self.rules.convert}".encode())
        for one in self.digests:
            digest.update(one.encode())
        return {"images": len(self), "size": self.size, "sha256": digest.hexdigest()[:20]}


@dataclass(frozen=True)
class ImageData:
    """A data set of images, checked and split.

    Args:
        name: of the data set.
        train, valid: the splits.
        skipped: images that were left out, by name, with the reason.
        classes: names of the labels.
        provenance: JSON-able: source, licence, options, counts.
    """

    name: str
    train: Images
    valid: Images
    skipped: Mapping[str, str]
    classes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        """One line a person can read."""
        text = f"{self.name}: {len(self.train):,} train / {len(self.valid):,} valid images at {self.train.size}"
        if self.skipped:
            text += f", {len(self.skipped):,} skipped"
        return f"{text}; {self.provenance.get('source', 'unknown source')}"


def load_images(
    name: str,
    *,
    path: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | bool | None = None,
    threads: int = 0,
    **options: Any,
) -> ImageData:
    """Finds, checks and splits a data set of images.

    Args:
        name: of a data set of images.
        path: its file or folder.
        cache: the folder where verdicts of the check are kept (see `cache.data_dir`); False: nowhere.
        threads: that check; 0: as many as CPUs, at most 8.
        **options: the fields of `ImagePreparation`.

    Returns:
        The splits. They depend on the images and the options alone.

    Raises:
        DataError: unknown name or option, missing data, or images that cannot be used.
    """
    entry = get(name)
    if not issubclass(entry, ImageDataset):
        raise DataError(f"{name}: holds drawings, not images; expected another data set (`load` reads this one).")
    unknown = sorted(set(options) - {f.name for f in dataclasses.fields(ImagePreparation)})
    if unknown:
        allowed = ", ".join(f.name for f in dataclasses.fields(ImagePreparation))
        raise DataError(f"{name}: unknown option {', '.join(unknown)}; expected some of: {allowed}.")
    dataset, preparation = entry(), ImagePreparation(**options)
    if path is None:
        raise DataError(f"{name}: give its place with path= (--data). {dataset.origin}")
    place = Path(path).expanduser()
    found = dataset.find(place)
    if len(found.source) == 0:
        raise DataError(f"{place}: expected images; found none. {dataset.origin}")
    found, missing = listed(dataset, found, preparation)
    train, valid = deal(dataset, found, preparation)
    rules = Rules(preparation.convert, preparation.max_pixels)
    folder = None if cache is False else caching.data_dir(None if cache is True else cache)
    checked = [*train, *valid]
    verdicts = dict(zip(checked, check(found.source, checked, rules, folder, threads=threads), strict=True))
    bad = dict(missing)
    for i in sorted(verdicts):
        wrong = verdicts[i].wrong
        if wrong is not None:
            bad[printable(found.source.names[i])] = wrong
    if bad:
        _report(place, bad, len(verdicts) + len(missing), preparation.on_bad_image)
    size = preparation.size or dataset.size
    flip = dataset.flip if preparation.flip is None else preparation.flip
    labels = np.full(len(found.source), -1, np.int64) if found.labels is None else found.labels
    parts = []
    for part in (train, valid):
        usable = [i for i in part if verdicts[i].wrong is None]
        parts.append(Images(found.source, usable, [verdicts[i] for i in usable], rules, size, flip, labels[usable]))
    if len(parts[0]) == 0:
        raise DataError(f"{place}: no usable image is left for training of {len(train):,}. {dataset.origin}")
    provenance = {
        "source": f"{name}, {place.name}",
        "licence": dataset.licence,
        "options": {k: str(v) if isinstance(v, os.PathLike) else v for k, v in dataclasses.asdict(preparation).items()},
        "found": len(found.source),
        "skipped": len(bad),
    }
    return ImageData(name, parts[0], parts[1], bad, found.classes, provenance)


def _report(place: Path, bad: Mapping[str, str], of: int, choice: str) -> None:
    """Raises, or warns, naming the bad images.

    Raises:
        DataError: the choice is "refuse".
    """
    shown = "\n".join(f"  {name}: {why}" for name, why in list(bad.items())[:10])
    more = f"\n  and {len(bad) - 10:,} more" if len(bad) > 10 else ""
    text = f"{place}: {len(bad):,} of {of:,} images cannot be used:\n{shown}{more}\n"
    if choice == "skip":
        warnings.warn(f"{text}They are left out.", stacklevel=3)
        return
    odd = any(why.startswith("odd") for why in bad.values())
    convert = ", use the odd ones with convert=True (--convert)" if odd else ""
    raise DataError(
        f"{text}Repair or remove them{convert}, or leave them out: on_bad_image='skip' (--on-bad-image skip)."
    )
