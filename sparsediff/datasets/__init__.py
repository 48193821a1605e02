"""Data sets of pen strokes: `names()`, `load(name, …)`.

>>> data = load("kanjivg")                                             # doctest: +SKIP
>>> batches = Batches(data.train, 128, seed=0)                         # doctest: +SKIP
>>> batch = next(batches)      # batch.x [128, T, 3] float32, batch.lengths [128] int32

Every file here without a leading underscore is a data set that registers itself; adding one is adding a file.
"""

from __future__ import annotations

from ._batches import Batch, Batches, collate
from ._preparation import Preparation
from ._registry import DATASETS, Dataset, get, load, names
from ._strokes import SPLITS, DataError, StrokeData, Strokes, polylines, positions

__all__ = [
    "DATASETS",
    "SPLITS",
    "Batch",
    "Batches",
    "DataError",
    "Dataset",
    "Preparation",
    "StrokeData",
    "Strokes",
    "collate",
    "get",
    "load",
    "names",
    "polylines",
    "positions",
]
