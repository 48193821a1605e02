"""`python -m bench.costs`: measures the cost table of this kind of machine and writes it into the package.

Run it on an idle machine after kernels changed; the file that it writes is committed. Two to four minutes.

    python -m bench.costs                      # sparse_kernels/nn/cost_tables/cpu-avx512.json, say
    python -m bench.costs --isa avx2           # ours and the dense library restricted to AVX2: cpu-avx2.json
    python -m bench.costs --ops linear         # measures linear anew and keeps the rows of the others
    python -m bench.costs --dtypes bfloat16    # adds or renews the rows of layers under autocast to bf16
    python -m bench.costs --device cuda        # the table of a GPU, cuda-sm90-h200.json, say

Single layers, forward and backward, in three forms, in turns: the torch.nn twin, densified, and the sparse kernel at
several sparsities (see `sparse_kernels.nn.costs`). Parameters are fp32; bf16 is that of autocast.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Which of their code paths the dense libraries take when ours are restricted.
DENSE_ISA = {
    "avx512": {},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "portable": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
OPS = ("linear", "conv", "gru")
SPARSITIES = (0.25, 0.5, 0.9)  # a kernel's time is nearly a line between
DTYPES = ("float32", "bfloat16")


def restrict(isa: str, arguments: Sequence[str]) -> None:
    """Starts this command again with its arguments and the libraries restricted, which read their environment once."""
    wanted = {"SPARSE_KERNELS_ISA": isa, **DENSE_ISA[isa]}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, "-m", "bench.costs", *arguments], {**os.environ, **wanted})


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of one op.

    Args:
        op, name: which, in words. patterns, sparsities: of the sparse forms. dense: the torch.nn layer.
        shape: of its input. positions: rows of its product.
    """

    op: str
    name: str
    patterns: tuple[str, ...]
    sparsities: tuple[float, ...]
    dense: Any
    shape: tuple[int, ...]
    positions: int


def cases() -> Iterator[Case]:
    """Shapes from small to large; a prediction is made of the nearest three."""
    from torch import nn

    linear = ("unstructured", "block:8x8", "block:16x1", "block:16x16", "block:32x32")
    for positions, size in [(64, 128), (256, 256), (1024, 512), (1024, 1024), (4096, 512), (512, 2048)]:
        yield Case(
            "linear", f"{size} to {size}, {positions} rows", linear, SPARSITIES, nn.Linear(size, size),
            (positions, size), positions,
        )  # fmt: skip
    conv = ("unstructured", "block:16x16", "block:32x32")
    shapes = [(4, 224, 64, 3), (4, 448, 32, 3), (4, 672, 16, 3), (4, 896, 8, 3), (16, 64, 32, 3), (16, 128, 16, 3),
              (16, 256, 8, 3), (16, 512, 4, 3), (1, 64, 16, 3), (1, 256, 16, 3), (4, 224, 64, 1), (4, 448, 32, 1),
              (4, 896, 8, 1), (1, 64, 16, 1)]  # fmt: skip
    for batch, channels, size, kernel in shapes:
        yield Case(
            "conv", f"{kernel}x{kernel}, {channels} channels at {size}x{size}, N={batch}", conv, SPARSITIES,
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2), (batch, channels, size, size),
            batch * size * size,
        )  # fmt: skip
    for batch, steps, features, hidden, layers in [(128, 64, 13, 96, 3), (32, 32, 64, 64, 1), (64, 32, 128, 256, 1)]:
        yield Case(
            "gru", f"{features} to {hidden}, {layers} layers, bidirectional, B={batch}, T={steps}",
            ("unstructured", "block:16x16"), (0.0, 0.5, 0.9),
            nn.GRU(features, hidden, layers, batch_first=True, bidirectional=True),
            (batch, steps, features), batch * steps,
        )  # fmt: skip


