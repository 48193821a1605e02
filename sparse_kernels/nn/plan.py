"""The plan of a sparse model: what became of every weight, which form runs each layer, and how fast that should be.

`sparsify` returns it, `print` shows it as a table, and it is what `plan.json` holds: the same plan gives the same bits.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .costs import Times
from .weights import SparseLayer

DENSE = "dense"
FORMAT = 1


@dataclass(frozen=True)
class PlanRow:
    """One weight.

    Args:
        layer: dotted path of its layer, for a GRU followed by the weight's name (as `SparseWeight.name`).
        shape: of the dense weight. pattern: how it is cut, or `"dense"`.
        sparsity: fraction of absent elements. nonzeros: present elements, padding left out.
        execution: the backend that runs the layer, or `"dense"` for an ordinary layer.
        reason: why it stays dense or runs as it does; empty where nothing needs saying.
        counted: whether it belongs to the total that the sparsity is measured on.
        positions: rows of the layer's product, where example inputs told.
        speedup: of the layer over its dense twin as predicted, where times are known.
    """

    layer: str
    shape: tuple[int, ...]
    pattern: str
    sparsity: float
    nonzeros: int
    execution: str
    reason: str
    counted: bool = True
    positions: float | None = None
    speedup: float | None = None

    @property
    def numel(self) -> int:
        """Elements of the dense weight."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class LayerPlan:
    """How one sparse layer runs.

    Args:
        layer: dotted path of the module. op, pattern, blocks: its kind and its number of active blocks, by which a
            plan recognises it (a regrow keeps them).
        execution: the backend. reason: why, if that needs saying.
        positions: rows of its product, where example inputs told.
        times: of the layer in every form, forward and backward, over all its uses in one step; where known.
    """

    layer: str
    op: str
    pattern: str
    blocks: int
    execution: str
    reason: str
    positions: float | None = None
    times: Times | None = None


