"""What the compilers make of csrc/cuda: no spills, bounded registers, tensor cores and asynchronous copies in the code.

nvcc compiles sm_75 to sm_90a; NVRTC 12.9 (the wheel nvidia-cuda-nvrtc-cu12 of the extra `dev`) sm_70, which CUDA 13
dropped. `pytest -s` prints every kernel's registers.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
FILES = ("product", "sddmm")

# Registers that a thread may use, by kernel: what lets its largest block of threads start.
BOUNDS = {"product_kernel": 255, "sddmm_kernel": 255, "product_reduce_kernel": 64, "sddmm_reduce_kernel": 64}


def compile_file(name: str, arch: str, folder: Path) -> tuple[str, str]:
    """The assembler's report and the PTX of one file."""
    out = folder / f"{name}.cubin"
    done = subprocess.run(
        [NVCC, "-std=c++17", f"-arch=sm_{arch}", "-cubin", "--keep", "--keep-dir", folder, "-Xptxas", "-v", "-Werror",
         "all-warnings", f"-I{ROOT / 'csrc'}", CUDA / f"{name}.cu", "-o", out],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr, (folder / f"{name}.ptx").read_text()


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["75", "80", "86", "89", "90a"])
@pytest.mark.parametrize("name", FILES)
def test_nvcc(name: str, arch: str, tmp_path: Path) -> None:
    report, ptx = compile_file(name, arch, tmp_path)
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill "
        r"loads.*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    assert len(found) >= 6, report
    for kernel, stack, stores, loads, registers in found:
        plain = next(known for known in BOUNDS if f"{len(known)}{known}" in kernel)
        print(f"sm_{arch} {kernel}: {registers} registers")
        assert (stack, stores, loads) == ("0", "0", "0"), f"{kernel} spills on sm_{arch}"
        assert int(registers) <= BOUNDS[plain], kernel
    for wanted in {"75": ["m16n8k8", "ldmatrix"]}.get(arch, ["m16n8k16", "ldmatrix", "cp.async", "bf16.bf16.f32"]):
        assert wanted in ptx, f"{name}: no {wanted} for sm_{arch}"


def nvrtc() -> Path | None:
    """NVRTC 12 of the wheel, the last that knows sm_70."""
    spec = importlib.util.find_spec("nvidia.cuda_nvrtc") if importlib.util.find_spec("nvidia") else None
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    return next((found for place in places for found in place.glob("lib/libnvrtc.so.12")), None)


# Half alone: bf16 is for sm_80 and newer.
SOURCE = """
#include "cuda/product.cuh"
#include "cuda/sddmm.cuh"
using namespace sk::gpu;
template __global__ void sk::gpu::product_kernel<Half, 32, 8>(const __grid_constant__ ProductArgs);
template __global__ void sk::gpu::product_kernel<Half, 32, 4>(const __grid_constant__ ProductArgs);
template __global__ void sk::gpu::product_kernel<Half, 16, 8>(const __grid_constant__ ProductArgs);
template __global__ void sk::gpu::product_reduce_kernel<Half>(const __grid_constant__ ProductArgs, int);
template __global__ void sk::gpu::sddmm_kernel<Half, 32, 5>(const __grid_constant__ SddmmArgs);
template __global__ void sk::gpu::sddmm_kernel<Half, 16, 16>(const __grid_constant__ SddmmArgs);
template __global__ void sk::gpu::sddmm_reduce_kernel<32>(const __grid_constant__ SddmmArgs);
"""


@pytest.mark.skipif(nvrtc() is None, reason="needs nvidia-cuda-nvrtc-cu12 (90 MB; pip install '.[dev]')")
def test_nvrtc_compiles_sm_70() -> None:
    library = ctypes.CDLL(str(nvrtc()))
    options = [b"-arch=sm_70", b"-std=c++17", f"-I{ROOT / 'csrc'}".encode(), b"-default-device"]
    program = ctypes.c_void_p()
    assert library.nvrtcCreateProgram(ctypes.byref(program), SOURCE.encode(), b"sm_70.cu", 0, None, None) == 0
    status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    library.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    library.nvrtcGetPTX(program, ptx)
    assert b"mma.sync.aligned.m8n8k4" in ptx.value
    # -arch=sm_70 goes all the way to machine code: registers and shared memory fit, or the compilation fails.
    assert library.nvrtcGetCUBINSize(program, ctypes.byref(size)) == 0 and size.value > 0
    library.nvrtcDestroyProgram(ctypes.byref(program))
