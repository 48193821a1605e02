"""Any folder of images, with all folders below it; a hash of its name puts a twentieth of them aside for validation."""

from __future__ import annotations

from pathlib import Path

from ._image_entry import Found, ImageDataset, folder_of_files
from ._registry import DATASETS


@DATASETS.register("imagefolder")
class ImageFolder(ImageDataset):
    """Images of a folder that the caller names."""

    name = "imagefolder"
    summary = "any folder of images, recursively (give it with path=)"
    licence = "that of the images"
    origin = "Any folder of PNG, JPEG, WebP, BMP, GIF, TIFF or PPM files will do."

    def find(self, path: Path) -> Found:
        return Found(folder_of_files(path))
