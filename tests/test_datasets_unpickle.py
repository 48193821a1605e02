"""The restricted unpickler: every form of array comes through, every hostile pickle is refused by name and runs
nothing.
"""

from __future__ import annotations

import collections
import functools
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsediff import datasets
from sparsediff.datasets import DataError
from sparsediff.datasets._unpickle import load_npz, load_plain

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def equal(a: Any, b: Any) -> bool:
    if isinstance(b, np.ndarray):
        same = isinstance(a, np.ndarray) and a.shape == b.shape and a.dtype == b.dtype
        return same and all(equal(x, y) for x, y in zip(a.flat, b.flat, strict=True))
    if isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in b)
    return bool(a == b)


def objects(*items: Any) -> np.ndarray:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


VALUES: dict[str, Any] = {
    "plain": {"drawing": [[[1, 2.5], [3, 4]], None, True, ("x", b"y\xff"), 2**70]},
    "float64": np.arange(6.0).reshape(2, 3),
    "float32": np.arange(6, dtype=np.float32),
    "int16": np.arange(-3, 3, dtype=np.int16).reshape(3, 2),
    "big-endian": np.arange(4, dtype=">i4"),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 3)),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "strided": np.arange(20.0)[::3],
    "scalar": [np.float64(2.5), np.int16(-3)],
    "ragged": objects(np.zeros((2, 3), np.int16), np.ones((4, 3), np.float64)),
    "shared": objects(*[np.arange(3.0)] * 3),
    "object-2d": np.array([[1, 2], [3, 4]], dtype=object),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_data_comes_through(value: Any, protocol: int) -> None:
    got = load_plain(pickle.dumps(value, protocol), "x")
    assert equal(got, [float(v) if v == 2.5 else int(v) for v in value] if value is VALUES["scalar"] else value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("other", ["numpy.core", "numpy._core"])
def test_both_generations_of_numpy_are_understood(protocol: int, other: str) -> None:
    value = VALUES["ragged"]
    data = pickle.dumps(value, protocol)
    mine = np.ndarray.__reduce__(np.zeros(1))[0].__module__.removesuffix(".multiarray")
    if protocol < 4:
        data = data.replace(mine.encode(), other.encode())
    else:  # names carry their length
        for module in (".multiarray", ".numeric"):
            old, new = (mine + module).encode(), (other + module).encode()
            data = data.replace(struct.pack("<B", len(old)) + old, struct.pack("<B", len(new)) + new)
        # One frame around the whole has another length now.
        start = data.index(b"\x95") if b"\x95" in data[:3] else -1
        if start >= 0:
            data = data[:start] + data[start + 9 :]
    assert (other.encode() in data) and equal(load_plain(data, "x"), value)


def test_python_2_pickles_are_understood() -> None:
    """As Python 2's numpy wrote `np.array([[1, 2, 1]], 'i2')`: bytes are strings."""
    data = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x01K\x03\x86"
        b"cnumpy\ndtype\nU\x02i2K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"U\x06\x01\x00\x02\x00\x01\x00tb."
    )
    assert equal(load_plain(data, "x"), np.array([[1, 2, 1]], dtype="<i2"))


class Call:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function: Callable[..., Any], *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def witness(path: str) -> None:
    Path(path).write_text("ran")


