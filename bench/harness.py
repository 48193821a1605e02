"""How everything here is measured: correctness first, then interleaved rounds, medians, and rows.

`rows_of` builds a problem, lets every variant's check pass or drops the variant, times dense, ours and peers in turn in
one process, and sets ours beside each rival. Ratios are taken within a round, where both sides saw the same machine,
and their median is the speedup.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import os
import statistics
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from bench.registry import Case, Ours, Prepared, Problem, Samples, Variant, Wrong
from bench.replay import Replay, gpu_allocated_mib
from bench.roofline import limits
from bench.rows import RESULTS, Row, machine
from sparse_kernels.nn.measure import call_ms
from sparse_kernels.nn.weights import SparseLayer
from sparsediff.allocator import keep_freed_memory

__all__ = [
    "RESULTS",
    "Outcome",
    "allocated_mib",
    "attempt",
    "check_close",
    "interleave",
    "machine",
    "measure_problem",
    "native",
]

Layer = TypeVar("Layer", bound=SparseLayer)

LONG_MS = 300.0
PEER = "peer "  # how a peer's rival name begins


@dataclasses.dataclass
class Outcome:
    """What came of a problem: rows, and by variant what went wrong instead; `named` as `Prepared.named`."""

    rows: list[Row]
    failures: dict[str, str]
    named: Mapping[str, str] = dataclasses.field(default_factory=dict)


def attempt(build: Callable[[], Ours]) -> Ours | Exception:
    """What `build` returns, or why it could not: one variant that cannot be built must not end the others."""
    try:
        return build()
    except Exception as error:
        return error


def native(layer: Layer) -> Layer:
    """The layer, executed by the native kernels even where the cost table would rather densify it: what is measured is
    the kernel, losses included.

    Raises:
        RuntimeError: they do not serve it, with the reason.
    """
    layer.execution = "cpu"
    return layer


def measure_problem(
    case: Case, problem: Problem, *, seconds: float | None = None, fewest: int = 3, most: int = 15
) -> Outcome:
    """Builds, checks and times one problem at torch's present thread count.

    Args:
        seconds: of timed rounds, default the problem's own share. fewest, most: rounds, whatever they take.

    Returns:
        Rows of the variants whose results are right. A variant that is wrong, or that could not be built or run, has no
        row: its reason stands in `failures`.
    """
    if case.keeps_freed_memory:
        keep_freed_memory()
    try:
        prepared = problem.prepare(problem.variants)
    # A problem that cannot be built here (memory, a missing package) must not end a run of all the others.
    except Exception as error:
        return Outcome([], {"as a whole": f"not built: {type(error).__name__}: {error}"})
    ours: dict[str, Ours] = {}
    failures: dict[str, str] = {}
    for variant in problem.variants:
        built = prepared.ours[variant]
        try:
            if isinstance(built, Exception):
                raise built
            if built.check is not None:
                built.check()
        # Whatever is wrong with one variant, the others are measured and the run says so at its end.
        except Exception as error:
            kind = "wrong result" if isinstance(error, Wrong) else type(error).__name__
            failures[variant.name] = f"{kind}: {error}"
        else:
            ours[variant.name] = built
    rows: list[Row] = []
    if ours:
        budget = problem.seconds if seconds is None else seconds
        try:
            samples = _samples(prepared, ours, budget, fewest, most)
        # A call that fails among the rounds leaves none of them whole; other problems and thread counts go on.
        except Exception as error:
            failures["as a whole"] = f"not timed: {type(error).__name__}: {error}"
            return Outcome([], failures, prepared.named)
        try:
            memory = _memory(prepared, ours) if problem.timed else {}
        # The times are there and stand without it.
        except Exception as error:
            failures["allocated memory"] = f"not measured: {type(error).__name__}: {error}"
            memory = {}
        for one in ours.values():
            rows += _rows(case, problem, prepared, one, samples, memory)
    return Outcome(rows, failures, prepared.named)


def _samples(prepared: Prepared, ours: Mapping[str, Ours], seconds: float, fewest: int, most: int) -> Samples:
    if prepared.measure is not None:
        return prepared.measure(seconds)
    functions = dict(prepared.dense)
    peers = {f"{name} {PEER}{peer}": run for name, one in ours.items() for peer, run in one.peers.items()}
    functions.update({name: one.run for name, one in ours.items() if one.run is not None})
    every: dict[str, Callable[[], Any]] = {**functions, **peers}
    if prepared.device == "cpu":
        return interleave(every, seconds=seconds, fewest=fewest, most=most, seldom=peers)
    calls = prepared.calls
    replays = {name: Replay(function, calls) for name, function in every.items()}
    for name, replay in replays.items():
        if replay.reason:
            print(f"  {name} is timed call by call, it cannot be captured in a CUDA graph: {replay.reason}")
    samples = interleave(replays, seconds=seconds, fewest=fewest, most=most, seldom=peers, device=prepared.device)
    return {name: {turn: ms / calls for turn, ms in rounds.items()} for name, rounds in samples.items()}


def interleave(
    functions: Mapping[str, Callable[[], Any]],
    *,
    seconds: float,
    fewest: int = 3,
    most: int = 15,
    seldom: Collection[str] = (),
    shortest_ms: float = 4.0,
    device: str = "cpu",
) -> Samples:
    """Times every function once a round, in rotating order.

    Args:
        functions: by name; a quick one is repeated within a round until it takes `shortest_ms`.
        seconds: what the rounds may take together; between `fewest` and `most` rounds fit in.
        seldom: names of those that take part in so few rounds (at least `fewest`) that they need about as long as all
            the others.
        device: where the functions run, which decides the clock.

    Returns:
        Milliseconds of one call, by name and round.
    """
    where = torch.device(device)
    once_ms: dict[str, float] = {}
    for name, function in functions.items():
        once_ms[name] = call_ms(function, 1, where)
        # The first call warms up; of a long one it also says how long it takes.
        if once_ms[name] < LONG_MS:
            once_ms[name] = call_ms(function, 1, where)
    repeats = {name: max(1, int(shortest_ms / max(ms, 1e-6))) for name, ms in once_ms.items()}
    cost = {name: repeats[name] * once_ms[name] for name in functions}
    often_ms = sum(ms for name, ms in cost.items() if name not in seldom)
    seldom_ms = sum(ms for name, ms in cost.items() if name in seldom)
    every = max(1, math.ceil(seldom_ms / often_ms)) if often_ms else 1
    rounds = int(seconds * 1e3 / max(often_ms + seldom_ms / every, 1e-3))
    rounds = min(max(rounds, fewest), most)
    every = max(1, min(every, rounds // fewest))
    samples: Samples = {name: {} for name in functions}
    names = list(functions)
    with _no_collection():
        for turn in range(rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                if name not in seldom or turn % every == 0:
                    samples[name][turn] = call_ms(functions[name], repeats[name], where)
    return samples


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _rows(
    case: Case, problem: Problem, prepared: Prepared, ours: Ours, samples: Samples, memory: Mapping[str, float]
) -> Iterator[Row]:
    """Ours beside every rival and every peer."""
    variant = ours.variant
    for rival in prepared.rivals:
        # A problem that measures itself may have a rival of each variant's own.
        among = [own if (own := f"{variant.name} {name}") in samples else name for name in rival.among]
        name = min(among, key=lambda name: statistics.median(samples[name].values()))
        goal = _goal(case, variant, rival.key)
        note = "; ".join(text for text in (rival.note, ours.note) if text)
        yield _row(case, problem, prepared, ours, rival.label.format(name), name, samples, memory, goal, note)
    if ours.limit_mib is not None and variant.name in memory:
        allocated = {variant.name: {0: memory[variant.name]}, "limit": {0: ours.limit_mib}}
        bare = dataclasses.replace(ours, flops=None, moved=None)
        in_mib = dataclasses.replace(prepared, unit="MiB")
        label = f"limit of {ours.limit_mib:g} MiB"
        yield _row(case, problem, in_mib, bare, label, "limit", allocated, {}, 1.0, ours.note)
    for peer in ours.peers:
        name = f"{variant.name} {PEER}{peer}"
        ways = {way for rival in prepared.rivals for way in rival.among}
        best = min(statistics.median(samples[way].values()) for way in ways)
        note = f"the peer is {best / statistics.median(samples[name].values()):.2f}x as fast as dense"
        yield _row(case, problem, prepared, ours, f"{PEER}{peer}", name, samples, memory, None, note)


def _goal(case: Case, variant: Variant, key: str) -> float | None:
    """What is asked with the instruction set in use; nothing of the portable kernels."""
    goal = variant.goals.get(key)
    if goal is None or case.device != "cpu" or (isa := machine()["isa"]) == "avx512":
        return goal
    return None if case.without_avx512 is None or isa != "avx2" else goal * case.without_avx512


def _row(
    case: Case,
    problem: Problem,
    prepared: Prepared,
    ours: Ours,
    label: str,
    rival: str,
    samples: Samples,
    memory: Mapping[str, float],
    goal: float | None,
    note: str,
) -> Row:
    variant = ours.variant
    mine, theirs = samples[variant.name], samples[rival]
    together = sorted(set(mine) & set(theirs))
    speedups = [theirs[turn] / mine[turn] for turn in together]
    speedup = statistics.median(speedups)
    ours_ms, rival_ms = (statistics.median(side[turn] for turn in together) for side in (mine, theirs))
    device = prepared.device
    limit = limits(ours.flops, ours.moved, footprint=ours.footprint, dtype=problem.dtype, device=device)
    ceilings = [rival_ms / least if least else None for least in (limit.compute_ms, limit.memory_ms)]
    met = None if goal is None else speedup >= goal
    row = Row(
        case=case.row_name or case.name,
        shape=problem.name,
        pattern=variant.pattern,
        sparsity=variant.sparsity,
        density=round(ours.density, 4),
        threads=torch.get_num_threads() if device == "cpu" else 0,
        rival=label,
        ours_ms=round(ours_ms, 4),
        rival_ms=round(rival_ms, 4),
        speedup=round(speedup, 3),
        speedup_p20=_percentile(speedups, 0.2),
        speedup_p80=_percentile(speedups, 0.8),
        efficiency=round(ours.density * speedup, 3),
        gflops=_rounded(ours.flops and ours.flops / (ours_ms * 1e6), 1),
        peak_gflops=limit.peak_gflops,
        roofline=_rounded(min((c for c in ceilings if c is not None), default=None), 2),
        goal=goal,
        met=met,
        note=note,
        extra=dict(ours.extra),
        unit=prepared.unit,
        dtype=problem.dtype,
        passes=problem.passes,
        rounds=len(together),
        ours_p20=_percentile([mine[turn] for turn in together], 0.2),
        ours_p80=_percentile([mine[turn] for turn in together], 0.8),
        rival_p20=_percentile([theirs[turn] for turn in together], 0.2),
        rival_p80=_percentile([theirs[turn] for turn in together], 0.8),
        flops=ours.flops,
        bytes_moved=ours.moved,
        gbs=_rounded(ours.moved and ours.moved / (ours_ms * 1e6), 1),
        bandwidth_gbs=limit.bandwidth_gbs,
        roofline_compute=_rounded(ceilings[0], 2),
        roofline_memory=_rounded(ceilings[1], 2),
        forbidden=limit.forbids(goal, rival_ms) if goal is not None and not met else "",
        ours_mib=_rounded(memory.get(variant.name), 2),
        rival_mib=_rounded(memory.get(rival), 2),
        machine=machine(device),
    )
    if row.prediction_error is not None:
        row.extra["prediction_error"] = round(row.prediction_error, 4)
        row.note = "; ".join(text for text in (row.prediction, note) if text)
    return row


def _percentile(values: list[float], share: float) -> float:
    return round(float(np.quantile(values, share)), 3)


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _memory(prepared: Prepared, ours: Mapping[str, Ours]) -> dict[str, float]:
    """MiB that one call of each function allocates at its peak."""
    functions = {**prepared.dense, **{name: one.run for name, one in ours.items() if one.run is not None}}
    allocated = gpu_allocated_mib if prepared.device == "cuda" else allocated_mib
    return {name: allocated(function) for name, function in functions.items()}


def allocated_mib(function: Callable[[], Any]) -> float:
    """The largest rise in MiB of what torch has allocated during a call, its results included."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        function()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = least = rise = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        least = min(least, held)  # a call begins by freeing the gradients of the one before
        rise = max(rise, held - least)
    return rise / 2**20


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler tells of its own start and stop on the process's stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def check_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Raises `Wrong` where a result strays from the dense one by more than `tolerance` of its largest element."""
    if actual.shape != expected.shape:
        raise Wrong(f"{what} has shape {list(actual.shape)}, the dense result {list(expected.shape)}")
    scale = expected.abs().max().item() or 1.0
    error = (actual.double() - expected.double()).abs().max().item() / scale
    if not error <= tolerance:
        raise Wrong(f"{what} is off by {error:.2g} of the dense result's largest element; nothing is timed")
