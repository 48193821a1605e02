"""LSUN bedrooms: 3,033,042 photographs: the paper trains on 10,598 of them and validates on 2,500; mirrored by chance.

Formats: the LMDB of webp images as it is published (a folder `bedroom_train_lmdb` with `data.mdb`, or the folder that
it lies in), or image files exported from it, with the lists `bedrooms_train.txt` and `bedrooms_val.txt` of
latent-diffusion where they lie in the folder. An image is known by its key, which is its file name in every export. The
published validation LMDB has 300 images, too few: both subsets come from the training set.

Source: Yu et al., "LSUN", arXiv 1506.03365; crop, size and mirroring: the loader of latent-diffusion.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from ._image_entry import Found, ImageDataset, folder_of_files
from ._image_sources import Lmdb
from ._registry import DATASETS


@DATASETS.register("lsun")
class LSUN(ImageDataset):
    """Bedrooms."""

    name = "lsun"
    summary = "LSUN bedrooms: the LMDB, or a folder of exported images (give it with path=)"
    licence = "LSUN, Yu et al.: for research"
    origin = (
        "LSUN is at https://www.yf.io/p/lsun (github.com/fyu/lsun downloads it); expected is the unpacked folder "
        "bedroom_train_lmdb, or a folder of exported images."
    )
    flip = 0.5
    counts = (10_598, 2_500)
    lists = ("bedrooms_train.txt", "bedrooms_val.txt")

    def find(self, path: Path) -> Found:
        for folder in (path, path / "bedroom_train_lmdb"):
            if (folder / "data.mdb").is_file():
                return Found(Lmdb(folder))
        return Found(folder_of_files(path))

    def key(self, name: str) -> str:
        return PurePosixPath(name).stem
