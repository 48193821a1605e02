"""Where images lie: files in a folder, an LMDB, one array. All say names, give bytes, and cross into worker processes.

An LMDB is opened once in every process that reads it: a handle that a fork carries over breaks, and a second one in the
same process is refused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ._images import MAX_BYTES, BadImage, Rules, UInt8, decode, is_image_name
from ._strokes import DataError


class ImageSource:
    """A list of images that are read one by one.

    Args:
        place: the file or folder, for messages.
        names: what the images are called, in a fixed order.
    """

    def __init__(self, place: Path, names: Sequence[str]) -> None:
        self.place = place
        self.names = list(names)

    def __len__(self) -> int:
        return len(self.names)

    def where(self, i: int) -> str:
        """Image i in words, for messages."""
        return f"{self.place}: {printable(self.names[i])}"

    def stamp(self, i: int) -> str:
        """Changes when image i changes, short of reading it."""
        raise NotImplementedError

    def content(self, i: int) -> bytes:
        """The bytes of image i.

        Raises:
            BadImage: they cannot be read.
        """
        raise NotImplementedError

    def picture(self, i: int, rules: Rules) -> Image.Image:
        """Image i as RGB.

        Raises:
            BadImage: it cannot be read, or not be used under the rules.
        """
        return self.decoded(self.content(i), rules)

    def decoded(self, content: bytes, rules: Rules) -> Image.Image:
        """The RGB picture of an image's bytes.

        Raises:
            BadImage: it cannot be used under the rules.
        """
        return decode(content, rules)


class Files(ImageSource):
    """Files below a folder; a name is the path from there."""

    def stamp(self, i: int) -> str:
        try:
            status = os.stat(self.place / self.names[i])
        except OSError:
            return "missing"
        return f"{status.st_size}:{status.st_mtime_ns}"

    def content(self, i: int) -> bytes:
        path = self.place / self.names[i]
        try:
            if not path.is_file():  # a pipe would never end
                raise BadImage("there is no such file" if not path.exists() else "not a file")
            if path.stat().st_size > MAX_BYTES:
                raise BadImage(f"giant: {path.stat().st_size:,} bytes, more than {MAX_BYTES:,}")
            return path.read_bytes()
        except OSError as error:
            raise BadImage(f"cannot be read ({error})") from None


class Lmdb(ImageSource):
    """Values of an LMDB; a name is the key."""

    def __init__(self, place: Path) -> None:
        environment = _environment(place)
        with environment.begin(buffers=False) as reading:
            keys = [bytes(key) for key in reading.cursor().iternext(keys=True, values=False)]
        super().__init__(place, [key.decode("utf-8", "surrogateescape") for key in keys])
        status = (place / "data.mdb").stat()
        self._stamp = f"{status.st_size}:{status.st_mtime_ns}"

    def stamp(self, i: int) -> str:
        return self._stamp

    def content(self, i: int) -> bytes:
        with _environment(self.place).begin(buffers=False) as reading:
            value = reading.get(self.names[i].encode("utf-8", "surrogateescape"))
        if value is None:
            raise BadImage("there is no such key")
        return bytes(value)


class Array(ImageSource):
    """Images in memory, `[N, H, W, 3]` uint8."""

    def __init__(self, place: Path, names: Sequence[str], images: UInt8) -> None:
        super().__init__(place, names)
        self.images = images

    def stamp(self, i: int) -> str:
        return hashlib.sha256(self.images[i].tobytes()).hexdigest()[:16]

    def content(self, i: int) -> bytes:
        return self.images[i].tobytes()

    def decoded(self, content: bytes, rules: Rules) -> Image.Image:
        return Image.fromarray(np.frombuffer(content, np.uint8).reshape(self.images.shape[1:]))


def printable(name: str) -> str:
    """A name that may hold bytes that are no text, as text."""
    return name.encode("utf-8", "backslashreplace").decode()


def walk(folder: Path, suffixes: Iterable[str] = ()) -> list[str]:
    """Paths, from `folder`, of all files below it that are called like images (or end in `suffixes`), sorted.

    Links to folders are followed, each folder once. Hidden files are left out.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of images; there is none. Give its path with path= (--data).")
    also = tuple(suffixes)
    found: list[str] = []
    seen: set[str] = set()
    for at, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(at)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        base = Path(at).relative_to(folder)
        found += [
            (base / name).as_posix()
            for name in files
            if not name.startswith(".") and (is_image_name(name) or name.lower().endswith(also or "\0"))
        ]
    return sorted(found)


_ENVIRONMENTS: dict[str, tuple[int, Any]] = {}  # by path: the process that opened it, its handle


def _environment(place: Path) -> Any:
    """This process's handle of an LMDB, for reading.

    Raises:
        DataError: it is not there, not whole, or the package lmdb is not.
    """
    path = str(place.resolve())
    owner, opened = _ENVIRONMENTS.get(path, (0, None))
    if owner == os.getpid():
        return opened
    if opened is not None:
        opened.close()  # a fork's copy; lmdb refuses to open it a second time
        del _ENVIRONMENTS[path]
    try:
        import lmdb
    except ImportError as error:
        raise DataError(f"{place}: needs the package lmdb ({error}): pip install 'sparsediff[ldm]'.") from None
    try:
        opened = lmdb.open(path, readonly=True, lock=False, readahead=False, meminit=False, create=False)
        needed = (opened.info()["last_pgno"] + 1) * opened.stat()["psize"]
    except lmdb.Error as error:
        raise DataError(f"{place}: expected an LMDB (a folder with data.mdb); got {error}. Get it again.") from None
    size = (place / "data.mdb").stat().st_size
    if size < needed:  # reading past the end of the file would kill the process
        opened.close()
        raise DataError(f"{place}: data.mdb is truncated: {size:,} bytes of {needed:,}. Get it again.")
    _ENVIRONMENTS[path] = (os.getpid(), opened)
    return opened
