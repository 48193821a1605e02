"""Latents on disk: encoded once, mapped into memory, complete or not there at all.

    DIR/latents.bin     [images, views, 3, h, w] float32 or float16, training split first; a view is an image as it is
                        or mirrored (an encoder does not commute with mirroring, so the second one is encoded as well)
    DIR/latents.json    shape, splits, what they were made from, and a SHA-256 of every block

Latents are those before quantisation, at scale 1.0. They are made in `.DIR.partial`: a block (one batch of the encoder)
is written and flushed, then its checksum is appended to `blocks.txt` and flushed. So after a kill at any instant the
blocks whose checksum holds are finished, and the rest are made again, in the same batches: the file is, bit for bit,
that of a run without interruption. When all are there the folder is renamed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsediff import autoencoder as first_stage
from sparsediff.checkpoint import flush
from sparsediff.datasets import ImageData, Images

FORMAT = 1
DATA, META, JOB, JOURNAL, LOCK = "latents.bin", "latents.json", "job.json", "blocks.txt", "lock"
SPLITS = ("train", "valid")
# What must be the same for latents to be those that a caller means, and in what words.
IDENTITY = {"images": "images, size or crop", "autoencoder": "autoencoder", "flips": "mirror images", "dtype": "dtype"}


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


def build(
    data: ImageData,
    autoencoder: Any,
    out: Path,
    *,
    both_flips: bool,
    dtype: str = "float32",
    batch_size: int = 8,
    overwrite: bool = False,
    on_block: Callable[[int], None] | None = None,
) -> Path:
    """Encodes both splits into the folder `out`, or continues to; latents that are there already are left alone.

    Args:
        data: the images. autoencoder: on the device that is to encode.
        out: the folder. both_flips: encode mirror images, too.
        dtype: "float32" or "float16", as stored. batch_size: images that are encoded at once.
        overwrite: replace other latents, finished or not. on_block: called with the number of every finished block.

    Returns:
        `out`.

    Raises:
        LatentsError: `out` holds other latents, another process is making them, the disk is too small, or the encoder
            gives values that are not finite.
        DataError: an image cannot be read.
    """
    side, factor = data.train.size, first_stage.factor(autoencoder)
    if side % factor:
        raise LatentsError(f"latents: size must be a multiple of {factor}, the autoencoder's factor; got {side}.")
    if batch_size < 1:
        raise LatentsError(f"latents: batch_size must be at least 1; got {batch_size}.")
    count = len(data.train) + len(data.valid)
    channels = int(autoencoder.config.latent_channels)
    job = {
        "format": FORMAT,
        "source": data.provenance.get("source", data.name),
        "images": {part: getattr(data, part).fingerprint() for part in SPLITS},
        "autoencoder": first_stage.fingerprint(autoencoder),
        "flips": both_flips,
        "flip": data.train.flip,
        "dtype": dtype,
        "shape": [count, 1 + both_flips, channels, side // factor, side // factor],
        "batch_size": batch_size,
        "scaling_factor": 1.0,
    }
    partial = out.with_name(f".{out.name}.partial")
    if out.exists() and not overwrite:
        _same(out, _read(out / META), job, "")
        return out
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial, out):
        if out.exists() and not overwrite:
            raise LatentsError(f"{out}: another process has just made these latents.")
        _prepare(partial, job, overwrite)
        _encode(partial, job, data, autoencoder, on_block)
        _write(partial / META, json.dumps({**job, "blocks": _journal(partial)}, indent=1))
        flush(partial)
        if out.exists():
            doomed = out.with_name(f".{out.name}.old")
            shutil.rmtree(doomed, ignore_errors=True)
            os.replace(out, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        os.replace(partial, out)
        flush(out.parent)
        for name in (JOB, JOURNAL, LOCK):
            (out / name).unlink(missing_ok=True)
    return out


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
    meta = _read(folder / META)
    if meta.get("format") != FORMAT:
        raise LatentsError(f"{folder}: has format {meta.get('format')}; this version reads {FORMAT}. Make it again.")
    expected: dict[str, Any] = {}
    if data is not None:
        expected["images"] = {part: getattr(data, part).fingerprint() for part in SPLITS}
    if autoencoder is not None:
        known = isinstance(autoencoder, Mapping)
        expected["autoencoder"] = dict(autoencoder) if known else first_stage.fingerprint(autoencoder)
    _same(folder, meta, expected, " (another --out keeps these)")
    shape, dtype = tuple(meta["shape"]), meta["dtype"]
    size = (folder / DATA).stat().st_size if (folder / DATA).is_file() else -1
    if size != _bytes(meta):
        raise LatentsError(f"{folder / DATA}: expected {_bytes(meta):,} bytes; got {max(size, 0):,}. {_AGAIN}")
    if verify:
        for block, digest in enumerate(_digests(folder, meta)):
            if digest != meta["blocks"][block]:
                raise LatentsError(f"{folder / DATA}: block {block} is damaged, its checksum differs. {_AGAIN}")
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


_AGAIN = "Make the latents again: sparsediff latents … --overwrite."


def _same(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any], hint: str) -> None:
    different = [key for key in IDENTITY if key in expected and found.get(key) != expected[key]]
    if different:
        listing = "; ".join(f"{IDENTITY[k]}: there {found.get(k)}, asked for {expected[k]}" for k in different)
        raise LatentsError(
            f"{folder}: holds latents made with other {' and '.join(IDENTITY[k] for k in different)} ({listing}). "
            f"Give what they were made with, or make them again with --overwrite{hint}."
        )


def _prepare(partial: Path, job: Mapping[str, Any], overwrite: bool) -> None:
    """Makes the folder that of this job: keeps finished blocks of the same one, refuses or removes another's."""
    if (partial / JOB).exists():
        try:
            begun = _read(partial / JOB)
        except LatentsError:
            begun = {}  # killed while this very file was written: nothing had begun
        if begun == job:
            return
        if begun and not overwrite:
            other = ", ".join(sorted(key for key in job if begun.get(key) != job[key]))
            raise LatentsError(
                f"{partial}: unfinished latents of another run lie there (other {other}). Repeat its settings to "
                "finish them, or give --overwrite to begin anew."
            )
    for name in (META, JOURNAL, DATA, JOB):
        (partial / name).unlink(missing_ok=True)
    _write(partial / JOB, json.dumps(job, indent=1))
    flush(partial)


