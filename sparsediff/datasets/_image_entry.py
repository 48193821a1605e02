"""What a data set of images is, and how its images are dealt out to training and validation.

A split is a function of the images' keys alone (file name without folder-specific parts, LMDB key): images are ranked
by a hash of their key, validation takes the first, training the next. So a subset of 12,500 is the same one in every
format and on every machine. A source's own splits and list files are kept; the ranking then only picks from them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

from ._image_sources import Files, ImageSource, printable, walk
from ._images import Rules
from ._registry import Entry
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


def folder_of_files(path: Path, suffixes: Sequence[str] = ()) -> Files:
    """All images below a folder."""
    return Files(path, walk(path, suffixes))


def listed(dataset: ImageDataset, found: Found, preparation: ImagePreparation) -> tuple[Found, dict[str, str]]:
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


def deal(dataset: ImageDataset, found: Found, preparation: ImagePreparation) -> tuple[list[int], list[int]]:
    """Indices of train and valid, each in the source's order."""
    names, place = found.source.names, found.source.place

    def rank(i: int) -> bytes:
        return hashlib.sha256(dataset.key(names[i]).encode("utf-8", "surrogateescape")).digest()

    def ranked(indices: Sequence[int], count: int | None) -> list[int]:  # of LSUN's three million, without sorting all
        return sorted(indices, key=rank) if count is None else heapq.nsmallest(count, indices, key=rank)

    pool = range(len(names)) if found.train is None else found.train
    if found.valid is None:
        train_count, valid_count = _counts(place, len(pool), preparation, dataset.counts)
        order = ranked(pool, valid_count + train_count)
        return sorted(order[valid_count:]), sorted(order[:valid_count])
    picked = []
    train_given = len(pool) if preparation.train_count == 0 else preparation.train_count
    for part, indices, given, own in (
        ("train", pool, train_given, dataset.counts[0]),
        ("valid", found.valid, preparation.valid_count, dataset.counts[1]),
    ):
        if given is not None and given > len(indices):
            raise DataError(f"{place}: {part}_count must be at most {len(indices)}, all of that split; got {given}.")
        picked.append(sorted(ranked(indices, own if given is None else given)))
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
