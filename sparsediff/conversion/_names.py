"""Names of Latent Diffusion's weights: CompVis's beside diffusers', and tensors carried from one to the other.

    U-Net   input_blocks.N.{0,1}, middle_block.{0,1,2}, output_blocks.N.{0,1,2}   down_blocks, mid_block, up_blocks
            in_layers.{0,2} emb_layers.1 out_layers.{0,3} skip_connection         norm1 conv1 time_emb_proj norm2 conv2
                                                                                  conv_shortcut
            qkv, rows by head: (q, k, v) of head 0, of head 1, …                  to_q, to_k, to_v
    VQ      down.L.block.N, mid.{block_1,attn_1,block_2}, up.L.block.N            down_blocks, mid_block, up_blocks

The order of qkv is that of the published models, `use_new_attention_order=False`. CompVis's attention has 1x1
convolutions where diffusers has linear layers. Whatever belongs to a weight element by element, such as a mask, is
carried by the same functions.

Sources: `openaimodel.py`, `model.py` and `ema.py` of the Latent Diffusion code; `unet_2d.py` and `vq_model.py` of
diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class ConversionError(RuntimeError):
    """A file cannot be converted; the message says what, expected, got and the remedy."""


@dataclass(frozen=True)
class Pair:
    """One module in both worlds.

    Args:
        theirs: its path in CompVis's code. ours: in diffusers; three paths where they stack q, k, v.
        ones: trailing dimensions of size 1 that their weight has and ours has not.
    """

    theirs: str
    ours: tuple[str, ...]
    ones: int = 0


@dataclass(frozen=True)
class Shape:
    """Architecture of a U-Net, as far as its weights tell.

    Args:
        widths: channels of the levels. blocks: residual blocks of a level. attention: which levels have attention.
        channels: of its input and output.
    """

    widths: tuple[int, ...]
    blocks: int
    attention: tuple[bool, ...]
    channels: int


def _resnet(theirs: str, ours: str) -> Iterator[Pair]:
    names = {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    }
    for their, our in names.items():
        yield Pair(f"{theirs}.{their}", (f"{ours}.{our}",))


def _attention(theirs: str, ours: str) -> Iterator[Pair]:
    yield Pair(f"{theirs}.norm", (f"{ours}.group_norm",))
    yield Pair(f"{theirs}.qkv", tuple(f"{ours}.to_{letter}" for letter in "qkv"), 1)
    yield Pair(f"{theirs}.proj_out", (f"{ours}.to_out.0",), 1)


def unet_pairs(shape: Shape) -> list[Pair]:
    """Every module of a U-Net that may have parameters."""
    levels, blocks = len(shape.widths), shape.blocks
    pairs = [
        Pair("time_embed.0", ("time_embedding.linear_1",)),
        Pair("time_embed.2", ("time_embedding.linear_2",)),
        Pair("input_blocks.0.0", ("conv_in",)),
        *_resnet("middle_block.0", "mid_block.resnets.0"),
        *_attention("middle_block.1", "mid_block.attentions.0"),
        *_resnet("middle_block.2", "mid_block.resnets.1"),
        Pair("out.0", ("conv_norm_out",)),
        Pair("out.2", ("conv_out",)),
    ]
    number = 1
    for level in range(levels):
        for block in range(blocks):
            pairs += _resnet(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{block}")
            if shape.attention[level]:
                pairs += _attention(f"input_blocks.{number}.1", f"down_blocks.{level}.attentions.{block}")
            number += 1
        if level < levels - 1:
            pairs.append(Pair(f"input_blocks.{number}.0.op", (f"down_blocks.{level}.downsamplers.0.conv",)))
            number += 1
    number = 0
    for up, level in enumerate(reversed(range(levels))):
        for block in range(blocks + 1):
            pairs += _resnet(f"output_blocks.{number}.0", f"up_blocks.{up}.resnets.{block}")
            if shape.attention[level]:
                pairs += _attention(f"output_blocks.{number}.1", f"up_blocks.{up}.attentions.{block}")
            if level > 0 and block == blocks:
                place = 2 if shape.attention[level] else 1
                pairs.append(Pair(f"output_blocks.{number}.{place}.conv", (f"up_blocks.{up}.upsamplers.0.conv",)))
            number += 1
    return pairs


def vq_pairs(levels: int, blocks: int) -> list[Pair]:
    """Every module of the first stage that may have parameters."""

    def resnet(theirs: str, ours: str) -> Iterator[Pair]:
        for name in ("norm1", "conv1", "norm2", "conv2"):
            yield Pair(f"{theirs}.{name}", (f"{ours}.{name}",))
        yield Pair(f"{theirs}.nin_shortcut", (f"{ours}.conv_shortcut",))

    pairs = [Pair(name, (name,)) for name in ("quant_conv", "post_quant_conv", "quantize.embedding")]
    for half in ("encoder", "decoder"):
        pairs += [Pair(f"{half}.{name}", (f"{half}.{name}",)) for name in ("conv_in", "conv_out")]
        pairs.append(Pair(f"{half}.norm_out", (f"{half}.conv_norm_out",)))
        pairs += [
            *resnet(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0"),
            *resnet(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1"),
            Pair(f"{half}.mid.attn_1.norm", (f"{half}.mid_block.attentions.0.group_norm",)),
            Pair(f"{half}.mid.attn_1.proj_out", (f"{half}.mid_block.attentions.0.to_out.0",), 2),
            *(Pair(f"{half}.mid.attn_1.{x}", (f"{half}.mid_block.attentions.0.to_{x}",), 2) for x in "qkv"),
        ]
    for level in range(levels):
        down, up = f"encoder.down.{level}", f"decoder.up.{level}"
        our_down, our_up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for block in range(blocks):
            pairs += resnet(f"{down}.block.{block}", f"{our_down}.resnets.{block}")
        for block in range(blocks + 1):
            pairs += resnet(f"{up}.block.{block}", f"{our_up}.resnets.{block}")
        pairs.append(Pair(f"{down}.downsample.conv", (f"{our_down}.downsamplers.0.conv",)))
        pairs.append(Pair(f"{up}.upsample.conv", (f"{our_up}.upsamplers.0.conv",)))
    return pairs


def to_diffusers(theirs: Mapping[str, Tensor], pairs: Sequence[Pair], head_dim: int = 1) -> dict[str, Tensor]:
    """Their tensors by our names; what is not there is left out.

    Args:
        theirs: parameters, or masks of weights, by CompVis's names. head_dim: channels of an attention head.

    Raises:
        ConversionError: naming every tensor that has no place in diffusers' model.
    """
    left = dict(theirs)
    ours: dict[str, Tensor] = {}
    for pair in pairs:
        for leaf in ("weight", "bias"):
            tensor = left.pop(f"{pair.theirs}.{leaf}", None)
            if tensor is None:
                continue
            if leaf == "weight" and pair.ones:
                tensor = tensor.flatten(1)
            if len(pair.ours) == 3:
                heads = _heads(pair, tensor, head_dim)
                parts = tensor.unflatten(0, (heads, 3, head_dim)).unbind(1)
                ours |= {f"{path}.{leaf}": part.flatten(0, 1) for path, part in zip(pair.ours, parts, strict=True)}
            else:
                ours[f"{pair.ours[0]}.{leaf}"] = tensor
    if left:
        raise ConversionError(f"{len(left)} tensors have no place in diffusers' model: {shown(left)}.")
    return ours


def to_compvis(ours: Mapping[str, Tensor], pairs: Sequence[Pair], head_dim: int = 1) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`. A mask that only some of q, k, v have is full in the others.

    Raises:
        ConversionError: naming every tensor that has no place in CompVis's model.
    """
    left = dict(ours)
    theirs: dict[str, Tensor] = {}
    for pair in pairs:
        for leaf in ("weight", "bias"):
            parts = [left.pop(f"{path}.{leaf}", None) for path in pair.ours]
            first = next((part for part in parts if part is not None), None)
            if first is None:
                continue
            whole = [torch.ones_like(first) if part is None else part for part in parts]
            tensor = whole[0]
            if len(parts) == 3:
                _heads(pair, tensor, head_dim, rows=1)
                tensor = torch.stack([part.unflatten(0, (-1, head_dim)) for part in whole], 1).flatten(0, 2)
            if leaf == "weight" and pair.ones:
                tensor = tensor.view(*tensor.shape, *(1,) * pair.ones)
            theirs[f"{pair.theirs}.{leaf}"] = tensor
    if left:
        raise ConversionError(f"{len(left)} tensors have no place in CompVis's model: {shown(left)}.")
    return theirs


