"""Builds csrc/ into sparse_kernels/_C with ninja; metadata is in pyproject.toml.

Needs a C++17 compiler, pybind11 and ninja: no torch, no GPU, no network. Each file of csrc/cpu/kernels is compiled once
per instruction set (see csrc/cpu/dispatch.h), csrc/cuda by nvcc, everything else for the baseline CPU.

Environment:
    SPARSE_KERNELS_CUDA    auto (default): CUDA kernels where nvcc is found; on: nvcc must be there; off
    SPARSE_KERNELS_ARCHS   compute capabilities, e.g. "80;90a"; default: all that the kernels know and nvcc still builds
    SPARSE_KERNELS_FLAGS   extra compiler and linker flags, e.g. "-g -fsanitize=address"
    CXX, CUDA_HOME         the C++ compiler (default: g++, else clang++) and the toolkit (default: the nvcc on PATH)
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
AVX2 = "-fno-exceptions -mavx2 -mfma -mbmi2"
ISAS = {"portable": "-fno-exceptions"}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS |= {"avx2": AVX2, "avx512": f"{AVX2} -mavx512f -mavx512dq -mavx512bw -mavx512vl"}
    ISAS["avx512_bf16"] = f"{ISAS['avx512']} -mavx512bf16"  # for the files that name it, see csrc/cpu/bf16.h

RULES = """
rule compile
  command = $tool $more -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $tool $in -o $out $more
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input="", capture_output=True, text=True, check=False)


def find_cxx() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    found = [name for name in names if shutil.which(name.split()[0])]
    return found[0] if found else sys.exit("no C++ compiler; install g++ (Debian: apt install g++) or correct CXX.")


def find_nvcc() -> str | None:
    wanted, home = os.environ.get("SPARSE_KERNELS_CUDA", "auto"), os.environ.get("CUDA_HOME")
    if wanted not in ("auto", "on", "off"):
        sys.exit(f"SPARSE_KERNELS_CUDA must be auto, on or off; got {wanted!r}.")
    names = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, names)), None)
    if wanted == "on" and not nvcc:
        sys.exit("SPARSE_KERNELS_CUDA=on, but there is no nvcc on PATH or in CUDA_HOME; install the CUDA toolkit.")
    return None if wanted == "off" else nvcc


def cuda_flags(nvcc: str, host_flags: str) -> tuple[str, str]:
    """The flags of nvcc (CUDA 13 dropped sm_70), and of the static runtime, which opens the driver on first use."""
    dryrun = run(nvcc, "--dryrun", "x.cu").stderr
    version, libraries = re.search(r"__CUDACC_VER_MAJOR__=(\d+)", dryrun), re.search(r"LIBRARIES=(.*)", dryrun)
    if not version or not libraries:
        sys.exit(f"{nvcc} --dryrun fails; repair the CUDA toolkit or set SPARSE_KERNELS_CUDA=off:\n{dryrun}")
    archs = os.environ.get("SPARSE_KERNELS_ARCHS") or ("70;80;90a" if int(version[1]) < 13 else "75;80;90a")
    if not re.fullmatch(r"\d+[af]?(;\d+[af]?)*", archs):
        sys.exit(f"SPARSE_KERNELS_ARCHS must look like '80;90a'; got {archs!r}.")
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs.split(";")]
    # PTX of the newest portable capability, for GPUs that are newer than this build.
    codes += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in archs.split(";") if a.isdigit()][-1:]
    host = " ".join(f"-Xcompiler={flag}" for flag in host_flags.split())
    return f"-std=c++17 -O3 -cudart=static {' '.join(codes)} {host}", f"{libraries[1]} -lcudart_static -ldl -lrt"


def manifest(target: Path) -> str:
    """The build.ninja that makes `target`."""
    import pybind11

    cxx, nvcc, extra = find_cxx(), find_nvcc(), os.environ.get("SPARSE_KERNELS_FLAGS", "")
    openmp = "" if run(*f"{cxx} -fopenmp -includeomp.h -xc++ -fsyntax-only -".split()).returncode else "-fopenmp"
    includes = " ".join(f"-isystem '{d}'" for d in (sysconfig.get_path("include"), pybind11.get_include()))
    shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    host = f"-fPIC -fvisibility=hidden -Wall -Wextra {openmp or '-Wno-unknown-pragmas'} {extra}"
    nvflags, cudalibs = cuda_flags(nvcc, host) if nvcc else ("", "")
    edges = []  # (object, compiler, source, further flags)
    for source in sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]):
        more = "-DSK_CUDA" if nvcc and source.stem.startswith("bind_cuda") else ""
        edges.append((f"{source.parent.name}/{source.stem}.o", "cxx", source, more))
    for source in sorted(ROOT.glob("csrc/cpu/kernels/*.cpp")):
        isas = [isa for isa in ISAS if isa != "avx512_bf16" or "__AVX512BF16__" in source.read_text()]
        edges += [(f"{isa}/{source.stem}.o", "cxx", source, f"-DSK_ISA={isa} {ISAS[isa]}") for isa in isas]
    edges += [(f"cuda/{s.stem}.o", "nvcc", s, "") for s in sorted(ROOT.glob("csrc/cuda/*.cu")) if nvcc]
    flags = f"-std=c++17 -O3 -ffp-contract=fast -fno-math-errno {host} -I'{ROOT / 'csrc'}' {includes}"
    lines = [f"cxx = {cxx} {flags}", f"nvcc = {nvcc} -ccbin '{cxx}' -I'{ROOT / 'csrc'}' {nvflags}", RULES]
    escape = {ord(c): f"${c}" for c in "$ :"}
    for built, tool, source, more in edges:
        lines += [f"build {built}: compile {str(source).translate(escape)}\n  tool = ${tool}\n  more = {more}"]
    lines += [f"build {str(target).translate(escape)}: link {' '.join(edge[0] for edge in edges)}"]
    lines += [f"  tool = {cxx}\n  more = {shared} {openmp} {cudalibs} {extra}\n"]
    return "\n".join(lines)


class NinjaBuild(build_ext):
    """Writes build/temp.<platform>/build.ninja and runs it: a second run compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(manifest(target))
        if subprocess.run(["ninja", "--quiet", "-C", str(folder)], check=False).returncode:
            sys.exit("compiling the native code failed; the compiler's message is above.")


setup(ext_modules=[Extension("sparse_kernels._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