def _encode(
    partial: Path, job: Mapping[str, Any], data: ImageData, autoencoder: Any, on_block: Callable[[int], None] | None
) -> None:
    from tqdm import tqdm

    count, batch, total = job["shape"][0], job["batch_size"], _bytes(job)
    handle = os.open(partial / DATA, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _reserve(handle, total, partial)
        done = _finished(partial, job)
        blocks = range(done, -(-count // batch))
        journal = open(partial / JOURNAL, "a", encoding="ascii")  # noqa: SIM115 - closed below, after the pool
        with (
            journal,
            ThreadPoolExecutor(4) as pool,
            tqdm(total=count, initial=min(done * batch, count), unit="image", desc="encoding", disable=None) as bar,
        ):

            def read(block: int) -> list[Any]:
                rows = range(block * batch, min(count, (block + 1) * batch))
                return [pool.submit(_views, data, row, job["flips"]) for row in rows]

            ahead = read(blocks[0]) if blocks else []
            for block in blocks:
                images = torch.stack([future.result() for future in ahead])  # [rows, views, 3, H, W]
                ahead = read(block + 1) if block + 1 in blocks else []
                latents = first_stage.encode(autoencoder, images.flatten(0, 1)).float().cpu()
                with np.errstate(over="ignore"):  # an overflow is infinite, which is looked for
                    stored = latents.reshape(len(images), *job["shape"][1:]).numpy().astype(job["dtype"])
                if not np.isfinite(stored).all():
                    row = block * batch + int(np.argmin(np.isfinite(stored).all(axis=(1, 2, 3, 4))))
                    raise LatentsError(
                        f"latents: that of {_name(data, row)} is not finite as {job['dtype']}; use --dtype float32, or "
                        "another autoencoder."
                    )
                content = stored.tobytes()
                _write_at(handle, content, block * batch * _row_bytes(job))
                os.fsync(handle)
                journal.write(f"{block} {hashlib.sha256(content).hexdigest()}\n")
                journal.flush()
                os.fsync(journal.fileno())
                bar.update(len(images))
                if on_block is not None:
                    on_block(block)
    finally:
        os.close(handle)


def _views(data: ImageData, row: int, both: bool) -> Tensor:
    split, i = _place(data, row)
    return torch.stack([split.view(i), *([split.view(i, flipped=True)] if both else [])])


def _place(data: ImageData, row: int) -> tuple[Images, int]:
    return (data.train, row) if row < len(data.train) else (data.valid, row - len(data.train))


def _name(data: ImageData, row: int) -> str:
    split, i = _place(data, row)
    return split.name(i)


def _finished(partial: Path, job: Mapping[str, Any]) -> int:
    """How many blocks from the first on are whole; the journal is cut to them."""
    lines = _journal(partial)
    done = 0
    for digest, noted in zip(_digests(partial, job), lines, strict=False):
        if digest != noted:
            break
        done += 1
    _write(partial / JOURNAL, "".join(f"{i} {digest}\n" for i, digest in enumerate(lines[:done])))
    return done


def _journal(partial: Path) -> list[str]:
    """Checksums of the blocks 0, 1, … as far as the journal goes; a line that a kill cut off ends it."""
    try:
        text = (partial / JOURNAL).read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return []
    found: list[str] = []
    for line in text.splitlines(keepends=True):
        number, _, digest = line.partition(" ")
        if number != str(len(found)) or len(digest) != 65 or not digest.endswith("\n"):
            break
        found.append(digest.strip())
    return found


def _digests(folder: Path, job: Mapping[str, Any]) -> Iterator[str]:
    """SHA-256 of every block of the file."""
    size = job["batch_size"] * _row_bytes(job)
    with open(folder / DATA, "rb") as stream:
        for start in range(0, _bytes(job), size):
            yield hashlib.sha256(stream.read(min(size, _bytes(job) - start))).hexdigest()


def _row_bytes(job: Mapping[str, Any]) -> int:
    return int(np.prod(job["shape"][1:])) * np.dtype(job["dtype"]).itemsize


def _bytes(job: Mapping[str, Any]) -> int:
    return int(job["shape"][0]) * _row_bytes(job)


def _reserve(handle: int, size: int, partial: Path) -> None:
    """Takes the room on the disk now, rather than to fail on it in hours."""
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise LatentsError(
                f"{partial.parent}: needs {size / 1e9:.2f} GB for latents ({error}). Make room."
            ) from None
        os.ftruncate(handle, size)  # a file system that cannot reserve


def _write_at(handle: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    os.replace(temporary, path)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LatentsError(f"{path}: expected the description of latents; cannot be read ({error}). {_AGAIN}") from None
    if not isinstance(found, dict):
        raise LatentsError(f"{path}: expected the description of latents; got {type(found).__name__}. {_AGAIN}")
    return found


@contextlib.contextmanager
def _locked(partial: Path, out: Path) -> Iterator[None]:
    with open(partial / LOCK, "w", encoding="ascii") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LatentsError(f"{out}: another process is making these latents; wait for it.") from None
        yield
