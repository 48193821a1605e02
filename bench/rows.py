"""Rows: what one measurement says, as JSON lines and as text.

A row carries its machine, versions and commit. Files are appended to, never rewritten; the newest row of a `key`
counts. Rows written before a field existed are read with that field's default.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sparse_kernels import _native
from sparsediff.doctor import cpu_name

RESULTS = Path(__file__).parent / "results"
PREDICTION_GOAL = 0.15  # how far a measured speedup may lie from the predicted one

# What makes two rows measurements of the same thing.
Key = tuple[str, str, str, float, str, str, str, int, str, str, str]


@dataclasses.dataclass
class Row:
    """One measured line: ours beside one rival.

    `ours` and `rival` are medians in `unit`, with their 20th and 80th percentiles. `speedup` is the median of the
    rounds' ratios (`speedup_p20`, `speedup_p80` beside it); `efficiency` is density times speedup; `gflops` and `gbs`
    count the nonzeros' operations and the bytes that must move; `roofline` is the speedup at which ours would run at
    the machine's limit, the smaller of `roofline_compute` and `roofline_memory`; `goal` is what the project asks for,
    and `forbidden` the arithmetic by which the roofline rules that goal out.
    """

    case: str
    shape: str
    pattern: str
    sparsity: float
    density: float
    threads: int
    rival: str
    ours_ms: float
    rival_ms: float
    speedup: float
    speedup_p20: float
    speedup_p80: float
    efficiency: float
    gflops: float | None = None
    peak_gflops: float | None = None
    roofline: float | None = None
    goal: float | None = None
    met: bool | None = None
    note: str = ""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    unit: str = "ms"
    dtype: str = "float32"
    passes: str = "forward + backward"
    rounds: int = 0
    ours_p20: float | None = None
    ours_p80: float | None = None
    rival_p20: float | None = None
    rival_p80: float | None = None
    flops: float | None = None
    bytes_moved: float | None = None
    gbs: float | None = None
    bandwidth_gbs: float | None = None
    roofline_compute: float | None = None
    roofline_memory: float | None = None
    forbidden: str = ""
    ours_mib: float | None = None
    rival_mib: float | None = None
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What was measured and where, without when: rows of one key can be compared. The CPU and its cores
        count, the commit does not; of a rival that is the faster of several ("D2 packed"), only the part that always
        stays ("D2")."""
        about = self.machine
        names = ("gpu", "gpus", "capability") if "gpu" in about else ("cpu", "cores", "isa")
        kind, count, features = (str(about.get(name)) for name in names)
        return (
            self.case, self.shape, self.pattern, self.sparsity, self.dtype, self.passes, stable_rival(self.rival),
            self.threads, kind, count, features,
        )  # fmt: skip

    @property
    def verdict(self) -> str:
        """What became of the goal: met, MISSED, forbidden by the roofline, or nothing where there is none."""
        if self.met is None:
            return ""
        return "met" if self.met else ("forbidden" if self.forbidden else "MISSED")

    @property
    def prediction_error(self) -> float | None:
        """Measured over predicted speedup, less one; None where nothing was predicted."""
        predicted = self.extra.get("predicted")
        return self.speedup / predicted - 1 if predicted else None

    @property
    def prediction(self) -> str:
        """The prediction beside what was measured and its goal, in words; empty where nothing was predicted."""
        error = self.prediction_error
        if error is None:
            return ""
        verdict = "met" if abs(error) <= PREDICTION_GOAL else "MISSED"
        return (
            f"predicted {self.extra['predicted']:.2f}x, off by {error:+.1%} (at most {PREDICTION_GOAL:.0%}: {verdict})"
        )


def stable_rival(rival: str) -> str:
    """A rival's name without the form that was quickest this time: "D2 packed" → "D2", "dense padded" → "dense"."""
    first = rival.split()[0]
    return first if first in ("D2", "dense") else rival


