"""Data sets of images: `load_images(name, …)` finds, checks and splits them; reading and decoding come when asked for.

A split is a function of the images' keys alone (file name without folder-specific parts, LMDB key): images are ranked
by a hash of their key, validation takes the first, training the next. So a subset of 12,500 is the same one in every
format and on every machine. A source's own splits and list files are kept; the ranking then only picks from them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from . import _cache as caching
from ._image_check import Verdict, check
from ._image_sources import Files, ImageSource, printable, walk
from ._images import VERSION, BadImage, Rules, UInt8, crop_resize
from ._registry import Entry, get
from ._strokes import DataError, Int64


@dataclass(frozen=True)
class ImagePreparation:
    """How images are chosen and prepared. None: what the data set has as its own.

    Args:
        size: height and width after crop and resize.
        flip: chance that an image is mirrored when a batch is made, afresh in every epoch.
        train_count: images for training; 0: all that validation leaves.
        valid_count: images for validation; 0: none.
        train_list, valid_list: text files that name the images of a split, one a line.
        on_bad_image: "refuse" ends with a list of the images that cannot be used, "skip" leaves them out, naming them.
        convert: use images with a palette, transparency, CMYK, 16 bits, several frames or an EXIF orientation
            (see `Rules.convert`) instead of calling them bad.
        max_pixels: images of more are bad.

    Raises:
        DataError: an option is out of range.
    """

    size: int | None = None
    flip: float | None = None
    train_count: int | None = None
    valid_count: int | None = None
    train_list: str | os.PathLike[str] | None = None
    valid_list: str | os.PathLike[str] | None = None
    on_bad_image: str = "refuse"
    convert: bool = False
    max_pixels: int = Rules.max_pixels

    def __post_init__(self) -> None:
        if self.on_bad_image not in ("refuse", "skip"):
            raise DataError(f"images: on_bad_image must be 'refuse' or 'skip'; got {self.on_bad_image!r}.")
        if self.size is not None and self.size < 1:
            raise DataError(f"images: size must be at least 1; got {self.size}.")
        if self.flip is not None and not 0 <= self.flip <= 1:
            raise DataError(f"images: flip must be in [0, 1]; got {self.flip}.")
        for name in ("train_count", "valid_count"):
            if (getattr(self, name) or 0) < 0:
                raise DataError(f"images: {name} must be at least 0; got {getattr(self, name)}.")
        if self.max_pixels < 1:
            raise DataError(f"images: max_pixels must be at least 1; got {self.max_pixels}.")


@dataclass(frozen=True)
class Found:
    """What a data set found at a path.

    Args:
        source: all its images.
        train, valid: indices of the splits that the source has itself; None: it has none, and `pool` is divided.
        labels: `[len(source)]` int64 classes; None: there are none.
        classes: names of the classes.
    """

    source: ImageSource
    train: Sequence[int] | None = None
    valid: Sequence[int] | None = None
    labels: Int64 | None = None
    classes: tuple[str, ...] = ()


class ImageDataset(Entry):
    """One registered data set of images."""

    size: ClassVar[int] = 256
    flip: ClassVar[float] = 0.0
    # (train, valid); None: all there are, and a twentieth where the source has no validation split.
    counts: ClassVar[tuple[int | None, int | None]] = (None, None)
    lists: ClassVar[tuple[str, str] | None] = None  # list files that the set is published with
    origin: ClassVar[str] = ""  # where a person gets it

    def find(self, path: Path) -> Found:
        """The images at `path`.

        Raises:
            DataError: they are not there; the message says what is expected.
        """
        raise NotImplementedError

    def key(self, name: str) -> str:
        """What identifies an image in every form the set is published in."""
        return str(PurePosixPath(name).with_suffix(""))


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
    found, missing = _listed(dataset, found, preparation)
    train, valid = _deal(dataset, found, preparation)
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


def _listed(dataset: ImageDataset, found: Found, preparation: ImagePreparation) -> tuple[Found, dict[str, str]]:
    """`found` with the splits that list files name, and what they name that is not there."""
    given = (preparation.train_list, preparation.valid_list)
    files = [None if file is None else Path(file).expanduser() for file in given]
    if files == [None, None] and dataset.lists is not None and found.source.place.is_dir():
        beside = [found.source.place / name for name in dataset.lists]
        files = list(beside) if all(file.is_file() for file in beside) else files
    if files == [None, None]:
        return found, {}
    by_name = {name: i for i, name in enumerate(found.source.names)}
    by_key = {dataset.key(name): i for name, i in reversed(by_name.items())}
    missing: dict[str, str] = {}
    splits: list[list[int] | None] = []
    for file in files:
        if file is None:
            splits.append(None)
            continue
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: expected a list of images, one a line; it cannot be read ({error}).") from None
        indices = []
        for line in dict.fromkeys(filter(None, lines)):
            i = by_name.get(line, by_key.get(dataset.key(line)))
            if i is None:
                missing[line] = f"named in {file.name}, but not there"
            else:
                indices.append(i)
        splits.append(sorted(set(indices)))
    train, valid = splits
    if train is not None and valid is not None and set(train) & set(valid):
        twice = printable(found.source.names[min(set(train) & set(valid))])
        raise DataError(f"{files[0]}, {files[1]}: expected different images; both name {twice}. Remove it from one.")
    if train is None:
        train = sorted(set(range(len(found.source))) - set(valid or ()))
    return dataclasses.replace(found, train=train, valid=valid), missing


def _deal(dataset: ImageDataset, found: Found, preparation: ImagePreparation) -> tuple[list[int], list[int]]:
    """Indices of train and valid, each in the source's order."""
    names, place = found.source.names, found.source.place

    def ranked(indices: Sequence[int]) -> list[int]:
        keys = {i: dataset.key(names[i]).encode("utf-8", "surrogateescape") for i in indices}
        return sorted(indices, key=lambda i: hashlib.sha256(keys[i]).digest())

    pool = range(len(names)) if found.train is None else found.train
    if found.valid is None:
        train_count, valid_count = _counts(place, len(pool), preparation, dataset.counts)
        order = ranked(pool)
        return sorted(order[valid_count : valid_count + train_count]), sorted(order[:valid_count])
    picked = []
    train_given = len(pool) if preparation.train_count == 0 else preparation.train_count
    for part, indices, given, own in (
        ("train", pool, train_given, dataset.counts[0]),
        ("valid", found.valid, preparation.valid_count, dataset.counts[1]),
    ):
        if given is not None and given > len(indices):
            raise DataError(f"{place}: {part}_count must be at most {len(indices)}, all of that split; got {given}.")
        picked.append(sorted(ranked(indices)[: own if given is None else given]))
    return picked[0], picked[1]


def _counts(place: Path, n: int, preparation: ImagePreparation, own: tuple[int | None, int | None]) -> tuple[int, int]:
    """How many of n images without splits train and validate: as given, or as the set has it and n allows.

    Raises:
        DataError: there are fewer than were asked for.
    """
    train, valid, wish = preparation.train_count, preparation.valid_count, n // 20 if own[1] is None else own[1]
    if valid is None:
        if train:
            valid = min(wish, max(0, n - train))
        elif train is None and own[0] is not None and own[0] + wish > n:
            valid = round(n * wish / (own[0] + wish))  # a smaller set is divided in the same proportion
        else:
            valid = min(wish, n - 1)
    if not train:
        train = n - valid if train == 0 or own[0] is None else min(own[0], n - valid)
    if train < 1 or train + valid > n:
        raise DataError(
            f"{place}: expected at least {max(train, 1) + valid:,} images, for train_count {max(train, 1):,} and "
            f"valid_count {valid:,}; found {n:,}. Ask for fewer."
        )
    return train, valid


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


def folder_of_files(path: Path, suffixes: Sequence[str] = ()) -> Files:
    """All images below a folder."""
    return Files(path, walk(path, suffixes))
