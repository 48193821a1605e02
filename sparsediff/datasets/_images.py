"""One image file to the square of pixels that a model trains on: decoding, checks, crop and size.

`crop_resize` is the only place where a picture changes its size: training, latents and the reference of a score all go
through it, because most failed reproductions of a FID come from two that differ.

What is wrong with an image is of two kinds. *Unreadable*: corrupt, truncated, giant, not an image. *Odd*: readable, but
more than one thing could be meant by it: a palette, transparency, CMYK, 16 bits, several frames, an orientation in
EXIF. `Rules.convert` settles the second kind; what is left is a `BadImage`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from ._strokes import DataError

UInt8 = npt.NDArray[np.uint8]

# What decoders are asked for: no format that runs another program or a language.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"))
# Raise it whenever a change here changes pixels: checks, latents and references of before are then made again.
VERSION = 1
MAX_BYTES = 1 << 30
_NPY, _PNG = b"\x93NUMPY", b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112


class BadImage(DataError):
    """An image that cannot be used as it is; the message says why, and the caller knows which one it is."""


@dataclass(frozen=True)
class Rules:
    """What counts as usable.

    Args:
        convert: use odd images: palettes and CMYK by their colours, transparency over white, the high byte of 16 bits,
            the first of several frames, turned as EXIF says.
        max_pixels: larger images are refused before they are decoded.
    """

    convert: bool = False
    max_pixels: int = 64_000_000


def decode(content: bytes, rules: Rules) -> Image.Image:
    """The picture in the bytes of an image file, or of a `.npy` file of one `[1, 3, H, W]` image of uint8.

    Returns:
        An RGB image.

    Raises:
        BadImage: it cannot be used, or not under these rules.
    """
    if len(content) > MAX_BYTES:
        raise BadImage(f"giant: {len(content):,} bytes, more than {MAX_BYTES:,}")
    if content[: len(_NPY)] == _NPY:
        return _from_npy(content, rules)
    Image.init()  # a format that was asked for must be loaded
    try:
        if content[:8] == _PNG:
            # Decoding stops at the last row and never compares a checksum.
            Image.open(io.BytesIO(content), formats=("PNG",)).verify()
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > rules.max_pixels:
                raise BadImage(f"giant: {width}x{height}, more than {rules.max_pixels:,} pixels")
            odd = _oddities(image, content)
            if odd and not rules.convert:
                raise BadImage(f"odd: {', '.join(odd)}")
            image.load()
            return _to_rgb(image)
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(f"giant: {error}") from None
    except Image.UnidentifiedImageError:
        kind = f"begins with {content[:8]!r}" if content else "empty file"
        raise BadImage(f"not an image of a known format ({kind})") from None
    except Exception as error:
        # Decoders meet damaged bytes with whatever their parsing runs into: OSError, SyntaxError, struct.error, ...
        raise BadImage(f"corrupt or truncated ({type(error).__name__}: {error})") from None


def crop_resize(picture: Image.Image | UInt8, size: int) -> UInt8:
    """The largest centred square of an RGB picture, bicubic with antialiasing to `size`: `[size, size, 3]` uint8.

    Equivalent to `np.asarray(picture.crop(square).resize((size, size), Image.Resampling.BICUBIC))`.

    Args:
        picture: an RGB image, or `[H, W, 3]` uint8.
        size: height and width of the result.

    Source: the loader of latent-diffusion for LSUN.
    """
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size != (side, side):
        image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.array(image, dtype=np.uint8)


def is_image_name(name: str) -> bool:
    """Whether a file's name says that it is an image."""
    return PurePath(name).suffix.lower() in SUFFIXES


def _oddities(image: Image.Image, content: bytes) -> list[str]:
    odd = []
    if getattr(image, "n_frames", 1) > 1:
        odd.append(f"{getattr(image, 'n_frames', 1)} frames")
    if image.mode in ("P", "PA", "1"):
        odd.append("palette" if image.mode != "1" else "1 bit a pixel")
    if image.has_transparency_data:
        odd.append("transparency")
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        odd.append(image.mode)
    if image.mode.startswith(("I", "F")) or _png_depth(content) == 16 or _tiff_depth(image) > 8:
        odd.append("more than 8 bits a channel")
    orientation = _orientation(image)
    if orientation != 1:
        odd.append(f"turned by EXIF orientation {orientation}")
    return odd


def _png_depth(content: bytes) -> int:
    # Pillow reads RGB of 16 bits as RGB of 8 without a word; the header's byte 24 is the depth.
    return content[24] if content[:8] == _PNG and len(content) > 24 else 8


def _tiff_depth(image: Image.Image) -> int:
    depths = getattr(image, "tag_v2", {}).get(258, (8,))
    return max(depths) if isinstance(depths, tuple) else int(depths)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        # Damaged metadata say nothing about the pixels, which are checked by decoding them.
        return 1
    return value if value in range(1, 9) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise BadImage("odd: floating-point pixels, which have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_npy(content: bytes, rules: Rules) -> Image.Image:
    try:
        array: npt.NDArray[Any] = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError, TypeError, SyntaxError) as error:
        raise BadImage(f"corrupt or truncated ({type(error).__name__}: {error})") from None
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim != 3 or array.shape[0] != 3 or array.dtype != np.uint8 or array.size == 0:
        raise BadImage(f"expected uint8 of shape (1, 3, H, W); got {array.dtype} {array.shape}")
    if array[0].size > rules.max_pixels:
        raise BadImage(f"giant: {array.shape[2]}x{array.shape[1]}, more than {rules.max_pixels:,} pixels")
    return Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))
