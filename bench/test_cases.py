"""Every case under pytest-benchmark: the check must pass, then dense and ours are timed, one test each.

    pytest bench/ [-k conv] [--threads 2] [--full] [--benchmark-compare …]

Tests of one problem make one group, so that pytest-benchmark's table sets dense and ours side by side. The speedups,
taken within interleaved rounds, and the roofline stand in `extra_info`. Goals are reported, not asserted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import registry
from bench.harness import measure_problem
from bench.rows import Row, table
from sparsediff.allocator import keep_freed_memory

pytest.importorskip("pytest_benchmark", reason="pytest bench/ needs pytest-benchmark: pip install '.[bench]'")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    timed = metafunc.function is not test_what_measures_itself
    problems = [
        (case, problem)
        for case in registry.all_cases().values()
        if case.device == "cpu"  # pytest-benchmark times the call, and that of a GPU returns before its work is done
        for problem in case.problems
        if problem.timed == timed and (problem.quick or metafunc.config.getoption("full"))
    ]
    if metafunc.function is test_dense:
        names = [f"{case.name}/{problem.name}" for case, problem in problems]
        metafunc.parametrize("case,problem", problems, ids=names)
    else:
        chosen = [(case, problem, variant) for case, problem in problems for variant in problem.variants]
        names = [f"{case.name}/{problem.name}/{variant.name}" for case, problem, variant in chosen]
        metafunc.parametrize("case,problem,variant", chosen, ids=names)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(request.config.getoption("threads"))


def _time(benchmark: Any, case: registry.Case, problem: registry.Problem, run: Callable[[], Any]) -> None:
    benchmark.group = f"{case.name}/{problem.name}"
    benchmark.pedantic(run, rounds=3, iterations=1, warmup_rounds=1)


def test_dense(benchmark: Any, case: registry.Case, problem: registry.Problem) -> None:
    if case.keeps_freed_memory:
        keep_freed_memory()  # as for ours, whose test may come first
    prepared = problem.prepare(())
    _time(benchmark, case, problem, prepared.dense[prepared.rivals[0].among[0]])


def test_ours(benchmark: Any, case: registry.Case, problem: registry.Problem, variant: registry.Variant) -> None:
    one = dataclasses.replace(problem, variants=(variant,))
    rows = _rows(case, one)
    benchmark.extra_info["rows"] = [dataclasses.asdict(row) for row in rows]
    built = one.prepare((variant,)).ours[variant]
    assert isinstance(built, registry.Ours) and built.run is not None
    _time(benchmark, case, problem, built.run)


def test_what_measures_itself(case: registry.Case, problem: registry.Problem, variant: registry.Variant) -> None:
    assert _rows(case, dataclasses.replace(problem, variants=(variant,)))


def _rows(case: registry.Case, problem: registry.Problem) -> list[Row]:
    outcome = measure_problem(case, problem, seconds=0.2, most=3)
    assert not outcome.failures, outcome.failures
    print(table(outcome.rows))
    return outcome.rows
