"""Sparsity patterns: the rule that says which groups of weights are present or absent together.

A pattern is a pure description; the index set of a concrete weight is a `sparse_kernels.topology.Topology`.
`Block(bh, bw)` cuts a weight `[out, in]` into blocks of `bh` outputs by `bw` inputs; `Unstructured()` is the block of
one weight. A rule that fixes a count *inside* a group (N:M) is a `Pattern` too: it answers the same questions
(`grid`, `padding`, `why_not`) and adds its own.
"""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

SIDES = (1, 4, 8, 16, 32, 64)

# A tensor whose padded blocks would hold this much more than its real elements stays dense (architecture: 3-channel
# convolutions, 13-wide GRU inputs under big blocks).
MAX_PADDING = 0.25


class Pattern(ABC):
    """What a rule must answer about a weight `[out, in]` before a `Topology` can be built for it."""

    @abstractmethod
    def grid(self, out: int, in_: int) -> tuple[int, int]:
        """Number of group rows and group columns that cover `[out, in]`, edge groups included."""

    @abstractmethod
    def padding(self, out: int, in_: int) -> float:
        """Elements that stick out of `[out, in]`, as a fraction of the real ones."""

    def why_not(self, out: int, in_: int) -> str | None:
        """Why a weight `[out, in]` cannot be cut by this pattern, or None where it can."""
        if out * in_ == 0:
            return f"a weight [{out}, {in_}] has no elements"
        padding = self.padding(out, in_)
        if padding > MAX_PADDING:
            return f"{self} pads [{out}, {in_}] by {padding:.0%} (more than {MAX_PADDING:.0%})"
        return None


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of `bh` consecutive outputs by `bw` consecutive inputs (of one tap, for a convolution).

    Args:
        bh: block height along the output features, one of 1, 4, 8, 16, 32, 64.
        bw: block width along the input features, one of 1, 4, 8, 16, 32, 64.

    Raises:
        ValueError: for any other side.
    """

    bh: int
    bw: int

    def __post_init__(self) -> None:
        for side in (self.bh, self.bw):
            if type(side) is not int or side not in SIDES:
                sides = ", ".join(map(str, SIDES))
                raise ValueError(f"Block: sides must be one of {sides}; got {self.bh!r}x{self.bw!r}.")

    def grid(self, out: int, in_: int) -> tuple[int, int]:
        return -(-out // self.bh), -(-in_ // self.bw)

    def padding(self, out: int, in_: int) -> float:
        rows, cols = self.grid(out, in_)
        return rows * self.bh * cols * self.bw / (out * in_) - 1.0

    @property
    def area(self) -> int:
        """Elements of one whole block."""
        return self.bh * self.bw

    def __str__(self) -> str:
        return "unstructured" if self.area == 1 else f"block:{self.bh}x{self.bw}"


@functools.cache
def block(bh: int, bw: int) -> Block:
    """`Block(bh, bw)` from a table: an op asks for its pattern at every call."""
    return Block(bh, bw)


def Unstructured() -> Block:
    """Every weight on its own: `Block(1, 1)`."""
    return Block(1, 1)


def parse_pattern(text: str | Pattern) -> Block:
    """The pattern that `str(pattern)` prints: `"unstructured"`, `"block:16x16"`, or short `"16x16"`.

    Raises:
        ValueError: for any other text.
    """
    if isinstance(text, Block):
        return text
    if isinstance(text, str):
        if text == "unstructured":
            return Unstructured()
        match = re.fullmatch(r"(?:block:)?(\d+)x(\d+)", text)
        if match:
            return Block(int(match[1]), int(match[2]))
    raise ValueError(f"pattern must be 'unstructured' or 'block:BHxBW' such as 'block:16x16'; got {text!r}.")
