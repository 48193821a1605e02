"""Bytes of a whole ChiroDiff's parameters, gradients, AdamW state, EMA and index, sparse against dense, after a step.

The milliseconds of a row stand for KiB; `speedup` is dense over sparse. Goals: within 10 % of density for blocks of 64
elements and more, 1.65 times density for unstructured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from bench.harness import Row, compare
from sparse_kernels import Topology
from sparsediff.presets import PRESETS
from sparsediff.train import Run, load_data


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def training_bytes(run: Run) -> dict[str, int]:
    """What training the model keeps, by kind."""
    topologies = [module for module in run.model.modules() if isinstance(module, Topology)]
    states = [value for state in run.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return {
        "parameters": distinct_bytes(run.model.parameters()),
        "gradients": distinct_bytes(p.grad for p in run.model.parameters() if p.grad is not None),
        "optimizer": distinct_bytes(states),
        "ema": distinct_bytes(run.ema.model.parameters()),
        "index": distinct_bytes(buffer for topology in topologies for buffer in topology.buffers()),
    }


def run(quick: bool) -> Iterator[Row]:
    """S = 0.75 and 0.9 for block sides that matter, and unstructured."""
    settings = dataclasses.replace(PRESETS["chirodiff-kanjivg"], threads=torch.get_num_threads(), limit=500)
    data = load_data(settings)

    def measured(**changes: object) -> tuple[Run, dict[str, int]]:
        run = Run(dataclasses.replace(settings, **changes), data)  # type: ignore[arg-type]
        run.training_step()
        return run, training_bytes(run)

    whole, dense = measured(method="dense")
    total = sum(dense.values())
    for pattern in ("block:16x16",) if quick else ("block:8x8", "block:16x16", "block:32x32", "unstructured"):
        for sparsity in (0.75, 0.9):
            run, sparse = measured(method="rigl", pattern=pattern, sparsity=sparsity)
            used = sum(sparse.values())
            density = sum(p.numel() for p in run.parameters) / sum(p.numel() for p in whole.parameters)
            limit = 1.65 if pattern == "unstructured" else 1.1
            yield compare(
                "memory (KiB)",
                "kanjivg",
                pattern,
                sparsity,
                density,
                "dense",
                [used / 1024],
                [total / 1024],
                goal=round(1 / (density * limit), 3),
                **sparse,
            )
