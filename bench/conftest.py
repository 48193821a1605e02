"""`pytest bench/`: the same cases through pytest-benchmark, whose own options, tables and comparisons then apply."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="every problem of every case, not only the quick ones")
    parser.addoption("--threads", type=int, default=1, help="torch's thread count")
