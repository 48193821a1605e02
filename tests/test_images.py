"""Data sets of images: formats, splits, images that cannot be used, batches."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from sparsediff import cli, datasets
from sparsediff.datasets import DataError, ImageBatches, ImageDataset, crop_resize, load_images
from sparsediff.datasets._images import BadImage, Rules, decode

EMOJI = Path(os.environ.get("SPARSEDIFF_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
EMOJI /= "noto_emoji_32.npz"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEDIFF_DATA", str(tmp_path_factory.mktemp("cache")))


def pixels(seed: int, width: int = 12, height: int = 9) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(picture: Any, kind: str = "PNG", **options: Any) -> bytes:
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def folder(at: Path, count: int, name: str = "{:05d}.png") -> Path:
    for i in range(count):
        file = at / name.format(i)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(pixels(i)))
    return at


def names(images: datasets.Images) -> list[str]:
    return [images.name(i) for i in range(len(images))]


# Crop and size


@pytest.mark.parametrize("shape", [(9, 12), (12, 9), (8, 8), (4, 4), (1, 5), (33, 20)], ids=str)
def test_crop_resize_is_the_published_loaders(shape: tuple[int, int]) -> None:
    picture = pixels(0, shape[1], shape[0])
    side = min(shape)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    square = picture[top : top + side, left : left + side]
    expected = square if side == 8 else np.asarray(Image.fromarray(square).resize((8, 8), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(crop_resize(picture, 8), expected)
    np.testing.assert_array_equal(crop_resize(Image.fromarray(picture), 8), expected)


def test_crop_resize_does_not_alias() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255  # every second column: without antialiasing the result is all black or all white
    assert np.abs(crop_resize(stripes, 16)[:, 2:-2].astype(int) - 127).max() < 8


def test_views() -> None:
    file = folder(Path(os.environ["SPARSEDIFF_DATA"]) / "images", 2)
    images = load_images("imagefolder", path=file, size=8, valid_count=0).train
    picture = images.picture(1)
    assert picture.dtype == np.uint8 and picture.shape == (8, 8, 3)
    view = images.view(1)
    assert view.shape == images.shape and view.dtype == torch.float32 and view.is_contiguous()
    np.testing.assert_allclose(view.permute(1, 2, 0).numpy(), picture / 127.5 - 1, atol=1e-6)
    assert torch.equal(images.view(1, flipped=True), view.flip(2))
    with pytest.raises(IndexError, match=r"index must be in \[0, 2\)"):
        images.picture(2)


# Images that cannot be used


def truncated(kind: str) -> bytes:
    whole = encoded(pixels(0, 64, 64), kind)
    return whole[: len(whole) * 2 // 3]


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(pixels(0), "JPEG", exif=exif)


def animated() -> bytes:
    return encoded(pixels(0), "GIF", save_all=True, append_images=[Image.fromarray(pixels(1))])


def npy(array: npt.NDArray[Any], allow_pickle: bool = False) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=allow_pickle)
    return stream.getvalue()


UNREADABLE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "not an image"),
    "text": (lambda: b"<html>404</html>", "not an image"),
    "truncated png": (lambda: truncated("PNG"), "corrupt or truncated"),
    "truncated jpeg": (lambda: truncated("JPEG"), "corrupt or truncated"),
    "truncated webp": (lambda: truncated("WEBP"), "corrupt or truncated|not an image"),
    "flipped bits": (lambda: (w := encoded(pixels(0)))[:60] + b"\xff\xff\xff\xff" + w[64:], "corrupt or truncated"),
    "only a header": (lambda: encoded(pixels(0))[:40], "corrupt or truncated|not an image"),
    "giant": (lambda: encoded(Image.new("L", (3000, 400))), "giant: 3000x400"),
    "float": (lambda: encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "odd"),
    "npy of floats": (lambda: npy(np.zeros((1, 3, 4, 4))), "expected uint8 of shape"),
    "npy of another shape": (lambda: npy(np.zeros((4, 4, 3), np.uint8)), "expected uint8 of shape"),
    "npy of objects": (lambda: npy(np.array([{}], dtype=object), allow_pickle=True), "corrupt or truncated"),
    "truncated npy": (lambda: npy(np.zeros((1, 3, 4, 4), np.uint8))[:-9], "corrupt or truncated"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_images(case: str) -> None:
    make, message = UNREADABLE[case]
    with pytest.raises(BadImage, match=message):
        decode(make(), Rules(convert=True, max_pixels=1_000_000))


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(Image.new("L", (300, 400)))
    for limit in (100_000, 10_000):  # Pillow's own warning, and its error
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(BadImage, match="giant"):
            decode(content, Rules())


def gray16() -> Image.Image:
    return Image.fromarray((np.arange(48, dtype=np.uint16) * 1000).reshape(6, 8))


def half_clear() -> Image.Image:
    image = Image.new("RGBA", (8, 6), (255, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    return image


WHITE = (255, 255, 255)
# Content, what it is called, and a pixel (x, y) → RGB after conversion.
ODD: dict[str, tuple[Callable[[], bytes], str, tuple[int, int], tuple[int, int, int]]] = {
    "palette": (lambda: encoded(Image.new("RGB", (8, 6), (9, 99, 200)).quantize(4)), "palette", (1, 1), (9, 99, 200)),
    "alpha": (lambda: encoded(half_clear()), "transparency", (0, 0), WHITE),
    "alpha elsewhere": (lambda: encoded(half_clear()), "transparency", (1, 0), (255, 0, 0)),
    "gray alpha": (lambda: encoded(half_clear().convert("LA")), "transparency", (0, 0), WHITE),
    "clear colour": (lambda: encoded(Image.new("RGB", (4, 4)), transparency=(0, 0, 0)), "transparency", (0, 0), WHITE),
    "cmyk": (lambda: encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "TIFF"), "CMYK", (0, 0), (0, 0, 0)),
    "16 bits": (lambda: encoded(gray16()), "more than 8 bits", (7, 5), (47000 >> 8,) * 3),
    "1 bit": (lambda: encoded(Image.new("1", (8, 8), 1)), "1 bit", (3, 3), WHITE),
    "frames": (animated, "2 frames", (0, 0), tuple(Image.open(io.BytesIO(animated())).convert("RGB").getpixel((0, 0)))),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_odd_images_are_converted_if_asked(case: str) -> None:
    make, called, at, expected = ODD[case]
    content = make()
    with pytest.raises(BadImage, match=f"odd: .*{called}"):
        decode(content, Rules())
    image = decode(content, Rules(convert=True))
    assert image.mode == "RGB" and image.getpixel(at) == expected


def test_exif_orientation() -> None:
    with pytest.raises(BadImage, match="turned by EXIF orientation 6"):
        decode(rotated(), Rules())
    turned = decode(rotated(), Rules(convert=True))
    assert turned.size == (9, 12)
    stored = Image.open(io.BytesIO(rotated()))
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(stored.transpose(Image.Transpose.ROTATE_270)))


def test_16_bits_of_colour_are_not_taken_for_8() -> None:
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + struct.pack(">3H", 0x1234, 0x5678, 0x9ABC) * 2 for _ in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    with pytest.raises(BadImage, match="more than 8 bits"):
        decode(content, Rules())
    assert decode(content, Rules(convert=True)).getpixel((0, 0)) == (0x12, 0x56, 0x9A)


def test_ordinary_images_are_taken_as_they_are() -> None:
    picture = pixels(0)
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        np.testing.assert_array_equal(np.asarray(decode(encoded(picture, kind), Rules())), picture)
    np.testing.assert_array_equal(np.asarray(decode(encoded(picture, "WEBP", lossless=True), Rules())), picture)
    assert decode(encoded(picture, "JPEG"), Rules()).mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decode(encoded(picture[..., 0]), Rules()))[..., 2], picture[..., 0])
    np.testing.assert_array_equal(np.asarray(decode(npy(picture.transpose(2, 0, 1)[None]), Rules())), picture)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Ten good images, a truncated one, one with a palette, and a link to nothing."""
    at = folder(tmp_path / "mixed", 10)
    (at / "deep").mkdir()
    (at / "deep" / "broken.jpg").write_bytes(truncated("JPEG"))
    (at / "odd.png").write_bytes(ODD["palette"][0]())
    (at / "gone.png").symlink_to(at / "nowhere")
    return at


