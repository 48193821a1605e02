"""A training run of seconds, on drawings made up on the spot; as a script it is a process that a test can kill.

python tests/tiny_run.py OUT key=value ...
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from sparsediff.datasets import StrokeData, Strokes
from sparsediff.presets import TrainConfig
from sparsediff.train import start

TINY = TrainConfig(
    hidden=16,
    layers=2,
    timesteps=50,
    epochs=5,
    batch_size=8,
    method="dense",
    pattern="block:8x8",
    sparsity=0.5,
    every=4,
    drop=0.3,
    sample_every=0,
    sample_count=4,
    sample_steps=5,
    log_every=1,
    save_every=4,
    threads=1,
)


def drawings(count: int = 70, seed: int = 0) -> StrokeData:
    """`count` random walks of 2 to 12 points."""
    rng = np.random.default_rng(seed)
    walks = [rng.normal(size=(n, 3)) for n in rng.integers(2, 13, size=count)]
    for walk in walks:
        walk[:, 2] = 0
        walk[-1, 2] = 1
    strokes = Strokes.from_list(walks)
    empty = Strokes.from_list([])
    return StrokeData("tiny", strokes, empty, empty, None)


def configured(out: Path, **changes: Any) -> TrainConfig:
    """The tiny run in `out` with some settings changed."""
    return dataclasses.replace(TINY, out=str(out), **changes)


if __name__ == "__main__":
    changes = dict(pair.split("=", 1) for pair in sys.argv[2:])
    raise SystemExit(start(configured(Path(sys.argv[1]), **{k: json.loads(v) for k, v in changes.items()}), drawings()))
