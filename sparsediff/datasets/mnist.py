"""MNIST as pen strokes: its pictures, thinned and traced (`_vectorise`).

Formats: the four idx files (gzipped or not) in a folder, or an `.npz` with the arrays train_images, train_labels,
test_images, test_labels (also x_train, y_train, x_test, y_test). Drawings of the 10,000 test pictures are the test
split; the training pictures are divided into train and valid.

Source: LeCun, Cortes, Burges, http://yann.lecun.com/exdb/mnist/.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ._cache import fingerprint
from ._collector import Collector
from ._fetch import download
from ._preparation import Complaints, Drawings, evenly, hashed_split
from ._registry import DATASETS, Dataset, Request, Source
from ._strokes import DataError
from ._unpickle import load_npz
from ._vectorise import vectorise

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
# MD5 sums as torchvision publishes them.
FILES = {
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}
_KEYS = {"train": ("train_images", "train_labels"), "test": ("test_images", "test_labels")}
_KERAS = {"train_images": "x_train", "train_labels": "y_train", "test_images": "x_test", "test_labels": "y_test"}

UInt8 = npt.NDArray[np.uint8]


@DATASETS.register("mnist")
class MNIST(Dataset):
    """Handwritten digits; the label of a drawing is its digit."""

    name = "mnist"
    summary = (
        "MNIST's digits, thinned and traced to strokes (downloads the idx files, or give a folder or .npz with path=)"
    )
    licence = "MNIST: LeCun, Cortes, Burges; usually given as CC BY-SA 3.0"

    def locate(self, request: Request) -> Source:
        path = request.path
        if path is None:
            for file, md5 in FILES.items():
                download(
                    [mirror + file + ".gz" for mirror in MIRRORS],
                    request.folder / (file + ".gz"),
                    known_hash=f"md5:{md5}",
                    remedy=f"Without network, put {', '.join(f + '.gz' for f in FILES)} in {request.folder}, or give "
                    "a folder or an .npz of MNIST with path= (--data).",
                )
            path = request.folder
        if not is_mnist(path):
            raise DataError(
                f"{path}: expected an .npz of MNIST, or a folder with {next(iter(FILES))} (or …gz); found neither. "
                "Give one with path= (--data)."
            )
        return Source((path,), "MNIST, thinned and traced", {**fingerprint(path), "from": "mnist"}, "mnist")

    def read(self, request: Request, source: Source, complaints: Complaints) -> Drawings:
        pictures, labels, tests = read_pictures(source.files[0])
        chosen = evenly(len(pictures), request.preparation.limit)
        train, valid, _ = request.preparation.split
        keys = np.array([f"{'test' if tests[i] else 'train'}/{i}" for i in chosen.tolist()])
        share = train / (train + valid) if train + valid > 0 else 1.0
        splits = np.where(tests[chosen], 2, hashed_split(keys, (share, 1.0 - share, 0.0))).astype(np.int8)
        collector = Collector()
        traced = vectorise(pictures[chosen], _progress)
        for i, strokes in zip(chosen.tolist(), traced, strict=True):
            collector.add([s.T for s in strokes], str(labels[i]), f"{source.files[0]}: picture {i}")
        drawings = collector.drawings()
        drawings.keys, drawings.splits = keys, splits
        return drawings


def _progress(chunks: range) -> Iterator[int]:
    from tqdm import tqdm

    return iter(tqdm(chunks, desc="tracing MNIST", unit="chunk", leave=False, disable=None))


def is_mnist(path: Path) -> bool:
    """Whether `path` looks like MNIST: an `.npz` file, or a folder with the idx file of the training pictures."""
    return (path.is_file() and path.suffix == ".npz") or (
        path.is_dir() and _idx_file(path, next(iter(FILES))) is not None
    )


def read_pictures(path: Path) -> tuple[UInt8, npt.NDArray[np.integer[Any]], npt.NDArray[np.bool_]]:
    """MNIST's pictures.

    Args:
        path: a folder of idx files or an `.npz`. Test pictures and labels may be missing.

    Returns:
        (pictures `[N, H, W]` uint8, labels `[N]`, which are test pictures `[N]` bool); missing labels are -1.

    Raises:
        DataError: missing, damaged or inconsistent files.
    """
    if path.is_file():
        arrays = load_npz(path)
        arrays = {ours: arrays[name] for ours, keras in _KERAS.items() for name in (keras, ours) if name in arrays}
    else:
        names = dict(zip(FILES, ("train_images", "train_labels", "test_images", "test_labels"), strict=True))
        found = {ours: _idx_file(path, file) for file, ours in names.items()}
        arrays = {ours: read_idx(file) for ours, file in found.items() if file is not None}
    if "train_images" not in arrays:
        raise DataError(f"{path}: expected the array train_images (or x_train); it is missing. Give an .npz of MNIST.")
    pictures, labels, tests = [], [], []
    for part, (images, classes) in _KEYS.items():
        if images not in arrays:
            continue
        shape, kind = arrays[images].shape, arrays[images].dtype
        if len(shape) != 3 or kind != np.uint8:
            raise DataError(f"{path}: {images} must be uint8 of shape (N, 28, 28); got {kind} {shape}. Get it again.")
        known = arrays.get(classes, np.full(shape[0], -1))
        if known.shape != shape[:1] or known.dtype.kind not in "iu":
            raise DataError(
                f"{path}: {classes} must be {shape[0]} integers; got {known.dtype} {known.shape}. Get it again."
            )
        pictures.append(arrays[images])
        labels.append(known.astype(np.int64))
        tests.append(np.full(shape[0], part == "test"))
    if len({p.shape[1:] for p in pictures}) > 1:
        raise DataError(
            f"{path}: expected pictures of one size; got {[p.shape for p in pictures]}. Get the file again."
        )
    return np.concatenate(pictures), np.concatenate(labels), np.concatenate(tests)


def _idx_file(folder: Path, name: str) -> Path | None:
    spellings = (name, name.replace("-idx", ".idx"))
    for candidate in (folder / (s + end) for s in spellings for end in ("", ".gz")):
        if candidate.is_file():
            return candidate
    return None


def read_idx(path: Path) -> UInt8:
    """An idx file of unsigned bytes, gzipped or not.

    Layout: two zero bytes, the type (8: unsigned byte), the number of dimensions, each dimension as a big-endian 32-bit
    integer, the data.

    Raises:
        DataError: not an idx file of bytes, or not of the announced length.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error}). Get the file again.") from None
    if len(content) < 4 or content[:3] != b"\0\0\x08" or not 1 <= content[3] <= 4:
        raise DataError(
            f"{path}: expected an idx file of unsigned bytes; it begins with {content[:4]!r}. Get it again."
        )
    begin = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:begin].ljust(begin - 4, b"\0"), ">u4").tolist())
    if len(content) - begin != math.prod(shape):
        raise DataError(
            f"{path}: expected {math.prod(shape):,} bytes for {shape}; got {len(content) - begin:,}. Get it again."
        )
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)