def test_bad_images_are_refused_by_name(mixed: Path) -> None:
    with pytest.raises(DataError) as error:
        load_images("imagefolder", path=mixed, size=8)
    text = str(error.value)
    assert "3 of 13 images cannot be used" in text
    for part in ("deep/broken.jpg: corrupt", "odd.png: odd: palette", "gone.png: there is no such file", "--convert"):
        assert part in text
    assert "--on-bad-image skip" in text


def test_bad_images_are_skipped_by_name(mixed: Path) -> None:
    with pytest.warns(UserWarning, match=r"(?s)3 of 13 .*deep/broken\.jpg: corrupt.*They are left out"):
        data = load_images("imagefolder", path=mixed, size=8, on_bad_image="skip", valid_count=3)
    assert sorted(data.skipped) == ["deep/broken.jpg", "gone.png", "odd.png"] and "3 skipped" in data.summary()
    assert len(data.train) + len(data.valid) == 10
    with pytest.warns(UserWarning, match="2 of 13"):
        converted = load_images("imagefolder", path=mixed, size=8, on_bad_image="skip", convert=True, valid_count=3)
    assert "odd.png" in names(converted.train) + names(converted.valid)
    assert converted.train.fingerprint() != data.train.fingerprint()


def test_verdicts_are_kept_and_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = folder(tmp_path / "images", 6)
    before = load_images("imagefolder", path=at, size=8)
    from sparsediff.datasets import _image_check

    judged: list[int] = []
    judge = _image_check._judge

    def counting(source: Any, i: int, rules: Rules) -> Any:
        judged.append(i)
        return judge(source, i, rules)

    monkeypatch.setattr(_image_check, "_judge", counting)
    assert load_images("imagefolder", path=at, size=8).train.fingerprint() == before.train.fingerprint()
    assert judged == []
    (at / "00002.png").write_bytes(truncated("PNG"))
    with pytest.raises(DataError, match=r"1 of 6 .*\n.*00002\.png"):
        load_images("imagefolder", path=at, size=8)
    assert judged == [2]
    (at / "00002.png").write_bytes(encoded(pixels(77)))
    after = load_images("imagefolder", path=at, size=8)
    assert judged == [2, 2] and after.train.fingerprint() != before.train.fingerprint()
    (kept,) = (Path(os.environ["SPARSEDIFF_DATA"]) / "checked").iterdir()
    kept.write_text("{")
    with pytest.warns(UserWarning, match="damaged"):
        assert load_images("imagefolder", path=at, size=8).train.fingerprint() == after.train.fingerprint()
    assert len(judged) == 8
    assert load_images("imagefolder", path=at, size=8, cache=False).train.fingerprint() == after.train.fingerprint()
    assert len(judged) == 14


