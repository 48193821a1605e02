"""Stroke data: containers, preparation, batches, the cache, and KanjiVG with its SVG paths."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsediff import datasets
from sparsediff.datasets import Batches, DataError, Preparation, StrokeData, Strokes, collate, polylines, positions
from sparsediff.datasets import _cache as cache
from sparsediff.datasets._preparation import Complaints, Drawings, hashed_split, prepare, resample, simplify
from sparsediff.datasets._svgpath import flatten, segments

PLAIN = Preparation(resample=None, scale=None, split=(1, 0, 0))

SVG = """<svg xmlns="http://www.w3.org/2000/svg"><g id="kvg:StrokePaths_0">{}</g></svg>"""


def drawings(*items: list[list[tuple[float, float]]]) -> Drawings:
    """Drawings from nested lists: drawing → stroke → (x, y)."""
    strokes = [stroke for item in items for stroke in item]
    return Drawings(
        np.array([p for stroke in strokes for p in stroke], dtype=np.float64).reshape(-1, 2),
        np.concatenate([[0], np.cumsum([len(s) for s in strokes])]).astype(np.int64),
        np.concatenate([[0], np.cumsum([len(i) for i in items])]).astype(np.int64),
        np.array([f"d{i}" for i in range(len(items))]),
    )


def prepared(raw: Drawings, options: Preparation = PLAIN) -> Strokes:
    return prepare(raw, options, Complaints(options.on_bad))[0]


def some(n: int = 10, seed: int = 0) -> Strokes:
    rng = np.random.default_rng(seed)
    return Strokes.from_list([rng.standard_normal((int(t), 3)) for t in rng.integers(1, 9, n)])


# Containers


def test_strokes_index_select_and_histogram() -> None:
    s = some()
    assert np.array_equal(np.concatenate(list(s)), s.points)
    assert np.array_equal(s[-1], s[len(s) - 1])
    picked = s.select([3, 0, 3])
    assert [len(d) for d in picked] == [s.lengths[3], s.lengths[0], s.lengths[3]]
    assert np.array_equal(picked[2], s[3])
    histogram = s.length_histogram()
    assert histogram.sum() == len(s) and (histogram * np.arange(len(histogram))).sum() == len(s.points)
    with pytest.raises(IndexError, match="got 10"):
        s[10]


def test_fingerprint_depends_on_every_point() -> None:
    s = some()
    changed = s.points.copy()
    changed[-1, 2] += 1
    assert s.fingerprint() == some().fingerprint()
    assert s.fingerprint() != Strokes(changed, s.offsets, s.labels).fingerprint()


@pytest.mark.parametrize(
    ("points", "offsets", "message"),
    [
        (np.zeros((4, 2), np.float32), [0, 4], "shape"),
        (np.zeros((4, 3), np.float32), [0, 3, 2, 4], "item 1 runs from 3 to 2"),
        (np.zeros((4, 3), np.float32), [0, 2, 2, 4], "item 1 is empty"),
        (np.zeros((4, 3), np.float32), [0, 2], "damaged or truncated"),
        (np.array([[0, 0, 0], [0, np.nan, 0]], np.float32), [0, 1, 2], "item 1 holds"),
        (np.zeros((4, 3)), [0, 4], "float32"),
    ],
    ids=["columns", "decreasing", "empty", "short", "nan", "dtype"],
)
def test_strokes_refuse_what_is_not_a_list_of_drawings(points: np.ndarray, offsets: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Strokes(points, np.array(offsets), np.array([""] * (len(offsets) - 1)))


def test_positions_are_the_running_sum() -> None:
    d = some()[0]
    assert np.allclose(positions(d), np.cumsum(d[:, :2], axis=0), atol=1e-6)


def test_polylines_start_at_the_origin_and_follow_the_lift() -> None:
    lines = polylines([[1, 0, 0], [1, 0, 0.9], [0, 5, 0.1], [0, 1, 1]])
    assert [line.tolist() for line in lines] == [[[0, 0], [1, 0], [2, 0]], [[2, 5], [2, 6]]]


# Preparation


def test_the_source_comes_back_when_nothing_is_changed() -> None:
    rng = np.random.default_rng(1)
    items = [[rng.standard_normal((n, 2)).tolist() for n in (2, 5, 3)], [rng.standard_normal((4, 2)).tolist()]]
    s = prepared(drawings(*items))
    for drawing, item in zip(s, items, strict=True):
        first = np.array(item[0][0])
        for line, stroke in zip(polylines(drawing), item, strict=True):
            assert np.allclose(line, np.array(stroke) - first, atol=1e-5)


def test_radius_spacing_and_end_points() -> None:
    raw = drawings([[(5, 5), (5, 9)], [(5, 7), (8, 7)]], [[(0, 0), (1e-9, 0)]])
    s = prepared(raw, Preparation(resample=0.05, scale=10, split=(1, 0, 0)))
    assert [d.shape for d in s] == [(20 + 15 - 1, 3), (20 - 1, 3)]  # lengths 1 and .75 of the radius at .05
    first, second = polylines(s[0])
    assert np.allclose(first[-1], (0, 10), atol=1e-5) and np.allclose(second[[0, -1]], [(0, 5), (7.5, 5)], atol=1e-5)
    assert np.allclose(np.diff(first[:, 1]), 10 / 19, atol=1e-5)
    assert np.allclose([np.hypot(*positions(d).T).max() for d in s], 10, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_resample_equals_one_stroke_at_a_time(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 9, 20)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    xy = rng.standard_normal((offsets[-1], 2))
    xy[1::4] = xy[::4][: len(xy[1::4])]  # repeated points
    got, new = resample(xy, offsets, 0.3)
    for k in range(20):
        p = xy[offsets[k] : offsets[k + 1]]
        along = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(p, axis=0).T))])
        at = np.linspace(0, along[-1], max(2, int(along[-1] / 0.3)))
        want = np.stack([np.interp(at, along, p[:, 0]), np.interp(at, along, p[:, 1])], axis=1)
        assert np.allclose(got[new[k] : new[k + 1]], want, atol=1e-9)


def test_simplify_keeps_ends_and_tolerance() -> None:
    t = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(t), np.sin(t)], axis=1)
    spot = np.zeros((3, 2))
    xy = np.concatenate([circle, spot, circle[:50]])
    got, new = simplify(xy, np.array([0, 200, 203, 253]), 0.01)
    assert np.array_equal(got[new[1] : new[2]], np.zeros((2, 2)))
    for k, line in ((0, circle), (2, circle[:50])):
        part = got[new[k] : new[k + 1]]
        assert len(part) < len(line) / 3
        assert np.array_equal(part[[0, -1]], line[[0, -1]])
        assert np.abs(np.hypot(*((part[1:] + part[:-1]) / 2).T) - 1).max() <= 0.0101  # chords stay close to the arc


def test_long_drawings_and_single_points_are_dropped_and_counted() -> None:
    line = [(float(i), 0.0) for i in range(6)]
    raw = drawings([line], [line[:3], line[:1]], [line[:2]])
    complaints = Complaints("error")
    s = prepare(raw, Preparation(resample=None, max_points=6, split=(1, 0, 0)), complaints)[0]
    assert s.labels.tolist() == ["d1", "d2"]
    assert complaints.counts == {"drawings of 6 points or more": 1, "strokes of a single point": 1}


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ([], "empty drawing"),
        ([[(1.0, 1.0)]], "empty drawing"),
        ([[(0.0, 0.0), (np.nan, 1.0)]], "not finite"),
        ([[(0.0, 0.0), (np.inf, 1.0)]], "not finite"),
        ([[(0.0, 0.0), (1e9, 1.0)]], "giant coordinate"),
        ([[(1.0, 1.0), (1.0, 1.0)]], "without extent"),
    ],
    ids=["no-stroke", "one-point", "nan", "inf", "giant", "spot"],
)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_unusable_drawings_raise_or_are_counted(item: list, reason: str, position: int) -> None:
    good = [[(0.0, 0.0), (1.0, 0.0)], [(3.0, 1.0), (2.0, 2.0)]]
    items = [good, good]
    items.insert(position, item)
    with pytest.raises(DataError, match=f"drawing {position}: .*{reason}.*on_bad='skip'"):
        prepared(drawings(*items))
    complaints = Complaints("skip")
    s = prepare(drawings(*items), Preparation(split=(1, 0, 0), on_bad="skip"), complaints)[0]
    assert len(s) == 2 and sum(n for r, n in complaints.counts.items() if reason in r) == 1
    assert np.array_equal(s[0], s[1])


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(DataError, match="no usable drawing is left of 1"):
        prepared(drawings([[(0, 0), (1, 1), (2, 2), (3, 3)]]), Preparation(resample=None, max_points=4))


@pytest.mark.parametrize(
    "options",
    [
        {"resample": 0},
        {"rdp": -1},
        {"scale": None},
        {"split": (1, 1, 1)},
        {"limit": 0},
        {"on_bad": "?"},
        {"max_points": 2},
    ],
    ids=str,
)
def test_options_out_of_range(options: dict) -> None:
    with pytest.raises(DataError, match="got"):
        Preparation(**options)


def test_splits_are_stable_and_keep_keys_together() -> None:
    keys = np.array([f"k{i}" for i in range(4000)])
    part = hashed_split(keys, (0.85, 0.075, 0.075))
    assert np.abs(np.bincount(part) / 4000 - [0.85, 0.075, 0.075]).max() < 0.02
    assert np.array_equal(hashed_split(keys[::-1], (0.85, 0.075, 0.075))[::-1], part)


# Batches


def test_collate_equals_padding_one_by_one() -> None:
    s = some()
    batch = collate(s, [4, 1, 9])
    assert batch.x.dtype == torch.float32 and batch.lengths.dtype == torch.int32
    assert batch.x.shape == (3, int(batch.lengths.max()), 3)
    for b, i in enumerate([4, 1, 9]):
        n = int(batch.lengths[b])
        assert np.array_equal(batch.x[b, :n].numpy(), s[i]) and not batch.x[b, n:].any()
    moved = collate(s, [4, 1, 9], form="position", length=20)
    assert moved.x.shape[1] == 20
    n = int(moved.lengths[1])
    assert np.allclose(moved.x[1, :n, :2], positions(s[1]), atol=1e-6)
    assert np.array_equal(moved.x[1, :n, 2].numpy(), s[1][:, 2]) and not moved.x[1, n:].any()


@pytest.mark.parametrize(("indices", "message"), [([], "at least one"), ([10], "got 10"), ([-1], "got -1")])
def test_collate_refuses(indices: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        collate(some(), indices)


def test_an_epoch_is_a_permutation_and_resumes_to_the_bit() -> None:
    s = some(23)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches = Batches(s, 5, seed=7)
    assert len(batches) == 4
    seen, states = [], []
    for _ in range(3 * len(batches)):
        states.append(json.loads(json.dumps(batches.state_dict())))
        seen.append(next(batches))
    assert torch.equal(torch.get_rng_state(), before)
    epochs = [torch.cat([b.indices for b in seen[k : k + 4]]) for k in (0, 4, 8)]
    assert all(len(set(e.tolist())) == 20 for e in epochs) and not torch.equal(epochs[0], epochs[1])
    for k, state in enumerate(states):
        again = Batches(s, 5, seed=99)
        again.load_state_dict(state)
        for want in seen[k : k + 3]:
            assert torch.equal(next(again).x, want.x)
    assert not torch.equal(next(Batches(s, 5, seed=8)).indices, seen[0].indices)


def test_batches_refuse_another_run_and_nothing() -> None:
    state = Batches(some(23), 5, seed=7).state_dict()
    with pytest.raises(DataError, match="batch_size 5; this run has 6"):
        Batches(some(23), 6, seed=7).load_state_dict(state)
    with pytest.raises(DataError, match="data"):
        Batches(some(23, seed=1), 5, seed=7).load_state_dict(state)
    with pytest.raises(DataError, match="empty"):
        Batches(Strokes.from_list([]), 5, seed=0)
    with pytest.raises(DataError, match="at least 1"):
        Batches(some(), 0, seed=0)


def test_incomplete_batches_and_small_splits() -> None:
    batches = Batches(some(23), 5, seed=0, drop_last=False, shuffle=False)
    assert len(batches) == 5
    assert torch.cat([next(batches).indices for _ in range(5)]).tolist() == list(range(23))
    assert len(next(Batches(some(3), 5, seed=0)).indices) == 3


# The cache


def test_cache_round_trip_damage_and_leftovers(tmp_path: Path) -> None:
    data = StrokeData("x", some(), some(3), Strokes.from_list([]), 10.0, {"source": "here", "dropped": {"a": 1}})
    path = tmp_path / "prepared" / "x.npz"
    assert cache.load(path) is None
    cache.save(path, data)
    assert [p.name for p in path.parent.iterdir()] == ["x.npz"]
    back = cache.load(path)
    assert back is not None and back.provenance == data.provenance and back.scale == 10.0
    for part in datasets.SPLITS:
        assert back.split(part).fingerprint() == data.split(part).fingerprint()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="damaged"):
        assert cache.load(path) is None


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data = StrokeData("x", some(), some(), some(), None)
    with pytest.warns(UserWarning, match="cannot be kept"):
        cache.save(tmp_path / "file" / "x.npz", data)


def test_the_folder_is_argument_then_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "b"))
    assert cache.data_dir(tmp_path / "a") == tmp_path / "a"
    assert cache.data_dir() == tmp_path / "b"
    monkeypatch.delenv(cache.ENVIRONMENT)
    assert cache.data_dir().name == "sparsediff"


# Registry


def test_names_and_unknown_names() -> None:
    assert "kanjivg" in datasets.names()
    assert all(datasets.get(name).name == name for name in datasets.names())
    with pytest.raises(DataError, match="kanjivg"):
        datasets.load("kanjivq")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colour": 1}, "unknown option colour; expected some of: .*variants"),
        ({"variants": "some"}, "'all', 'base'; got 'some'"),
        ({"category": "cat"}, "no categories"),
        ({"path": "/nowhere"}, "expected a folder"),
    ],
    ids=["option", "value", "category", "path"],
)
def test_wrong_requests(options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        datasets.load("kanjivg", **options)


# SVG paths


def sampled(path: str, steps: int = 8) -> tuple[np.ndarray, list[int]]:
    from array import array

    numbers = array("d")
    counts = segments(path, numbers)
    points, offsets = flatten(np.array(numbers).reshape(-1, 4, 2), np.array(counts, dtype=np.int64), steps)
    return points, np.diff(offsets).tolist()


PATHS = [
    "M17.38,15.5c4.19,1.6,10.82,6.6,11.87,9.09",
    "M14.25,88.23c1.71,1.27,3.78,1.32,4.86-0.25c3.14-4.57,6.29-10.16,9.14-15.99",
    "m 10 10 C 20 20 40 20 50 10 S 80 0 90 10 s 5 5 8 3",
    "M0,0 s 3 4 6 0 S 9-9,9,0",
    "M1 2L3 4h5v-6H0V1l-.5.5 1e1-2E-1",
    "M0 0q5 5 10 0t10 0T30 5",
    "m5 5 3 0 0 3z m10 10 l1 1Z",
    "M1,1L4,5L1,1Z",
]


@pytest.mark.parametrize("path", PATHS)
def test_paths_equal_svgelements(path: str) -> None:
    svgelements = pytest.importorskip(
        "svgelements", reason="svgelements, the reference for SVG paths, is not installed"
    )

    def at(point: Any) -> complex:
        return complex(float(point.x), float(point.y))

    reference = svgelements.Path(path)
    want: list[list[complex]] = []
    for piece in reference:
        if isinstance(piece, svgelements.Move):
            want.append([at(piece.end)])
        elif piece.start != piece.end or not isinstance(piece, svgelements.Close):
            want[-1] += [at(piece.point(t / 8)) for t in range(1, 9)]
    got, counts = sampled(path)
    assert counts == [len(w) for w in want]
    assert np.allclose(got[:, 0] + 1j * got[:, 1], np.concatenate(want), atol=1e-6)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("L1 1", "must begin with M"),
        ("M0 0 A 1 1 0 0 0 2 2", "command 'A'"),
        ("M0 0 C 1 2 3", "needs 6 numbers"),
        ("M0 0 L 1 x", "expected numbers"),
        ("M0 0 L1 1 Z 3", "unexpected '3'"),
        ("M0 0 L 1 #", "expected numbers"),
    ],
)
def test_paths_that_are_none(path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        sampled(path)


# KanjiVG


@pytest.fixture(scope="module")
def kanji() -> StrokeData:
    pytest.importorskip("kanji", reason="the package kanjivg is not installed")
    return datasets.load("kanjivg", cache=False, limit=600)


def test_kanjivg_has_the_shape_of_the_paper_s_data(kanji: StrokeData) -> None:
    total = sum(len(kanji.split(s)) for s in datasets.SPLITS)
    assert total == 600 and kanji.provenance["read"] > 11_000 and not kanji.provenance["dropped"]
    train = kanji.train
    assert 60 < train.lengths.mean() < 110
    ends = train.offsets[1:] - 1
    assert set(np.unique(train.points[:, 2])) == {0.0, 1.0} and train.points[ends, 2].all()
    for drawing in train:
        assert np.hypot(*positions(drawing).T).max() == pytest.approx(10, abs=1e-3)


def test_kanjivg_ichi_runs_left_to_right_and_ju_crosses() -> None:
    """一 is one stroke to the right; 十 (ten) is that and one downwards, y down."""
    pytest.importorskip("kanji", reason="the package kanjivg is not installed")
    import importlib.metadata

    folder = Path(str(importlib.metadata.distribution("kanjivg").locate_file("kanji")))
    kanji = datasets.get("kanjivg")()
    assert kanji.licence.startswith("CC BY-SA")
    from sparsediff.datasets.kanjivg import stroke_paths

    (ichi,) = stroke_paths(folder / "04e00.svg")
    points, _ = sampled(ichi)
    assert points[-1, 0] - points[0, 0] > 80 and abs(points[-1, 1] - points[0, 1]) < 10
    _, down = stroke_paths(folder / "05341.svg")
    points, _ = sampled(down)
    assert points[-1, 1] - points[0, 1] > 60


def test_a_folder_of_svgs_variants_and_damage(tmp_path: Path) -> None:
    for stem in ("00001", "00001-Kaisho", "00002"):
        (tmp_path / f"{stem}.svg").write_text(SVG.format('<path d="M0,0c1,1,2,2,3,9"/><path d="M5,5L9,9"/>'))
    split = {"split": (1, 0, 0), "cache": False, "path": tmp_path}
    assert datasets.load("kanjivg", **split).train.labels.tolist() == ["00001", "00001-Kaisho", "00002"]
    assert datasets.load("kanjivg", variants="base", **split).train.labels.tolist() == ["00001", "00002"]
    bad = {
        "not xml": "not well-formed|syntax error",
        SVG.format(""): "found none",
        SVG.format('<path d="M0,0A1,1"/>'): "command 'A'",
        SVG.format('<path transform="scale(2)" d="M0,0L1,1"/>'): "transform",
    }
    for text, message in bad.items():
        (tmp_path / "00003.svg").write_text(text)
        with pytest.raises(DataError, match=f"00003.svg: .*({message})"):
            datasets.load("kanjivg", **split)
        data = datasets.load("kanjivg", on_bad="skip", **split)
        assert len(data.train) == 3 and data.provenance["dropped"]["not a character of KanjiVG"] == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found none"):
        datasets.load("kanjivg", path=tmp_path / "empty", cache=False)


def test_a_second_load_comes_from_the_cache_and_follows_its_key(tmp_path: Path) -> None:
    folder = tmp_path / "svg"
    folder.mkdir()
    (folder / "00001.svg").write_text(SVG.format('<path d="M0,0c1,1,2,2,3,9"/>'))
    request = {"path": folder, "cache": tmp_path / "cache", "split": (1, 0, 0)}
    first = datasets.load("kanjivg", **request)
    (kept,) = (tmp_path / "cache" / "prepared").iterdir()
    stamp = kept.stat().st_mtime_ns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = datasets.load("kanjivg", **request)
    assert second.train.fingerprint() == first.train.fingerprint() and second.provenance == first.provenance
    assert kept.stat().st_mtime_ns == stamp
    datasets.load("kanjivg", rdp=0.1, **request)
    (folder / "00001.svg").write_text(SVG.format('<path d="M0,0c1,1,2,2,3,9"/><path d="M0,0L1,1"/>'))
    assert len(datasets.load("kanjivg", **request).train.points) > len(first.train.points)
    assert len(list((tmp_path / "cache" / "prepared").iterdir())) == 3


def test_the_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(DataError, match="pip install kanjivg"):
        datasets.load("kanjivg")
