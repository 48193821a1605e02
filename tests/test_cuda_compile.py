"""What the compilers make of csrc/cuda: no spills, bounded registers and shared memory, tensor cores and asynchronous
copies in the code.

nvcc compiles sm_75 to sm_90a; NVRTC 12.9 (the wheel nvidia-cuda-nvrtc-cu12 of the extra `dev`) sm_70, which CUDA 13
dropped. `pytest -s` prints every kernel's registers and shared memory.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import emulated_cuda
import pytest

from sparse_kernels import Block, testing
from sparse_kernels.backends._cuda_config import ConvSizes, Device, product_config, sddmm_config
from sparse_kernels.backends._cuda_index import orientation

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
FILES = ("product", "sddmm")

# Registers of a thread by kernel: today's most on any architecture and a little slack. Eight warps of the larger half
# fit a multiprocessor once, and two blocks of eight warps of those that keep to 128.
BOUNDS = {
    "product_kernel<32, 8>": 240,
    "product_kernel<32, 4>": 128,
    "product_kernel<16, 8>": 128,
    "product_reduce_kernel": 64,
    "sddmm_kernel<32, 5>": 236,
    "sddmm_kernel<16, 16>": 236,
    "sddmm_reduce_kernel<32>": 56,
    "sddmm_reduce_kernel<16>": 56,
}


# sm_75 multiplies with more instructions, and its largest blocks have 12 warps, not 16.
MORE = {("75", "product_kernel<16, 8>"): 152}


def plain(mangled: str) -> str:
    """The name of a kernel without its dtype: `product_kernel<32, 8>`."""
    name = next(known for known in sorted({b.split("<")[0] for b in BOUNDS}) if f"{len(known)}{known}" in mangled)
    numbers = re.findall(r"Li(\d+)E", mangled)
    return f"{name}<{', '.join(numbers)}>" if numbers else name


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
        r"loads.*?Used (\d+) registers([^\n]*)",
        report,
        re.DOTALL,
    )
    assert len(found) >= 6, report
    for kernel, stack, stores, loads, registers, rest in found:
        name = plain(kernel)
        print(f"sm_{arch} {name}: {registers} registers")
        assert (stack, stores, loads) == ("0", "0", "0"), f"{name} spills on sm_{arch}"
        assert int(registers) <= MORE.get((arch, name), BOUNDS[name]), f"{name}: {registers} registers on sm_{arch}"
        assert " smem" not in rest, f"{name}: shared memory that the launcher does not count: {rest}"
    for wanted in {"75": ["m16n8k8", "ldmatrix"]}.get(arch, ["m16n8k16", "ldmatrix", "cp.async", "bf16.bf16.f32"]):
        assert wanted in ptx, f"{name}: no {wanted} for sm_{arch}"


# Multiprocessors and KiB of shared memory that a block may have; then the most that products and gradients take of it.
MACHINES = {"75": (40, 64, 61, 53), "80": (108, 163, 81, 147), "89": (128, 99, 81, 74), "90": (132, 227, 81, 203)}
# Of the U-Net at batch 12: channels, image, kernel.
LAYERS = ((224, 64, 3), (448, 32, 3), (672, 16, 3), (896, 8, 3), (896, 8, 1))


@pytest.mark.skipif(emulated_cuda.CXX is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("side", [16, 32])
@pytest.mark.parametrize("arch", MACHINES)
def test_shared_memory(arch: str, side: int) -> None:
    """What the launchers ask for with the configurations of the rules."""
    processors, room, product_most, gradient_most = MACHINES[arch]
    native, device = emulated_cuda.backend().library(), Device(processors, room << 10)
    for channels, image, kernel in LAYERS:
        index = testing.TOPOLOGIES["random"](channels, channels, Block(side, side), kernel**2).weight_index()
        conv = ConvSizes(12, *4 * (image,), kernel, kernel, 1, 1, *2 * (kernel // 2,), 1, 1)
        sizes = orientation(index, False)
        where = (*sizes[:2], sizes.chunks, sizes.chunk, side, index.nnzb, channels, channels, 0, 0)
        product = functools.partial(native.cuda_product_shared_bytes, where, conv, False)
        gradient = functools.partial(native.cuda_sddmm_shared_bytes, where, conv)
        chosen = product_config(conv, sizes, False, device, product)
        chosen_gradient = sddmm_config(conv, sizes, index, False, device, gradient)
        found = product(chosen), gradient(chosen_gradient)
        print(f"sm_{arch} {channels}@{image} {kernel}x{kernel} block {side}: {found[0]} and {found[1]} bytes of shared")
        assert found[0] <= (product_most + 2) << 10 and found[1] <= (gradient_most + 2) << 10
        assert max(found) <= room << 10


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
