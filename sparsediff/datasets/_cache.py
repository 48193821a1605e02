"""Where downloads and prepared drawings are kept, and the file format of the latter.

The folder is, in this order: the `cache` argument, the environment variable
`SPARSEDIFF_DATA`, the user's cache folder. Downloads lie in `<folder>/<data set>/`, prepared drawings in
`<folder>/prepared/`.

A prepared file is an `.npz` without pickle, named after a digest of everything that went into it (format version, data
set, options, the source's version). It is written under another name and renamed, so it is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ._strokes import SPLITS, DataError, StrokeData, Strokes

ENVIRONMENT = "SPARSEDIFF_DATA"
# Raise it whenever a change of this package changes what any option prepares.
FORMAT = 1


def data_dir(cache: str | os.PathLike[str] | None = None) -> Path:
    """The folder of downloads and prepared drawings; it need not exist yet."""
    if cache is not None:
        return Path(cache).expanduser()
    if os.environ.get(ENVIRONMENT):
        return Path(os.environ[ENVIRONMENT]).expanduser()
    import pooch

    return Path(pooch.os_cache("sparsediff"))


def prepared_path(folder: Path, name: str, key: Mapping[str, Any]) -> Path:
    """The file that holds the data set `name` prepared from `key` (JSON-able)."""
    text = json.dumps({"format": FORMAT, "name": name, **key}, sort_keys=True)
    return folder / "prepared" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.npz"


def save(path: Path, data: StrokeData) -> None:
    """Writes a data set whole or not at all; a folder that cannot be written to costs a warning, not the run."""
    arrays: dict[str, Any] = {
        "meta": np.array(json.dumps({"name": data.name, "scale": data.scale, "provenance": dict(data.provenance)}))
    }
    for part in SPLITS:
        strokes = data.split(part)
        arrays |= {
            f"{part}_points": strokes.points,
            f"{part}_offsets": strokes.offsets,
            f"{part}_labels": strokes.labels,
        }
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as stream:
            temporary = stream.name
            np.savez(stream, **arrays)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        warnings.warn(
            f"{data.name}: prepared drawings cannot be kept in {path.parent} ({error}); every start will prepare them "
            f"again. Point {ENVIRONMENT} to a folder that can be written to.",
            stacklevel=2,
        )


def load(path: Path) -> StrokeData | None:
    """Reads what `save` wrote; None where there is no such file or it is damaged (it is then prepared again)."""
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            meta = json.loads(str(arrays["meta"]))
            parts = [
                Strokes(*(arrays[f"{part}_{kind}"] for kind in ("points", "offsets", "labels"))) for part in SPLITS
            ]
    except FileNotFoundError:
        return None
    except Exception as error:
        # Any failure here means one thing, a damaged file, and has one remedy that the caller applies.
        warnings.warn(f"{path}: damaged ({type(error).__name__}: {error}); it is prepared again.", stacklevel=2)
        return None
    train, valid, test = parts
    return StrokeData(meta["name"], train, valid, test, meta["scale"], meta["provenance"])


def fingerprint(path: Path) -> dict[str, Any]:
    """What identifies a source file or folder short of reading it: location, size, time of last change.

    Raises:
        DataError: there is no such file or folder.
    """
    try:
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        stats = [p.stat() for p in files]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}). Give the path of a readable file or folder.") from None
    if not path.exists():
        raise DataError(f"{path}: no such file or folder. Give the path of the data, or leave it out.")
    return {
        "path": str(path.resolve()),
        "files": len(files),
        "bytes": sum(s.st_size for s in stats),
        "changed_ns": max((s.st_mtime_ns for s in stats), default=0),
    }