def _heads(pair: Pair, tensor: Tensor, head_dim: int, rows: int = 3) -> int:
    if tensor.shape[0] % (rows * head_dim):
        raise ConversionError(
            f"{pair.theirs}: {tensor.shape[0]} rows are not {rows} times a multiple of {head_dim}, the channels of an "
            "attention head; say --head-dim."
        )
    return int(tensor.shape[0]) // (rows * head_dim)


def shape_of_compvis(state: Mapping[str, Tensor]) -> Shape:
    """Architecture of a CompVis U-Net.

    Raises:
        ConversionError: it is none, or one that diffusers' `UNet2DModel` does not have.
    """
    widths, counts, attention = [0], [0], [False]
    number = 1
    while True:
        if f"input_blocks.{number}.0.op.weight" in state:
            widths, counts, attention = [*widths, 0], [*counts, 0], [*attention, False]
        elif f"input_blocks.{number}.0.out_layers.0.weight" in state:
            widths[-1] = len(state[f"input_blocks.{number}.0.out_layers.0.weight"])
            counts[-1] += 1
            attention[-1] = f"input_blocks.{number}.1.qkv.weight" in state
        else:
            break
        number += 1
    return _shape(state, "input_blocks.0.0", "out.2", widths, counts, attention)


def shape_of_diffusers(state: Mapping[str, Tensor]) -> Shape:
    """Architecture of a `UNet2DModel`, dense or sparse.

    Raises:
        ConversionError: it is none.
    """
    widths: list[int] = []
    counts: list[int] = []
    attention: list[bool] = []
    while f"down_blocks.{len(widths)}.resnets.0.norm2.weight" in state:
        level = f"down_blocks.{len(widths)}"
        widths.append(len(state[f"{level}.resnets.0.norm2.weight"]))
        counts.append(sum(f"{level}.resnets.{k}.norm2.weight" in state for k in range(100)))
        attention.append(f"{level}.attentions.0.group_norm.weight" in state)
    return _shape(state, "conv_in", "conv_out", widths or [0], counts or [0], attention)


