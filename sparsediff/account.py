"""The `account` command: a preset's parameters, FLOPs and memory beside its dense twin's, as a table or as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsediff.accounting import ModelCount, count
from sparsediff.build import build_dense_model, example_inputs
from sparsediff.methods import METHODS
from sparsediff.presets import PRESETS, TrainConfig

# Training samples of the published runs. KanjiVG is the sketch-rnn file's train split, QuickDraw that of one category.
PUBLISHED_SAMPLES = {
    "chirodiff-kanjivg": 10_358,
    "chirodiff-quickdraw": 70_000,
    "ldm-celebahq": 12_500,
    "ldm-bedrooms": 10_598,
    "ldm-imagenette": 9_469,
}

CONVENTIONS = {
    "flop": "a multiply-add is 2 FLOPs; products with weights only: no norms, activations or additions",
    "attention": "products of attention have no weights: `*_with_attention` includes them, nothing else does",
    "one_sample_a_step": "training as the paper counts it: a step costs what one sample costs",
    "whole_batch": "training as it is computed: a step costs what its batch costs",
    "train_step": "per sample: 3 f_S (f_D where dense); rigl: (3 f_S ΔT + 2 f_S + f_D) / (ΔT + 1)",
    "memory": "bytes between steps in fp32: parameters, gradients, AdamW, EMA, index with what kernels derive",
}


@dataclass(frozen=True)
class Account:
    """What a run costs.

    Args:
        name: of the preset. config: its settings. model: the counted model.
        samples: of the training split; None where nobody has said.
    """

    name: str
    config: TrainConfig
    model: ModelCount
    samples: int | None = None

    @property
    def steps(self) -> int | None:
        """Of the whole training: an epoch's last batch, where it is not full, is dropped."""
        return None if self.samples is None else self.config.epochs * (self.samples // self.config.batch_size)

    def train_step(self, *, dense: bool = False, attention: bool = False) -> float:
        """FLOPs of a training step on one sample."""
        more = self.model.other_flops if attention else 0.0
        f_sparse, f_dense = self.model.flops + more, self.model.dense_flops + more
        if dense:
            return 3 * f_dense
        return METHODS.get(self.config.method).training_flops(f_sparse, f_dense, every=self.config.every)

    def to_json(self) -> dict[str, Any]:
        """Every figure, JSON-ready."""
        config, model, steps = self.config, self.model, self.steps

        def pair(sparse: float, dense: float) -> dict[str, float]:
            return {"sparse": sparse, "dense": dense}

        def forward(more: float) -> dict[str, float]:
            return pair(model.flops + more, model.dense_flops + more)

        def times(factor: float, one: dict[str, float]) -> dict[str, float]:
            return {key: factor * value for key, value in one.items()}

        step, step_attention = (
            pair(self.train_step(attention=more), self.train_step(dense=True, attention=more)) for more in (False, True)
        )
        flops: dict[str, Any] = {
            "forward": forward(0.0),
            "forward_with_attention": forward(model.other_flops),
            "sample": times(config.sample_steps, forward(0.0)),
            "sample_with_attention": times(config.sample_steps, forward(model.other_flops)),
            "train_step": step,
            "train": None,
        }
        if steps is not None:
            flops["train"] = {
                "one_sample_a_step": times(steps, step),
                "whole_batch": times(steps * config.batch_size, step),
            }
        memory = {"sparse": model.memory(), "dense": model.memory(dense=True)}
        index = sum(weight.index_bytes for weight in model.weights)
        derived = sum(weight.derived_bytes for weight in model.weights)
        nonzeros = sum(weight.nonzeros for weight in model.weights if weight.pattern != "dense")
        return {
            "preset": self.name,
            "method": config.method,
            "sparsity": _asked(config),
            "pattern": config.pattern,
            "allocation": config.allocation,
            "achieved_sparsity": model.sparsity,
            "one_sample": model.inputs,
            "sample_steps": config.sample_steps,
            "training": {
                "samples": self.samples,
                "epochs": config.epochs,
                "batch_size": config.batch_size,
                "steps": steps,
                "every": config.every,
            },
            "conventions": CONVENTIONS,
            "params": pair(model.parameters, model.dense_parameters),
            "weights": {"nonzeros": model.parameters - model.rest, "dense": model.dense_parameters - model.rest},
            "flops": flops,
            "ratio": {
                "params": model.parameters / model.dense_parameters,
                "train_flops": step["sparse"] / step["dense"],
                "sample_flops": model.flops / model.dense_flops,
                "memory": sum(memory["sparse"].values()) / sum(memory["dense"].values()),
            },
            "ratio_with_attention": {
                "train_flops": step_attention["sparse"] / step_attention["dense"],
                "sample_flops": (model.flops + model.other_flops) / (model.dense_flops + model.other_flops),
            },
            "memory_bytes": memory,
            "index": {
                "bytes": index,
                "derived_bytes": derived,
                "bytes_per_nonzero": (index + derived) / nonzeros if nonzeros else 0.0,
            },
            "layers": [
                {
                    "layer": weight.name,
                    "shape": list(weight.shape),
                    "pattern": weight.pattern,
                    "numel": weight.numel,
                    "nonzeros": weight.nonzeros,
                    "density": weight.nonzeros / weight.numel,
                    "flops": weight.flops,
                    "dense_flops": weight.dense_flops,
                    "index_bytes": weight.index_bytes + weight.derived_bytes,
                }
                for weight in model.weights
            ],
        }

    def __str__(self) -> str:
        data = self.to_json()
        rows = [("layer", "shape", "pattern", "density", "nonzeros", "MFLOP", "dense", "index KiB")]
        rows += [
            (
                layer["layer"],
                "x".join(map(str, layer["shape"])),
                layer["pattern"],
                f"{layer['density']:.4f}",
                f"{layer['nonzeros']:,}",
                f"{layer['flops'] / 1e6:,.2f}",
                f"{layer['dense_flops'] / 1e6:,.2f}",
                f"{layer['index_bytes'] / 1024:,.1f}",
            )
            for layer in data["layers"]
        ]
        lines = _table(rows, left=3)
        lines.insert(1, "-" * max(map(len, lines)))
        flops, memory, training = data["flops"], data["memory_bytes"], data["training"]
        lines += ["", f"one sample: {data['one_sample']}; sparsity {data['achieved_sparsity']:.4f} of the weights", ""]
        totals = [("", self.config.method, "dense", "ratio")]

        def total(name: str, figures: dict[str, float], style: str = ".4g") -> None:
            sparse, dense = figures["sparse"], figures["dense"]
            totals.append((name, format(sparse, style), format(dense, style), f"{sparse / dense:.4f}"))

        total("parameters", data["params"], ",d")
        total("FLOPs of a forward", flops["forward"])
        total("... with attention's products", flops["forward_with_attention"])
        total(f"FLOPs of a sample, {data['sample_steps']} steps", flops["sample"])
        total("... with attention's products", flops["sample_with_attention"])
        total("FLOPs of a training step, one sample", flops["train_step"])
        if flops["train"] is not None:
            total(
                f"FLOPs of {training['steps']:,} steps, one sample a step (the paper)",
                flops["train"]["one_sample_a_step"],
            )
            total(
                f"FLOPs of {training['steps']:,} steps, batches of {training['batch_size']}",
                flops["train"]["whole_batch"],
            )
        for kind in memory["dense"]:
            sparse, dense = memory["sparse"][kind], memory["dense"][kind]
            ratio = f"{sparse / dense:.4f}" if dense else ""
            totals.append((f"{kind}, MiB", f"{sparse / 2**20:,.2f}", f"{dense / 2**20:,.2f}", ratio))
        total("parameters to index, MiB", {k: sum(v.values()) / 2**20 for k, v in memory.items()}, ",.2f")
        lines += _table(totals, left=1)
        if flops["train"] is None:
            lines.append(
                f"FLOPs of the whole training: --samples N (of the training split) tells them for {self.name}."
            )
        return "\n".join([*lines, *(f"{name}: {text}" for name, text in CONVENTIONS.items())])


def account(name: str, config: TrainConfig, samples: int | None = None) -> Account:
    """Counts a preset's model on the meta device.

    Args:
        name: of the preset. config: its settings, or changed ones. samples: of the training split; by default those
            of the published run, where there is one.

    Raises:
        ValueError: settings that `sparsify` would refuse.
    """
    with torch.device("meta"):
        model = build_dense_model(config)
        inputs = example_inputs(config, model, 1)
    counted = count(model, inputs, sparsity=_asked(config), pattern=config.pattern, allocation=config.allocation)
    return Account(name, config, counted, PUBLISHED_SAMPLES.get(name) if samples is None else samples)


def _asked(config: TrainConfig) -> float:
    return config.sparsity if METHODS.get(config.method).sparse else 0.0


def _table(rows: Sequence[tuple[str, ...]], *, left: int) -> list[str]:
    """Lines of equal columns, the first `left` of them aligned to the left."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    cells = [
        [
            cell.ljust(width) if k < left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    return ["  ".join(row).rstrip() for row in cells]


def run(preset: str, *, as_json: bool, samples: int | None, **changes: Any) -> str:
    """What the command prints.

    Args:
        preset: its name. as_json: instead of the table. samples: see `account`.
        changes: settings in place of the preset's; None keeps the preset's.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    result = account(preset, dataclasses.replace(PRESETS[preset], **given), samples)
    return json.dumps(result.to_json(), indent=1, ensure_ascii=False) if as_json else str(result)
