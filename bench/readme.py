"""`python -m bench.readme [--check]`: writes the tables of README.md from the committed rows.

Numbers in the README are never typed: what stands between the two markers is this module's output. A line without a
row is left out. With `--check` it only says whether the file is up to date.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bench.rows import RESULTS, Row, newest, read, stable_rival

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- rows: begin -->", "<!-- rows: end -->"


@dataclass(frozen=True)
class Line:
    """A line of a table: the rows of one case, shape, pattern and rival (`stable_rival`) over the sparsities."""

    case: str
    shape: str
    pattern: str
    rival: str
    label: str


CONV = "D1 oneDNN channels_last"
TRAINING = (
    Line("conv", "3x3 N=4 C=224 64x64", "block:32x32", CONV,
         "`SparseConv2d` 3x3, 224 channels, 64x64, batch 4, Block 32, vs oneDNN channels_last"),
    Line("conv", "3x3 N=4 C=224 64x64", "block:16x16", CONV, "`SparseConv2d` as above, Block 16"),
    Line("conv", "3x3 N=4 C=224 64x64", "unstructured", CONV, "`SparseConv2d` as above, unstructured"),
    Line("conv", "3x3 N=4 C=672 16x16", "block:32x32", CONV, "`SparseConv2d` 3x3, 672 channels, 16x16, Block 32"),
    Line("conv", "1x1 N=4 C=448 32x32", "block:32x32", CONV, "`SparseConv2d` 1x1, 448 channels, 32x32, Block 32"),
    Line("linear", "P=4096 K=1024", "block:32x32", "D2",
         "`SparseLinear` 1024→1024, 4096 rows, Block 32, vs the best dense"),
    Line("linear", "P=4096 K=1024", "block:16x16", "D2", "the same, Block 16"),
    Line("linear", "P=1024 K=1024", "unstructured", "D1 F.linear",
         "the same, 1024 rows, unstructured, against `F.linear`"),
    Line("gru", "H=96 L=3 bi B=128 T=64", "block:16x16", "D1 packed",
         "`SparseGRU` H=96, 3 layers, bidirectional, Block 16, against packed `nn.GRU`"),
    Line("gru", "H=128 L=3 bi B=128 T=64", "block:16x16", "D1 packed", "the same, H=128"),
    Line("gru", "H=128 L=3 bi B=128 T=64", "unstructured", "D1 packed", "the same, unstructured"),
    Line("chirodiff step", "kanjivg B=128", "block:16x16", "dense", "ChiroDiff training step on KanjiVG, Block 16"),
    Line("chirodiff step", "kanjivg B=128", "unstructured", "dense", "the same, unstructured"),
    Line("memory (KiB)", "kanjivg", "block:16x16", "dense",
         "its parameters, gradients, AdamW, EMA, index (memory)"),
    Line("end_to_end", "ResNet-18 32x32 N=16", "block:32x32", "dense", "ResNet-18 32x32 training step, Block 32"),
    Line("end_to_end", "UNet2D 224-448-672-896 64x64 N=1", "block:32x32", "dense",
         "UNet2D 224-448-672-896 64x64 training step, Block 32"),
)  # fmt: skip
BF16 = (
    Line("bf16", "linear P=4096 K=1024", "block:32x32", "D1 torch bf16",
         "`SparseLinear` 1024→1024, 4096 rows, Block 32, against torch bf16"),
    Line("bf16", "conv 3x3 N=4 C=224 64x64", "block:32x32", "D1 torch bf16",
         "`SparseConv2d` 3x3, 224 channels, 64x64, batch 4, Block 32"),
)  # fmt: skip
SPARSITIES = (0.0, 0.5, 0.75, 0.9)
TABLES = (("forward + backward, fp32", TRAINING), ("forward, bf16", BF16))


def load_rows(folder: Path = RESULTS) -> list[Row]:
    """The newest committed rows of the machine (CPU, cores, instruction set) that has most of them."""
    rows = list(newest(row for file in sorted(folder.glob("cpu-*.jsonl")) for row in read(file)).values())
    machines = Counter(_machine(row) for row in rows)
    if not machines:
        return []
    (most, _), *_ = machines.most_common(1)
    return [row for row in rows if _machine(row) == most]


def _machine(row: Row) -> tuple[object, ...]:
    return row.machine["cpu"], row.machine.get("cores"), row.machine["isa"]


def section(threads: int = 2, folder: Path = RESULTS) -> str:
    """The Markdown between the markers.

    Raises:
        SystemExit: no committed row belongs to any line.
    """
    rows = {
        (row.case, row.shape, row.pattern, stable_rival(row.rival), row.sparsity): row
        for row in load_rows(folder)
        if row.threads == threads
    }
    parts: list[str] = []
    machines: set[str] = set()
    for title, table in TABLES:
        lines = []
        for line in table:
            found = [rows.get((line.case, line.shape, line.pattern, line.rival, s)) for s in SPARSITIES]
            if any(found):
                cells = ["–" if row is None else f"{row.speedup:.1f}x" for row in found]
                lines.append(f"| {line.label} | {' | '.join(cells)} |")
            for row in found:
                if row is not None:
                    about = row.machine
                    machines.add(f"{about['cpu']}, {threads} threads, {about['isa']}, torch {about['torch']}")
        if lines:
            parts += [f"| {title} | S=0 | S=.5 | S=.75 | S=.9 |", "|---|---|---|---|---|", *lines, ""]
    if not parts:
        raise SystemExit(f"{folder} holds no row of any line of the README's tables")
    return "\n".join([*parts, f"Median speedup over dense on {'; '.join(sorted(machines))}."])


def updated(text: str) -> str:
    """`text` with the section between the markers replaced."""
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    return f"{before}{BEGIN}\n{section()}\n{END}{after}"


def main(arguments: list[str]) -> int:
    text = README.read_text(encoding="utf-8")
    new = updated(text)
    if "--check" in arguments:
        if new != text:
            print("README.md does not match the committed rows; run python -m bench.readme", file=sys.stderr)
        return int(new != text)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
