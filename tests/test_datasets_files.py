"""Data sets that read files (sketch-rnn, Quick, Draw!, MNIST, VMNIST), and downloads from a server on this machine."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import json
import os
import pickle
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsediff import datasets
from sparsediff.datasets import DataError, polylines
from sparsediff.datasets import _fetch as fetch
from sparsediff.datasets import mnist as mnist_module
from sparsediff.datasets import quickdraw as quickdraw_module
from sparsediff.datasets._vectorise import skeletons, vectorise
from sparsediff.datasets.mnist import read_idx
from sparsediff.rendering import render

SHARED = Path(os.environ.get("SPARSEDIFF_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
PLAIN: dict[str, Any] = {"resample": None, "scale": None, "cache": False}


def shared(name: str) -> Path:
    """A real file that is not part of the repository."""
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{name} is not in ../shared/data (or SPARSEDIFF_TEST_DATA)")
    return path


def objects(items: list[Any]) -> np.ndarray:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


def stroke3(n: int, seed: int = 0) -> np.ndarray:
    """A drawing of n rows, strokes of two to four points."""
    rng = np.random.default_rng(seed)
    rows = np.concatenate([rng.integers(1, 50, (n, 2)), np.zeros((n, 1), int)], axis=1).astype(np.int16)
    rows[3::4, 2] = 1
    rows[-1, 2] = 1
    return rows


# sketch-rnn


@pytest.mark.parametrize("start", ["move", "line"])
def test_sketchrnn_rows_come_back(start: str, tmp_path: Path) -> None:
    parts = {"train": [stroke3(n, n) for n in (4, 8, 12)], "valid": [stroke3(8)], "test": [stroke3(4), stroke3(16)]}
    path = tmp_path / "x.npz"
    np.savez(path, **{k: objects(v) for k, v in parts.items()})
    data = datasets.load("sketchrnn", path=path, start=start, **PLAIN)
    for part, items in parts.items():
        for got, want in zip(data.split(part), items, strict=True):
            assert np.array_equal(got, want[1:] if start == "move" else want)
    assert data.train.labels.tolist() == ["train/0", "train/1", "train/2"]


@pytest.mark.parametrize(("shift", "start"), [(0, "line"), (200, "move")])
def test_the_meaning_of_row_0_is_seen_from_the_positions(shift: int, start: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    items = [np.concatenate([rng.integers(-20, 20, (7, 2)), np.eye(7)[:, 6:]], axis=1) for _ in range(20)]
    for item in items:
        item[0, :2] += shift  # absolute positions on a canvas
    path = tmp_path / "x.npz"
    np.savez(path, train=objects(items))
    auto, told = (datasets.load("sketchrnn", path=path, start=s, **PLAIN) for s in ("auto", start))
    assert auto.train.fingerprint() == told.train.fingerprint()


def test_a_file_without_splits_is_split(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, train=objects([stroke3(8, i) for i in range(40)]))
    data = datasets.load("sketchrnn", path=path, split=(0.5, 0.25, 0.25), **PLAIN)
    assert [len(data.split(s)) > 3 for s in datasets.SPLITS] == [True] * 3


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (np.zeros((3, 2)), "not a list of"),
        (np.array(["a"]), "refused"),
        (None, "not a list of"),
        (np.zeros((0, 3)), "empty drawing"),
        (np.array([[0, 0, 0], [np.nan, 0, 1]]), "not finite"),
        (np.array([[0, 0, 0], [np.inf, 0, 1]]), "not finite"),
        (np.array([[0, 0, 0], [1e9, 0, 1]]), "giant"),
        (np.array([[0, 0, 0], [1, 0, 0.5]]), "neither 0 nor 1"),
        (np.array([[5, 5, 1], [5, 5, 1]]), "empty drawing"),
    ],
    ids=["columns", "text", "none", "empty", "nan", "inf", "giant", "lift", "dots"],
)
def test_bad_items_of_a_sketchrnn_file(item: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    good = stroke3(8)
    np.savez(path, train=objects([good, item, good]), valid=objects([good]), test=objects([good]))
    with pytest.raises(DataError, match=rf"(?s)x\.npz: .*{reason}") as caught:
        datasets.load("sketchrnn", path=path, **PLAIN)
    if reason != "refused":
        assert "item 1 of 'train'" in str(caught.value) or "item train/1" in str(caught.value)
        data = datasets.load("sketchrnn", path=path, on_bad="skip", **PLAIN)
        assert len(data.train) == 2 and sum(n for r, n in data.provenance["dropped"].items() if reason in r) == 1
        assert all(np.array_equal(d, good[1:]) for d in data.train)


def test_sketchrnn_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give the file with path="):
        datasets.load("sketchrnn")
    with pytest.raises(DataError, match="there is none"):
        datasets.load("sketchrnn", path=tmp_path / "none.npz")
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    with pytest.raises(DataError, match=r"expected the keys train, valid, test .* got a\."):
        datasets.load("sketchrnn", path=tmp_path / "x.npz", cache=False)


def test_the_real_kanji_file(tmp_path: Path) -> None:
    data = datasets.load("sketchrnn", path=shared("kanji.rdp100.npz"), resample=None, cache=tmp_path)
    # Row 0 is a line: taken so, and only so, the strokes begin where those of KanjiVG's SVG files do.
    assert len(data.train.points) == 388_350
    assert [len(data.split(s)) for s in datasets.SPLITS] == [10_358, 600, 500]
    assert not data.provenance["dropped"]
    assert data.train.lengths.mean() == pytest.approx(37.5, abs=0.1)
    again = datasets.load("sketchrnn", path=shared("kanji.rdp100.npz"), resample=None, cache=tmp_path)
    assert again.train.fingerprint() == data.train.fingerprint()


# Quick, Draw!


def line(drawing: Any, **more: Any) -> str:
    return json.dumps({"word": "cat", "key_id": "7", "recognized": True, "drawing": drawing, **more})


CAT = [[[0, 10, 20], [0, 5, 0]], [[5, 5], [10, 20]]]


def test_ndjson_raw_and_simplified(tmp_path: Path) -> None:
    timed = [[x, y, [k * 10 for k in range(len(x))]] for x, y in CAT]
    (tmp_path / "cat.ndjson").write_text(line(CAT) + "\n" + line(timed, key_id="8") + "\n\n")
    data = datasets.load("quickdraw", path=tmp_path, category="cat", split=(1, 0, 0), **PLAIN)
    assert data.train.labels.tolist() == ["7", "8"] and np.array_equal(data.train[0], data.train[1])
    for got, (x, y) in zip(polylines(data.train[0]), CAT, strict=True):
        assert np.array_equal(got, np.array([x, y]).T)


def test_unrecognized_drawings_can_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.ndjson"
    path.write_text(line(CAT) + "\n" + line(CAT, recognized=False))
    for only, count in ((False, 2), (True, 1)):
        data = datasets.load("quickdraw", path=path, recognized_only=only, split=(1, 0, 0), **PLAIN)
        assert len(data.train) == count


@pytest.mark.parametrize(
    "bad",
    [
        line(CAT)[:-20],
        "[1, 2]",
        "{}",
        line([[[0, 1], [0]]]),
        line([[[0, "a"], [0, 1]]]),
        line([[0, 1]]),
        line([]),
        line([[[0, 1], [float("nan"), 2]]]),
        line([[[0, 1e30], [0, 2]]]),
    ],
    ids=["truncated", "list", "keys", "lengths", "text", "flat", "empty", "nan", "giant"],
)
def test_bad_lines(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "x.ndjson"
    path.write_text("\n".join([line(CAT), bad, line(CAT)]))
    with pytest.raises(DataError, match=r"x\.ndjson: line 2: .*expected .*on_bad='skip'"):
        datasets.load("quickdraw", path=path, **PLAIN)
    data = datasets.load("quickdraw", path=path, on_bad="skip", split=(1, 0, 0), **PLAIN)
    assert len(data.train) == 2 and sum(data.provenance["dropped"].values()) == 1


def flat(path: Path, **changes: Any) -> Path:
    items = [stroke3(4, i) for i in range(6)]
    arrays: dict[str, Any] = {
        "points": np.concatenate(items),
        "offsets": np.arange(7, dtype=np.int32) * 4,
        "label": np.array([0, 1, 0, 1, 1, 1], np.int16),
        "categories": np.array(["cat", "crab"]),
        "key_id": np.array([f"k{i}" for i in range(6)]),
    } | changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def test_the_flat_file_gives_one_category(tmp_path: Path) -> None:
    data = datasets.load("quickdraw", path=flat(tmp_path / "f.npz"), category="cat", split=(1, 0, 0), **PLAIN)
    assert data.train.labels.tolist() == ["k0", "k2"]
    assert np.array_equal(data.train[1], stroke3(4, 2)[1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": None}, "label missing"),
        ({"offsets": np.array([0, 4, 2, 8, 12, 16, 24])}, "item 1 runs from 4 to 2"),
        ({"offsets": np.array([0, 4, 4, 8, 12, 16, 24])}, "item 1 is empty"),
        ({"offsets": np.arange(7) * 3}, "damaged or truncated"),
        ({"label": np.zeros(3, int)}, "one label a drawing"),
        ({"categories": np.array(["dog", "crab"])}, "category must be one of its 2; got 'cat'. Near it:"),
    ],
    ids=["keys", "decreasing", "empty", "short", "labels", "category"],
)
def test_damaged_flat_files(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        datasets.load("quickdraw", path=flat(tmp_path / "f.npz", **changes), category="cat", **PLAIN)


def test_quickdraw_wrong_requests(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a category"):
        datasets.load("quickdraw")
    with pytest.raises(DataError, match=r"expected one of cat\.npz"):
        datasets.load("quickdraw", path=tmp_path, category="cat")
    with pytest.raises(DataError, match="holds many categories"):
        datasets.load("quickdraw", path=flat(tmp_path / "f.npz"), **PLAIN)
    (tmp_path / "dog.ndjson").write_text(line(CAT))
    with pytest.raises(DataError, match="line 1: expected drawings of 'dog'; got 'cat'"):
        datasets.load("quickdraw", path=tmp_path, category="dog", **PLAIN)
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(DataError, match=r"or \.ndjson file; got \.txt"):
        datasets.load("quickdraw", path=tmp_path / "x.txt")


@pytest.mark.parametrize("category", ["cat", "crab", "mosquito"])
def test_the_real_quickdraw_file(category: str) -> None:
    data = datasets.load("quickdraw", path=shared("quickdraw345_stroke3.npz"), category=category, cache=False)
    assert data.provenance["read"] > 10 and 50 < data.train.lengths.mean() < 200


# MNIST


def digits(n: int = 3) -> np.ndarray:
    """Pictures of a vertical bar, a ring and a plus sign, in turn."""
    pictures = np.zeros((n, 28, 28), np.uint8)
    y, x = np.mgrid[:28, :28] - 13.5
    shapes = [
        (np.abs(x) < 1.6) & (np.abs(y) < 9),
        np.abs(np.hypot(x, y) - 8) < 1.6,
        ((np.abs(x) < 1.6) & (np.abs(y) < 9)) | ((np.abs(y) < 1.6) & (np.abs(x) < 9)),
    ]
    for i in range(n):
        pictures[i] = shapes[i % 3] * 255
    return pictures


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def folder(path: Path, *, zipped: bool = False, dotted: bool = False, n: int = 30) -> Path:
    path.mkdir(exist_ok=True)
    contents = (digits(n), np.arange(n, dtype=np.uint8) % 3, digits(6), np.arange(6, dtype=np.uint8) % 3)
    for name, content in zip(mnist_module.FILES, contents, strict=True):
        file = path / (name.replace("-idx", ".idx") if dotted else name)
        if zipped:
            file.with_name(file.name + ".gz").write_bytes(gzip.compress(idx(content)))
        else:
            file.write_bytes(idx(content))
    return path


def test_bar_ring_and_plus_are_traced() -> None:
    bar, ring, plus = vectorise(digits())
    assert len(bar) == 1 and np.allclose(bar[0][:, 0], 13.5, atol=0.6)
    assert np.ptp(bar[0][:, 1]) > 12 and bar[0][0, 1] < bar[0][-1, 1]  # downwards
    assert len(ring) == 1 and np.array_equal(ring[0][0], ring[0][-1])
    assert np.allclose(np.hypot(*(ring[0] - 13.5).T), 8, atol=0.8) and ring[0][0, 1] < 7  # from its top
    assert len(plus) == 2 and all(np.hypot(*(s[-1] - s[0])) > 12 for s in plus)  # straight on at the crossing
    assert vectorise(np.zeros((2, 28, 28), np.uint8)) == [[], []]


def test_skeletons_are_thin_and_keep_connectivity() -> None:
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy, which counts the components, is not installed")
    rng = np.random.default_rng(0)
    ink = np.zeros((40, 30, 30), bool)
    ink[:, 1:-1, 1:-1] = np.stack([ndimage.gaussian_filter(rng.standard_normal((28, 28)), 2) > 0.03 for _ in range(40)])
    thin = skeletons(ink)
    assert not (thin & ~ink).any()
    everywhere = np.ones((3, 3))
    for before, after in zip(ink, thin, strict=True):
        assert ndimage.label(before, everywhere)[1] == ndimage.label(after, everywhere)[1]
        assert ndimage.label(~before)[1] == ndimage.label(~after)[1]  # holes
        assert not ndimage.minimum_filter(after, (2, 2)).sum() > 2  # hardly a block of two by two is left


@pytest.mark.parametrize("form", ["idx", "gz", "dotted", "npz", "keras"])
def test_every_form_of_mnist_gives_the_same(form: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "m", zipped=form == "gz", dotted=form == "dotted")
    if form in ("npz", "keras"):
        names = ("train_images", "train_labels", "test_images", "test_labels")
        arrays = [read_idx(path / name) for name in mnist_module.FILES]
        keys = [mnist_module._KERAS[n] for n in names] if form == "keras" else names
        path = tmp_path / "m.npz"
        np.savez(path, **dict(zip(keys, arrays, strict=True)))
    data = datasets.load("mnist", path=path, cache=False)
    assert len(data.train) + len(data.valid) == 30 and len(data.test) == 6
    assert data.test.labels.tolist() == ["0", "1", "2"] * 2
    assert np.hypot(*np.cumsum(data.test[0][:, :2], axis=0).T).max() == pytest.approx(10, abs=1e-3)
    # Drawn again, the strokes lie on the picture: the bar's picture is dark in the middle column.
    assert render(data.test[0], 28)[4:24, 13:15].min(axis=1).max() < 128


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", b"", "begins with b''"),
        ("train-images-idx3-ubyte", b"\0\0\x0d\3" + bytes(12), "unsigned bytes"),
        ("train-images-idx3-ubyte", idx(digits())[:-1], "expected 2,352 bytes"),
        ("train-images-idx3-ubyte", idx(digits())[:9], "bytes"),
        ("train-images-idx3-ubyte", idx(digits()[0]), r"shape \(N, 28, 28\)"),
        ("train-labels-idx1-ubyte", idx(np.zeros(3, np.uint8)), "must be 30 integers"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((6, 9, 9), np.uint8)), "one size"),
    ],
    ids=["empty", "float", "truncated", "header", "flat", "labels", "sizes"],
)
def test_damaged_idx_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    (path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        datasets.load("mnist", path=path, cache=False)


def test_a_truncated_gzip_and_a_folder_without_mnist(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", zipped=True)
    file = path / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match="cannot be read"):
        datasets.load("mnist", path=path, cache=False)
    with pytest.raises(DataError, match="found neither"):
        datasets.load("mnist", path=tmp_path, cache=False)


def test_a_blank_picture_is_an_empty_drawing(tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    pictures = digits(30)
    pictures[4] = 0
    (path / "train-images-idx3-ubyte").write_bytes(idx(pictures))
    with pytest.raises(DataError, match="picture 4: empty drawing"):
        datasets.load("mnist", path=path, cache=False)
    data = datasets.load("mnist", path=path, cache=False, on_bad="skip")
    assert len(data.train) + len(data.valid) == 29


def test_the_real_mnist() -> None:
    data = datasets.load("mnist", path=shared("mnist.npz"), limit=300, cache=False)
    every = [d for s in datasets.SPLITS for d in data.split(s)]
    assert len(every) == 300 and not data.provenance["dropped"].get("empty drawing")
    strokes = np.array([int(d[:, 2].sum()) for d in every])
    assert 1 <= strokes.mean() < 2 and strokes.max() < 8


# VMNIST


def test_vmnist_pickles_with_and_without_class_folders(tmp_path: Path) -> None:
    one, two = (
        {"drawing": [[[0, 9, 9], [0, 0, 5], [0, 1, 2]]]},
        {"drawing": [[0.0, 9.0, 9.0], [0.0, 0.0, 5.0], [0, 1, 2]]},
    )
    array = {"drawing": [np.array([[0, 9, 9], [0, 0, 5], [0, 1, 2]], float)], "word": "3"}
    for sub in ("3", "4"):
        (tmp_path / "classes" / sub).mkdir(parents=True)
    for name, item in (("3/sketch_10", one), ("3/sketch_9", two), ("4/sketch_0", array)):
        (tmp_path / "classes" / name).write_bytes(pickle.dumps(item, 4))
    data = datasets.load("vmnist", path=tmp_path / "classes", split=(1, 0, 0), **PLAIN)
    assert data.train.labels.tolist() == ["3", "3", "4"]
    assert all(d.tolist() == [[9, 0, 0], [0, 5, 1]] for d in data.train)
    (tmp_path / "all.pkl").write_bytes(pickle.dumps([one, two, array]))
    whole = datasets.load("vmnist", path=tmp_path / "all.pkl", split=(1, 0, 0), **PLAIN)
    assert len(whole.train) == 3 and "pickles" in whole.provenance["source"]


@pytest.mark.parametrize(
    "item",
    [{}, {"drawing": 3}, {"drawing": [[[0, 1], [0]]]}, [1], {"drawing": [["a", "b"]]}, {"drawing": [[[None], [1]]]}],
    ids=["keys", "number", "lengths", "list", "text", "none"],
)
def test_bad_vmnist_items(item: Any, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(pickle.dumps({"drawing": [[[0, 9], [0, 5], [0, 1]]]}))
    (tmp_path / "b").write_bytes(pickle.dumps(item))
    with pytest.raises(DataError, match=r"b(: item 0)?: not a drawing: expected \{'drawing'"):
        datasets.load("vmnist", path=tmp_path, **PLAIN)
    assert len(datasets.load("vmnist", path=tmp_path, on_bad="skip", split=(1, 0, 0), **PLAIN).train) == 1


def test_vmnist_falls_back_to_mnist_and_says_so(tmp_path: Path) -> None:
    folder(tmp_path / "mnist", zipped=True)
    known = mnist_module.FILES
    for name in known:  # the folder's files are not the published ones
        content = (tmp_path / "mnist" / f"{name}.gz").read_bytes()
        known = known | {name: hashlib.md5(content, usedforsecurity=False).hexdigest()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist_module, "FILES", known)
        data = datasets.load("vmnist", cache=tmp_path)
        assert "not the published VMNIST" in data.provenance["source"] and data.name == "vmnist"
        (tmp_path / "vmnist").mkdir()
        (tmp_path / "vmnist" / "sketch_0").write_bytes(pickle.dumps({"drawing": [[[0, 9], [0, 5], [0, 1]]]}))
        assert "pickles" in datasets.load("vmnist", cache=tmp_path).provenance["source"]


# Downloads


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server on this machine; yields its address and its folder."""
    root = tmp_path / "www"
    root.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(root))

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/", root
        httpd.shutdown()
        thread.join()