def test_an_image_that_goes_bad_later_is_named(tmp_path: Path) -> None:
    images = load_images("imagefolder", path=folder(tmp_path / "images", 3), size=8, valid_count=0).train
    (tmp_path / "images" / "00001.png").unlink()
    with pytest.raises(DataError, match=r"00001\.png: there is no such file\. It was in order"):
        images.view(1)


# Formats and splits


def test_every_set_of_images_describes_itself() -> None:
    found = [name for name in datasets.names() if issubclass(datasets.get(name), ImageDataset)]
    assert found == ["celebahq", "emoji", "imagefolder", "imagenette", "lsun"]
    for name in found:
        entry = datasets.get(name)
        assert entry.name == name and entry.summary and entry.licence
        with pytest.raises(DataError, match=rf"{name}: give its place with path="):
            load_images(name)


def test_a_set_of_the_other_kind_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="kanjivg: holds drawings"):
        load_images("kanjivg", path=".")
    assert cli.main(["train", "chirodiff-kanjivg", "--dataset", "celebahq", "--out", "nowhere"]) == 1
    assert "celebahq: holds images, not drawings" in capsys.readouterr().err
    with pytest.raises(DataError, match="unknown option sise"):
        load_images("imagefolder", path=".", sise=3)


def test_a_folder_in_any_order_gives_one_order(tmp_path: Path) -> None:
    at = folder(tmp_path / "images", 30, "class{0}/{0}.png")
    (at / "._0.png").write_bytes(b"resource fork")
    (at / "notes.txt").write_text("no image")
    (at / "loop").symlink_to(at)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "UPPER.JPEG").write_bytes(encoded(pixels(99), "JPEG"))
    (at / "linked").symlink_to(tmp_path / "elsewhere")
    data = load_images("imagefolder", path=at, size=8, valid_count=5)
    assert len(data.train) == 26 and len(data.valid) == 5
    assert "linked/UPPER.JPEG" in names(data.train) + names(data.valid)
    assert names(data.train) == sorted(names(data.train))
    # A split belongs to the name: other images do not change which side one is on of the rest.
    again = load_images("imagefolder", path=at, size=8, valid_count=5, train_count=10)
    assert names(again.valid) == names(data.valid) and set(names(again.train)) < set(names(data.train))


