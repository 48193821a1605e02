"""Quick, Draw!: drawings of one category.

Formats, told apart by name and content: sketch-rnn's `.npz` of a category (70,000 / 2,500 / 2,500 drawings; the
default, downloaded), `.ndjson` of a category, raw (with times) or simplified, and a flat `.npz` of many categories.
`path` is such a file, or a folder that holds `<category>.npz` or `<category>.ndjson`.

Source: https://github.com/googlecreativelab/quickdraw-dataset, Google, CC BY 4.0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

from ._cache import fingerprint
from ._collector import Collector
from ._fetch import download
from ._preparation import Complaints, Drawings
from ._registry import DATASETS, Dataset, Request, Source
from ._stroke3 import flat_category, from_npz
from ._strokes import DataError
from ._unpickle import load_npz

ADDRESS = "https://storage.googleapis.com/quickdraw_dataset/sketchrnn/"
CATEGORIES = "https://github.com/googlecreativelab/quickdraw-dataset/blob/master/categories.txt"
_NAMES = ("{}.npz", "sketchrnn_{}.npz", "{}.ndjson", "full_raw_{}.ndjson", "full_simplified_{}.ndjson")


@DATASETS.register("quickdraw")
class QuickDraw(Dataset):
    """One category of Quick, Draw!, for example cat, crab or mosquito."""

    name = "quickdraw"
    summary = "one category of Quick, Draw! (category=; downloads sketch-rnn's .npz, or give .npz/.ndjson with path=)"
    licence = "CC BY 4.0, Google (the Quick, Draw! dataset)"
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "start": ("auto", "move", "line"),
        "recognized_only": (False, True),
    }
    has_categories = True

    def locate(self, request: Request) -> Source:
        path, category = request.path, request.category
        if category is None and (path is None or path.is_dir()):
            raise DataError(f"quickdraw: expected a category (--category cat; all are in {CATEGORIES}); got none.")
        if path is None:
            folder, file = request.folder, f"{category}.npz"
            path = download(
                [ADDRESS + quote(file)],
                folder / file,
                known_hash=None,
                remedy=f"Is {category!r} a category of {CATEGORIES}? Without network, fetch {ADDRESS + quote(file)} "
                f"elsewhere and put it in {folder}, or give a file with path= (--data).",
            )
        elif path.is_dir():
            found = [path / name.format(category) for name in _NAMES if (path / name.format(category)).is_file()]
            if not found:
                names = ", ".join(name.format(category) for name in _NAMES)
                raise DataError(f"{path}: expected one of {names} in this folder; found none. Put one there.")
            path = found[0]
        kind = path.suffix
        if kind not in (".npz", ".ndjson"):
            raise DataError(
                f"{path}: expected a .npz or .ndjson file; got {kind or 'no suffix'}. Convert or rename it."
            )
        identity = fingerprint(path)
        return Source((path,), f"Quick, Draw! file {path.name}" + (f", {category}" if category else ""), identity, kind)

    def read(self, request: Request, source: Source, complaints: Complaints) -> Drawings:
        path, category = source.files[0], request.category
        if source.kind == ".ndjson":
            return read_ndjson(path, category, complaints, recognized_only=request.options["recognized_only"])
        arrays = load_npz(path)
        if "points" in arrays:
            if category is None:
                raise DataError(f"{path}: holds many categories: choose one with category= (--category).")
            return flat_category(path, arrays, category, complaints)
        return from_npz(path, arrays, request.options["start"], complaints)


def read_ndjson(path: Path, category: str | None, complaints: Complaints, *, recognized_only: bool = False) -> Drawings:
    """Drawings of an `.ndjson` file: a line is {"key_id", "word", "recognized", "drawing": [[[x…], [y…](, [t…])], …]}.

    Args:
        path: the file.
        category: expected "word" of every line; None: any.
        complaints: receives lines that are not of this form.
        recognized_only: leave out drawings that the game did not recognize.

    Raises:
        DataError: the file cannot be read, or it holds another category.
    """
    collector = Collector()
    try:
        with open(path, encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                where = f"{path}: line {number}"
                try:
                    item = json.loads(line)
                    word = item.get("word")
                    wrong = category is not None and word is not None and word != category
                    if not wrong and (item.get("recognized", True) or not recognized_only):
                        collector.add(item["drawing"], str(item.get("key_id", number)), where)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    got = f"{type(error).__name__}: {error}"
                    complaints.add(
                        where, "not a drawing", f"expected JSON with a drawing [[[x…], [y…]], …]; got {got}."
                    )
                    continue
                if wrong:
                    raise DataError(
                        f"{where}: expected drawings of {category!r}; got {word!r}. Give the file of {category}."
                    )
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}). Get the file again.") from None
    return collector.drawings()
