"""Builds csrc/ into sparse_kernels/_C with ninja; metadata is in pyproject.toml.

Needs a C++17 compiler, pybind11 and ninja: no torch, no GPU, no network. Each file of csrc/cpu/kernels is compiled once
per instruction set (see csrc/cpu/dispatch.h); everything else is compiled for the baseline CPU.

Environment:
    CXX                    the compiler (default: g++, else clang++)
    SPARSE_KERNELS_FLAGS   extra flags for compiling and linking, e.g. "-g -fsanitize=address"
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = "-mavx2 -mfma -mbmi2"
ISAS = {"portable": ""}
if X86:
    ISAS |= {"avx2": AVX2, "avx512": f"{AVX2} -mavx512f -mavx512dq -mavx512bw -mavx512vl"}

RULES = """\
rule cxx
  command = $cxx $flags $isa -MMD -MF $out.d -c $in -o $out
  description = compile $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx $in -o $out $ldflags
  description = link $out
"""


def fail(message: str) -> None:
    raise SystemExit(f"sparse_kernels: {message}")


def compiler() -> str:
    """The C++ compiler: $CXX, else g++, else clang++."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++")):
        if shutil.which(name.split()[0]):
            return name
    fail("no C++ compiler found; install g++ (Debian: apt install g++) or set CXX.")
    raise AssertionError


def supports(cxx: str, flag: str) -> bool:
    """Whether `cxx` compiles an empty file with `flag` (Apple's clang has no OpenMP)."""
    command = [*cxx.split(), flag, "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input=b"", capture_output=True, check=False).returncode == 0


def escape(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def manifest(target: Path) -> str:
    """The build.ninja that makes `target`."""
    import pybind11

    cxx, extra = compiler(), os.environ.get("SPARSE_KERNELS_FLAGS", "")
    openmp = "-fopenmp" if supports(cxx, "-fopenmp") else "-Wno-unknown-pragmas"
    includes = " ".join(f"-isystem '{d}'" for d in (sysconfig.get_path("include"), pybind11.get_include()))
    shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    flags = "-std=c++17 -O3 -ffp-contract=fast -fno-math-errno -fPIC -fvisibility=hidden -Wall -Wextra"
    lines = [
        f"cxx = {cxx}",
        f"flags = {flags} {openmp} -I'{ROOT / 'csrc'}' {includes} {extra}",
        f"ldflags = {shared} {openmp} {extra}",
        RULES,
    ]
    objects = []
    for source in sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]):
        objects.append(f"{source.relative_to(ROOT / 'csrc').with_suffix('.o')}")
        lines.append(f"build {objects[-1]}: cxx {escape(source)}")
    for source in sorted(ROOT.glob("csrc/cpu/kernels/*.cpp")):
        for isa, isa_flags in ISAS.items():
            objects.append(f"cpu/{isa}/{source.stem}.o")
            lines += [f"build {objects[-1]}: cxx {escape(source)}", f"  isa = -DSK_ISA={isa} {isa_flags}"]
    lines += [f"build {escape(target)}: link {' '.join(objects)}", f"default {escape(target)}", ""]
    return "\n".join(lines)


class NinjaBuild(build_ext):
    """Writes build/native-<python and platform>/build.ninja and runs it; a second run compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = ROOT / "build" / f"native-{sysconfig.get_config_var('SOABI')}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(manifest(target))
        ninja = shutil.which("ninja") or fail("ninja is missing; pip install ninja.")
        if subprocess.run([str(ninja), "-C", str(folder)], check=False).returncode:
            fail("compiling the native code failed; the compiler's message is above.")


setup(ext_modules=[Extension("sparse_kernels._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
