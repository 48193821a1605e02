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


def check_kind(where: str, module: object, kind: type[nn.Module]) -> None:
    """Raises TypeError where `module` is not of the kind that a layer is made from."""
    if not isinstance(module, kind):
        raise TypeError(f"{where}: module must be a torch.nn.{kind.__name__}; got {type(module).__name__}.")


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
    """A random topology of `(1 − S)` of the blocks, rounded.

    Where blocks stick out of the weight, the draw is corrected until the real elements are `(1 − S)` of the weight
    within one block too: a few blocks of one size change places with blocks of another, each at random.
    """
    device = torch.device(device) if device is not None else torch.get_default_device()
    nnzb = block_count(_blocks(out, in_, pattern, taps), sparsity)
    topology = Topology.random(out, in_, pattern, nnzb, taps=taps, generator=generator, device=device)
    if topology.crow.is_meta or (out % pattern.bh == 0 and in_ % pattern.bw == 0):
        return topology
    mask = topology.mask().cpu()
    _even_out(mask, topology, generator)
    rows, cols = mask.to(device).nonzero(as_tuple=True)
    topology.rewrite(torch.arange(nnzb, device=rows.device), rows, cols)
    return topology


def _even_out(mask: Tensor, topology: Topology, generator: torch.Generator | None) -> None:
    heights, widths = (side.cpu() for side in topology.weight_index().block_areas())
    areas = (heights[:, None] * widths[None, :]).flatten()
    active = mask.view(-1)
    missing = topology.nnzb * topology.numel / areas.numel() - int(areas[active].sum())
    where = generator.device if generator is not None else torch.device("cpu")
    order = torch.randperm(areas.numel(), generator=generator, device=where).cpu()
    sizes = areas.unique().tolist()
    steps = sorted(((big - small, small, big) for small in sizes for big in sizes if big > small), reverse=True)
    for step, small, big in steps:  # the largest exchanges first
        leave, enter = (small, big) if missing > 0 else (big, small)
        count = int(abs(missing) / step + 0.5)
        leaving = order[(active & (areas == leave))[order]][:count]
        entering = order[(~active & (areas == enter))[order]][:count]
        count = min(leaving.numel(), entering.numel())
        active[leaving[:count]] = False
        active[entering[:count]] = True
        missing -= count * (enter - leave)


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
