"""Compiles the Triton kernels for sm_80 and sm_90 as they are launched, and says what the assembly holds.

    python tests/triton_aot.py CASE…      prints one JSON object a case

Runs in a process of its own: Triton's compiler and its interpreter exclude each other. No GPU is needed; the launch
code runs on CPU tensors that are never read, up to the launch itself.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sparse_kernels import Block, Topology
from sparse_kernels.backends import ConvGeometry, _triton_config, _triton_launch

PROCESSORS = {"sm80": 108, "sm90": 132}
KERNELS = _triton_launch._kernels()
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


class _Driver:
    """What Triton asks about a GPU before it compiles."""

    def __init__(self, arch: str) -> None:
        self.target = GPUTarget("cuda", int(arch.removeprefix("sm")), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # what has been compiled is kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda


class _Recorder:
    """Stands in for the kernels: compiles where they would be launched."""

    def __init__(self, kernels: Any, options: dict[str, Any]) -> None:
        self.kernels, self.options, self.compiled = kernels, options, None

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self.kernels, name)

        def compile_(grid: Any, *arguments: Any, **keywords: Any) -> None:
            self.compiled = kernel.warmup(*arguments, grid=grid, **{**keywords, **self.options})

        class Launcher:
            def __getitem__(self, grid: Any) -> Callable[..., None]:
                return lambda *arguments, **keywords: compile_(grid, *arguments, **keywords)

        return Launcher()


def compile_case(case: str, options: dict[str, Any] | None = None) -> Any:
    """The compiled kernel of `arch-op-primitive-block-dtype`, with further options of Triton's if any.

    Ops: linear, row (of one row), conv (3x3), strided (by 2), ragged (a 3x3 whose channels no vector divides), conv1d,
    point (a 3x3 of one pixel). Triton takes arguments of 1 for constants, so sizes of 1 compile another way.
    """
    arch, op, primitive, block, precision = case.split("-")
    bh, _, bw = block.partition("x")
    pattern, dtype = Block(int(bh), int(bw or bh)), DTYPES[precision]
    driver.set_active(_Driver(arch))
    _triton_launch._machine = lambda device: (_triton_config.TABLES[arch], PROCESSORS[arch])
    kernels = _Recorder(KERNELS, options or {})
    _triton_launch._kernels = lambda: kernels
    exactly = "tf32" if precision == "tf32" else "ieee"
    _triton_launch._precision = lambda *_: exactly
    conv = None
    height, width, n = {"conv1d": (1, 64, 12), "point": (1, 1, 1)}.get(op, (32, 32, 12))
    if op == "conv1d":
        conv = ConvGeometry((1, 3), padding=(0, 1))
    elif op not in ("linear", "row"):
        step = 2 if op == "strided" else 1
        conv = ConvGeometry((3, 3), (step, step), (1, 1))
    features = 450 if op == "ragged" else 448
    taps = 1 if conv is None else conv.kernel[0] * conv.kernel[1]
    rows, cols = pattern.grid(features, features)
    topology = Topology.random(features, features, pattern, rows * cols * taps // 4, taps=taps)
    index = topology.weight_index()
    x, values = (
        torch.empty(1 if op == "row" else 4096, features, dtype=dtype),
        torch.empty(index.nnzb, index.bh, index.bw, dtype=dtype),
    )
    dy, bias = x, torch.empty(features)
    if conv is not None:
        shape = n, features, height, width
        x = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
        dy_shape = n, features, *conv.output_size(height, width)
        dy = torch.empty(dy_shape, dtype=dtype, memory_format=torch.channels_last)
    if primitive == "spmm":
        _triton_launch.product(x, values, index, bias, conv, activation="silu", keep=True)
    elif primitive == "spmm_t":
        _triton_launch.product(dy, values, index, None, conv, x, transposed=True)
    elif primitive == "sddmm":
        _triton_launch.sddmm(dy, x, index, conv)
    else:
        _triton_launch.block_scores(dy, x, index, conv)
    return kernels.compiled


def inspect(kernel: Any) -> dict[str, Any]:
    """What a compiled kernel's assembly holds: counts of instructions, spilled bytes, registers, shared memory."""
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage.stdout + usage.stderr))
    copy = r"cp\.async\.c%s\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x%s\b"
    count = lambda pattern: len(re.findall(pattern, ptx))  # noqa: E731
    return {
        "wgmma": count(r"wgmma\.mma_async"),
        "mma": count(r"mma\.sync"),
        "loads of 16 bytes": count(copy % ("[ag]", "10")) + count(r"ld\.global\S*\.(?:v4\.b32|v2\.b64)"),
        "pipelined loads": count(copy % ("[ag]", "10")) + count(r"cp\.async\.bulk"),
        "through L1": count(copy % ("a", "10")),
        "copies of 8 bytes": count(copy % ("a", "8")),
        "copies of 4 bytes": count(copy % ("a", "4")),
        "spilled bytes": int(found["STACK"]) + int(found["LOCAL"]),
        "registers": int(found["REG"]),
        "shared": int(kernel.metadata.shared),
        "warps": int(kernel.metadata.num_warps),
    }


def main(cases: list[str]) -> int:
    """A case may end in `+option=number`, an option of Triton's compiler."""
    for case in cases:
        name, *given = case.split("+")
        options = {key: int(value) for key, value in (item.split("=") for item in given)}
        print(json.dumps({"case": case, **inspect(compile_case(name, options))}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
