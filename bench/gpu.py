"""`python -m bench gpu`: everything that a machine with an NVIDIA GPU is wanted for, offline, within ten minutes.

    python -m bench gpu [--out FOLDER] [--minutes M] [--only STAGE …]

Stages, each a process of its own under a time limit, so that one that fails or hangs does not end the others:

    build       the native code for this GPU's architecture, in place
    rates       what the machine can do: copies, dense products, tensor cores
    smoke       every product of every GPU backend on small shapes
    gpu-…       the GPU cases, the most wanted first; rows are appended as they are measured
    costs       the cost table by which the execution plan of this kind of GPU decides
    tests       the parametrised tests of all ops and backends, with their tensors on the GPU
    sanitizer   compute-sanitizer (memcheck, racecheck) over the smoke stage

FOLDER gets `rows.jsonl`, `rates.json`, `costs.json`, `summary.txt` and three logs. Where ten minutes are all that a
command gets, two do it: `--only build rates smoke tests sanitizer`, then `--only gpu- costs`. Nothing is downloaded:
packages that are missing are named, with the wheels to bring. In a copy without git, `SPARSE_KERNELS_COMMIT` says what
rows name as their commit.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.rows import RESULTS, machine

ROOT = Path(__file__).resolve().parent.parent
CASES = ("gpu-conv-cuda", "gpu-conv-triton", "gpu-linear-cuda", "gpu-linear-triton")
COSTS = "costs"
BACKENDS = ("cuda", "triton")
TESTS_SECONDS, SANITIZER_SECONDS = 60.0, 40.0
TAIL = 2500  # characters of a stage's output

# What a stage imports, and the wheel that has it; torch and Triton come with the machine.
NEEDS = {
    "build": {"setuptools": "setuptools>=77", "pybind11": "pybind11"},
    "tests": {"pytest": "pytest", "hypothesis": "hypothesis", "expecttest": "expecttest"},
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A process.

    Args:
        command: what runs, in the repository's root. seconds: the most it may take; None: a share of what is left.
        log: the file of the folder that its output goes to. environment: variables beside this process's.
        why_not: why it cannot run here; empty where it can.
    """

    name: str
    command: Sequence[str]
    seconds: float | None
    log: str
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    why_not: str = ""


def missing(stage: str) -> str:
    """The wheels that a stage lacks, in words; empty where it has all."""
    absent = []
    for module, wheel in NEEDS.get(stage, {}).items():
        name, _, oldest = wheel.partition(">=")
        found = importlib.util.find_spec(module) is not None
        if not found or (oldest and int(metadata.version(name).split(".")[0]) < int(oldest)):
            absent.append(wheel)
    if stage == "build" and _ninja_folder() is None:
        absent.append("ninja")
    return f"bring the wheels of {', '.join(absent)}" if absent else ""


def _ninja_folder() -> str | None:
    """Where the `ninja` program lies: on PATH, or in its wheel."""
    if found := shutil.which("ninja"):
        return str(Path(found).parent)
    if importlib.util.find_spec("ninja") is None:
        return None
    import ninja

    return str(ninja.BIN_DIR)


def _tool(name: str) -> str:
    """The path of one of the CUDA toolkit's programs; empty where it is not installed."""
    return shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}") or ""


def architecture() -> str:
    """The GPU's, as `SPARSE_KERNELS_ARCHS` names it."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}a" if major >= 9 else f"{major}{minor}"


def stages(out: Path) -> list[Stage]:
    """What there is to do, in order: what the others need, then what is wanted most."""
    python = sys.executable
    small = [python, "-m", "bench.gpu", "--smoke"]
    nvcc, sanitizer = _tool("nvcc"), _tool("compute-sanitizer")
    path = os.pathsep.join([folder for folder in (_ninja_folder(), os.environ.get("PATH")) if folder])
    made = [
        Stage("build", [python, "setup.py", "build_ext", "--inplace"], 150, "build.log",
              {"SPARSE_KERNELS_CUDA": "on", "SPARSE_KERNELS_ARCHS": architecture(), "PATH": path},
              missing("build") or ("" if nvcc else "there is no nvcc: install the CUDA toolkit")),
        Stage("rates", [python, "-m", "bench.gpu", "--rates", str(out / "rates.json")], 60, "build.log"),
        Stage("smoke", small, 90, "tests.log"),
    ]  # fmt: skip
    for case in (*CASES[:2], COSTS, *CASES[2:]):
        command = [python, "-m", "bench", "run", case, "--device", "cuda", "--out", str(out / "rows.jsonl")]
        if case == COSTS:
            command = [python, "-m", "bench.costs", "--device", "cuda", "--ops", "conv", "linear",
                       "--patterns", "block:32x32", "block:16x16", "--out", str(out / "costs.json")]  # fmt: skip
        made.append(Stage(case, command, None, "bench.log"))
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", *workers, "tests/test_ops.py"]
    # Without CUBLAS_WORKSPACE_CONFIG torch warns of what poisoned buffers ask for.
    on_gpu = {"SPARSE_KERNELS_TEST_DEVICE": "cuda", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    made.append(Stage("tests", tests, TESTS_SECONDS, "tests.log", on_gpu, missing("tests")))
    for tool in ("memcheck", "racecheck"):
        # Without torch's cache of freed memory an access beyond a tensor is one beyond an allocation.
        made.append(
            Stage(f"sanitizer-{tool}", [sanitizer, "--tool", tool, "--error-exitcode", "9", *small], SANITIZER_SECONDS,
                  "tests.log", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                  "" if sanitizer else "there is no compute-sanitizer; it is a part of the CUDA toolkit")
        )  # fmt: skip
    return made


def perform(stage: Stage, out: Path, seconds: float) -> str:
    """Runs a stage and all it starts for at most so long; returns what came of it in words."""
    if stage.why_not:
        return f"not run: {stage.why_not}"
    command = list(stage.command)
    if stage.name in CASES:
        command += ["--minutes", f"{max(seconds - 15, 10) / 60:.2f}"]
    begun = time.perf_counter()
    with (out / stage.log).open("a", encoding="utf-8") as file:
        print(f"== {stage.name}: {' '.join(command)}", file=file, flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment}, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            # Its children too: they would disturb what is measured next.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after its {seconds:.0f} s; what it wrote until then is in {stage.log}"
    took = f"{time.perf_counter() - begun:.0f} s"
    return f"passed in {took}" if status == 0 else f"FAILED (exit {status}) after {took}, see {stage.log}"


def smoke_products() -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Small products and the patterns they are tried with: whole and ragged channels, strides, one tap and nine."""
    from bench.gpu_products import PASSES, Product

    for passes in PASSES:
        every = tuple(f"block:{side}" for side in ("16x16", "32x32", "64x64", "64x32"))
        yield Product(2, 96, 9, 3, passes), every
        yield Product(70, 96, 1, 0, passes), every
        yield Product(2, 100, 7, 3, passes), every[:2]
        yield Product(2, 96, 9, 3, passes, stride=2), every[:2]
        yield Product(2, 96, 9, 1, passes), every[:2]
        yield Product(1, 32, 48, 3, passes), every[1:2]  # few blocks, many positions: split sums


