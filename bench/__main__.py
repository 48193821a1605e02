"""`python -m bench [case …] [--threads 1 2] [--quick] [--out FILE]`: measures, prints the table, writes JSON lines."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from pathlib import Path

import torch

from bench import cases
from bench.harness import RESULTS, Row, machine, peak_gflops, table, write


def names() -> list[str]:
    """Every case: the modules of `bench/cases/`."""
    return [module.name for module in pkgutil.iter_modules(cases.__path__)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"any of {', '.join(names())} (default: all)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts to measure at")
    parser.add_argument("--quick", action="store_true", help="one shape and few rounds of each case")
    parser.add_argument("--out", type=Path, help="JSON lines to append to; default: none for --quick, else a new file "
                        "in bench/results/ named after the CPU")  # fmt: skip
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.cases) - set(names()))
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; expected any of {', '.join(names())}")
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    out = options.out
    if out is None and not options.quick:
        stem = "-".join([*str(about["cpu"]).lower().split(), f"{about['cores']}c", str(about["isa"])])
        out = RESULTS / f"cpu-{stem}.jsonl"
    missed = 0
    for threads in options.threads:
        torch.set_num_threads(threads)
        print(f"\n{threads} thread(s): measured fp32 peak {peak_gflops(threads):.0f} GFLOP/s")
        for name in options.cases or names():
            rows: list[Row] = list(importlib.import_module(f"bench.cases.{name}").run(options.quick))
            print(f"\n{table(rows)}", flush=True)
            if out is not None:
                write(rows, out)
            missed += sum(row.met is False for row in rows)
    print(f"\n{missed} goal(s) missed" + (f"; rows appended to {out}" if out else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