@functools.cache
def _commit() -> str:
    """Of the working tree, or what `SPARSE_KERNELS_COMMIT` says where that is a copy without git."""
    if given := os.environ.get("SPARSE_KERNELS_COMMIT"):
        return given
    command = ["git", "describe", "--always", "--dirty"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    except OSError:
        return "unknown"
    return described.stdout.strip() or "unknown"


@functools.cache
def _peer_versions() -> dict[str, str]:
    versions = {}
    for package in ("scipy", "sparseprop", "stanford-stk", "triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a row must say of where it was measured: on "cpu" or on "cuda"."""
    if device == "cuda":
        return {**_gpu(), **_versions()}
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "isa": _native.native().isa_name(), **_versions()}


@functools.cache
def _gpu() -> dict[str, Any]:
    about = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    return {
        "gpu": about.name,
        "gpus": 1,
        "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "memory_gib": round(about.total_memory / 2**30, 1),
        "l2_mib": round(about.L2_cache_size / 2**20, 1),
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _versions() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        **_peer_versions(),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def default_file(device: str = "cpu") -> Path:
    """Where this machine's rows belong: one file for each CPU, core count and instruction set, or for each GPU."""
    about = machine(device)
    if device == "cuda":
        return RESULTS / f"gpu-{'-'.join(str(about['gpu']).lower().split())}.jsonl"
    stem = "-".join([*str(about["cpu"]).lower().split(), f"{about['cores']}c", str(about["isa"])])
    return RESULTS / f"cpu-{stem}.jsonl"


def write(rows: Iterable[Row], path: Path) -> None:
    """Appends the rows as JSON lines, each with this CPU's machine where it names none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**dataclasses.asdict(row), "machine": row.machine or machine()}) + "\n")


def read(path: Path) -> list[Row]:
    """The rows of a file in its order; fields that this version does not know go to `extra`.

    Raises:
        ValueError: a line is no row; names the file and the line.
    """
    known = {field.name for field in dataclasses.fields(Row)}
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            if "(KiB)" in entry["case"]:
                entry.setdefault("unit", "KiB")
            unknown = {name: entry.pop(name) for name in sorted(set(entry) - known)}
            row = Row(**entry)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}:{number} is not a row: {error}.") from error
        row.extra.update(unknown)
        rows.append(row)
    return rows


def newest(rows: Iterable[Row]) -> dict[Key, Row]:
    """The newest row of each key, in the order in which the keys first appeared."""
    kept: dict[Key, Row] = {}
    for row in rows:
        before = kept.get(row.key)
        if before is None or before.machine.get("date", "") <= row.machine.get("date", ""):
            kept[row.key] = row
    return kept


_COLUMNS = ("case", "shape", "pattern", "S", "density", "thr", "rival", "ours", "rival's", "unit", "speedup", "p20-p80",
            "eff", "GF/s", "peak", "GB/s", "roof", "goal", "")  # fmt: skip


def table(rows: Iterable[Row]) -> str:
    """The rows as aligned text, the arithmetic of forbidden goals and what was predicted beneath."""
    rows = list(rows)
    lines = [_COLUMNS]
    for r in rows:
        lines.append(
            (
                r.case,
                r.shape,
                r.pattern,
                f"{r.sparsity:g}",
                f"{r.density:.3f}",
                str(r.threads),
                r.rival,
                f"{r.ours_ms:.2f}",
                f"{r.rival_ms:.2f}",
                r.unit,
                f"{r.speedup:.2f}x",
                f"{r.speedup_p20:.2f}-{r.speedup_p80:.2f}",
                f"{r.efficiency:.2f}",
                or_dash(r.gflops, ".0f"),
                or_dash(r.peak_gflops, ".0f"),
                or_dash(r.gbs, ".0f"),
                or_dash(r.roofline, ".1f"),
                or_dash(r.goal, ".3g"),
                r.verdict,
            )
        )
    widths = [max(len(line[k]) for line in lines) for k in range(len(_COLUMNS))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    text += [f"  forbidden: {r.shape} {r.pattern} S={r.sparsity:g}: {r.forbidden}" for r in rows if r.forbidden]
    text += [f"  {r.shape} {r.pattern} S={r.sparsity:g}: {r.prediction}" for r in rows if r.prediction]
    return "\n".join(text)


def or_dash(value: float | None, spec: str) -> str:
    """A number in a format, a dash for None."""
    return "-" if value is None else format(value, spec)
