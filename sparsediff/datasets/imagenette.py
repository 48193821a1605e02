"""Imagenette: ten classes of ImageNet, 9,469 images for training and 3,925 for validation.

Format: the unpacked archive of any of its sizes, a folder with `train` and `val`, each with a folder for every class.
Some of its images are greyscale, which is read as equal red, green and blue.

Source: https://github.com/fastai/imagenette.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ._image_entry import Found, ImageDataset
from ._image_sources import Files, walk
from ._registry import DATASETS
from ._strokes import DataError

CLASSES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


@DATASETS.register("imagenette")
class Imagenette(ImageDataset):
    """Ten easy classes; the label of an image is the number of its class."""

    name = "imagenette"
    summary = "Imagenette, ten classes of ImageNet: the unpacked archive (give it with path=)"
    licence = "Apache-2.0 (fast.ai); the images are ImageNet's, for non-commercial research"
    origin = (
        "Imagenette is https://s3.amazonaws.com/fast-ai-imageclas/imagenette2.tgz: unpack it and give the folder "
        "with train and val."
    )

    def find(self, path: Path) -> Found:
        absent = [
            f"{part}/{wnid}" for part in ("train", "val") for wnid in CLASSES if not (path / part / wnid).is_dir()
        ]
        if absent:
            raise DataError(f"{path}: expected the folders train and val of ten classes; no {absent[0]}. {self.origin}")
        parts: dict[str, list[int]] = {}
        names: list[str] = []
        labels: list[int] = []
        for part in ("train", "val"):
            start = len(names)
            for label, wnid in enumerate(CLASSES):
                inside = [f"{part}/{wnid}/{name}" for name in walk(path / part / wnid)]
                names += inside
                labels += [label] * len(inside)
            parts[part] = list(range(start, len(names)))
        source = Files(path, names)
        return Found(source, parts["train"], parts["val"], np.array(labels, np.int64), tuple(CLASSES.values()))
