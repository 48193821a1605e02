"""VMNIST: MNIST as pen strokes, as ChiroDiff and SketchODE use it.

The published files are pickles, one a digit, {'drawing': [[[x…], [y…], [t…]], …]}, in a folder or in one folder a
class; they are read under the restriction of `_unpickle`. Unpack them to `<data folder>/vmnist/`, or give the folder
with `path=`. Where there are none, MNIST's own pictures are thinned and traced instead (the data set `mnist`), and the
provenance says so: those drawings have another order and direction of strokes than the published ones.

Source: https://github.com/dasayan05/chirodiff, "Data preparation" (a folder of Google Drive, fetched by hand).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ._cache import fingerprint
from ._collector import Collector
from ._preparation import Complaints, Drawings
from ._registry import DATASETS, Dataset, Request, Source
from ._strokes import DataError
from ._unpickle import load_plain
from .mnist import MNIST, is_mnist


@DATASETS.register("vmnist")
class VMNIST(Dataset):
    """Vectorised digits: the published pickles, or MNIST traced where they are missing."""

    name = "vmnist"
    summary = "VMNIST's pickles (a manual download) or, where they are missing, MNIST traced to strokes"
    licence = MNIST.licence

    def locate(self, request: Request) -> Source:
        path = request.path if request.path is not None else request.folder
        if request.path is None and not _files(path):
            mnist = Request(None, None, request.folder.parent / "mnist", request.preparation, request.options)
            return self._traced(mnist)
        if is_mnist(path):
            return self._traced(request)
        if not path.exists():
            raise DataError(f"{path}: expected a folder of VMNIST's pickles; none there. Give one with path= (--data).")
        return Source((path,), f"VMNIST pickles, {path.name}", fingerprint(path), "pickles")

    def _traced(self, request: Request) -> Source:
        source = MNIST().locate(request)
        text = "MNIST, thinned and traced (not the published VMNIST)"
        return Source(source.files, text, source.identity, source.kind)

    def read(self, request: Request, source: Source, complaints: Complaints) -> Drawings:
        if source.kind == "mnist":
            return MNIST().read(request, source, complaints)
        root = source.files[0]
        collector = Collector()
        keys = []
        for file in _files(root):
            label = file.parent.name if file.parent != root and file != root else file.stem
            try:
                content = load_plain(file.read_bytes(), str(file))
            except OSError as error:
                raise DataError(f"{file}: cannot be read ({error}). Get the file again.") from None
            for k, item in enumerate(content if isinstance(content, list) else [content]):
                where = f"{file}: item {k}" if isinstance(content, list) else str(file)
                try:
                    collector.add(_strokes(item), label, where)
                except (TypeError, ValueError, KeyError, IndexError) as error:
                    got = f"{type(error).__name__}: {error}"
                    complaints.add(
                        where, "not a drawing", f"expected {{'drawing': [[[x…], [y…], [t…]], …]}}; got {got}."
                    )
                    continue
                keys.append(f"{file.relative_to(root)}/{k}")
        drawings = collector.drawings()
        drawings.keys = np.array(keys, dtype=np.str_)
        return drawings


def _files(root: Path) -> list[Path]:
    """The pickles: `root` itself, or the files in it and in its folders."""
    if root.is_file():
        return [root]
    files = [p for p in root.rglob("*") if p.is_file() and not p.name.startswith(".")]
    # sketch_10 comes after sketch_9.
    return sorted(files, key=lambda p: (str(p.parent), len(p.name), p.name))


def _strokes(item: Any) -> list[Sequence[Any]]:
    if not isinstance(item, dict):
        raise TypeError(f"a {type(item).__name__} instead of a dict")
    drawing = list(item["drawing"])
    # One stroke may stand for itself: [[x…], [y…], [t…]] instead of a list of such.
    single = len(drawing) in (2, 3) and len(drawing[0]) > 0 and isinstance(drawing[0][0], (int, float, np.number))
    return [drawing] if single else drawing