HOSTILE: dict[str, tuple[Callable[[str], Any], str]] = {
    "os.system": (lambda p: Call(os.system, f"touch {p}"), r"(posix|nt)\.system"),
    "eval": (lambda p: Call(eval, f"open({p!r}, 'w')"), "eval"),
    "exec": (lambda p: Call(exec, f"open({p!r}, 'w')"), "exec"),
    "getattr": (lambda p: Call(getattr, Path(p), "touch"), "getattr|Path"),
    "partial": (lambda p: functools.partial(witness, p), "partial"),
    "own function": (lambda p: Call(witness, p), "witness"),
    "np.load": (lambda p: Call(np.load, p), r"numpy.*load"),
    "np.save": (lambda p: Call(np.save, p, 1), r"numpy.*save"),
    "np.fromfile": (lambda p: Call(np.fromfile, p), "fromfile"),
    "np.memmap": (lambda p: Call(np.memmap, p, "u1", "w+", 0, (1,)), "memmap"),
    "np.zeros": (lambda p: Call(np.zeros, 3), "zeros"),
    "np.testing": (lambda p: Call(np.testing.assert_, False), "assert_"),
    "np.dtype of a class": (lambda p: Call(np.dtype, int), "int|long"),
    "structured dtype": (lambda p: np.zeros(2, [("a", "i4")]), "dtype"),
    "datetime": (lambda p: np.zeros(2, "M8[s]"), "dtype"),
    "string array": (lambda p: np.array(["ab"]), "dtype"),
    "io.open": (lambda p: Call(io.open, p, "w"), "open"),
    "OrderedDict": (lambda p: collections.OrderedDict(a=1), "OrderedDict"),
    "set": (lambda p: {1, 2}, "set|EMPTY_SET"),
    "complex": (lambda p: 1j, "complex"),
    "deep": (lambda p: functools.reduce(lambda a, _: [a], range(50), 0), "nested deeper"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("wrap", ["bare", "list", "array", "dict"])
@pytest.mark.parametrize("name", HOSTILE)
def test_everything_else_is_refused_by_name_and_nothing_runs(
    name: str, wrap: str, protocol: int, tmp_path: Path
) -> None:
    build, message = HOSTILE[name]
    target = tmp_path / "ran"
    value = build(str(target))
    wrapped = {"bare": value, "list": [1, value], "array": objects(np.zeros(2), value), "dict": {"drawing": value}}[
        wrap
    ]
    with pytest.raises(
        DataError, match=rf"(?s)FILE: refused: the pickle asks for .*({message}).*Nothing in it was run"
    ):
        load_plain(pickle.dumps(wrapped, protocol), "FILE")
    assert not target.exists()


def crafted(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


NDARRAY = b"cnumpy\nndarray\n"
DTYPE = b"cnumpy\ndtype\n"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
ARRAY = RECONSTRUCT + b"(" + NDARRAY + b"(I0\ntS'b'\ntR"  # an array before its content
OBJECT = DTYPE + b"(S'O8'\nI0\nI1\ntR"
FLAGS = b"(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"  # a dtype state that denies holding objects


@pytest.mark.parametrize(
    "data",
    [
        crafted(NDARRAY),
        crafted(NDARRAY, b"(I4\ntR"),
        crafted(NDARRAY, b"}(S'x'\nI1\nub"),
        crafted(b"(", NDARRAY, b"o"),
        crafted(b"(inumpy\nndarray\n"),
        crafted(NDARRAY, b"(t\x81"),
        crafted(DTYPE, b"}(S'x'\nI1\nub"),
        crafted(DTYPE, b"(S'i4,i4'\ntR"),
        crafted(DTYPE, b"(S'V8'\ntR"),
        crafted(RECONSTRUCT, b"(", DTYPE, b"(I0\ntS'b'\ntR"),
        crafted(RECONSTRUCT, b"(", NDARRAY, b"(I1000000000\ntS'b'\ntR"),
        crafted(ARRAY),
        # Raw bytes for object pointers, with and without forged flags.
        crafted(ARRAY, b"(I1\n(I1\nt", OBJECT, b"I00\nS'AAAAAAAA'\ntb"),
        crafted(ARRAY, b"(I1\n(I1\nt", OBJECT, FLAGS, b"I00\nS'AAAAAAAA'\ntb"),
        # Shapes that the bytes do not fill.
        crafted(ARRAY, b"(I1\n(I1000000\nt", DTYPE, b"(S'f8'\nI0\nI1\ntR", b"I00\nS'AAAAAAAA'\ntb"),
        crafted(ARRAY, b"(I1\n(I-1\nt", DTYPE, b"(S'f8'\nI0\nI1\ntR", b"I00\nS'AAAAAAAA'\ntb"),
        crafted(b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR"),
        crafted(b"c_codecs\nencode\n(S'x'\nS'latin1'\nS'strict'\ntR"),
        crafted(b"Pid\n"),
        crafted(b"\x82\x01"),
        crafted(b"Nr\xff\xff\xff\xff", NDARRAY),  # a memo of 2^32 entries
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\x00\x00.",  # 2^48 bytes
        b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile\n\x93.",
        b"\x80\x04\x8c\x05numpy\x8c\x12ndarray.__class__.__mro__\x93.",
    ],
    ids=range(24),
)
def test_crafted_pickles_are_refused(data: bytes) -> None:
    with pytest.raises(DataError, match=r"FILE: (refused|expected a pickle)"):
        load_plain(data, "FILE")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_truncation_at_every_byte(protocol: int) -> None:
    data = pickle.dumps(VALUES["ragged"], protocol)
    for n in range(len(data)):
        with pytest.raises(DataError, match=r"FILE"):
            load_plain(data[:n], "FILE")


def test_noise_never_escapes() -> None:
    rng = np.random.default_rng(0)
    data = pickle.dumps(VALUES["ragged"], 2)
    load_plain(data, "FILE")
    for _ in range(3000):
        forged = bytearray(data)
        for at in rng.integers(0, len(data), 3):
            forged[at] = rng.integers(256)
        try:
            load_plain(bytes(forged), "FILE")
        except DataError as error:
            assert "FILE" in str(error)


# .npz files


def test_npz_with_and_without_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, plain=np.arange(3), ragged=VALUES["ragged"])
    arrays = load_npz(path)
    assert list(arrays) == ["plain", "ragged"]
    assert equal(arrays["plain"], np.arange(3)) and equal(arrays["ragged"], VALUES["ragged"])


def test_a_hostile_npz_is_refused_through_the_data_set(tmp_path: Path) -> None:
    path, target = tmp_path / "kanji.npz", tmp_path / "ran"
    np.savez(path, train=objects(np.zeros((2, 3)), Call(os.system, f"touch {target}")))
    for on_bad in ("error", "skip"):  # a hostile file is not a bad item
        with pytest.raises(DataError, match=r"kanji\.npz: array 'train': refused: .*system"):
            datasets.load("sketchrnn", path=path, cache=False, on_bad=on_bad)
    assert not target.exists()


def npz(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name + ".npy", content)
    return path


def header(shape: str, descr: str = "'|O'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY\x07\x00",
        header("(2,)"),
        header("(2,)") + pickle.dumps(objects(1, 2, 3)),
        header("(2,)") + pickle.dumps([1, 2]),
        header("(10**9,)", "'<f8'"),
        header("(1000000000000,)", "'<f8'") + b"1234",
        header("__import__('os').getcwd()"),
    ],
    ids=["empty", "version", "no-pickle", "count", "list", "expression", "giant", "call"],
)
def test_damaged_members_of_an_npz(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.npz: array 'train'"):
        load_npz(npz(tmp_path / "a.npz", train=content))


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(DataError, match="no such file"):
        load_npz(path)
    path.write_bytes(b"hello")
    with pytest.raises(DataError, match=r"a\.npz: expected an \.npz"):
        load_npz(path)
    np.savez_compressed(path, a=np.random.default_rng(0).standard_normal(1000))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="truncated"):
        load_npz(path)
    path.write_bytes(whole[:300] + bytes(64) + whole[364:])
    with pytest.raises(DataError, match=r"a\.npz"):
        load_npz(path)
