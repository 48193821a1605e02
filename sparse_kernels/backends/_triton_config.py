"""How the Triton kernels are launched: one committed table per architecture, read by shape alone.

The rows are reasoned, not yet measured on a GPU: `autotune` measures, and its findings belong here. The reasoning, for
bf16 blocks of side b at density d, a group of G lines, P positions a program (FLOP of present blocks; u = 1-(1-d)^G):

    L2 traffic bounds by   P·G·d·b / (P·u + G·d·b) FLOP/B    b=32, P=256, d=.5: G=1 28, G=2 37, G=4 54
    arithmetic bounds by   G·d / u of the tensor cores       d=.5: G=2 .67, G=4 .53;  d=.1: .53, .29
    wgmma of N columns reads its 64 rows of A again for each: N=32 runs at 2/3, N >= 64 in full

A linear of blocks 32 is traffic-bound at G <= 2 for every density, so it takes tiles of 128 outputs, G = 4: with P=256
that is about 310, 220 and 175 TFLOP/s at S=.5, .75, .9 on 5.8 TB/s of L2. A convolution finds eight of its nine taps in
L1, so the arithmetic decides: 64 outputs, the fewest that feed wgmma. A block of 64 has those by itself.
Accumulators stay at 128 registers a thread or below (64 for mma.sync, whose operands are registers too).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..index import WeightIndex
from ..patterns import Block

LARGEST_GROUP = 4


@dataclass(frozen=True)
class ProductConfig:
    """A launch of `product_kernel`.

    Args:
        block_p: positions of a program. warps, stages: as Triton means them. band: position tiles that are gone
            through for all row-groups before the next. entries: 1 or 2 of the row-group's a step.
        cache: where activation tiles are kept: "" and ".cg" in L2, ".ca" in L1 too, before Triton 3.9 by copies of 8
            bytes, since those of 16 always passed L1 by.
        registers: of a thread at most; 128 lets two programs of 8 warps share a processor, and spills some. None: as
            many as the compiler likes.
    """

    block_p: int
    warps: int
    stages: int
    band: int = 16
    entries: int = 1
    cache: str = ""
    registers: int | None = None


@dataclass(frozen=True)
class GradientConfig:
    """A launch of `sddmm_kernel` or `block_scores_kernel`.

    Args:
        block_p: positions of a step. width: gathered features of a program. warps, stages, cache: as for a product.
        height: output features of a program (scores alone; a row-group's for sddmm).
        splits: parts into which the positions are cut; None: as many as fill the machine.
    """

    block_p: int
    width: int
    warps: int
    stages: int
    height: int = 0
    cache: str = ""
    splits: int | None = None


@dataclass(frozen=True)
class Table:
    """One architecture. Candidates come in order of preference; the first that fits and fills the machine is taken."""

    shared_bytes: int  # of a program, at most
    product: Sequence[ProductConfig]
    gradient: Sequence[GradientConfig]
    scores: Sequence[GradientConfig]


TABLES: dict[str, Table] = {
    "sm90": Table(
        227 << 10,
        product=(ProductConfig(256, 8, 5), ProductConfig(128, 4, 5), ProductConfig(64, 4, 5)),
        gradient=(GradientConfig(64, 256, 8, 4), GradientConfig(64, 128, 4, 4), GradientConfig(64, 64, 4, 4)),
        scores=(GradientConfig(64, 256, 8, 4, height=128), GradientConfig(64, 128, 4, 4, height=128)),
    ),
    "sm80": Table(
        163 << 10,
        product=(ProductConfig(256, 8, 4), ProductConfig(128, 8, 4), ProductConfig(64, 4, 4)),
        gradient=(GradientConfig(32, 256, 8, 4), GradientConfig(32, 128, 8, 4), GradientConfig(32, 64, 4, 4)),
        scores=(GradientConfig(32, 128, 8, 4, height=128),),
    ),
    # Ampere and later for desktops: two thirds of the shared memory.
    "sm86": Table(
        99 << 10,
        product=(ProductConfig(128, 8, 3), ProductConfig(64, 4, 3)),
        gradient=(GradientConfig(32, 128, 8, 3), GradientConfig(32, 64, 4, 3)),
        scores=(GradientConfig(32, 128, 8, 3, height=64),),
    ),
}


def architecture(capability: tuple[int, int]) -> str:
    """The row of `TABLES` for a compute capability."""
    if capability[0] in (9, 10):
        return "sm90"
    return "sm80" if capability in ((8, 0), (8, 7)) else "sm86"


def group_size(op: str, side: int) -> int:
    """Lines of a row-group, of blocks whose side along the outputs is `side`."""
    return max(1, min((128 if op == "linear" else 64) // side, LARGEST_GROUP))


def group_sizes(op: str, pattern: Block) -> tuple[int, int]:
    """Lines of a row-group by row and by column; they depend on the pattern alone, as a topology's buffers do."""
    return group_size(op, pattern.bh), group_size(op, pattern.bw)


def choose_product(
    table: Table, processors: int, positions: int, groups: int, width: int, inner: int, bytes_: int, gathers: bool
) -> ProductConfig:
    """The launch for `positions` x `groups` tiles of `width` outputs, steps of `inner` features of `bytes_` each."""
    chosen = None
    for config in table.product:
        entries = 2 if inner * bytes_ < 64 else config.entries
        step = (config.block_p + width) * inner * entries * bytes_
        stages = min(config.stages, table.shared_bytes // step)
        if stages < 2 or config.block_p * width * 4 > table.shared_bytes:
            continue
        chosen = replace(config, stages=stages, entries=entries, cache=".ca" if gathers else "")
        # Two to a processor even out what the longest row-group takes longer.
        if -(-positions // config.block_p) * groups >= 2 * processors:
            break
    assert chosen is not None, "the last row of a table fits every block"
    return chosen


def choose_gradient(
    table: Table, processors: int, positions: int, index: WeightIndex, group: int, bytes_: int, gathers: bool
) -> GradientConfig:
    """The launch of sddmm for row-groups of `group` lines."""
    density = index.nnzb / (index.row_blocks * index.col_blocks)
    entries = max(1.0, (1.0 - (1.0 - density) ** group) * index.col_blocks)  # of a row-group, expected
    groups, height = -(-index.row_blocks // group), group * index.bh
    chosen = None
    for config in table.gradient:
        stages = min(config.stages, table.shared_bytes // ((config.width + height) * config.block_p * bytes_))
        columns = config.width // index.bw
        # What is not an entry of a row-group's last column tile is multiplied in vain.
        if stages < 2 or columns < 1 or (columns > 1 and -(-entries // columns) * columns > 1.25 * entries):
            continue
        chosen = replace(config, stages=stages)
        break
    if chosen is None:
        smallest = table.gradient[-1]
        chosen = replace(smallest, width=max(index.bw, smallest.width), stages=2)
    programs = groups * -(-entries // (chosen.width // index.bw))
    cache = ".ca" if gathers else ""
    return replace(chosen, cache=cache, splits=_splits(processors, programs, positions, chosen.block_p))


def choose_scores(
    table: Table, processors: int, positions: int, index: WeightIndex, bytes_: int, workspace_bytes: int
) -> GradientConfig:
    """The launch of block_scores; splits only where the partial gradients and their sum fit `workspace_bytes`."""
    chosen, programs = None, 1
    for config in table.scores:
        stages = min(config.stages, table.shared_bytes // ((config.width + config.height) * config.block_p * bytes_))
        if stages < 2:
            continue
        chosen = replace(config, stages=stages)
        programs = -(-index.out // config.height) * -(-(index.col_blocks * index.bw) // config.width)
        if programs >= processors:
            break
    if chosen is None:
        chosen = replace(table.scores[-1], stages=2)
    gradient_bytes = 4 * index.row_blocks * index.bh * index.col_blocks * index.bw
    room = workspace_bytes // gradient_bytes - 1
    return replace(chosen, splits=max(1, min(_splits(processors, programs, positions, chosen.block_p), room)))


def _splits(processors: int, programs: float, positions: int, block_p: int) -> int:
    """Parts of the positions that bring two programs to each processor, of eight steps at least."""
    return max(1, min(int(2 * processors // max(programs, 1.0)), positions // (8 * block_p)))
