"""`python -m bench list | run | compare | report | gpu`: what there is, measure it, set two measurements side by side,
plot, and everything that a machine with a GPU is wanted for.

    python -m bench list                                    cases, problems, variants, peers
    python -m bench run [case | case/problem …] [options]   check, time, print, append rows
    python -m bench compare A B                             A, B: FILE, COMMIT or FILE@COMMIT
    python -m bench report [FILE …] [--out PAGE]            one HTML page of all rows
    python -m bench gpu [--out FOLDER]                      build, test, sanitize and measure on a GPU

Without one of these words, what follows `python -m bench` are the arguments of `run`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from bench import peers, registry
from bench.compare import comparison
from bench.harness import measure_problem
from bench.roofline import peak_gflops
from bench.rows import RESULTS, default_file, machine, table, write
from sparse_kernels import _native

# What a problem takes as a whole, as a multiple of its timed rounds: building, checking and warming up are the rest.
UNTIMED = 2.0


def list_(arguments: Sequence[str]) -> int:
    """Prints every case with its problems and variants, and the peers."""
    parser = argparse.ArgumentParser(prog="python -m bench list", description=list_.__doc__)
    parser.parse_args(arguments)
    for case in registry.all_cases().values():
        print(f"{case.name}: {case.about}")
        for problem in case.problems:
            variants: dict[str, list[str]] = {}
            for variant in problem.variants:
                variants.setdefault(variant.pattern, []).append(f"{variant.sparsity:g}")
            text = "; ".join(f"{pattern} S={','.join(values)}" for pattern, values in variants.items())
            print(f"  {case.name}/{problem.name}{' (quick)' if problem.quick else ''}: {text}")
    print("peers:")
    for name, reason in peers.roll_call().items():
        print(f"  {name}: {reason or 'present'}")
    return 0


def run(arguments: Sequence[str]) -> int:
    """Checks and times cases, prints their rows and appends them to a file; 1 where a result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench run", description=run.__doc__)
    parser.add_argument("cases", nargs="*", help="case names or case/problem globs (default: all), see list")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose cases to run")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts to measure at on the CPU")
    parser.add_argument("--isa", help="instruction set of our kernels, as SPARSE_KERNELS_ISA; the rivals keep "
                        "theirs")  # fmt: skip
    parser.add_argument("--pattern", nargs="+", default=[], help="only these patterns")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[], help="only these sparsities")
    parser.add_argument("--quick", action="store_true", help="one shape of each case and few rounds")
    parser.add_argument("--seconds", type=float, help="of timed rounds for each problem and thread count")
    parser.add_argument("--minutes", type=float, default=20.0, help="of the whole run: behind schedule, what is left "
                        "gets fewer rounds (at least three)")  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSON lines to append to; default: none for --quick, else the file of "
                        "this machine in bench/results/")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.isa:
        _native.native().set_isa(options.isa)
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda needs an NVIDIA GPU and its driver, and torch finds none; leave it out here.")
    try:
        chosen = registry.select(
            options.cases,
            patterns=options.pattern,
            sparsities=options.sparsity,
            quick=options.quick,
            device=options.device,
        )
    except ValueError as error:
        parser.error(str(error))
    out = options.out or (None if options.quick else default_file(options.device))
    seconds = options.seconds if options.seconds is not None else (1.0 if options.quick else None)
    thread_counts: list[int] = [torch.get_num_threads()] if on_gpu else options.threads
    print(", ".join(f"{key} {value}" for key, value in machine(options.device).items()))
    for name, reason in peers.roll_call().items():
        if reason:
            print(f"peer {name} is absent: {reason}")
    begun = time.perf_counter()
    counts = {"rows": 0, "met": 0, "MISSED": 0, "forbidden": 0}
    failures: list[str] = []
    for threads in () if on_gpu else thread_counts:
        print(f"{threads} thread(s): measured fp32 peak {peak_gflops(threads):.0f} GFLOP/s", flush=True)
    planned = sum(problem.seconds for _, problem in chosen) * len(thread_counts)
    for case, problem in chosen:
        named: dict[str, str] = {}
        print()
        for threads in thread_counts:
            torch.set_num_threads(threads)
            left = options.minutes * 60 - (time.perf_counter() - begun)
            share = problem.seconds * min(1.0, max(0.0, left) / (UNTIMED * planned))
            planned -= problem.seconds
            outcome = measure_problem(case, problem, seconds=share if seconds is None else seconds)
            if outcome.rows:
                print(table(outcome.rows), flush=True)
                counts["rows"] += len(outcome.rows)
                for row in outcome.rows:
                    if row.verdict:
                        counts[row.verdict] += 1
                if out is not None:
                    write(outcome.rows, out)
            named.update(outcome.named)
            for name, reason in outcome.failures.items():
                where = "GPU" if on_gpu else f"{threads} thread(s)"
                failures.append(f"{case.name}/{problem.name} {name}, {where}: {reason}")
                print(f"  FAILED {failures[-1]}", flush=True)
        print(_reasons(named), end="", flush=True)
    print(
        f"\n{counts['rows']} rows in {time.perf_counter() - begun:.0f} s; goals: {counts['met']} met, "
        f"{counts['MISSED']} missed, {counts['forbidden']} forbidden by the roofline"
        + (f"; appended to {out}" if out else "")
    )
    for failure in failures:
        print(f"FAILED {failure}")
    return int(bool(failures))


def _reasons(named: Mapping[str, str]) -> str:
    """Who did not take part, a line for each peer and reason, from "peer, variant" and its reason."""
    variants: dict[tuple[str, str], list[str]] = {}
    for name, reason in named.items():
        peer, _, variant = name.rpartition(", ")
        variants.setdefault((peer, reason), []).append(variant)
    return "".join(f"  {peer} not in {', '.join(of)}: {reason}\n" for (peer, reason), of in variants.items())


def compare(arguments: Sequence[str]) -> int:
    """Sets two measurements side by side; 1 where the later one regressed beyond noise."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=compare.__doc__)
    parser.add_argument("before", metavar="A", help="FILE, COMMIT (its rows in bench/results) or FILE@COMMIT")
    parser.add_argument("after", metavar="B", help="the same")
    parser.add_argument("--all", action="store_true", help="also the rows that did not change")
    options = parser.parse_args(arguments)
    try:
        text, regressions = comparison(options.before, options.after, unchanged=options.all)
    except ValueError as error:
        parser.error(str(error))
    print(text)
    return int(regressions > 0)


def report(arguments: Sequence[str]) -> int:
    """Writes one HTML page of all rows."""
    from bench.report import write_report  # matplotlib, for this alone

    parser = argparse.ArgumentParser(prog="python -m bench report", description=report.__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="row files (default: all of bench/results)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.html"), help="the page")
    options = parser.parse_args(arguments)
    files = options.files or sorted(RESULTS.glob("*.jsonl"))
    print(f"{write_report(files, options.out)}")
    return 0


def gpu(arguments: Sequence[str]) -> int:
    """Builds, tests, sanitizes and measures on a GPU."""
    from bench.gpu import main as everything

    return everything(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "list": list_,
    "run": run,
    "compare": compare,
    "report": report,
    "gpu": gpu,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; see this module's docstring."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if given and given[0] in COMMANDS:
        return COMMANDS[given[0]](given[1:])
    return run(given)


if __name__ == "__main__":
    sys.exit(main())
