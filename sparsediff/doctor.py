"""`sparsediff doctor`: what this machine has, what it lacks, and what to do about it."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

from sparse_kernels import _native
from sparse_kernels.backends import registry

PACKAGES = ("numpy", "triton", "safetensors", "tyro", "pooch", "shapely", "kanjivg", "matplotlib", "pillow")
LDM_PACKAGES = ("diffusers", "lmdb")  # of the extra ldm
FEATURES = ("avx2", "fma", "bmi2", "avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_bf16", "amx_bf16", "asimd")


def _version(package: str, remedy: str = "") -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"not installed{remedy}"


def _proc(path: str, key: str) -> str | None:
    """The value of the first `key: value` line of a file in /proc; None where there is none (macOS, some ARM)."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key), None)


def cpu_name() -> str:
    """What the CPU calls itself."""
    return _proc("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def _cpu() -> list[tuple[str, str]]:
    flags = (_proc("/proc/cpuinfo", "flags") or _proc("/proc/cpuinfo", "Features") or "").split()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [
        ("model", f"{cpu_name()}, {usable} of {os.cpu_count()} logical cores usable"),
        ("features", " ".join(name for name in FEATURES if name in flags) or "unknown"),
        ("threads", f"{torch.get_num_threads()} (torch.set_num_threads or OMP_NUM_THREADS)"),
    ]
    reason = _native.why_unavailable()
    if reason is None:
        native = _native.native()
        bf16 = " with bf16" if native.bf16_kernels() else ", bf16 converted"
        rows.append(("kernels", f"{native.isa_name()}{bf16} (of {', '.join(native.isa_names())}; SPARSE_KERNELS_ISA)"))
    else:
        rows.append(("kernels", f"none: {reason}"))
    total, available = _proc("/proc/meminfo", "MemTotal"), _proc("/proc/meminfo", "MemAvailable")
    if total and available:
        gib = [int(text.split()[0]) / 2**20 for text in (available, total)]
        rows.append(("memory", f"{gib[0]:.1f} GiB available of {gib[1]:.1f} GiB"))
    return rows


def _gpus() -> list[tuple[str, str]]:
    rows = []
    if not torch.version.cuda:
        rows.append(("torch", "a CPU-only build; install a CUDA build of torch to train on a GPU"))
    elif not torch.cuda.is_available():
        rows.append(("torch", f"built for CUDA {torch.version.cuda}, but no usable GPU or driver was found"))
    else:
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            size = f"{gpu.total_memory / 2**30:.1f} GiB, {gpu.multi_processor_count} SMs"
            rows.append((f"cuda:{index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {size}"))
    if _native.why_unavailable() is None:
        native = _native.native()
        reason = native.cuda_why_unavailable()
        if not native.cuda_built():
            reason = "built without nvcc; reinstall with SPARSE_KERNELS_CUDA=on and a CUDA toolkit"
        elif reason is not None:
            reason += "; needs an NVIDIA GPU and a driver for the CUDA that this was built with"
        rows.append(("native", reason or f"{len(native.cuda_devices())} visible to the CUDA kernels"))
    return rows


def _backends() -> list[tuple[str, str]]:
    rows = []
    for name in registry.names():
        reason = registry.get(name).why_unavailable()
        rows.append((name, "available" if reason is None else f"unavailable: {reason}"))
    return rows


def report() -> str:
    """Versions, CPU, GPUs, memory, and every backend with the reason and remedy where it is unavailable."""
    sections = {
        "versions": [
            ("sparsediff", _version("sparsediff")),
            ("python", f"{platform.python_version()} ({sys.platform}, {platform.machine()})"),
            ("torch", torch.__version__),  # with its build, "+cu130" or "+cpu", which metadata may leave out
            *((package, _version(package)) for package in PACKAGES),
            *((package, _version(package, "; pip install 'sparsediff[ldm]'")) for package in LDM_PACKAGES),
        ],
        "cpu": _cpu(),
        "gpu": _gpus(),
        "backends": _backends(),
    }
    lines = []
    for title, rows in sections.items():
        lines.append(title)
        lines += [f"  {name:<12} {text}" for name, text in rows]
    return "\n".join(lines)


def main() -> int:
    """Prints the report."""
    print(report())
    return 0
