"""Any sketch-rnn `.npz`: keys train, valid, test, each an object array of `(n, 3)` arrays [dx, dy, lift].

Such files exist for Quick, Draw!, KanjiVG, Omniglot, the Sheep Market and many more. They hold pickles, which are read
under the restriction of `_unpickle`: numpy arrays and nothing else. The file's own splits are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ._cache import fingerprint
from ._preparation import Complaints, Drawings
from ._registry import DATASETS, Dataset, Request, Source
from ._stroke3 import from_npz
from ._strokes import DataError
from ._unpickle import load_npz


@DATASETS.register("sketchrnn")
class SketchRNN(Dataset):
    """The drawings of one sketch-rnn file, which the caller names."""

    name = "sketchrnn"
    summary = "any sketch-rnn .npz file (give it with path=)"
    licence = "that of the file"
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {"start": ("auto", "move", "line")}
    needs_path = True

    def locate(self, request: Request) -> Source:
        path = request.path
        if path is None or not path.is_file():
            raise DataError(
                f"{path}: expected a sketch-rnn .npz file; there is none. Give an existing file with path= (--data)."
            )
        return Source((path,), f"sketch-rnn file {path.name}", fingerprint(path))

    def read(self, request: Request, source: Source, complaints: Complaints) -> Drawings:
        path = source.files[0]
        return from_npz(path, load_npz(path), request.options["start"], complaints)
