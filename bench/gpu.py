"""`python -m bench gpu`: everything that a machine with an NVIDIA GPU is wanted for, offline, within ten minutes.

    python -m bench gpu [--out FOLDER] [--minutes M] [--only STAGE …]

Stages, each a process of its own under a time limit, so that one that fails or hangs does not end the others:

    build       the native code for this GPU's architecture, in place
    tests       the tests of the GPU backends, on the GPU
    sanitizer   compute-sanitizer (memcheck, racecheck) over every product on small shapes
    rates       what the machine can do: copies, dense products, tensor cores
    bench       the GPU cases, the most wanted first; rows are appended as they are measured
    costs       the cost table by which the execution plan of this kind of GPU decides

FOLDER gets `rows.jsonl`, `rates.json`, `costs.json` and a log of each stage. Nothing is downloaded: packages that are
missing are named, with the wheels to bring.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from bench.rows import RESULTS, machine

ROOT = Path(__file__).resolve().parent.parent
CASES = ("gpu-conv-cuda", "gpu-conv-triton", "gpu-linear-cuda", "gpu-linear-triton")
COSTS = "costs"
MEASURED = (*CASES[:2], COSTS, *CASES[2:])
BACKENDS = ("cuda", "triton")
TAIL = 2500  # characters of a stage's output

# What a stage imports, and the wheel that has it; torch and Triton come with the machine.
NEEDS = {
    "": {"numpy": "numpy", "safetensors": "safetensors", "PIL": "pillow"},
    "build": {"setuptools": "setuptools", "pybind11": "pybind11", "ninja": "ninja"},
    "tests": {"pytest": "pytest", "hypothesis": "hypothesis", "expecttest": "expecttest"},
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A process.

    Args:
        command: what runs, in the repository's root. seconds: the most it may take.
        environment: variables beside this process's. why_not: why it cannot run here; empty where it can.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    why_not: str = ""


def missing(stage: str) -> str:
    """The wheels that a stage lacks, in words; empty where it has all."""
    absent = [wheel for module, wheel in NEEDS.get(stage, {}).items() if importlib.util.find_spec(module) is None]
    return f"bring the wheels of {', '.join(absent)}" if absent else ""


def architecture() -> str:
    """The GPU's, as `SPARSE_KERNELS_ARCHS` names it."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}a" if major >= 9 else f"{major}{minor}"