def test_download_records_a_checksum_and_checks_it_later(server: tuple[str, Path], tmp_path: Path) -> None:
    address, root = server
    (root / "a.bin").write_bytes(b"content")
    target = tmp_path / "sub" / "a.bin"
    urls = [address + "missing", address + "a.bin"]  # the first mirror does not have it
    assert fetch.download(urls, target, known_hash=None, remedy="").read_bytes() == b"content"
    digest = hashlib.sha256(b"content").hexdigest()
    assert (tmp_path / "sub" / "a.bin.sha256").read_text().strip() == f"sha256:{digest}"
    (root / "a.bin").unlink()  # not asked again
    assert fetch.download(urls, target, known_hash=None, remedy="") == target
    target.write_bytes(b"damaged")
    with pytest.raises(DataError, match="damaged: delete it"):
        fetch.download(urls, target, known_hash=None, remedy="")


def test_download_refuses_a_wrong_checksum(server: tuple[str, Path], tmp_path: Path) -> None:
    address, root = server
    (root / "a.bin").write_bytes(b"content")
    target = tmp_path / "a.bin"
    with pytest.raises(DataError, match=r"a\.bin could not be downloaded.*hash.*Put it there"):
        fetch.download([address + "a.bin"], target, known_hash="md5:" + "0" * 32, remedy="Put it there.")
    assert not target.exists()


def test_offline_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = "http://127.0.0.1:9/"
    monkeypatch.setattr(quickdraw_module, "ADDRESS", nowhere)
    with pytest.raises(
        DataError, match=r"no connection.*fetch http://127.0.0.1:9/the%20sun.npz elsewhere and put it in"
    ):
        datasets.load("quickdraw", category="the sun", cache=tmp_path)
    monkeypatch.setattr(mnist_module, "MIRRORS", (nowhere,))
    with pytest.raises(DataError, match=r"put train-images-idx3-ubyte\.gz, .* in .*mnist, or give"):
        datasets.load("mnist", cache=tmp_path)


def test_quickdraw_downloads_its_category(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, root = server
    np.savez(root / "cat.npz", train=objects([stroke3(8)]), valid=objects([stroke3(8)]), test=objects([stroke3(8)]))
    monkeypatch.setattr(quickdraw_module, "ADDRESS", address)
    data = datasets.load("quickdraw", category="cat", cache=tmp_path / "data")
    assert len(data.train) == 1
    assert sorted(p.name for p in (tmp_path / "data" / "quickdraw").iterdir()) == ["cat.npz", "cat.npz.sha256"]