def measure_case(case: Case, dtype: Any, device: Any, rounds: int) -> Iterator[dict[str, Any]]:
    """The rows of one shape in one dtype at torch's number of threads; images are channels_last."""
    import torch

    from sparse_kernels import backends, parse_pattern
    from sparse_kernels.nn import surgery
    from sparse_kernels.nn.measure import dense_step, timed, training_step
    from sparse_kernels.nn.weights import SPARSE_KERNEL

    form = torch.channels_last if len(case.shape) == 4 else torch.contiguous_format
    x = torch.randn(case.shape, device=device, dtype=dtype).contiguous(memory_format=form).requires_grad_()
    dense = case.dense.to(device)
    if x.dim() == 4:
        dense = dense.to(memory_format=torch.channels_last)
    layers = {}
    ends = (case.sparsities[0], case.sparsities[-1])  # where densified is timed: it copies what is there
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        forms: dict[str, Callable[[], object]] = {"dense": dense_step(dense, (x,), {})}
        for pattern in case.patterns:
            name, why = backends.choose(case.op, pattern=parse_pattern(pattern), dtype=dtype, device=device)
            if why != SPARSE_KERNEL:
                print(f"  {case.op} {pattern}: {why}; runs densified")
                if device.type == "cpu":  # where autocast leaves such a layer in fp32
                    continue
            for sparsity in case.sparsities:
                layer = surgery.TWINS[type(dense)].from_dense(
                    dense, pattern=pattern, sparsity=sparsity, generator=torch.Generator().manual_seed(0)
                )
                if layer.work().density == 0:  # of a few large blocks none is left
                    continue
                layers[pattern, sparsity] = layer
                if why == SPARSE_KERNEL:
                    layer.execution = name
                    forms[f"{pattern} {sparsity}"] = training_step(layer, layer, (x,), {})
                if sparsity in ends:
                    twin = copy.deepcopy(layer)
                    twin.execution = "densified"
                    forms[f"{pattern} {sparsity} densified"] = training_step(twin, twin, (x,), {})
        if not layers:
            return
        ms = timed(forms, device, rounds=rounds)
    for (pattern, sparsity), layer in layers.items():
        work, sparse = layer.work(), ms.get(f"{pattern} {sparsity}")
        yield {
            "layer": f"{type(layer).__name__} {case.name}",
            "op": case.op,
            "pattern": pattern,
            "dtype": str(dtype).removeprefix("torch."),
            "numel": work.numel,
            "taps": work.taps,
            "density": round(work.density, 5),
            "positions": case.positions,
            "threads": torch.get_num_threads(),
            "dense_ms": round(ms["dense"], 4),
            "densified_ms": round(between(sparsity, {s: ms.get(f"{pattern} {s} densified") for s in ends}), 4),
            "sparse_ms": None if sparse is None else round(sparse, 4),
        }


def between(sparsity: float, known: Mapping[float, float | None]) -> float:
    """The value at a sparsity, on the line through those that are known."""
    points = [(at, value) for at, value in known.items() if value is not None]
    (first, low), (last, high) = points[0], points[-1]
    return low if first == last else low + (sparsity - first) / (last - first) * (high - low)


def group_of(row: Mapping[str, Any]) -> str:
    """What is measured at once, and replaced at once: op, dtype and thread count."""
    return f"{row['op']} {row['dtype']} {row['threads']}"


def measured(
    before: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], anew: Collection[str], about: Mapping[str, Any]
) -> dict[str, dict[str, str]]:
    """Commit and date of each group of `rows`: of `about` for those in `anew`, else as the file said `before`."""
    old = before.get("measured", {})
    sources = {
        group: about if group in anew else old.get(group, before.get("machine", {})) for group in map(group_of, rows)
    }
    return {group: {name: str(of.get(name)) for name in ("commit", "date")} for group, of in sources.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.costs", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), help="what to measure anew")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: float32, on a GPU bfloat16")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 and 2, on a GPU 1")
    parser.add_argument("--isa", choices=list(DENSE_ISA), help="restrict ours and the dense libraries to it")
    parser.add_argument("--out", type=Path, help="default: the file of this kind of machine in the package")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--patterns", nargs="+", help="only these; the nearest stands for another")
    parser.add_argument("--rounds", type=int, default=3, help="of each form; the median counts")
    options = parser.parse_args(arguments)
    on_gpu = options.device != "cpu"
    options.dtypes = options.dtypes or [DTYPES[1] if on_gpu else DTYPES[0]]
    options.threads = options.threads or ([1] if on_gpu else [1, 2])
    if options.isa:
        restrict(options.isa, sys.argv[1:] if arguments is None else arguments)

    import torch

    import sparse_kernels.nn.costs as costs
    from bench.harness import machine

    device = torch.device(options.device)
    kind = costs.machine_kind(device)
    if kind is None:
        parser.error("the native kernels are not built; there is nothing to measure")
    path = options.out or Path(costs.__file__).parent / "cost_tables" / f"{kind}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": []}
    anew = {f"{op} {dtype} {count}" for op in options.ops for dtype in options.dtypes for count in options.threads}
    rows = [row for row in before["rows"] if group_of(row) not in anew]
    start = time.perf_counter()
    for threads in options.threads:
        torch.set_num_threads(threads)
        for dtype, case in itertools.product(options.dtypes, cases()):
            if case.op in options.ops:
                wanted = tuple(p for p in case.patterns if p in (options.patterns or case.patterns))
                case = dataclasses.replace(case, patterns=wanted)
                new = list(measure_case(case, getattr(torch, dtype), device, options.rounds))
                rows += new
                best = max((row["dense_ms"] / row["sparse_ms"] for row in new if row["sparse_ms"]), default=0.0)
                print(f"{threads} thread(s), {case.op} {case.name}, {dtype}: up to {best:.1f}x, "
                      f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
    rows.sort(key=lambda row: OPS.index(row["op"]))
    about = machine(device.type)
    head = json.dumps({"kind": kind, "machine": about, "measured": measured(before, rows, anew, about)}, indent=1)[:-2]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)  # one row a line, for readable differences
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    print(f"{len(rows)} rows in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
