"""Latent Diffusion's networks as functions of a CompVis state dict: what a conversion must preserve.

Written from the structure of the published modules, and independent of the package: weights are made and used by
CompVis's names only.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


class Weights:
    """Random tensors by name."""

    def __init__(self, seed: int) -> None:
        self.state: State = {}
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, name: str, *shape: int) -> None:
        fan_in = max(1, math.prod(shape[1:]))
        self.state[f"{name}.weight"] = torch.randn(shape, generator=self.generator) / math.sqrt(fan_in)
        self.state[f"{name}.bias"] = torch.randn(shape[:1], generator=self.generator) / 4

    def norm(self, name: str, channels: int) -> None:
        self.add(name, channels)

    def res(self, name: str, in_: int, out: int, time: int) -> None:
        self.norm(f"{name}.in_layers.0", in_)
        self.add(f"{name}.in_layers.2", out, in_, 3, 3)
        self.add(f"{name}.emb_layers.1", out, time)
        self.norm(f"{name}.out_layers.0", out)
        self.add(f"{name}.out_layers.3", out, out, 3, 3)
        if in_ != out:
            self.add(f"{name}.skip_connection", out, in_, 1, 1)

    def attention(self, name: str, channels: int) -> None:
        self.norm(f"{name}.norm", channels)
        self.add(f"{name}.qkv", 3 * channels, channels, 1)
        self.add(f"{name}.proj_out", channels, channels, 1)

    def block(self, name: str, in_: int, out: int) -> None:
        self.norm(f"{name}.norm1", in_)
        self.add(f"{name}.conv1", out, in_, 3, 3)
        self.norm(f"{name}.norm2", out)
        self.add(f"{name}.conv2", out, out, 3, 3)
        if in_ != out:
            self.add(f"{name}.nin_shortcut", out, in_, 1, 1)

    def middle(self, name: str, channels: int) -> None:
        self.block(f"{name}.block_1", channels, channels)
        self.norm(f"{name}.attn_1.norm", channels)
        for letter in ("q", "k", "v", "proj_out"):
            self.add(f"{name}.attn_1.{letter}", channels, channels, 1, 1)
        self.block(f"{name}.block_2", channels, channels)


def unet_state(widths: tuple[int, ...], blocks: int, attention: tuple[bool, ...], seed: int = 0) -> State:
    """A U-Net of 3 channels."""
    w, time, ch = Weights(seed), 4 * widths[0], widths[0]
    w.add("time_embed.0", time, ch)
    w.add("time_embed.2", time, time)
    w.add("input_blocks.0.0", ch, 3, 3, 3)
    skips, n = [ch], 1
    for level, width in enumerate(widths):
        for _ in range(blocks):
            w.res(f"input_blocks.{n}.0", ch, width, time)
            ch = width
            if attention[level]:
                w.attention(f"input_blocks.{n}.1", ch)
            skips.append(ch)
            n += 1
        if level + 1 < len(widths):
            w.add(f"input_blocks.{n}.0.op", ch, ch, 3, 3)
            skips.append(ch)
            n += 1
    w.res("middle_block.0", ch, ch, time)
    w.attention("middle_block.1", ch)
    w.res("middle_block.2", ch, ch, time)
    n = 0
    for level in reversed(range(len(widths))):
        for block in range(blocks + 1):
            w.res(f"output_blocks.{n}.0", ch + skips.pop(), widths[level], time)
            ch = widths[level]
            if attention[level]:
                w.attention(f"output_blocks.{n}.1", ch)
            if level and block == blocks:
                w.add(f"output_blocks.{n}.{2 if attention[level] else 1}.conv", ch, ch, 3, 3)
            n += 1
    w.norm("out.0", ch)
    w.add("out.2", 3, ch, 3, 3)
    return w.state


def vq_state(widths: tuple[int, ...], blocks: int, codes: int, seed: int = 1) -> State:
    """A VQ autoencoder of 3 channels and a code of 3 numbers."""
    w, ch = Weights(seed), widths[0]
    w.add("encoder.conv_in", ch, 3, 3, 3)
    for level, width in enumerate(widths):
        for block in range(blocks):
            w.block(f"encoder.down.{level}.block.{block}", ch, width)
            ch = width
        if level + 1 < len(widths):
            w.add(f"encoder.down.{level}.downsample.conv", ch, ch, 3, 3)
    w.middle("encoder.mid", ch)
    w.norm("encoder.norm_out", ch)
    w.add("encoder.conv_out", 3, ch, 3, 3)
    w.add("quant_conv", 3, 3, 1, 1)
    w.state["quantize.embedding.weight"] = torch.randn(codes, 3, generator=w.generator)
    w.add("post_quant_conv", 3, 3, 1, 1)
    w.add("decoder.conv_in", ch, 3, 3, 3)
    w.middle("decoder.mid", ch)
    for level in reversed(range(len(widths))):
        for block in range(blocks + 1):
            w.block(f"decoder.up.{level}.block.{block}", ch, widths[level])
            ch = widths[level]
        if level:
            w.add(f"decoder.up.{level}.upsample.conv", ch, ch, 3, 3)
    w.norm("decoder.norm_out", ch)
    w.add("decoder.conv_out", 3, ch, 3, 3)
    return w.state


class Network:
    """Layers of a state dict by name."""

    def __init__(self, state: State, eps: float) -> None:
        self.s = {name: tensor.double() for name, tensor in state.items()}
        self.eps = eps

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
        weight = self.s[f"{name}.weight"]
        padding = weight.shape[-1] // 2 if padding is None else padding
        return F.conv2d(x, weight, self.s[f"{name}.bias"], stride, padding)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.s[f"{name}.weight"], self.s[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.s[f"{name}.weight"], self.s[f"{name}.bias"], self.eps)

    def res(self, name: str, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv(f"{name}.in_layers.2", F.silu(self.norm(f"{name}.in_layers.0", x)))
        h = h + self.linear(f"{name}.emb_layers.1", F.silu(emb))[:, :, None, None]
        h = self.conv(f"{name}.out_layers.3", F.silu(self.norm(f"{name}.out_layers.0", h)))
        skip = f"{name}.skip_connection"
        return h + (self.conv(skip, x) if f"{skip}.weight" in self.s else x)

    def attention(self, name: str, x: Tensor, head_dim: int) -> Tensor:
        batch, channels, height, width = x.shape
        h = self.norm(f"{name}.norm", x).flatten(2)
        qkv = F.conv1d(h, self.s[f"{name}.qkv.weight"], self.s[f"{name}.qkv.bias"])
        heads = channels // head_dim
        q, k, v = qkv.reshape(batch * heads, 3 * head_dim, height * width).split(head_dim, dim=1)
        attended = (q.transpose(1, 2) @ k / math.sqrt(head_dim)).softmax(-1)
        h = (attended @ v.transpose(1, 2)).transpose(1, 2).reshape(batch, channels, -1)
        h = F.conv1d(h, self.s[f"{name}.proj_out.weight"], self.s[f"{name}.proj_out.bias"])
        return x + h.view_as(x)

    def block(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)))
        skip = f"{name}.nin_shortcut"
        return h + (self.conv(skip, x) if f"{skip}.weight" in self.s else x)

    def middle(self, name: str, x: Tensor) -> Tensor:
        x = self.block(f"{name}.block_1", x)
        h = self.norm(f"{name}.attn_1.norm", x)
        q, k, v = (self.conv(f"{name}.attn_1.{letter}", h).flatten(2) for letter in "qkv")
        attended = (q.transpose(1, 2) @ k / math.sqrt(x.shape[1])).softmax(-1)
        h = (v @ attended.transpose(1, 2)).view_as(x)
        return self.block(f"{name}.block_2", x + self.conv(f"{name}.attn_1.proj_out", h))


def unet(state: State, x: Tensor, t: Tensor, head_dim: int) -> Tensor:
    """The noise that a CompVis U-Net predicts, in fp64."""
    net = Network(state, 1e-5)
    dim = len(state["input_blocks.0.0.bias"])
    # In fp32, as both codes do, whose angles are off by 1e-5.
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2, dtype=torch.float32) / (dim // 2))
    angles = t.float()[:, None] * frequencies
    emb = torch.cat([angles.cos(), angles.sin()], 1).double()
    emb = net.linear("time_embed.2", F.silu(net.linear("time_embed.0", emb)))

    def run(name: str, h: Tensor) -> Tensor:
        for place in range(3):
            if f"{name}.{place}.in_layers.0.weight" in state:
                h = net.res(f"{name}.{place}", h, emb)
            elif f"{name}.{place}.qkv.weight" in state:
                h = net.attention(f"{name}.{place}", h, head_dim)
            elif f"{name}.{place}.op.weight" in state:
                h = net.conv(f"{name}.{place}.op", h, stride=2)
            elif f"{name}.{place}.conv.weight" in state:
                h = net.conv(f"{name}.{place}.conv", F.interpolate(h, scale_factor=2.0, mode="nearest"))
            elif f"{name}.{place}.weight" in state:
                h = net.conv(f"{name}.{place}", h)
        return h

    def count(kind: str) -> int:
        return 1 + max(int(name.split(".")[1]) for name in state if name.startswith(kind))

    h, skips = x.double(), []
    for n in range(count("input_blocks")):
        h = run(f"input_blocks.{n}", h)
        skips.append(h)
    h = run("middle_block", h)
    for n in range(count("output_blocks")):
        h = run(f"output_blocks.{n}", torch.cat([h, skips.pop()], 1))
    return net.conv("out.2", F.silu(net.norm("out.0", h)))


def vq_encode(state: State, x: Tensor, levels: int, blocks: int) -> Tensor:
    """Latents before quantisation, in fp64."""
    net = Network(state, 1e-6)
    h = net.conv("encoder.conv_in", x.double())
    for level in range(levels):
        for block in range(blocks):
            h = net.block(f"encoder.down.{level}.block.{block}", h)
        if level + 1 < levels:
            h = net.conv(f"encoder.down.{level}.downsample.conv", F.pad(h, (0, 1, 0, 1)), stride=2, padding=0)
    h = net.middle("encoder.mid", h)
    return net.conv("quant_conv", net.conv("encoder.conv_out", F.silu(net.norm("encoder.norm_out", h))))


def vq_decode(state: State, z: Tensor, levels: int, blocks: int) -> Tensor:
    """Images of latents, in fp64."""
    net = Network(state, 1e-6)
    codes = net.s["quantize.embedding.weight"]
    nearest = torch.cdist(z.double().permute(0, 2, 3, 1).reshape(-1, 3), codes).argmin(1)
    z = codes[nearest].view(len(z), *z.shape[2:], 3).permute(0, 3, 1, 2)
    h = net.middle("decoder.mid", net.conv("decoder.conv_in", net.conv("post_quant_conv", z)))
    for level in reversed(range(levels)):
        for block in range(blocks + 1):
            h = net.block(f"decoder.up.{level}.block.{block}", h)
        if level:
            h = net.conv(f"decoder.up.{level}.upsample.conv", F.interpolate(h, scale_factor=2.0, mode="nearest"))
    return net.conv("decoder.conv_out", F.silu(net.norm("decoder.norm_out", h)))
