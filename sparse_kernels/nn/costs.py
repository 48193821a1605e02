"""What a layer costs: predictions from a committed table of measurements, one file a kind of machine.

`cost_tables/<kind>.json` holds, for one machine of that kind, the forward + backward times of single layers in three
forms: the dense twin from torch.nn, the sparse kernel, and *densified* (scatter, dense library, gather).
`python -m bench.costs` makes it. A prediction interpolates: in the density, where a sparse kernel's time is a fixed
part plus one in proportion; and between shapes, in the time that a multiply-add takes. It reads no clock, so that a
plan made from it is the same every time.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from .. import _native
from ..patterns import Block, parse_pattern

# Rows of a layer's product where nobody said how many there are.
DEFAULT_POSITIONS = 1024
# How many of the measured shapes a prediction is made of.
NEIGHBOURS = 3


@dataclass(frozen=True)
class Times:
    """Milliseconds of one layer's forward and backward.

    Args:
        dense: of its torch.nn twin. densified: of the dense library behind a sparse layer. sparse: of the kernel; None
            where there is none.
    """

    dense: float
    densified: float
    sparse: float | None

    def of(self, execution: str) -> float:
        """The time of the form that `execution` names; that of the dense library where there is no kernel."""
        return self.densified if execution == "densified" or self.sparse is None else self.sparse

    def speedup(self, execution: str) -> float:
        """How many times faster than the dense twin."""
        return self.dense / self.of(execution)

    def scaled(self, factor: float) -> Times:
        """For `factor` times as many positions."""
        sparse = None if self.sparse is None else self.sparse * factor
        return Times(self.dense * factor, self.densified * factor, sparse)


@dataclass(frozen=True)
class Work:
    """What decides a layer's times.

    Args:
        op: "linear", "conv" or "gru". pattern: how its weights are cut. dtype: that it computes in.
        numel: elements of its dense weights; `taps` of them share an input feature and an output feature.
        density: fraction of them that is present. positions: rows of its matrix product. threads: that run it.
    """

    op: str
    pattern: Block
    dtype: torch.dtype
    numel: int
    taps: int
    density: float
    positions: float
    threads: int

    @property
    def place(self) -> tuple[float, float, float]:
        """Where it lies among other shapes: logarithms of positions, width and taps."""
        return math.log2(self.positions), math.log2(self.numel / self.taps) / 2, math.log2(self.taps)


def decide(times: Times, backend: str, source: str) -> tuple[str, str]:
    """The faster of the sparse kernel of `backend` and the densified form, and why.

    Returns:
        The execution, and the reason: empty for the sparse kernel, which wins a tie because it needs less memory.
    """
    if times.sparse is None:
        return "densified", f"no sparse kernel ({source})"
    if times.sparse <= times.densified:
        return backend, ""
    return "densified", f"{times.sparse / times.densified:.2f}x faster than the sparse kernel ({source})"


class CostTable:
    """Measured rows of one kind of machine.

    Args:
        kind: as `machine_kind` names it. rows: pairs of what was measured and its times.
    """

    def __init__(self, kind: str, rows: Sequence[tuple[Work, Times]]) -> None:
        self.kind = kind
        self.rows = tuple(rows)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CostTable:
        """From the content of a file that `python -m bench.costs` wrote."""
        rows = []
        for row in data["rows"]:
            fields = {**row, "pattern": parse_pattern(row["pattern"]), "dtype": getattr(torch, row["dtype"])}
            times = Times(*(fields.pop(f"{form}_ms") for form in ("dense", "densified", "sparse")))
            fields.pop("layer")
            rows.append((Work(**fields), times))
        return cls(data["kind"], rows)

    def predict(self, work: Work) -> Times | None:
        """The times of a layer, or None where nothing of its op and dtype was measured.

        Of the patterns and thread counts that were measured, the nearest stands for one that was not.
        """
        rows = [row for row in self.rows if (row[0].op, row[0].dtype) == (work.op, work.dtype)]
        if not rows or work.positions <= 0:
            return None
        pattern = min({row[0].pattern for row in rows}, key=lambda p: (_distance(p, work.pattern), str(p)))
        rows = [row for row in rows if row[0].pattern == pattern]
        threads = min({row[0].threads for row in rows}, key=lambda n: (abs(math.log2(n / work.threads)), n))
        shapes: dict[tuple[float, ...], list[tuple[Work, Times]]] = {}
        for row in rows:
            if row[0].threads == threads:
                shapes.setdefault(row[0].place, []).append(row)
        nearest = sorted(shapes, key=lambda place: (math.dist(place, work.place), place))[:NEIGHBOURS]
        weights = [1.0 / (math.dist(place, work.place) ** 2 + 1e-3) for place in nearest]
        logs = [0.0, 0.0, 0.0]
        for place, weight in zip(nearest, weights, strict=True):
            measured = shapes[place][0][0]
            size = measured.positions * measured.numel
            for form, ms in enumerate(_at_density(shapes[place], work.density)):
                logs[form] += weight / sum(weights) * math.log(ms / size)
        return Times(*(math.exp(log) for log in logs)).scaled(work.positions * work.numel)


def _distance(a: Block, b: Block) -> float:
    return abs(math.log2(a.bh / b.bh)) + abs(math.log2(a.bw / b.bw))


def _at_density(rows: Sequence[tuple[Work, Times]], density: float) -> tuple[float, float, float]:
    """Dense, densified and sparse milliseconds of one shape at a density between or beyond those measured."""
    points = sorted((work.density, times.dense, times.densified, times.of("sparse")) for work, times in rows)
    if len(points) == 1:
        only, dense, densified, sparse = points[0]
        return dense, densified, sparse * density / only
    above = next((k for k in range(1, len(points) - 1) if points[k][0] >= density), len(points) - 1)
    (low, *first), (high, *second) = points[above - 1], points[above]
    share = (density - low) / (high - low)
    inside = min(1.0, max(0.0, share))
    # Beyond the measured densities a line must not fall below what the arithmetic alone takes, nor to nothing.
    floor = first[2] * max(density / low, 0.05) if share < 0 else second[2] if share > 1 else 0.0
    return (
        first[0] + inside * (second[0] - first[0]),
        first[1] + inside * (second[1] - first[1]),
        max(floor, first[2] + share * (second[2] - first[2])),
    )


def machine_kind(device: torch.device) -> str | None:
    """The name of this machine's table: of a CPU its instruction set (`cpu-avx512`), of a GPU its capability and its
    name (`cuda-sm90-h200`); None where there can be no table."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return gpu_kind(properties.major, properties.minor, properties.name)
    if device.type != "cpu" or _native.why_unavailable() is not None:
        return None
    return f"cpu-{_native.native().isa_name()}"


def gpu_kind(major: int, minor: int, name: str) -> str:
    """A GPU's name as a table's: `gpu_kind(9, 0, "NVIDIA H200") == "cuda-sm90-h200"`."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "-".join(["cuda", f"sm{major}{minor}", *(word for word in words if word != "nvidia")])


def cost_table(device: torch.device) -> CostTable | None:
    """The committed table for machines like this one, if there is one."""
    kind = machine_kind(device)
    return None if kind is None else _load(kind)


def why_no_times(work: Work, device: torch.device) -> str:
    """Why nothing is predicted for this work: no table for this kind of machine, or none of its rows."""
    if cost_table(device) is None:
        return f"no cost table for {machine_kind(device) or device.type}"
    return f"{work.op} in {str(work.dtype).removeprefix('torch.')} was not measured"


@functools.cache
def _load(kind: str) -> CostTable | None:
    path = resources.files(__package__) / "cost_tables" / f"{kind}.json"
    return CostTable.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
