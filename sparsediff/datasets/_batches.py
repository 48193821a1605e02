"""Padded batches in an order that is a function of (seed, epoch) and can be taken up anywhere.

The state of a run's data is three integers: seed, epoch, position in the epoch's permutation. Nothing of the global
random state is read or changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ._strokes import DataError, Strokes

Form = Literal["delta", "position"]


@dataclass(frozen=True)
class Batch:
    """A padded batch.

    Args:
        x: `[B, T, 3]` float32 rows (dx, dy, lift), or (x, y, lift) in position form; rows from `lengths[b]` on are
            zero.
        lengths: `[B]` int32.
        indices: `[B]` int64, which drawings these are.
    """

    x: Tensor
    lengths: Tensor
    indices: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on another device."""
        return Batch(*(t.to(device, non_blocking=non_blocking) for t in (self.x, self.lengths, self.indices)))


def collate(strokes: Strokes, indices: npt.ArrayLike, *, form: Form = "delta", length: int | None = None) -> Batch:
    """Pads drawings to a batch.

    Args:
        strokes: the drawings.
        indices: `[B]` integers.
        form: "delta": rows (dx, dy, lift); "position": rows (x, y, lift), the running sum of the former.
        length: T of the result; None: the longest of the chosen drawings.

    Raises:
        DataError: no indices, an index out of range, or a drawing longer than `length`.
    """
    chosen = np.asarray(indices, dtype=np.int64)
    if chosen.ndim != 1 or len(chosen) == 0:
        raise DataError(f"collate: indices must be a list of at least one drawing; got shape {chosen.shape}.")
    if chosen.min() < 0 or chosen.max() >= len(strokes):
        raise DataError(f"collate: indices must be in [0, {len(strokes)}); got {chosen.min()} to {chosen.max()}.")
    starts = strokes.offsets[chosen]
    lengths = strokes.offsets[chosen + 1] - starts
    longest = int(lengths.max())
    if length is not None and longest > length:
        raise DataError(f"collate: drawings must have at most {length} points; got one of {longest}. Raise length.")
    steps = np.arange(longest if length is None else length)
    real = steps < lengths[:, None]  # [B, T]
    x = strokes.points[np.where(real, starts[:, None] + steps, 0)]
    if form == "position":
        x[:, :, :2] = np.cumsum(x[:, :, :2], axis=1, dtype=np.float64)
    elif form != "delta":
        raise DataError(f"collate: form must be 'delta' or 'position'; got {form!r}.")
    x[~real] = 0.0
    return Batch(torch.from_numpy(x), torch.from_numpy(lengths.astype(np.int32)), torch.from_numpy(chosen))


def permutation(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of n things in an epoch, drawn from a generator of its own."""
    # SeedSequence mixes the two numbers well: neighbouring seeds and epochs share no permutation.
    mixed = np.random.SeedSequence([seed % 2**64, epoch]).generate_state(1, np.uint64)[0]
    order: npt.NDArray[np.int64] = torch.randperm(
        n, generator=torch.Generator().manual_seed(int(mixed >> np.uint64(1)))
    ).numpy()
    return order


class Batches(Iterator[Batch]):
    """Endless shuffled batches of a split, epoch after epoch.

    Each epoch is a permutation of all drawings drawn from a generator of its own, seeded by (seed, epoch). The last,
    incomplete batch of an epoch is left out (its drawings come up in other epochs) unless `drop_last=False`. A split
    that has fewer drawings than a batch gives batches of the whole split.

    Args:
        strokes: the split.
        batch_size: drawings a batch, at least 1.
        seed: any integer.
        drop_last: leave out incomplete batches.
        shuffle: False: every epoch in the split's order.
        form: see `collate`.

    Raises:
        DataError: an empty split or a batch size below 1.
    """

    def __init__(
        self,
        strokes: Strokes,
        batch_size: int,
        *,
        seed: int,
        drop_last: bool = True,
        shuffle: bool = True,
        form: Form = "delta",
    ) -> None:
        if len(strokes) == 0:
            raise DataError(
                "batches: the split must have at least one drawing; it is empty. Change the split fractions."
            )
        if batch_size < 1:
            raise DataError(f"batches: batch_size must be at least 1; got {batch_size}.")
        self.strokes = strokes
        self.batch_size = min(batch_size, len(strokes))
        self.seed = int(seed)
        self.drop_last = drop_last
        self.shuffle = shuffle
        self.form: Form = form
        self.epoch = 0
        self.position = 0
        self._fingerprint = strokes.fingerprint()
        self._order_of: tuple[int, int] | None = None
        self._order = np.zeros(0, np.int64)

    def __len__(self) -> int:
        """Batches an epoch."""
        whole, rest = divmod(len(self.strokes), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        start = self.position * self.batch_size
        indices = self._permutation()[start : start + self.batch_size]
        self.position += 1
        if self.position >= len(self):
            self.epoch, self.position = self.epoch + 1, 0
        return collate(self.strokes, indices, form=self.form)

    def peek(self) -> Batch:
        """The batch that comes next, which stays the next."""
        state = self.state_dict()
        batch = next(self)
        self.load_state_dict(state)
        return batch

    def _permutation(self) -> npt.NDArray[np.int64]:
        if self._order_of != (self.seed, self.epoch):
            n = len(self.strokes)
            self._order = permutation(n, self.seed, self.epoch) if self.shuffle else np.arange(n)
            self._order_of = (self.seed, self.epoch)
        return self._order

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch comes from, JSON-able: seed, epoch, position (in batches), batch size, drawings."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "batch_size": self.batch_size,
            "data": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken: the following batches are the same to the bit.

        Raises:
            DataError: the state belongs to another batch size or to other drawings.
        """
        for key, mine in (("batch_size", self.batch_size), ("data", self._fingerprint)):
            if state[key] != mine:
                raise DataError(
                    f"batches: the saved state has {key} {state[key]}; this run has {mine}. "
                    "Resume with the same data, options and batch size."
                )
        self.seed, self.epoch, self.position = int(state["seed"]), int(state["epoch"]), int(state["position"])