@pytest.mark.parametrize(
    ("count", "options", "expected"),
    [
        (40, {}, (38, 2)),
        (3, {}, (3, 0)),
        (40, {"valid_count": 0}, (40, 0)),
        (40, {"train_count": 5}, (5, 2)),
        (40, {"train_count": 40}, (40, 0)),
        (40, {"train_count": 30, "valid_count": 11}, "expected at least 41 images"),
        (40, {"valid_count": 40}, "expected at least 41 images"),
    ],
)
def test_counts(tmp_path: Path, count: int, options: dict[str, int], expected: Any) -> None:
    at = folder(tmp_path / "images", count)
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            load_images("imagefolder", path=at, size=8, **options)
    else:
        data = load_images("imagefolder", path=at, size=8, **options)
        assert (len(data.train), len(data.valid)) == expected


def test_celebahq_in_both_formats_has_the_same_subsets(tmp_path: Path) -> None:
    images = folder(tmp_path / "png", 104)
    (tmp_path / "npy").mkdir()
    for i in range(104):
        np.save(tmp_path / "npy" / f"imgHQ{i:05d}.npy", pixels(i).transpose(2, 0, 1)[None])
    one, other = (load_images("celebahq", path=p, size=8) for p in (images, tmp_path / "npy"))
    assert (len(one.train), len(one.valid)) == (100, 4)  # 12,500 to 500, of what there is
    assert [n[-9:-4] for n in names(other.train)] == [n[:5] for n in names(one.train)]
    np.testing.assert_array_equal(one.valid.picture(1), other.valid.picture(1))
    assert datasets.get("celebahq").counts == (12_500, 500) and datasets.get("lsun").counts == (10_598, 2_500)
    (images / "imgHQ00000.npy").write_bytes(npy(np.zeros((1, 3, 4, 4), np.uint8)))
    with pytest.raises(DataError, match=r"holds 1 \.npy and 104 image files"):
        load_images("celebahq", path=images, size=8)


def test_list_files(tmp_path: Path) -> None:
    at = folder(tmp_path / "faces", 10)
    (at / "celebahqtrain.txt").write_text("".join(f"imgHQ{i:05d}.npy\n" for i in range(7)) + "\n")
    (at / "celebahqvalidation.txt").write_text("imgHQ00008.npy\nimgHQ00011.npy\n")
    with pytest.raises(DataError, match=r"imgHQ00011\.npy: named in celebahqvalidation\.txt, but not there"):
        load_images("celebahq", path=at, size=8)
    with pytest.warns(UserWarning, match=r"imgHQ00011\.npy"):
        data = load_images("celebahq", path=at, size=8, on_bad_image="skip")
    assert names(data.train) == [f"{i:05d}.png" for i in range(7)] and names(data.valid) == ["00008.png"]
    mine = tmp_path / "mine.txt"
    mine.write_text("00003.png\n00001.png\n00003.png\n")
    data = load_images("celebahq", path=at, size=8, train_list=mine, valid_count=0)
    assert names(data.train) == ["00001.png", "00003.png"]
    data = load_images("imagefolder", path=at, size=8, valid_list=mine)
    assert names(data.valid) == ["00001.png", "00003.png"] and len(data.train) == 8
    with pytest.raises(DataError, match=r"both name 00001\.png"):
        load_images("imagefolder", path=at, size=8, valid_list=mine, train_list=mine)
    with pytest.raises(DataError, match="expected a list of images"):
        load_images("imagefolder", path=at, size=8, train_list=tmp_path)


