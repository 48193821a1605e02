"""Initial topologies and values: fresh, or cut from a dense weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..allocation import block_count
from ..patterns import Block
from ..topology import Topology

INITS = ("random", "magnitude")


def check_cut(where: str, out: int, in_: int, pattern: Block) -> None:
    """Raises ValueError where the pattern cannot cut a weight `[out, in]`."""
    reason = pattern.why_not(out, in_)
    if reason is not None:
        raise ValueError(f"{where}: {reason}; choose a smaller block or keep the dense layer.")


def draw(
    out: int,
    in_: int,
    pattern: Block,
    sparsity: float,
    *,
    taps: int = 1,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Topology:
    """A random topology of `(1 − S)` of the blocks, rounded."""
    device = torch.device(device) if device is not None else torch.get_default_device()
    nnzb = block_count(_blocks(out, in_, pattern, taps), sparsity)
    return Topology.random(out, in_, pattern, nnzb, taps=taps, generator=generator, device=device)


def cut(
    matrix: Tensor,
    in_: int,
    pattern: Block,
    sparsity: float,
    *,
    taps: int = 1,
    init: str = "random",
    generator: torch.Generator | None = None,
    rescale: bool = False,
) -> tuple[Topology, nn.Parameter]:
    """A topology of `(1 − S)` of the blocks of a dense `matrix [out, taps · in]`, and the values it keeps.

    Args:
        init: `"random"` draws the blocks, `"magnitude"` keeps those of largest RMS.
        rescale: multiplies the kept values by `1/√density`, so that a fresh layer's output keeps its variance.

    Raises:
        ValueError: for an unknown `init`.
    """
    out = matrix.shape[0]
    if init == "random":
        topology = draw(out, in_, pattern, sparsity, taps=taps, generator=generator, device=matrix.device)
    elif init == "magnitude":
        nnzb = block_count(_blocks(out, in_, pattern, taps), sparsity)
        topology = Topology.by_magnitude(matrix, in_, pattern, nnzb, taps=taps)
    else:
        raise ValueError(f"init must be one of {', '.join(INITS)}; got {init!r}.")
    values = topology.gather(matrix.detach())
    if rescale:
        values = values * rescaling(topology)
    return topology, nn.Parameter(values.contiguous(), requires_grad=matrix.requires_grad)


def copy_parameter(parameter: Tensor | None) -> nn.Parameter | None:
    """A copy that shares no storage and keeps `requires_grad`."""
    if parameter is None:
        return None
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


def rescaling(topology: Topology) -> float:
    """`1/√density`: what keeps the variance of a layer's output when the weights outside the topology are absent."""
    return 1.0 / math.sqrt(topology.density) if topology.nnzb else 1.0


@torch.no_grad()
def fill_uniform(
    values: Tensor, bound: float, topology: Topology | None = None, generator: torch.Generator | None = None
) -> None:
    """Fills with U(−bound, bound), the padding of edge blocks with zero.

    The draw happens on the generator's device, so that a seed gives the same values everywhere.
    """
    if values.is_meta:
        return
    if generator is None or generator.device == values.device:
        values.uniform_(-bound, bound, generator=generator)
    else:
        drawn = torch.empty(values.shape, dtype=values.dtype, device=generator.device)
        values.copy_(drawn.uniform_(-bound, bound, generator=generator))
    if topology is not None and (topology.out % topology.bh or topology.in_ % topology.bw):
        values.mul_(_inside(topology))


def _inside(topology: Topology) -> Tensor:
    """Which elements of each active block lie inside the weight: bool `[nnzb, bh, bw]`."""
    heights, widths = topology.weight_index().block_areas()
    rows, cols = topology.coords()
    row = torch.arange(topology.bh, device=rows.device)[None, :, None]
    col = torch.arange(topology.bw, device=rows.device)[None, None, :]
    return (row < heights[rows][:, None, None]) & (col < widths[cols][:, None, None])


def _blocks(out: int, in_: int, pattern: Block, taps: int) -> int:
    rows, cols = pattern.grid(out, in_)
    return rows * cols * taps