@dataclass(frozen=True)
class Plan:
    """Rows in module order, and what was asked for. `print(plan)` shows the table.

    The totals are over the counted rows: convolution, linear and GRU weights that were not excluded. Biases, norms and
    layers of other kinds are outside.

    Args:
        rows: one a weight. pattern, allocation, target: what `sparsify` was asked for.
        layers: how each sparse layer runs.
        source: where the executions come from: "auto" (the cost table), "measure", "off" (kernels wherever they are).
        device, threads: what they hold for.
        rest_ms: measured milliseconds of the model's forward and backward outside the sparse layers.
    """

    rows: tuple[PlanRow, ...]
    pattern: str
    allocation: str
    target: float
    layers: tuple[LayerPlan, ...] = ()
    source: str = "auto"
    device: str = "cpu"
    threads: int = 1
    rest_ms: float | None = None

    @property
    def numel(self) -> int:
        """Elements of all counted weights."""
        return sum(row.numel for row in self.rows if row.counted)

    @property
    def nonzeros(self) -> int:
        """Present elements of all counted weights."""
        return sum(row.nonzeros for row in self.rows if row.counted)

    @property
    def sparsity(self) -> float:
        """Fraction of the counted weights that is absent."""
        return 1.0 - self.nonzeros / self.numel if self.numel else 0.0

    @property
    def flop_bound(self) -> float | None:
        """The speedup if every present weight ran at the dense rate and nothing but counted weights cost time; None
        without example inputs."""
        known = [row for row in self.rows if row.counted and row.positions is not None]
        kept = sum(row.nonzeros * row.positions for row in known if row.positions)
        return sum(row.numel * row.positions for row in known if row.positions) / kept if kept else None

    def sparse_layers_ms(self) -> tuple[float, float] | None:
        """Forward and backward of all sparse layers: as dense twins and as planned; None where any time is unknown."""
        pairs = [(one.times.dense, one.times.of(one.execution)) for one in self.layers if one.times is not None]
        if not pairs or len(pairs) < len(self.layers):
            return None
        return sum(dense for dense, _ in pairs), sum(planned for _, planned in pairs)

    def step_speedup(self, *, dense_extra_ms: float = 0.0, sparse_extra_ms: float = 0.0) -> float | None:
        """Predicted speedup of the model's forward and backward over its dense twin; None without measured times.

        Args:
            dense_extra_ms, sparse_extra_ms: what a step of either has beside them, such as the optimizer.
        """
        layers = self.sparse_layers_ms()
        if layers is None or self.rest_ms is None:
            return None
        dense, planned = layers
        return (dense + self.rest_ms + dense_extra_ms) / (planned + self.rest_ms + sparse_extra_ms)

    def __iter__(self) -> Iterator[PlanRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    # Application

    def apply(self, model: nn.Module) -> None:
        """Lets every sparse layer of a model run as planned, or leaves them all as they are.

        Args:
            model: the one that was planned, or its like: the same layers with as many active blocks.

        Raises:
            ValueError: it has other sparse layers than the plan, or the plan names an unknown backend.
            RuntimeError: a backend of the plan cannot run its layer here, with the reason.
        """
        layers = {path: module for path, module in model.named_modules() if isinstance(module, SparseLayer)}
        planned = {one.layer: one for one in self.layers}
        for path in [*layers, *planned]:
            if (path in layers) != (path in planned):
                where = "the model has no such sparse layer" if path in planned else "the plan does not name it"
                raise ValueError(f"plan: layer {path!r}: {where}; make a plan for this model.")
        for path, layer in layers.items():
            one = planned[path]
            here, there = (layer.op, str(layer.pattern), active_blocks(layer)), (one.op, one.pattern, one.blocks)
            if here != there:
                raise ValueError(
                    f"plan: layer {path!r} is {there[0]}, {there[1]} with {there[2]} blocks in the plan and "
                    f"{here[0]}, {here[1]} with {here[2]} in the model; make a plan for this model."
                )
            layer.require(one.execution)
        for path, layer in layers.items():
            layer.follow(planned[path].execution, planned[path].reason, planned[path].positions)

    # JSON

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-ready objects, totals included."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            "format": FORMAT,
            **fields,
            "sparsity": self.sparsity,
            "numel": self.numel,
            "nonzeros": self.nonzeros,
            "layers": [dataclasses.asdict(one) for one in self.layers],
            "rows": [{**dataclasses.asdict(row), "shape": list(row.shape)} for row in self.rows],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The inverse of `to_json`.

        Raises:
            ValueError: the data is no plan, or one of another version.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"plan: expected a plan of format {FORMAT}; got {found}; make the plan anew.")
        try:
            rows = tuple(PlanRow(**{**row, "shape": tuple(row["shape"])}) for row in data["rows"])
            layers = tuple(
                LayerPlan(**{**one, "times": None if one["times"] is None else Times(**one["times"])})
                for one in data["layers"]
            )
            names = {field.name for field in dataclasses.fields(cls)}
            return cls(**{**{k: v for k, v in data.items() if k in names}, "rows": rows, "layers": layers})
        except (KeyError, TypeError) as error:
            raise ValueError(f"plan: the data does not parse ({error}); make the plan anew.") from error

    def save(self, path: str | Path) -> Path:
        """Writes plan.json: whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            temporary.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads plan.json.

        Raises:
            ValueError: it is no plan. OSError: it cannot be read.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    # Text

    def __str__(self) -> str:
        head = ("layer", "shape", "pattern", "sparsity", "nonzeros", "execution", "speedup", "reason")
        body = [
            (
                row.layer,
                "x".join(map(str, row.shape)),
                row.pattern,
                f"{row.sparsity:.4f}",
                f"{row.nonzeros:,}",
                row.execution,
                "" if row.speedup is None else f"{row.speedup:.2f}x",
                row.reason if row.counted else f"(not counted) {row.reason}",
            )
            for row in self.rows
        ]
        summary = f"asked for {self.target:g}, {self.allocation}"
        body.append(("total", f"{self.numel:,}", "", f"{self.sparsity:.4f}", f"{self.nonzeros:,}", "", "", summary))
        widths = [max(len(line[k]) for line in [head, *body]) for k in range(len(head))]
        right = {3, 4, 6}

        def line(cells: tuple[str, ...]) -> str:
            padded = (
                cell.rjust(width) if k in right else cell.ljust(width)
                for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            return "  ".join(padded).rstrip()

        rule = "-" * len(line(tuple("-" * width for width in widths)))
        lines = [line(head), rule, *[line(cells) for cells in body[:-1]], rule, line(body[-1])]
        return "\n".join([*lines, *self.prediction()])

    def prediction(self) -> list[str]:
        """What the plan foresees of a step, in lines; none without times."""
        layers, bound = self.sparse_layers_ms(), self.flop_bound
        lines = []
        if layers is not None:
            origin = "measured" if self.source == "measure" else "from the cost table"
            lines.append(
                f"sparse layers, forward + backward, {self.threads} thread(s), {origin}: {layers[1]:.1f} ms, "
                f"{layers[0]:.1f} ms dense: {layers[0] / layers[1]:.2f}x"
            )
        step = self.step_speedup()
        if step is not None:
            lines.append(f"with the rest of the model, {self.rest_ms:.1f} ms: {step:.2f}x predicted")
        if bound is not None and layers is not None:
            lines.append(f"FLOP bound of all counted weights: {bound:.2f}x")
        return lines


def active_blocks(layer: SparseLayer) -> int:
    """Of all sparse weights of a layer."""
    return sum(topology.nnzb for _, _, topology in layer.sparse_items())
