"""KanjiVG: the pen strokes of Chinese characters, kana, letters and digits, from the SVG files of the PyPI package
`kanjivg`.

Of the package's files about 6,700 are characters in their ordinary form (`04e00.svg`) and about 5,000 variants of them
(`04e14-Kaisho.svg`: another stroke order or another style). `variants="all"` reads both, as the sketch-rnn file of
KanjiVG does (11,458 drawings of an older release); "base" reads the former alone. A character and its variants go to
the same split.

Source: https://kanjivg.tagaini.net, Ulrich Apel, CC BY-SA 3.0.
"""

from __future__ import annotations

import importlib.metadata
import xml.etree.ElementTree as ElementTree
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ._cache import fingerprint
from ._preparation import Complaints, Drawings
from ._registry import DATASETS, Dataset, Request, Source
from ._strokes import DataError
from ._svgpath import flatten, segments

_SVG = "{http://www.w3.org/2000/svg}"


@DATASETS.register("kanjivg")
class KanjiVG(Dataset):
    """Characters of the installed package `kanjivg`, or of a folder of such SVG files."""

    name = "kanjivg"
    summary = "KanjiVG characters from the PyPI package kanjivg (no download)"
    licence = "CC BY-SA 3.0, © Ulrich Apel (KanjiVG)"
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {"variants": ("all", "base")}

    def locate(self, request: Request) -> Source:
        if request.path is not None:
            if not request.path.is_dir():
                raise DataError(
                    f"{request.path}: expected a folder of KanjiVG's *.svg files. Leave path out to use the package; "
                    "a sketch-rnn .npz is the data set 'sketchrnn' (--dataset sketchrnn)."
                )
            return Source((request.path,), f"KanjiVG, the folder {request.path.name}", fingerprint(request.path))
        try:
            package = importlib.metadata.distribution("kanjivg")
        except importlib.metadata.PackageNotFoundError:
            raise DataError(
                "kanjivg: the package with the characters is not installed: pip install kanjivg, or give a folder of "
                "KanjiVG's *.svg files with path= (--data)."
            ) from None
        folder = Path(str(package.locate_file("kanji")))
        return Source((folder,), f"KanjiVG, PyPI package kanjivg {package.version}", {"kanjivg": package.version})

    def read(self, request: Request, source: Source, complaints: Complaints) -> Drawings:
        folder = source.files[0]
        everything = request.options["variants"] == "all"
        files = sorted((p for p in folder.glob("*.svg") if everything or "-" not in p.stem), key=lambda p: p.stem)
        if not files:
            raise DataError(
                f"{folder}: expected KanjiVG's *.svg files; found none. Reinstall the package: pip install kanjivg."
            )
        numbers: array[float] = array("d")
        per_stroke: list[int] = []
        per_drawing: list[int] = []
        for file in files:
            before = len(numbers), len(per_stroke)
            try:
                for path in stroke_paths(file):
                    per_stroke += segments(path, numbers)
            except (DataError, ElementTree.ParseError, OSError, UnicodeDecodeError) as error:
                complaints.add(str(file), "not a character of KanjiVG", f"{error}")
                del numbers[before[0] :], per_stroke[before[1] :]
            per_drawing.append(len(per_stroke) - before[1])
        cubics = np.frombuffer(numbers, dtype=np.float64).reshape(-1, 4, 2)
        xy, strokes = flatten(cubics, np.array(per_stroke, dtype=np.int64))
        labels = np.array([p.stem for p in files])
        return Drawings(
            xy,
            strokes,
            np.concatenate([[0], np.cumsum(per_drawing)]).astype(np.int64),
            labels,
            keys=np.array([p.stem.partition("-")[0] for p in files]),
            where=lambda i: str(files[i]),
        )


def stroke_paths(file: Path) -> list[str]:
    """The `d` attributes of a KanjiVG file's strokes in writing order.

    Raises:
        DataError: the file has no strokes, or moves them with a `transform`.
        xml.etree.ElementTree.ParseError: it is not XML.
    """
    root = ElementTree.parse(file).getroot()
    for group in root.iter(_SVG + "g"):
        if group.get("id", "").startswith("kvg:StrokePaths"):
            if any("transform" in element.attrib for element in group.iter()):
                raise DataError("expected strokes without a transform attribute.")
            paths = [element.get("d", "") for element in group.iter(_SVG + "path")]
            if not paths:
                break
            return paths
    raise DataError("expected a group 'kvg:StrokePaths_…' with at least one path; found none.")
