"""`python -m bench.readme [--check]`: writes the table of README.md from the committed rows.

Numbers in the README are never typed: what stands between the two markers is this module's output. With `--check` it
only says whether the file is up to date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.harness import RESULTS

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- rows: begin -->", "<!-- rows: end -->"

# What the first screen shows: case, shape, pattern and rival, a line each, over these sparsities.
LINES = (
    (
        "linear",
        "P=4096 K=1024",
        "block:32x32",
        "D2 best dense",
        "`SparseLinear` 1024→1024, 4096 rows, Block 32, vs oneDNN",
    ),
    ("linear", "P=4096 K=1024", "block:16x16", "D2 best dense", "the same, Block 16"),
    ("linear", "P=1024 K=1024", "unstructured", "D1 F.linear", "the same, 1024 rows, unstructured, against `F.linear`"),
    (
        "gru",
        "H=96 L=3 bi B=128 T=64",
        "block:16x16",
        "D1 packed",
        "`SparseGRU` H=96, 3 layers, bidirectional, Block 16, against packed `nn.GRU`",
    ),
    ("gru", "H=128 L=3 bi B=128 T=64", "block:16x16", "D1 packed", "the same, H=128"),
    ("gru", "H=128 L=3 bi B=128 T=64", "unstructured", "D1 packed", "the same, unstructured"),
    ("chirodiff step", "kanjivg B=128", "block:16x16", "dense", "ChiroDiff training step on KanjiVG, Block 16"),
    ("chirodiff step", "kanjivg B=128", "unstructured", "dense", "the same, unstructured"),
    ("memory (KiB)", "kanjivg", "block:16x16", "dense", "its parameters, gradients, AdamW, EMA, index (memory)"),
)
SPARSITIES = (0.0, 0.5, 0.75, 0.9)


def load_rows(folder: Path = RESULTS) -> dict[tuple[str, str, str, float, int, str], dict[str, Any]]:
    """The newest committed CPU row of each (case, shape, pattern, sparsity, threads, rival)."""
    newest: dict[tuple[str, str, str, float, int, str], dict[str, Any]] = {}
    for file in sorted(folder.glob("cpu-*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rival = row["rival"].split()[0] if row["rival"].startswith("dense") else row["rival"]
            key = (row["case"], row["shape"], row["pattern"], row["sparsity"], row["threads"], rival)
            if key not in newest or newest[key]["machine"]["date"] <= row["machine"]["date"]:
                newest[key] = row
    return newest


def section(threads: int = 2) -> str:
    """The Markdown between the markers."""
    rows = load_rows()
    lines = [
        "| forward + backward, fp32 | S=0 | S=.5 | S=.75 | S=.9 |",
        "|---|---|---|---|---|",
    ]
    machines = set()
    for case, shape, pattern, rival, label in LINES:
        cells = []
        for sparsity in SPARSITIES:
            row = rows.get((case, shape, pattern, sparsity, threads, rival))
            cells.append("–" if row is None else f"{row['speedup']:.1f}x")
            if row is not None:
                about = row["machine"]
                machines.add(f"{about['cpu']}, {threads} threads, {about['isa']}, torch {about['torch']}")
        if set(cells) == {"–"}:
            raise SystemExit(f"bench/results holds no row of {case}, {shape}, {pattern} against {rival}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Median speedup over dense on {'; '.join(sorted(machines))}."])


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
