"""Folders as diffusers' `save_pretrained` makes them: `config.json` and a weight file. diffusers is imported on use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DENSE_FILE = "diffusion_pytorch_model.safetensors"


class WeightsError(RuntimeError):
    """A model's folder or its weights cannot be used; the message says what, expected, got and the remedy."""


def require_diffusers(what: str) -> Any:
    """The package diffusers.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise RuntimeError(f"{what} needs diffusers ({error}): pip install 'sparsediff[ldm]'.") from error
    return diffusers


def read_config(folder: Path, class_name: str) -> dict[str, Any]:
    """The settings in `folder/config.json`, of a model of the class `class_name`.

    Raises:
        WeightsError: there is no such file, or it is of another class.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{folder}: expected config.json of a {class_name}; there is none.") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file}: cannot be read ({error}). Get the folder again.") from None
    found = config.get("_class_name", class_name) if isinstance(config, dict) else type(config).__name__
    if found != class_name:
        raise WeightsError(f"{file}: expected the settings of a {class_name}; got those of {found}.")
    return config


def load_dense(model_class: Any, folder: Path) -> Any:
    """A dense model from its folder, every parameter of it from the file.

    diffusers itself leaves parameters that a file lacks at random values; here that is an error.

    Raises:
        WeightsError: files are missing, damaged, or of another architecture.
    """
    read_config(folder, model_class.__name__)
    try:
        model, info = model_class.from_pretrained(
            folder, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:
        # diffusers, torch and safetensors each have their own types for one thing: this folder cannot be loaded.
        raise WeightsError(f"{folder}: cannot be loaded ({type(error).__name__}: {error}). Get it again.") from error
    wrong = {kind: keys for kind, keys in info.items() if keys}
    if wrong:
        listing = "; ".join(f"{kind}: {', '.join(map(str, keys[:3]))} ({len(keys)})" for kind, keys in wrong.items())
        raise WeightsError(f"{folder}: the weights are not those of its config.json ({listing}). Get it again.")
    return model