def test_imagenette(tmp_path: Path) -> None:
    from sparsediff.datasets.imagenette import CLASSES

    with pytest.raises(DataError, match=r"no train/n01440764.*imagenette2\.tgz"):
        load_images("imagenette", path=tmp_path)
    for part, count in (("train", 3), ("val", 2)):
        for wnid in CLASSES:
            folder(tmp_path / part / wnid, count, wnid + "_{}.JPEG")
    data = load_images("imagenette", path=tmp_path, size=8)
    assert (len(data.train), len(data.valid)) == (30, 20) and len(data.classes) == 10
    assert all(name.startswith("train/") for name in names(data.train))
    assert data.train.labels.tolist() == [i for i in range(10) for _ in range(3)]
    assert data.classes[data.valid.labels[19]] == "parachute"
    fewer = load_images("imagenette", path=tmp_path, size=8, train_count=12, valid_count=0)
    assert (len(fewer.train), len(fewer.valid)) == (12, 0)
    with pytest.raises(DataError, match="valid_count must be at most 20"):
        load_images("imagenette", path=tmp_path, size=8, valid_count=21)


@pytest.mark.skipif(not EMOJI.exists(), reason=f"{EMOJI} is not here")
def test_emoji() -> None:
    data = load_images("emoji", path=EMOJI)
    assert len(data.train) + len(data.valid) == 3926 and len(data.valid) == 196
    assert data.train.shape == (3, 32, 32) and not set(names(data.train)) & set(names(data.valid))
    with np.load(EMOJI) as arrays:
        i = int(names(data.train)[7].split()[0])
        np.testing.assert_array_equal(data.train.picture(7), arrays["images"][i])


def test_a_file_of_other_arrays_is_no_emoji(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 4, 4)))
    with pytest.raises(DataError, match=r"expected `images`, uint8 of shape \(N, H, W, 3\); got float64 \(2, 4, 4\)"):
        load_images("emoji", path=tmp_path / "x.npz")


# LMDB


@pytest.fixture
def bedrooms(tmp_path: Path) -> Path:
    """A published LMDB in small: webp under hexadecimal keys; the same, exported, in `exported`."""
    import lmdb

    at = tmp_path / "bedroom_train_lmdb"
    environment = lmdb.open(str(at), map_size=1 << 22, sync=False)
    (tmp_path / "exported").mkdir()
    with environment.begin(write=True) as writing:
        for i in range(40):
            key = f"{i * 2654435761 % 2**32:040x}"
            content = encoded(pixels(i, 16, 20), "WEBP", lossless=True)
            writing.put(key.encode(), content)
            (tmp_path / "exported" / f"{key}.webp").write_bytes(content)
    environment.close()
    return tmp_path


def test_lsun_as_published_and_exported(bedrooms: Path) -> None:
    published = load_images("lsun", path=bedrooms, size=8)
    exported = load_images("lsun", path=bedrooms / "exported", size=8)
    assert (len(published.train), len(published.valid)) == (32, 8)  # 10,598 to 2,500, of what there is
    assert [f"{name}.webp" for name in names(published.train)] == names(exported.train)
    assert published.train.fingerprint() == exported.train.fingerprint()
    assert torch.equal(published.train.view(3), exported.train.view(3))
    assert published.train.flip == 0.5


