"""Small pictures in one `.npz` file: `images` `[N, H, W, 3]` uint8, and their names in `glyph` (or none); or a folder
of image files."""

from __future__ import annotations

from pathlib import Path

from ._image_entry import Found, ImageDataset, folder_of_files
from ._image_sources import Array
from ._registry import DATASETS
from ._strokes import DataError
from ._unpickle import load_npz


@DATASETS.register("emoji")
class Emoji(ImageDataset):
    """Colour emoji at 32x32, or any such file or folder."""

    name = "emoji"
    summary = "32x32 colour emoji in one .npz file (images, glyph), or a folder (give it with path=)"
    licence = "that of the file (Noto Emoji: SIL OFL 1.1 / Apache-2.0)"
    origin = "Expected is an .npz file with `images`, uint8 of shape (N, H, W, 3), or a folder of images."
    size = 32

    def find(self, path: Path) -> Found:
        if path.is_dir():
            return Found(folder_of_files(path))
        arrays = load_npz(path)
        images = arrays.get("images")
        if (
            images is None
            or images.dtype.name != "uint8"
            or images.ndim != 4
            or images.shape[3] != 3
            or not images.size
        ):
            got = "no such array" if images is None else f"{images.dtype} {images.shape}"
            raise DataError(f"{path}: expected `images`, uint8 of shape (N, H, W, 3); got {got}.")
        glyphs = arrays.get("glyph")
        if glyphs is not None and (glyphs.shape != images.shape[:1] or glyphs.dtype.kind != "U"):
            raise DataError(f"{path}: expected {len(images)} names in `glyph`; got {glyphs.dtype} {glyphs.shape}.")
        # Numbered, because a name may occur twice.
        names = [f"{i} {glyphs[i]}" if glyphs is not None else str(i) for i in range(len(images))]
        return Found(Array(path, names, images))

    def key(self, name: str) -> str:
        return name
