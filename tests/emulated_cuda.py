"""The CUDA kernels under emulation: builds csrc/cuda as C++ against tests/emulation and makes a backend of it."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from sparse_kernels.backends import register
from sparse_kernels.backends._cuda_config import Device
from sparse_kernels.backends.cuda import CudaBackend

ROOT = Path(__file__).resolve().parent.parent
CXX = next(filter(None, map(shutil.which, [os.environ.get("CXX", "g++"), "g++", "clang++"])), None)
CACHE = ROOT / "build" / "emulation"
SOURCES = (
    "csrc/cuda/product.cu",
    "csrc/cuda/sddmm.cu",
    "csrc/bind_cuda_products.cpp",
    "tests/emulation/module.cpp",
)


def build(root: Path = ROOT, arch: int = 800, flags: Sequence[str] = ("-O1",)) -> Path:
    """Compiles the kernels for `arch` (ten times the compute capability) and returns the module.

    What was compiled before, by the text that the preprocessor leaves, is taken from build/emulation.
    """
    import pybind11

    assert CXX is not None
    CACHE.mkdir(parents=True, exist_ok=True)
    includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    common = [CXX, "-std=c++17", "-fPIC", "-fvisibility=hidden", "-DSK_EMULATION", "-DSK_CUDA"]
    common += [f"-I{root / 'csrc'}", f"-I{root / 'tests' / 'emulation'}", *includes]
    objects = []
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test process may be building the same
        for source in SOURCES:
            # The bindings are the same for every architecture and need no sanitizer.
            more = [f"-DSK_ARCH={arch}", *flags] if source.endswith(".cu") else ["-O0"]
            command = [*common, *more, "-xc++", str(root / source)]
            text = subprocess.run([*command, "-E", "-P"], check=True, capture_output=True).stdout
            digest = hashlib.sha256(repr((CXX, more)).encode() + text).hexdigest()[:16]
            objects.append(CACHE / f"{Path(source).stem}-{digest}.o")
            if not objects[-1].exists():
                subprocess.run([*command, "-c", "-o", str(CACHE / "part.o")], check=True)
                (CACHE / "part.o").rename(objects[-1])
        digest = hashlib.sha256(repr((objects, tuple(flags))).encode()).hexdigest()[:16]
        target = CACHE / f"{digest}.so"
        if not target.exists():
            subprocess.run([CXX, "-shared", *flags, *map(str, objects), "-o", str(CACHE / "part.so")], check=True)
            (CACHE / "part.so").rename(target)
    return target


def load(path: Path) -> ModuleType:
    """The module at `path`; several builds may be loaded side by side."""
    spec = importlib.util.spec_from_file_location("emulated_cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class EmulatedCuda(CudaBackend):
    """The `cuda` backend on CPU tensors, its launchers those of an emulation build."""

    device_type = "cpu"

    def __init__(self, path: Path, arch: int = 800) -> None:
        self.name = f"cuda-sm_{arch // 10}"
        self.arch = arch
        self._module = load(path)

    def why_unavailable(self) -> str | None:
        return None

    def library(self) -> ModuleType:
        return self._module

    def capability(self, device: torch.device) -> tuple[int, int]:
        return self.arch // 100, self.arch // 10 % 10

    def architectures(self) -> list[tuple[int, int]]:
        return [self.capability(torch.device("cpu"))]

    def limits(self, device: torch.device) -> Device:
        # Shared memory as on sm_75 where it is least; few multiprocessors, so that little is split by default.
        return Device(2, 64 << 10 if self.arch < 800 else 99 << 10)

    def stream(self, device: torch.device) -> int:
        return 0

    def current(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()


@functools.cache
def backend(arch: int = 800) -> EmulatedCuda:
    """The registered backend of one architecture."""
    found = EmulatedCuda(build(arch=arch), arch)
    register(found)
    return found
