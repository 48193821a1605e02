"""What a benchmark case is, and how it makes itself known.

A case is one file in `bench/cases/` that ends in `register(Case(...))`. Its problems are named without building
anything, so that `list`, filters and pytest know them; `prepare` builds one problem: the dense rivals, ours for every
variant with the check that must pass before anything is timed, and the peers.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench import cases

Samples = dict[str, dict[int, float]]  # by name, then by round


@dataclasses.dataclass(frozen=True)
class Variant:
    """One of ours: a pattern at a sparsity, and the speedups that are asked of it, by the rival's key."""

    pattern: str
    sparsity: float
    goals: Mapping[str, float] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        return f"{self.pattern} S={self.sparsity:g}"


@dataclasses.dataclass(frozen=True)
class Rival:
    """A dense way that ours is held against.

    Args:
        key: what goals refer to: "D1". label: as rows show it; "{}" stands for the name of the one that was quickest.
        among: names of the timed functions of which the quickest is the rival.
        note: how it was chosen.
    """

    key: str
    label: str
    among: tuple[str, ...]
    note: str = ""


@dataclasses.dataclass
class Ours:
    """One variant, built.

    Args:
        density: the true one of the built topology.
        run: the timed work. check: raises `Wrong` where a result is not the dense one's.
        flops: of the nonzeros. moved: bytes that any implementation must read or write. footprint: of the operands.
        limit_mib: what a call may allocate; a row of its own holds it against that.
        peers: public implementations of the same work, by name, already checked.
        extra, note: go into the row; a speedup `extra["predicted"]` is set beside the measured one.
    """

    variant: Variant
    density: float
    run: Callable[[], Any] | None = None
    check: Callable[[], None] | None = None
    flops: float | None = None
    moved: float | None = None
    footprint: float | None = None
    limit_mib: float | None = None
    peers: Mapping[str, Callable[[], Any]] = dataclasses.field(default_factory=dict)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""


@dataclasses.dataclass
class Prepared:
    """A problem, built for some of its variants.

    Args:
        dense: timed functions by name. rivals: how rows are made of them.
        ours: by variant; one that could not be built is the exception that says why.
        measure: takes the seconds that it may use and returns samples by name, in place of interleaved timing: ours
            under the variant's name, a rival under its own, or under both names with a space between where every
            variant has a rival of its own. unit: of those samples.
        named: peers that do not take part, as "peer, variant", and why.
        device: "cpu" or "cuda", where the functions run. calls: of the work that one call of a function makes, see
            `bench.rotation`.
    """

    dense: Mapping[str, Callable[[], Any]]
    rivals: Sequence[Rival]
    ours: Mapping[Variant, Ours | Exception]
    measure: Callable[[float], Samples] | None = None
    unit: str = "ms"
    named: Mapping[str, str] = dataclasses.field(default_factory=dict)
    device: str = "cpu"
    calls: int = 1


@dataclasses.dataclass(frozen=True)
class Problem:
    """One shape of a case.

    Args:
        name: as rows show it. variants: of ours. prepare: builds it for these of its variants.
        quick: belongs to the quick selection. timed: by interleaving (else it measures itself).
        seconds: share of timed rounds in a whole run, at each thread count.
    """

    name: str
    variants: tuple[Variant, ...]
    prepare: Callable[[tuple[Variant, ...]], Prepared]
    quick: bool = False
    timed: bool = True
    seconds: float = 6.0
    dtype: str = "float32"
    passes: str = "forward + backward"


@dataclasses.dataclass(frozen=True)
class Case:
    """A file of `bench/cases/`.

    Args:
        name: on the command line. about: one line. problems: in the order of their rows.
        without_avx512: what remains of the goals with AVX2; None: no goal there. The portable kernels have none.
        row_name: as rows show it; default: `name`.
        device: "cpu", or "cuda" for cases that need an NVIDIA GPU.
        keeps_freed_memory: measured with glibc keeping freed memory, as `sparsediff train` does, on both sides. That
            lasts as long as the process, so such cases come last.
    """

    name: str
    about: str
    problems: tuple[Problem, ...]
    without_avx512: float | None = None
    row_name: str = ""
    keeps_freed_memory: bool = False
    device: str = "cpu"


class Wrong(Exception):
    """A result is not what the dense computation gives: nothing is timed."""


_CASES: dict[str, Case] = {}


def register(case: Case) -> Case:
    """Makes a case known.

    Raises:
        ValueError: another case or two problems have the same name.
    """
    problems = [problem.name for problem in case.problems]
    if case.name in _CASES or len(set(problems)) < len(problems):
        raise ValueError(f"benchmark case {case.name!r}: the names of cases, and of a case's problems, must differ.")
    _CASES[case.name] = case
    return case


@functools.cache
def _load() -> None:
    for module in sorted(pkgutil.iter_modules(cases.__path__), key=lambda module: module.name):
        importlib.import_module(f"{cases.__name__}.{module.name}")


def all_cases() -> dict[str, Case]:
    """Every case by name, in the order in which they run."""
    _load()
    return dict(sorted(_CASES.items(), key=lambda item: (item[1].keeps_freed_memory, item[0])))


def select(
    wanted: Sequence[str],
    *,
    patterns: Sequence[str] = (),
    sparsities: Sequence[float] = (),
    quick: bool = False,
    device: str = "cpu",
) -> list[tuple[Case, Problem]]:
    """The problems that filters leave, with only the variants that they leave.

    Args:
        wanted: case names or "case/problem" globs ("conv3x3", "linear/P=4096*"); none: everything.
        patterns, sparsities: of the variants; none: all.
        quick: only the problems of the quick selection, where "case/problem" does not name one.
        device: only the cases of this device.

    Raises:
        ValueError: a filter fits nothing.
    """
    chosen: list[tuple[Case, Problem]] = []
    unused = set(wanted)
    candidates = [case for case in all_cases().values() if case.device == device]
    for case in candidates:
        for problem in case.problems:
            fits = [glob for glob in wanted if fnmatch.fnmatchcase(f"{case.name}/{problem.name}", _whole(glob))]
            unused -= set(fits)
            named = any("/" in glob for glob in fits)
            if (wanted and not fits) or (quick and not problem.quick and not named):
                continue
            variants = tuple(
                variant
                for variant in problem.variants
                if (not patterns or variant.pattern in patterns) and (not sparsities or variant.sparsity in sparsities)
            )
            if variants:
                chosen.append((case, dataclasses.replace(problem, variants=variants)))
    if unused:
        names = ", ".join(case.name for case in candidates)
        raise ValueError(
            f"no case or problem of device {device} fits {', '.join(sorted(unused))}; cases: {names}; "
            "see python -m bench list."
        )
    if not chosen:
        raise ValueError("no variant has such a pattern and sparsity; see python -m bench list.")
    return chosen


def _whole(glob: str) -> str:
    return glob if "/" in glob else f"{glob}/*"
