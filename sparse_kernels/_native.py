"""Loads the compiled module `sparse_kernels._C`, or says why it cannot be loaded and what to do."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch  # noqa: F401  # before _C, so that both share the OpenMP runtime that torch ships

REMEDY = "reinstall with a C++17 compiler at hand (pip install --force-reinstall --no-deps .)"


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("sparse_kernels._C"), None
    except ModuleNotFoundError as error:
        if error.name != "sparse_kernels._C":
            raise
        return None, f"the native module sparse_kernels._C was not built; {REMEDY}"
    except ImportError as error:  # a missing symbol or library, another Python's build, a wrong SPARSE_KERNELS_ISA
        if "SPARSE_KERNELS_ISA" in str(error):
            return None, str(error)
        return None, f"the native module sparse_kernels._C does not load ({error}); {REMEDY}"


def why_unavailable() -> str | None:
    """None when the native module is there, else the reason and the remedy."""
    return _load()[1]


def native() -> ModuleType:
    """The native module.

    Raises:
        ImportError: it was not built or does not load; the message names the remedy.
    """
    module, reason = _load()
    if module is None:
        raise ImportError(reason)
    return module