def smoke() -> int:
    """Every product of every GPU backend on small shapes against the CPU's dense one; 1 where one is wrong."""
    from bench.gpu_products import prepare
    from bench.registry import Variant

    failures = checked = 0
    for backend in BACKENDS:
        for product, patterns in smoke_products():
            variants = tuple(Variant(pattern, 0.5) for pattern in patterns)
            for variant, ours in prepare(product, backend, variants, alone=True).ours.items():
                checked += 1
                try:
                    if isinstance(ours, Exception):
                        raise ours
                    if ours.check is not None:
                        ours.check()
                # All are tried: which ones fail says where to look.
                except Exception as error:
                    failures += 1
                    print(f"{backend} {product} {variant.pattern}: {type(error).__name__}: {error}", flush=True)
    print(f"{checked} products checked, {failures} wrong or refused")
    return int(failures > 0)


def write_rates(path: Path) -> int:
    """Measures the machine's rates and writes them, each as soon as it is known."""
    from bench.cases.gpu_conv import BATCH, SHAPES
    from bench.gpu_rates import rates

    known: dict[str, Any] = {}
    for name, rate in rates(BATCH, SHAPES):
        known[name] = rate
        print(f"{name}: {rate}", flush=True)
        path.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the stages; see this module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", help="folder of rows, rates and logs")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages together")
    parser.add_argument("--only", nargs="+", default=[], help="only stages whose names begin so")
    parser.add_argument("--smoke", action="store_true", help="only check every product on small shapes, here")
    parser.add_argument("--rates", type=Path, help="only measure the machine's rates, here, into this file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch finds no NVIDIA GPU (torch.cuda.is_available() is False): this needs one and its driver.")
    if options.smoke:
        return smoke()
    if options.rates is not None:
        return write_rates(options.rates)
    return run_stages(options.out, options.minutes, options.only)


def run_stages(out: Path, minutes: float, only: Sequence[str] = ()) -> int:
    """Runs the stages one after the other; 1 where one failed or none ran."""
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    begun = time.perf_counter()
    about = ", ".join(f"{key} {value}" for key, value in machine("cuda").items())
    print(about, flush=True)
    lines = [about]
    todo = [stage for stage in stages(out) if not only or any(stage.name.startswith(prefix) for prefix in only)]
    for place, stage in enumerate(todo):
        left = minutes * 60 - (time.perf_counter() - begun)
        later = todo[place + 1 :]
        if stage.seconds is None:
            # Measuring shares what is left among its stages, less what those after it are kept for.
            kept = sum(other.seconds for other in later if other.seconds is not None and not other.why_not)
            share = (left - min(kept, left / 3)) / (1 + sum(other.seconds is None for other in later))
        else:
            share = min(stage.seconds, left)
        outcome = perform(stage, out, share) if left > 5 else "not run: no time left"
        lines.append(f"{stage.name}: {outcome}")
        print(lines[-1], flush=True)
        (out / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for log in sorted(out.glob("*.log")):
        if any("FAILED" in line and log.name in line for line in lines):
            print(f"\n{log.name} ends:\n{log.read_text(encoding='utf-8', errors='replace')[-TAIL:]}")
    ran = [line for line in lines[1:] if ": not run" not in line]
    return int(not ran or any("FAILED" in line or "stopped" in line for line in ran))


if __name__ == "__main__":
    sys.exit(main())
