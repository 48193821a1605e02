"""Making latents: an encoder's batches to a file, which a kill at any instant leaves so that it can go on.

Latents are made in `.DIR.partial`: a block (one batch of the encoder) is written and flushed, then its checksum is
appended to `blocks.txt` and flushed. So after a kill the blocks whose checksum holds are finished, and the rest are
made again, in the same batches: the file is, bit for bit, that of a run without interruption. When all are there the
folder is renamed. `latent_cache` describes what is in it.
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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsediff import autoencoder as first_stage
from sparsediff.checkpoint import flush
from sparsediff.datasets import ImageData, Images
from sparsediff.latent_cache import (
    DATA,
    FORMAT,
    META,
    SPLITS,
    LatentsError,
    byte_count,
    compare,
    digests,
    read_json,
    row_bytes,
)

JOB, JOURNAL, LOCK = "job.json", "blocks.txt", "lock"


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
        compare(out, read_json(out / META), job)
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


def _prepare(partial: Path, job: Mapping[str, Any], overwrite: bool) -> None:
    """Makes the folder that of this job: keeps finished blocks of the same one, refuses or removes another's."""
    if (partial / JOB).exists():
        try:
            begun = read_json(partial / JOB)
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

    count, batch, total = job["shape"][0], job["batch_size"], byte_count(job)
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
                _write_at(handle, content, block * batch * row_bytes(job))
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
    for digest, noted in zip(digests(partial, job), lines, strict=False):
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


def _reserve(handle: int, size: int, partial: Path) -> None:
    """Takes the room on the disk now, rather than to fail on it in hours."""
    if not hasattr(os, "posix_fallocate"):
        os.ftruncate(handle, size)
        return
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


@contextlib.contextmanager
def _locked(partial: Path, out: Path) -> Iterator[None]:
    with open(partial / LOCK, "w", encoding="ascii") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LatentsError(f"{out}: another process is making these latents; wait for it.") from None
        yield
