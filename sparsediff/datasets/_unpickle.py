"""Reads pickles that hold plain data and numpy arrays, and nothing else.

sketch-rnn's `.npz` files hold object arrays and VMNIST's drawings are pickles, so both need pickle, whose files may
name any function of any installed package and have it called. Here only the opcodes that plain data and arrays need are
known, a file's names are looked up in a fixed table of stand-ins, and a call of one checks its arguments and builds an
array from bytes with numpy's public interface. Any other name, call or opcode ends the load with a DataError that says
which. No global that a file names is ever imported or called.

numpy's own `ndarray.__setstate__` and `dtype.__setstate__` are not used either: a forged dtype state can make numpy
take raw bytes for object pointers.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
import numpy.typing as npt

from ._strokes import DataError

_SIZES = {"b": (1,), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8)}
_DEPTH = 8


class Refused(pickle.UnpicklingError):
    """A pickle asks for something that is neither plain data nor a numpy array."""


def _refuse(what: str) -> NoReturn:
    raise Refused(what)


class _Dtype:
    """Stands for a numpy dtype: numbers, booleans and object references only."""

    __slots__ = ("order", "spec")

    def __init__(self, spec: str) -> None:
        self.spec, self.order = spec, "|"

    def set_state(self, state: object) -> None:
        # (version, byte order, subdtype, names, fields, itemsize, alignment, flags[, metadata])
        if not (isinstance(state, tuple) and len(state) in (8, 9) and state[1] in ("<", ">", "|", "=")):
            _refuse(f"a numpy dtype with state {state!r:.80}")
        if any(part is not None for part in state[2:5]) or (len(state) == 9 and state[8]):
            _refuse("a structured numpy dtype")
        self.order = str(state[1])

    def resolve(self) -> np.dtype[Any]:
        return np.dtype((self.order if self.order in "<>" else "=") + self.spec)


class _Array:
    """Stands for a numpy array until the whole pickle is read."""

    __slots__ = ("dtype", "items", "raw", "shape")

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = (0,)
        self.dtype: _Dtype | None = None
        self.raw: bytes = b""
        self.items: list[Any] | None = None

    def fill(self, shape: object, dtype: object, fortran: object, data: object) -> None:
        sizes = shape if isinstance(shape, tuple) else (shape,)
        if len(sizes) > 4 or not all(type(n) is int and n >= 0 for n in sizes):
            _refuse(f"an array of shape {shape!r:.80}")
        if not isinstance(dtype, _Dtype):
            _refuse(f"an array of dtype {dtype!r:.80}")
        if fortran not in (False, True, 0, 1, "C", "F"):
            _refuse(f"an array of order {fortran!r:.80}")
        count = math.prod(sizes)
        if dtype.spec == "O":
            if type(data) is not list or len(data) != count:
                _refuse(f"an object array of shape {sizes} whose content is not a list of {count} items")
            self.items = data
        else:
            # Python 2 wrote bytes as str, which reads back as latin-1 text.
            raw = data.encode("latin1") if isinstance(data, str) else data
            if not isinstance(raw, (bytes, bytearray)) or len(raw) != count * dtype.resolve().itemsize:
                _refuse(f"a {dtype.spec} array of shape {sizes} whose bytes do not match")
            self.raw = bytes(raw)
        column_major = fortran in (True, 1, "F") and len(sizes) > 1
        self.shape = sizes[::-1] if column_major else sizes
        self.dtype = dtype
        if column_major and self.items is not None:
            _refuse("an object array in Fortran order")
        if column_major:
            self.raw = np.frombuffer(self.raw, dtype.resolve()).reshape(self.shape).T.tobytes()
            self.shape = sizes

    def set_state(self, state: object) -> None:
        if not (isinstance(state, tuple) and len(state) == 5 and self.dtype is None):
            _refuse(f"an array with state {state!r:.80}")
        self.fill(*state[1:])


class _Name:
    """Stands for a name that a pickled array refers to; `make` builds what a call of it would."""

    __slots__ = ("make", "name")

    def __init__(self, name: str, make: Callable[[tuple[Any, ...]], Any]) -> None:
        self.name, self.make = name, make

    def __repr__(self) -> str:
        return self.name


def _ndarray(args: tuple[Any, ...]) -> NoReturn:
    _refuse(f"numpy.ndarray{args!r:.80}")


def _dtype(args: tuple[Any, ...]) -> _Dtype:
    spec = args[0] if 1 <= len(args) <= 3 else None
    if isinstance(spec, str):
        if spec in ("O", "O8", "O4", "|O"):
            return _Dtype("O")
        kind, size = spec[:1], spec[1:]
        if kind in _SIZES and size in {str(n) for n in _SIZES[kind]}:
            return _Dtype(spec)
    _refuse(f"a numpy dtype {args!r:.80}")


def _reconstruct(args: tuple[Any, ...]) -> _Array:
    if len(args) != 3 or args[0] is not _NDARRAY or args[1] != (0,) or args[2] not in ("b", b"b"):
        _refuse(f"numpy's _reconstruct{args!r:.80}")
    return _Array()


def _frombuffer(args: tuple[Any, ...]) -> _Array:
    if len(args) != 4:
        _refuse(f"numpy's _frombuffer with {len(args)} arguments")
    array = _Array()
    array.fill(args[2], args[1], args[3], args[0])
    return array


def _scalar(args: tuple[Any, ...]) -> _Array:
    if len(args) != 2:
        _refuse(f"a numpy scalar of {len(args)} arguments")
    array = _Array()
    array.fill((), args[0], "C", args[1])
    return array


def _encode(args: tuple[Any, ...]) -> bytes:
    # How protocols 0 to 2 write bytes.
    if len(args) == 2 and isinstance(args[0], str) and args[1] in ("latin1", "latin-1"):
        return args[0].encode("latin1")
    _refuse(f"_codecs.encode with {args[1:]!r:.80}")


def _no_bytes(args: tuple[Any, ...]) -> bytes:
    # How protocols 0 to 2 write no bytes.
    if args:
        _refuse(f"bytes{args!r:.80}")
    return b""


_NDARRAY = _Name("numpy.ndarray", _ndarray)
_TABLE: dict[tuple[str, str], _Name] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Name("numpy.dtype", _dtype),
    ("_codecs", "encode"): _Name("_codecs.encode", _encode),
    ("__builtin__", "bytes"): _Name("bytes", _no_bytes),
}
for _core in ("numpy.core", "numpy._core"):
    _TABLE[_core + ".multiarray", "_reconstruct"] = _Name("_reconstruct", _reconstruct)
    _TABLE[_core + ".multiarray", "scalar"] = _Name("scalar", _scalar)
    _TABLE[_core + ".numeric", "_frombuffer"] = _Name("_frombuffer", _frombuffer)

_OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT",
    "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT",
    "DICT", "SETITEM", "SETITEMS", "GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GLOBAL",
    "STACK_GLOBAL", "REDUCE", "BUILD",
}  # fmt: skip
_CODES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}


def _forbid(name: str) -> Callable[[object], NoReturn]:
    def load(_: object) -> NoReturn:
        _refuse(f"an object that is no array (opcode {name})")

    return load


# The pure Python unpickler: its table of opcodes can be cut down, and its memo is a dict, where the C one allocates an
# array as large as the largest index a file names (2^32 entries for five bytes).
class _Unpickler(pickle._Unpickler):
    stack: list[Any]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]

    def find_class(self, module: str, name: str) -> _Name:
        try:
            return _TABLE[module, name]
        except KeyError:
            raise Refused(f"{module}.{name}") from None

    def load_reduce(self) -> None:
        args = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(function, _Name) or not isinstance(args, tuple):
            _refuse(f"a call of {function!r:.80}")
        self.stack[-1] = function.make(args)

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, (_Array, _Dtype)):
            _refuse(f"a change of {target!r:.80}")
        target.set_state(state)

    def load_bytearray8(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(min(size, sys.maxsize))))

    dispatch: ClassVar[Any] = {
        **{code: _forbid(name) for code, name in _CODES.items()},
        **{code: pickle._Unpickler.dispatch[code] for code, name in _CODES.items() if name in _OPCODES},
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }


def _resolve(value: Any, depth: int, done: dict[int, Any]) -> Any:
    """Turns stand-ins into arrays; only plain data may remain."""
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if depth == 0:
        _refuse(f"data nested deeper than {_DEPTH} levels")
    if id(value) in done:
        return done[id(value)]
    result: Any
    if isinstance(value, _Array):
        if value.dtype is None:
            _refuse("an array without content")
        if value.items is None:
            result = np.frombuffer(value.raw, value.dtype.resolve()).reshape(value.shape)
            if value.shape == ():
                result = result.item()
        else:
            result = np.empty(math.prod(value.shape), dtype=object)
            for i, item in enumerate(value.items):
                result[i] = _resolve(item, depth - 1, done)
            result = result.reshape(value.shape)
    elif type(value) is list:
        result = [_resolve(item, depth - 1, done) for item in value]
    elif type(value) is tuple:
        result = tuple(_resolve(item, depth - 1, done) for item in value)
    elif type(value) is dict:
        result = {_resolve(k, 1, done): _resolve(v, depth - 1, done) for k, v in value.items()}
    else:
        _refuse(f"an object of type {type(value).__name__}")
    done[id(value)] = result
    return result


def load_plain(data: bytes, where: str) -> Any:
    """Unpickles plain data (None, bool, int, float, str, bytes, list, tuple, dict) and numpy arrays of numbers or
    objects.

    Args:
        data: the pickle, of any protocol, written by Python 2 or 3 and numpy 1 or 2.
        where: names the file in error messages.

    Returns:
        The value. Arrays are read-only.

    Raises:
        DataError: the pickle asks for anything else (nothing of it was run), is truncated or is no pickle.
    """
    try:
        value = _Unpickler(io.BytesIO(data), encoding="latin1").load()
        return _resolve(value, _DEPTH, {})
    except Refused as error:
        raise DataError(
            f"{where}: refused: the pickle asks for {error}; expected numpy arrays and plain data only. Nothing in it "
            "was run. Get the file from its publisher again, or convert it to a format without pickle."
        ) from None
    except MemoryError:
        raise DataError(
            f"{where}: the pickle asks for more memory than there is; expected stroke data. Get it again."
        ) from None
    except Exception as error:
        raise DataError(
            f"{where}: expected a pickle of numpy arrays; got {len(data):,} bytes that cannot be read as one "
            f"({type(error).__name__}: {error}). The file is truncated or of another kind: get it again."
        ) from None


def load_npz(path: str | Path) -> dict[str, npt.NDArray[Any]]:
    """Reads all arrays of an `.npz` file, object arrays under the restriction of `load_plain`.

    Args:
        path: the file.

    Returns:
        Arrays by key, in the file's order.

    Raises:
        DataError: no such file, not an `.npz`, truncated, or a pickle in it asks for more than arrays.
    """
    path = Path(path)
    arrays: dict[str, npt.NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                key = member.removesuffix(".npy")
                where = f"{path}: array {key!r}"
                with archive.open(member) as stream:
                    arrays[key] = _read_array(stream.read(), where)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Give the path of an existing .npz file.") from None
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, RuntimeError, NotImplementedError) as error:
        raise DataError(
            f"{path}: expected an .npz file (a zip of .npy arrays); got {type(error).__name__}: {error}. "
            "The file is truncated or of another kind: get it again."
        ) from None
    except Exception as error:
        # zlib.error derives from Exception directly.
        raise DataError(f"{path}: damaged .npz file ({type(error).__name__}: {error}). Get it again.") from None
    return arrays


def _read_array(content: bytes, where: str) -> npt.NDArray[Any]:
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        reader = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}.get(version[0])
        if reader is None:
            raise ValueError(f"version {version} of the .npy format")
        shape, _, dtype = reader(stream)
        if dtype != np.dtype(object):
            stream.seek(0)
            plain: npt.NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
            return plain
    except (ValueError, EOFError, MemoryError, TypeError) as error:
        raise DataError(
            f"{where}: expected an .npy array; got {type(error).__name__}: {error}. Get the file again."
        ) from None
    value = load_plain(content[stream.tell() :], where)
    if not isinstance(value, np.ndarray) or value.dtype != np.dtype(object) or value.shape != shape:
        got = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise DataError(
            f"{where}: the header announces an object array of shape {shape}; got {got}. Get the file again."
        )
    return value
