"""Runs kernel tests on native code built with AddressSanitizer and UndefinedBehaviorSanitizer.

`python tests/sanitize.py [pytest arguments]`: builds a copy of the packages in build/sanitize and runs the tests of the
native CPU code on it, or those whose files the arguments name. Python itself is not instrumented, so the runtime is
preloaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "sanitize"
# -O1 keeps the stack traces readable and the build short; every finding ends the process.
FLAGS = "-g -O1 -fno-omit-frame-pointer -fsanitize=address -fsanitize=undefined -fno-sanitize-recover=all"

# One position more than the buffers hold: what the sanitizer is there to see.
OVERRUN = """
import torch
from sparse_kernels import Block, Topology
from sparse_kernels.backends._cpu_launch import native, native_index, workspace
index = Topology.full(16, 16, Block(16, 16)).weight_index()
w, values, x, y = native_index(index), torch.ones(1, 16, 16), torch.ones(32, 16), torch.empty(32, 16)
space = workspace(native().block_spmm_workspace_bytes(w, 33, 1))
native().block_spmm(w, values.data_ptr(), x.data_ptr(), 16, 0, 0, 0, y.data_ptr(), 16, 33, 1, space.data_ptr())
"""


def kernel_tests() -> list[str]:
    """The test files of the native CPU code: each family of kernels, what densifies weights, and threads."""
    tests = ROOT / "tests"
    return [
        str(path)
        for path in [*sorted(tests.glob("test_*_cpu.py")), tests / "test_densified.py", tests / "test_threads.py"]
    ]


def absolute(argument: str) -> str:
    """A pytest argument, by its full path where it names a file or folder of the present directory or the checkout."""
    path, separator, test = argument.partition("::")
    found = [folder / path for folder in (Path.cwd(), ROOT) if path and (folder / path).exists()]
    return f"{found[0]}{separator}{test}" if found else argument


def build() -> None:
    """Builds the packages with sanitized native code into build/sanitize."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(OUT), "--build-temp", f"{OUT}-objects"]
    environment = os.environ | {"SPARSE_KERNELS_FLAGS": FLAGS, "SPARSE_KERNELS_CUDA": "off"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def environment() -> dict[str, str]:
    """What a Python process needs in order to load the sanitized module."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONPATH": str(OUT),
        # Python and torch never free everything; torch's own allocator calls are not ours to judge.
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
        # Python's pools would hide an overrun of a small buffer.
        "PYTHONMALLOC": "malloc",
    }


def main(arguments: list[str]) -> int:
    """Builds, then runs pytest; returns its exit status."""
    build()

    def python(*command: str, **options: object) -> subprocess.CompletedProcess[str]:
        # Outside the checkout: `python -m` puts the working directory in front of PYTHONPATH.
        return subprocess.run([sys.executable, *command], cwd=OUT, env=environment(), check=False, text=True, **options)

    if "AddressSanitizer: heap-buffer-overflow" not in python("-c", OVERRUN, stderr=subprocess.PIPE).stderr:
        sys.exit("sanitize: an overrun of a buffer goes unseen; the sanitized module is not what Python loads")
    # Elsewhere than the caller's directory: pytest runs in OUT.
    arguments = [absolute(argument) for argument in arguments]
    targets = [] if any(Path(argument.partition("::")[0]).is_absolute() for argument in arguments) else kernel_tests()
    settings = (f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-x", "-q")
    # The sanitizer keeps freed memory back for a while, which looks like growth.
    settings += ("--deselect", "tests/test_threads.py::test_many_steps_grow_no_memory")
    # A finding ends the process before pytest could print what it captured from the file descriptors.
    settings += ("--capture=sys",)
    return python("-m", "pytest", *settings, *arguments, *targets).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