def stages(out: Path, minutes: float) -> list[Stage]:
    """What there is to do within so many minutes."""
    python = sys.executable
    tests = sorted(
        str(path.relative_to(ROOT)) for name in BACKENDS for path in (ROOT / "tests").glob(f"test_{name}*.py")
    )
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    sanitizer = shutil.which("compute-sanitizer") or ""
    small = [python, "-m", "bench.gpu", "--smoke"]
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    made = [
        Stage("build", [python, "setup.py", "build_ext", "--inplace"], 150,
              {"SPARSE_KERNELS_CUDA": "on", "SPARSE_KERNELS_ARCHS": architecture()},
              missing("build") or ("" if nvcc else "there is no nvcc: install the CUDA toolkit")),
        Stage("rates", [python, "-m", "bench.gpu", "--rates", str(out / "rates.json")], 60),
        Stage("smoke", small, 120),
        Stage("tests", [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, *tests], 120,
              why_not=missing("tests")),
    ]  # fmt: skip
    for tool in ("memcheck", "racecheck"):
        # Without torch's cache of freed memory an access beyond a tensor is one beyond an allocation.
        made.append(
            Stage(f"sanitizer-{tool}", [sanitizer, "--tool", tool, "--error-exitcode", "9", *small], 60,
                  {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                  "" if sanitizer else "there is no compute-sanitizer; it is a part of the CUDA toolkit")
        )  # fmt: skip
    # Measuring gets what the others leave, and what they did not use.
    for case in MEASURED:
        command = [python, "-m", "bench", "run", case, "--device", "cuda", "--out", str(out / "rows.jsonl")]
        if case == COSTS:
            command = [python, "-m", "bench.costs", "--device", "cuda", "--dtypes", "bfloat16", "--threads", "1",
                       "--ops", "conv", "linear", "--patterns", "block:32x32", "block:16x16",
                       "--out", str(out / "costs.json")]  # fmt: skip
        made.append(Stage(case, command, minutes * 60))
    return made


def perform(stage: Stage, out: Path, seconds: float) -> str:
    """Runs a stage for at most so long; returns what came of it in words. Its output goes to a file of its name."""
    if stage.why_not:
        return f"not run: {stage.why_not}"
    log = out / f"{stage.name.split('-')[0]}.log"
    command = list(stage.command)
    if stage.name in CASES:
        command += ["--minutes", f"{max(seconds - 15, 10) / 60:.2f}"]
    begun = time.perf_counter()
    with log.open("a", encoding="utf-8") as file:
        print(f"== {stage.name}: {' '.join(command)}", file=file, flush=True)
        try:
            status = subprocess.run(
                command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment},
                stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"stopped after its {seconds:.0f} s; what it wrote until then is in {log.name}"
    took = f"{time.perf_counter() - begun:.0f} s"
    return f"passed in {took}" if status == 0 else f"FAILED (exit {status}) after {took}, see {log.name}"


def smoke() -> int:
    """Every product of every GPU backend on small shapes against the dense one; 1 where one is wrong."""
    from bench.gpu_products import PASSES, Product, prepare
    from bench.registry import Variant

    variants = tuple(Variant(f"block:{side}", 0.5) for side in ("16x16", "32x32", "64x64", "64x32"))
    failures = 0
    for backend in BACKENDS:
        for passes in PASSES:
            for product in (Product(2, 96, 9, 3, passes), Product(2, 96, 9, 1, passes), Product(70, 96, 1, 0, passes)):
                for variant, ours in prepare(product, backend, variants).ours.items():
                    try:
                        if isinstance(ours, Exception):
                            raise ours
                        if ours.check is not None:
                            ours.check()
                        torch.cuda.synchronize()
                    # All are tried: which ones fail says where to look.
                    except Exception as error:
                        failures += 1
                        print(f"{backend} {product} {variant.pattern}: {type(error).__name__}: {error}", flush=True)
    print(f"{failures} wrong or refused")
    return int(failures > 0)


def write_rates(path: Path) -> int:
    """Measures the machine's rates and writes them."""
    from bench.cases.gpu_conv import BATCH, SHAPES
    from bench.gpu_rates import rates

    text = json.dumps(rates(BATCH, SHAPES), indent=2, ensure_ascii=False)
    print(text)
    path.write_text(text + "\n", encoding="utf-8")
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
    if reason := missing(""):
        parser.error(reason)
    chosen: Callable[[], int] | None = smoke if options.smoke else None
    if options.rates is not None:
        chosen = partial(write_rates, options.rates)
    if chosen is not None:
        return chosen()
    return run_stages(options.out, options.minutes, options.only)


def run_stages(out: Path, minutes: float, only: Sequence[str] = ()) -> int:
    """Runs the stages one after the other; 1 where one failed."""
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    begun = time.perf_counter()
    about = ", ".join(f"{key} {value}" for key, value in machine("cuda").items())
    print(about, flush=True)
    lines = [about]
    for stage in stages(out, minutes):
        if only and not any(stage.name.startswith(prefix) for prefix in only):
            continue
        left = minutes * 60 - (time.perf_counter() - begun)
        share = min(stage.seconds, left)
        if stage.name in MEASURED:
            share = left / (len(MEASURED) - MEASURED.index(stage.name))
        outcome = perform(stage, out, share) if left > 5 else "not run: no time left"
        lines.append(f"{stage.name}: {outcome}")
        print(lines[-1], flush=True)
        (out / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for log in sorted(out.glob("*.log")):
        if any("FAILED" in line and log.name in line for line in lines):
            print(f"\n{log.name} ends:\n{log.read_text(encoding='utf-8', errors='replace')[-TAIL:]}")
    return int(any("FAILED" in line or "stopped" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