def test_a_truncated_lmdb_is_refused(bedrooms: Path) -> None:
    file = bedrooms / "bedroom_train_lmdb" / "data.mdb"
    os.truncate(file, file.stat().st_size // 2)
    # In a process of its own: reading such a file ends the process, where nothing prevents it.
    code = f"from sparsediff.datasets import load_images; load_images('lsun', path={str(bedrooms)!r}, size=8)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "data.mdb is truncated" in done.stderr


def test_what_is_no_lmdb(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"\0" * 8192)
    with pytest.raises(DataError, match="expected an LMDB"):
        load_images("lsun", path=tmp_path)
    with pytest.raises(DataError, match=r"expected images; found none\. LSUN is at https://"):
        (tmp_path / "empty").mkdir()
        load_images("lsun", path=tmp_path / "empty")


# Batches


def test_batches_are_a_function_of_seed_and_epoch(tmp_path: Path) -> None:
    images = load_images("lsun", path=folder(tmp_path / "images", 11), size=8, valid_count=0).train

    def drawn(seed: int, count: int = 6) -> list[Any]:
        batches = ImageBatches(images, 4, seed=seed)
        return [(b.indices.tolist(), b.flipped.tolist()) for b in (next(batches) for _ in range(count))]

    state = torch.random.get_rng_state()
    assert drawn(0) == drawn(0) != drawn(1)
    assert torch.equal(state, torch.random.get_rng_state())
    batches = ImageBatches(images, 4, seed=0)
    assert len(batches) == 2
    batch = next(batches)
    assert batch.x.shape == (4, 3, 8, 8) and batch.x.dtype == torch.float32
    for row, i, flipped in zip(batch.x, batch.indices.tolist(), batch.flipped.tolist(), strict=True):
        assert torch.equal(row, images.view(i, flipped))
    flips = [f for seed in range(20) for _, row in drawn(seed) for f in row]
    assert 0.4 < np.mean(flips) < 0.6
    epoch = drawn(0, 2)
    assert len({i for rows, _ in epoch for i in rows}) == 8  # an epoch repeats nothing


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_resume_anywhere(bedrooms: Path, workers: int) -> None:
    images = load_images("lsun", path=bedrooms, size=8).train
    straight = ImageBatches(images, 10, seed=3)
    expected = [next(straight) for _ in range(8)]
    batches = ImageBatches(images, 10, seed=3, workers=workers)
    for want in expected[:4]:
        assert torch.equal(next(batches).x, want.x)
    state = json.loads(json.dumps(batches.state_dict()))
    assert torch.equal(batches.peek().x, expected[4].x) and batches.state_dict() == state
    batches.close()
    resumed = ImageBatches(images, 10, seed=0, workers=workers)
    resumed.load_state_dict(state)
    for want in expected[4:]:
        got = next(resumed)
        assert torch.equal(got.x, want.x) and torch.equal(got.flipped, want.flipped)
    resumed.close()


def test_an_lmdb_crosses_into_spawned_processes(bedrooms: Path) -> None:
    images = load_images("lsun", path=bedrooms, size=8).train
    code = "import pickle, sys; images = pickle.load(sys.stdin.buffer); print(images.view(2).double().sum().item())"
    import pickle

    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(images), capture_output=True, check=True)
    assert float(done.stdout) == images.view(2).double().sum().item()


def test_a_bad_image_in_a_worker_is_named(tmp_path: Path) -> None:
    images = load_images("imagefolder", path=folder(tmp_path / "images", 4), size=8, valid_count=0).train
    for file in (tmp_path / "images").iterdir():
        file.write_bytes(b"overwritten")
    with pytest.raises(DataError, match=r"png: not an image"):
        next(ImageBatches(images, 2, seed=0, workers=1))


def test_state_of_other_batches_is_refused(tmp_path: Path) -> None:
    images = load_images("imagefolder", path=folder(tmp_path / "images", 8), size=8, valid_count=0).train
    state = ImageBatches(images, 2, seed=0).state_dict()
    for changed in ({"batch_size": 3}, {"flip": 0.5}, {"data": {}}):
        with pytest.raises(DataError, match="Resume with the same data"):
            ImageBatches(images, 2, seed=0).load_state_dict(state | changed)


def test_reading_images_warns_of_nothing(mixed: Path) -> None:
    with warnings.catch_warnings(record=True) as caught, pytest.raises(DataError):
        warnings.simplefilter("always")
        load_images("imagefolder", path=mixed, size=8)
    assert caught == []