def _shape(
    state: Mapping[str, Tensor], first: str, last: str, widths: list[int], counts: list[int], attention: list[bool]
) -> Shape:
    if len(set(counts)) != 1 or 0 in widths or f"{last}.bias" not in state:
        raise ConversionError(
            f"the tensors are not those of an unconditional U-Net with as many residual blocks on every level; got "
            f"levels of {widths} channels with {counts} blocks, and {shown(state)}."
        )
    channels = len(state[f"{last}.bias"])
    weight = state.get(f"{first}.weight")
    if weight is not None and weight.shape[1] != channels:
        raise ConversionError(f"the U-Net turns {weight.shape[1]} channels into {channels}; expected as many.")
    return Shape(tuple(widths), counts[0], tuple(attention), channels)


def shown(names: Mapping[str, object] | Sequence[str]) -> str:
    """The first names, and how many more there are."""
    listed = sorted(names)
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")


def check_names(where: str, given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises ConversionError, naming them, where tensors are missing, unknown or of another shape."""
    wrong = []
    for kind, names in (("missing", expected.keys() - given.keys()), ("unknown", given.keys() - expected.keys())):
        if names:
            wrong.append(f"{kind}: {shown(sorted(names))}")
    for name in sorted(expected.keys() & given.keys()):
        if given[name].shape != expected[name].shape:
            wrong.append(f"{name} is {list(given[name].shape)}, expected {list(expected[name].shape)}")
    if wrong:
        raise ConversionError(f"{where}: the tensors are not those of the model: {'; '.join(wrong[:6])}.")
