"""The tool that makes a cost table: rows that the planner reads, and a second run that renews only what it measures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import costs as tool
from sparse_kernels import _native
from sparse_kernels.nn.costs import CostTable

pytestmark = pytest.mark.skipif(_native.why_unavailable() is not None, reason=str(_native.why_unavailable()))


def small_cases() -> Iterator[tool.Case]:
    for op, dense, shape, positions in (
        ("linear", nn.Linear(32, 32), (8, 32), 8),
        ("conv", nn.Conv2d(32, 32, 3, padding=1), (1, 32, 4, 4), 16),
    ):
        yield tool.Case(op, op, ("block:16x16",), (0.5,), dense, shape, positions)


def test_a_table_is_made_and_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "cases", small_cases)
    path = tmp_path / "cpu-test.json"
    assert tool.main(["--threads", "1", "2", "--out", str(path)]) == 0
    first = json.loads(path.read_text())
    assert [(row["op"], row["threads"]) for row in first["rows"]] == [
        (o, t) for o in ("linear", "conv") for t in (1, 2)
    ]
    table = CostTable.from_json(first)
    for work, times in table.rows:
        assert work.density == 0.5 and table.predict(work).sparse == pytest.approx(times.sparse)
    assert tool.main(["--ops", "conv", "--threads", "2", "--dtypes", "float32", "bfloat16", "--out", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    kept = [row for row in first["rows"] if (row["op"], row["threads"]) != ("conv", 2)]
    assert all(row in rows for row in kept) and len(rows) == len(kept) + 2
    assert {row["dtype"] for row in rows if row["threads"] == 2 and row["op"] == "conv"} == {"float32", "bfloat16"}
    assert torch.get_num_threads() == 2
