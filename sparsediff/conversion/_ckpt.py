"""Reads and writes `.ckpt` files, which are pickles: nothing that a file names is ever imported or called.

torch's `weights_only` unpickler admits tensors and plain data. Lightning's checkpoints also name classes of the program
that wrote them (callbacks, settings); those become inert stand-ins. Whatever names a function or class of Python itself
or of torch, which only an attack would, is refused.
"""

from __future__ import annotations

import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import torch

from sparsediff.conversion._names import ConversionError
from sparsediff.files import replaced

# Of the standard library, what checkpoints name without harm: kinds of settings.
_HARMLESS = {"argparse", "pathlib", "enum", "datetime", "typing", "__main__"}
_GETATTR = {"builtins.getattr", "__builtin__.getattr", "getattr"}


class StandIn:
    """Stands for an object of a class that is not loaded; keeps what it was made from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _attribute(*_: Any) -> type[StandIn]:
    """Stands for getattr, by which old pickles name a class inside a class."""
    return StandIn


def read_ckpt(path: Path) -> dict[str, Any]:
    """The dict in a `.ckpt` file, tensors on the CPU.

    Raises:
        ConversionError: there is none, it is damaged, or it asks for anything but tensors and data.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except FileNotFoundError:
        raise ConversionError(f"{path}: no such file.") from None
    except ValueError:
        names = []  # a file of torch < 1.6 has no table of names; the loader refuses them one by one
    except Exception as error:
        raise ConversionError(f"{path}: cannot be read as a checkpoint ({type(error).__name__}: {error}).") from None
    refused = [name for name in names if _is_suspect(name)]
    if refused:
        raise ConversionError(
            f"{path}: refused: the pickle asks for {', '.join(refused)}, which no checkpoint needs. Nothing in it was "
            "run. Get the file from its publisher again."
        )
    stand_ins: list[Any] = [StandIn]
    for name in names:
        stand_in = _attribute if name in _GETATTR else type("StandIn", (StandIn,), {"__module__": __name__})
        stand_ins.append((stand_in, name))
    try:
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's advice to load it without protection is none that we pass on.
        found = re.search(r"Unpickler error: (.*?)(?: was not an allowed|\n|$)", str(error))
        reason = found[1].strip().rstrip(".") if found else "it is no pickle of tensors"
        raise ConversionError(f"{path}: refused as a checkpoint: {reason}. Nothing in it was run.") from None
    except Exception as error:
        raise ConversionError(
            f"{path}: damaged, or no checkpoint ({type(error).__name__}: {error}). Get it again."
        ) from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: expected a dict of tensors; got {type(content).__name__}.")
    return content


def _is_suspect(name: str) -> bool:
    package = name.split(".")[0]
    if package in _HARMLESS or name in _GETATTR:
        return False
    return package in sys.stdlib_module_names or package in ("torch", "sparsediff", "sparse_kernels", "numpy")


def write_ckpt(path: Path, content: dict[str, Any]) -> Path:
    """Writes a dict of tensors and plain data as torch.save does, whole or not at all."""
    with replaced(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    return path
