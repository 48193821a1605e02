"""Data sets of pen strokes and of images: `names()`, `load(name, …)`, `load_images(name, …)`.

>>> data = load("kanjivg")                                             # doctest: +SKIP
>>> batches = Batches(data.train, 128, seed=0)                         # doctest: +SKIP
>>> batch = next(batches)      # batch.x [128, T, 3] float32, batch.lengths [128] int32
>>> faces = load_images("celebahq", path="celeba_hq")                  # doctest: +SKIP
>>> batch = next(ImageBatches(faces.train, 12, seed=0, workers=4))     # doctest: +SKIP
>>> # batch.x [12, 3, 256, 256] float32 in [-1, 1]

Every file here without a leading underscore is a data set that registers itself; adding one is adding a file.
"""

from __future__ import annotations

from ._batches import Batch, Batches, collate
from ._image_batches import ImageBatch, ImageBatches
from ._image_entry import ImageDataset, ImagePreparation
from ._image_sets import ImageData, Images, load_images
from ._images import BadImage, crop_resize
from ._preparation import Preparation
from ._registry import DATASETS, Dataset, get, load, names
from ._strokes import SPLITS, DataError, StrokeData, Strokes, polylines, positions

__all__ = [
    "DATASETS",
    "SPLITS",
    "BadImage",
    "Batch",
    "Batches",
    "DataError",
    "Dataset",
    "ImageBatch",
    "ImageBatches",
    "ImageData",
    "ImageDataset",
    "ImagePreparation",
    "Images",
    "Preparation",
    "StrokeData",
    "Strokes",
    "collate",
    "crop_resize",
    "get",
    "load",
    "load_images",
    "names",
    "polylines",
    "positions",
]
