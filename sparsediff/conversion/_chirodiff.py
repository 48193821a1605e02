"""ChiroDiff's Lightning checkpoints, as its published code writes them, into a checkpoint of ours.

scorefn.model.rnn.*        gru.*           scorefn.final_proj.0.*    output.*
scorefn.model.out_proj.*   hidden.*        pe_proj_W                 time_weight
ema.shadow_params          the averages, in the order of scorefn's parameters
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsediff import checkpoint
from sparsediff.build import build_dense_model
from sparsediff.conversion._ckpt import StandIn
from sparsediff.conversion._names import ConversionError, check_names, shown
from sparsediff.presets import TrainConfig
from sparsediff.samplers import LengthDistribution

_NAMES = {"scorefn.model.rnn.": "gru.", "scorefn.model.out_proj.": "hidden.", "scorefn.final_proj.0.": "output."}


def is_chirodiff(content: Mapping[str, Any]) -> bool:
    """Whether the content of a `.ckpt` file is ChiroDiff's."""
    return any(name.startswith("scorefn.") for name in content.get("state_dict", {}))


def convert_chirodiff(
    where: str, content: Mapping[str, Any], folder: Path, config: TrainConfig, lengths: LengthDistribution
) -> str:
    """Writes a run's folder with one checkpoint, to sample from.

    Args:
        where: the source, for messages. content: of the file.
        config: settings that the file does not tell; hidden units, layers, form and schedule are the file's.
        lengths: of the training drawings, which the file does not hold.

    Returns:
        What was taken from where.

    Raises:
        ConversionError: a conditional model or a transformer, or tensors that are missing, unknown or misshapen.
    """
    theirs: dict[str, Tensor] = content["state_dict"]
    state = {_renamed(name): tensor for name, tensor in theirs.items()}
    first = state.get("gru.weight_hh_l0")
    if first is None:
        raise ConversionError(f"{where}: expected the bidirectional GRU of ChiroDiff; got {shown(theirs)}.")
    given = content.get("hyper_parameters", {})
    text = _choice(given, "repr")
    for name, served in (("noise_schedule", "linear"), ("time_embedding", "randomfourier")):
        if _choice(given, name) not in ("", served):
            raise ConversionError(f"{where}: {name} is {_choice(given, name)!r}; only {served!r} is served.")
    told: dict[str, Any] = {
        ours: given[name] for ours, name in _SETTINGS.items() if isinstance(given.get(name), (int, float))
    }
    steps = told.get("timesteps", config.timesteps)  # their betas are meant for 1000 steps and scaled to others
    if text:
        told["form"] = "position" if text.startswith("threeseqabs") else "delta"
    told |= {name: told[name] * 1000 / steps for name in ("beta_start", "beta_end") if name in told}
    config = dataclasses.replace(
        config,
        model="chirodiff",
        method="dense",
        hidden=first.shape[1],
        layers=sum(f"gru.weight_hh_l{layer}" in state for layer in range(100)),
        **told,
    )
    model = build_dense_model(config)
    check_names(where, state, model.state_dict())
    names = [_renamed(name) for name in theirs if name.startswith("scorefn.")]
    average = {name: state[name] for name in names}
    kept = content.get("ema") or {}
    if kept:
        shadows = kept["shadow_params"]
        if [shadow.shape for shadow in shadows] != [state[name].shape for name in names]:
            raise ConversionError(f"{where}: {len(shadows)} averages do not fit the model's {len(names)} parameters.")
        average = dict(zip(names, shadows, strict=True))
    origin = "the file" if text else "the preset, for the file does not tell it"
    checkpoint.save(
        folder / "checkpoints",
        int(content.get("global_step", 0)),
        model=state,
        ema=average,
        state={
            "config": dataclasses.asdict(config),
            "plan": None,
            "lengths": lengths.counts,
            "ema_updates": int(kept.get("num_updates") or 0),
            "converted_from": where,
        },
    )
    return f"form {config.form} (of {origin}), {config.hidden}x{config.layers}"


def _choice(given: Mapping[str, Any], name: str) -> str:
    """The value of an enum in the settings; empty where it is not there."""
    choice = given.get(name)
    return str(choice.args[0]) if isinstance(choice, StandIn) and choice.args else ""


_SETTINGS = {"timesteps": "noise_T", "beta_start": "noise_low_noise", "beta_end": "noise_high_noise"}


def _renamed(name: str) -> str:
    if name == "pe_proj_W":
        return "time_weight"
    for theirs, ours in _NAMES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name
