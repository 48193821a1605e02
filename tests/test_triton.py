"""The `triton` backend without a GPU: its kernels in the interpreter, compiled for sm_80 and sm_90, and its excuses."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_kernels import Block, backends, ops, testing
from sparse_kernels.backends import _triton_config, _triton_launch, _triton_tune
from sparsediff import doctor

TESTS = Path(__file__).resolve().parent

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process with Triton's interpreter or compiler: one process cannot have both."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "TRITON_DEFAULT_FP_FUSION": "1", **environment}
    env = {key: value for key, value in env.items() if not key.startswith("PYTEST_XDIST")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=TESTS.parent, check=False)


@needs_triton
@pytest.mark.parametrize(
    "selected,least",
    [
        (["tests/test_triton_kernels.py", "-k", "every_geometry or launch_of_a_product"], 40),
        (["tests/test_triton_kernels.py", "-k", "not (every_geometry or launch_of_a_product)"], 80),
        (["tests/test_ops.py", "-k", "triton"], 60),
    ],
    ids=["geometries", "kernels", "ops"],
)
def test_in_the_interpreter(selected: list[str], least: int) -> None:
    options = ["-p", "triton_interpreter", "-p", "no:cacheprovider", "-p", "no:xdist", "-q"]
    done = run(["-m", "pytest", *options, *selected], TRITON_INTERPRET="1")
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(passed[1]) >= least, done.stdout[-2000:]


# Primitive by primitive, as it is launched for 448 channels: `arch-op-primitive-block-dtype`.
COMPILED = (
    "conv-spmm-32-bf16",
    "conv-spmm-16-bf16",
    "conv-spmm-64-fp16",
    "conv-spmm-64x32-bf16",
    "conv-spmm-32-tf32",
    "conv-spmm_t-32-bf16",
    "strided-spmm_t-32-bf16",
    "conv-sddmm-32-bf16",
    "conv-sddmm-16-fp16",
    "conv-sddmm-64-bf16",
    "conv-scores-32-bf16",
    "linear-spmm-32-bf16",
    "linear-spmm_t-64-bf16",
    "linear-sddmm-32-bf16",
    "conv1d-spmm-32-bf16",
    "conv1d-sddmm-32-bf16",
    "point-spmm_t-16-bf16",
    "point-scores-64-bf16",
    "row-spmm-32-bf16",
    "row-scores-32-bf16",
)

# What a kernel lacks when the case before it is compiled or shaped otherwise.
BROKEN = {
    "conv-spmm-32-bf16+num_stages=1": "no software pipelining",
    "conv-spmm-32-bf16+maxnreg=64": "spills",
    "conv-spmm-32-fp32": "no tensor core instruction",
    "ragged-sddmm-32-bf16": "no loads of 16 bytes",
}


def missing(report: dict[str, Any], arch: str) -> list[str]:
    """What the assembly of a compiled kernel lacks."""
    found = []
    if report["wgmma" if arch == "sm90" else "mma"] == 0:
        found.append("no tensor core instruction")
    if report["loads of 16 bytes"] == 0:
        found.append("no loads of 16 bytes")
    # Activations and the other operand, each in several stages; by 8 bytes where that is the way through L1.
    if report["pipelined loads"] + report["copies of 8 bytes"] < 6 or report["pipelined loads"] == 0:
        found.append("no software pipelining")
    if report["copies of 4 bytes"]:
        found.append("copies of 4 bytes")
    if report["spilled bytes"]:
        found.append("spills")
    if report["shared"] > _triton_config.TABLES[arch].shared_bytes:
        found.append("more shared memory than there is")
    return found


def compile_all(arch: str, cases: list[str], cache: Path) -> dict[str, list[str]]:
    """What each case lacks."""
    names = [f"{arch}-{case}" for case in cases]
    done = run([str(TESTS / "triton_aot.py"), *names], TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(cache))
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [report["case"] for report in reports] == names
    for report in reports:
        print(report)
    return {report["case"].removeprefix(f"{arch}-"): missing(report, arch) for report in reports}


@needs_triton
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_compiles_to_good_assembly(arch: str, tmp_path: Path) -> None:
    lacking = compile_all(arch, list(COMPILED), tmp_path)
    assert not any(lacking.values()), lacking


@needs_triton
def test_bad_assembly_is_noticed(tmp_path: Path) -> None:
    lacking = compile_all("sm90", list(BROKEN), tmp_path)
    assert all(BROKEN[case] in found for case, found in lacking.items()), lacking


def test_says_why_it_cannot_run_here() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    reason = backends.get("triton").why_unavailable()
    assert reason is not None and ("install" in reason or "GPU" in reason)
    assert f"unavailable: {reason}" in doctor.report()
    topology = testing.TOPOLOGIES["random"](32, 32, Block(16, 16), 1)
    values = testing.random_values(topology)
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run this: .*'cpu' or 'densified' can run it"):
        ops.linear(torch.randn(2, 32), values, topology, backend="triton")


@pytest.mark.parametrize(
    "op,pattern,dtype,device,why",
    [
        ("linear", Block(32, 32), torch.bfloat16, "cpu", "runs on NVIDIA GPUs"),
        ("gru", Block(32, 32), torch.bfloat16, "cuda", "no GRU"),
        ("conv", Block(1, 1), torch.bfloat16, "cuda", "sides of 16, 32, 64"),
        ("conv", Block(8, 8), torch.bfloat16, "cuda", "sides of 16, 32, 64"),
        ("conv", Block(32, 32), torch.float64, "cuda", "not float64"),
        ("conv", Block(64, 32), torch.float16, "cuda", None),
    ],
)
def test_says_what_it_does_not_serve(op: str, pattern: Block, dtype: torch.dtype, device: str, why: str | None) -> None:
    reason = backends.get("triton").why_unsupported(op, pattern=pattern, dtype=dtype, device=torch.device(device))
    assert reason is None if why is None else why in str(reason)


@pytest.mark.parametrize("arch", _triton_config.TABLES)
@pytest.mark.parametrize("side", [16, 32, 64])
@pytest.mark.parametrize("channels,image", [(224, 64), (448, 32), (672, 16), (896, 8)])
def test_launches_fit_the_machine(channels: int, image: int, side: int, arch: str) -> None:
    """Shared memory of every launch of the U-Net's convolutions, and the workspace of their scores."""
    table, positions = _triton_config.TABLES[arch], 12 * image * image
    topology = testing.TOPOLOGIES["random"](channels, channels, Block(side, side), 9)
    index = topology.weight_index()
    for bytes_ in (2, 4):
        size = _triton_config.group_size("conv", side)
        groups = -(-index.row_blocks // size)
        product = _triton_config.choose_product(table, 132, positions, groups, size * side, side, bytes_, True)
        step = (product.block_p + size * side) * side * product.entries * bytes_
        assert 2 <= product.stages and product.stages * step <= table.shared_bytes
        gradient = _triton_config.choose_gradient(table, 132, positions, index, size, bytes_, True)
        assert gradient.stages * (gradient.width + size * side) * gradient.block_p * bytes_ <= table.shared_bytes
        limit = _triton_launch.SCORES_WORKSPACE_BYTES
        scores = _triton_config.choose_scores(table, 132, positions, index, bytes_, limit)
        assert scores.stages * (scores.width + scores.height) * scores.block_p * bytes_ <= table.shared_bytes
        partial = 4 * index.row_blocks * index.bh * index.col_blocks * index.bw
        assert scores.splits == 1 or (scores.splits + 1) * partial <= limit


def test_autotuning_takes_the_quickest_and_measures_once() -> None:
    table = _triton_config.TABLES["sm90"]
    given = _triton_config.choose_product(table, 132, 4096, 7, 64, 32, 2, True)
    candidates = _triton_tune.product_candidates(table, given)
    assert candidates[0] == given and len(set(candidates)) == len(candidates)
    launched: list[_triton_config.ProductConfig] = []

    def measure(launch: Any) -> float:
        launch()
        return abs(launched[-1].block_p - 128) + launched[-1].stages

    for _ in range(2):
        found = _triton_tune.best("test", candidates, launched.append, measure)
    assert (found.block_p, found.stages) == (128, 3) and len(launched) == len(candidates)
    gradient = _triton_config.GradientConfig(64, 128, 4, 4, splits=6)
    splits = {config.splits for config in _triton_tune.gradient_candidates(table.gradient, gradient)}
    assert splits == {3, 6, 12}
    assert not _triton_tune.enabled(torch.device("cpu"))
