"""Checkpoints that survive a kill at any instant: safetensors and JSON in a directory that appears in one rename.

    DIR/checkpoints/step-00001200/state.json           numbers, settings, plan; refers to tensors by key
                                  model.safetensors    the model's state_dict, topology included
                                  ema.safetensors      averaged parameters by name
                                  train.safetensors    optimizer, method, generators, sampler

A checkpoint is written under a hidden name, every file and the folder flushed to the disk, then renamed. So whatever is
called `step-…` is complete, and the newest one is where a run resumes. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
PARTS = ("model", "ema", "train")

_TENSOR, _TUPLE, _PAIRS = "__tensor__", "__tuple__", "__pairs__"


class CheckpointError(RuntimeError):
    """A checkpoint is missing, broken or from another version; the message says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint directory holds.

    Args:
        path: the directory.
        step: the number of training steps it stands after.
        model: the model's state_dict.
        ema: averaged parameters by name.
        state: everything else, as it was given to `save`.
    """

    path: Path
    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    state: dict[str, Any]


def save(
    directory: Path, step: int, *, model: Mapping[str, Tensor], ema: Mapping[str, Tensor], state: Mapping[str, Any]
) -> Path:
    """Writes `directory/step-<step>` atomically.

    Args:
        directory: the folder of a run's checkpoints; made if need be.
        step: number of finished training steps; a checkpoint that exists for it is left alone.
        model: the model's state_dict.
        ema: averaged parameters by name.
        state: nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.

    Returns:
        The checkpoint's path.

    Raises:
        CheckpointError, OSError: it cannot be written, for example because the disk is full.
    """
    final = directory / f"step-{step:08d}"
    if final.exists():
        return final
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    tree, tensors = pack(state)
    for part, contents in zip(PARTS, (model, ema, tensors), strict=True):
        # safetensors refuses views of one storage, such as the rows of a shared buffer.
        contents = {
            key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in contents.items()
        }
        try:
            save_file(contents, partial / f"{part}.safetensors")
        except SafetensorError as error:
            raise CheckpointError(
                f"checkpoint {final} cannot be written ({error}); make room on the disk, then resume from the newest."
            ) from error
        flush(partial / f"{part}.safetensors")
    document = {"format": FORMAT, "step": step, "state": tree}
    (partial / "state.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    flush(partial / "state.json")
    flush(partial)
    os.replace(partial, final)
    flush(directory)
    return final


def load(path: Path, *, device: torch.device | str = "cpu") -> Checkpoint:
    """Reads a checkpoint: `path` is one, or a run's directory, whose newest one is taken.

    Raises:
        CheckpointError: there is none, or its files do not parse.
    """
    found = find(path)
    if found is None:
        raise CheckpointError(f"no checkpoint in {path}; expected {path}/checkpoints/step-… or a step-… directory.")
    try:
        document = json.loads((found / "state.json").read_text(encoding="utf-8"))
        parts = [load_file(found / f"{part}.safetensors", device=str(device)) for part in PARTS]
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint {found} is damaged ({error}); delete it to fall back on the one before."
        ) from error
    if document.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {found} has format {document.get('format')}; this version reads {FORMAT}.")
    model, ema, tensors = parts
    return Checkpoint(found, document["step"], model, ema, unpack(document["state"], tensors))


def find(path: Path) -> Path | None:
    """The checkpoint that `path` means: itself, or the newest in it or in its `checkpoints`; None if there is none."""
    if (path / "state.json").is_file():
        return path
    for folder in (path / "checkpoints", path):
        complete = in_order(folder)
        if complete:
            return complete[-1]
    return None


def in_order(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; what else lies there, a copy called step-7.bak say, is none."""
    found = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdecimal() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def prune(directory: Path, keep: int) -> None:
    """Deletes all but the newest `keep` >= 1 checkpoints, and what killed writers left behind."""
    for stale in directory.glob(".step-*"):
        shutil.rmtree(stale, ignore_errors=True)
    for old in in_order(directory)[:-keep]:
        # Renamed first: a half-deleted directory must not be called a checkpoint.
        doomed = directory / f".{old.name}.old"
        os.replace(old, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def flush(path: Path) -> None:
    """Forces a file's or a folder's contents to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def pack(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """A JSON value and the tensors it refers to by key.

    Raises:
        TypeError: a leaf is neither a tensor nor a JSON value.
    """
    tensors: dict[str, Tensor] = {}

    def walk(node: Any, key: str) -> Any:
        if isinstance(node, Tensor):
            tensors[key] = node
            return {_TENSOR: key}
        if isinstance(node, Mapping):
            if all(isinstance(k, str) and not k.startswith("__") for k in node):
                return {k: walk(v, f"{key}.{k}") for k, v in node.items()}
            return {_PAIRS: [[k, walk(v, f"{key}.{k}")] for k, v in node.items()]}  # JSON keys are strings
        if isinstance(node, tuple):
            return {_TUPLE: [walk(v, f"{key}.{i}") for i, v in enumerate(node)]}
        if isinstance(node, list):
            return [walk(v, f"{key}.{i}") for i, v in enumerate(node)]
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        raise TypeError(f"checkpoint: {key.lstrip('.')} must be a tensor or a JSON value; got {type(node).__name__}.")

    packed = {k: walk(v, k) for k, v in tree.items()} if isinstance(tree, Mapping) else walk(tree, "")
    return packed, tensors


def unpack(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of `pack`."""
    if isinstance(node, list):
        return [unpack(v, tensors) for v in node]
    if not isinstance(node, dict):
        return node
    if _TENSOR in node:
        return tensors[node[_TENSOR]]
    if _TUPLE in node:
        return tuple(unpack(v, tensors) for v in node[_TUPLE])
    if _PAIRS in node:
        return {k: unpack(v, tensors) for k, v in node[_PAIRS]}
    return {k: unpack(v, tensors) for k, v in node.items()}
