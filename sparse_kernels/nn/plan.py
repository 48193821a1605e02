"""The table that `sparsify` returns: what became of every weight of a model, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

DENSE = "dense"


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
    """

    layer: str
    shape: tuple[int, ...]
    pattern: str
    sparsity: float
    nonzeros: int
    execution: str
    reason: str
    counted: bool = True

    @property
    def numel(self) -> int:
        """Elements of the dense weight."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """Rows in module order, and what was asked for. `print(plan)` shows the table.

    The totals are over the counted rows: convolution, linear and GRU weights that were not excluded. Biases, norms and
    layers of other kinds are outside.
    """

    rows: tuple[PlanRow, ...]
    pattern: str
    allocation: str
    target: float

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

    def __iter__(self) -> Iterator[PlanRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-ready objects."""
        return {
            "pattern": self.pattern,
            "allocation": self.allocation,
            "target": self.target,
            "sparsity": self.sparsity,
            "numel": self.numel,
            "nonzeros": self.nonzeros,
            "rows": [{**asdict(row), "shape": list(row.shape)} for row in self.rows],
        }

    def __str__(self) -> str:
        head = ("layer", "shape", "pattern", "sparsity", "nonzeros", "execution", "reason")
        body = [
            (
                row.layer,
                "x".join(map(str, row.shape)),
                row.pattern,
                f"{row.sparsity:.4f}",
                f"{row.nonzeros:,}",
                row.execution,
                row.reason if row.counted else f"(not counted) {row.reason}",
            )
            for row in self.rows
        ]
        summary = f"asked for {self.target:g}, {self.allocation}"
        body.append(("total", f"{self.numel:,}", "", f"{self.sparsity:.4f}", f"{self.nonzeros:,}", "", summary))
        widths = [max(len(line[k]) for line in [head, *body]) for k in range(len(head))]
        right = {3, 4}

        def line(cells: tuple[str, ...]) -> str:
            padded = (
                cell.rjust(width) if k in right else cell.ljust(width)
                for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            return "  ".join(padded).rstrip()

        rule = "-" * len(line(tuple("-" * width for width in widths)))
        return "\n".join([line(head), rule, *[line(cells) for cells in body[:-1]], rule, line(body[-1])])
