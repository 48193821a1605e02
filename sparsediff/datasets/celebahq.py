"""CelebA-HQ: 30,000 faces at 1024x1024, of which the paper trains on 12,500 and validates on 500.

Formats: a folder of image files, or of the arrays `imgHQ00000.npy` … (uint8 `(1, 3, 1024, 1024)`) of
taming-transformers, with its lists `celebahqtrain.txt` and `celebahqvalidation.txt` where they lie in the folder. An
image is known by the number in its name, so both formats give the same subsets.

Source: Karras et al., "Progressive Growing of GANs", ICLR 2018; Esser et al., "Taming Transformers", CVPR 2021.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from ._image_entry import Found, ImageDataset, folder_of_files
from ._registry import DATASETS
from ._strokes import DataError


@DATASETS.register("celebahq")
class CelebAHQ(ImageDataset):
    """Faces."""

    name = "celebahq"
    summary = "CelebA-HQ faces: a folder of images, or of taming-transformers' .npy (give it with path=)"
    licence = "CC BY-NC 4.0 (CelebA-HQ, NVIDIA); the pictures of CelebA are for non-commercial research"
    origin = (
        "CelebA-HQ is described at https://github.com/tkarras/progressive_growing_of_gans; expected is a folder of its "
        "images (00000.png …), or of imgHQ00000.npy …."
    )
    counts = (12_500, 500)
    lists = ("celebahqtrain.txt", "celebahqvalidation.txt")

    def find(self, path: Path) -> Found:
        source = folder_of_files(path, (".npy",))
        arrays = sum(name.endswith(".npy") for name in source.names)
        if 0 < arrays < len(source):
            raise DataError(
                f"{path}: holds {arrays:,} .npy and {len(source) - arrays:,} image files, perhaps the same faces "
                "twice. Give the folder of one kind."
            )
        return Found(source)

    def key(self, name: str) -> str:
        number = re.search(r"\d+$", PurePosixPath(name).stem)
        return super().key(name) if number is None else str(int(number[0]))
