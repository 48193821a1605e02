"""Batches of images or latents: order and mirroring are functions of (seed, epoch), taken up anywhere, by any workers.

Which item is mirrored in which epoch is drawn for all items at once, by number. So it does not matter how many worker
processes read them, nor whether a latent or its image is read: a run on precomputed latents sees the mirror images that
a run on pixels sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ._batches import permutation
from ._strokes import DataError, Int64


class Views(Protocol):
    """What is batched: `Images`, or latents of them."""

    flip: float

    def __len__(self) -> int: ...

    def view(self, i: int, flipped: bool = False) -> Tensor:
        """Item i, or its mirror image, `[C, H, W]` float32."""

    def fingerprint(self) -> dict[str, int | str]:
        """What identifies the items."""


@dataclass(frozen=True)
class ImageBatch:
    """A batch.

    Args:
        x: `[B, C, H, W]` float32.
        indices: `[B]` int64, which items these are.
        flipped: `[B]` bool, which are mirrored.
    """

    x: Tensor
    indices: Tensor
    flipped: Tensor

    @property
    def lengths(self) -> None:
        """As for `Batch`: images have none."""
        return None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageBatch:
        """The batch on another device."""
        return ImageBatch(*(t.to(device, non_blocking=non_blocking) for t in (self.x, self.indices, self.flipped)))


class ImageBatches(Iterator[ImageBatch]):
    """Endless shuffled batches, epoch after epoch; an epoch's incomplete last batch is left out.

    Args:
        items: the split.
        batch_size: items a batch, at least 1; a smaller split gives batches of all of it.
        seed: any integer.
        workers: processes that read ahead; 0: this one reads. They change nothing else.

    Raises:
        DataError: an empty split or a batch size below 1.
    """

    def __init__(self, items: Views, batch_size: int, *, seed: int, workers: int = 0) -> None:
        if len(items) == 0:
            raise DataError("batches: the split must have at least one image; it is empty. Change the counts.")
        if batch_size < 1:
            raise DataError(f"batches: batch_size must be at least 1; got {batch_size}.")
        if workers < 0:
            raise DataError(f"batches: workers must be at least 0; got {workers}.")
        self.items = items
        self.batch_size = min(batch_size, len(items))
        self.seed = int(seed)
        self.workers = workers
        self.epoch = 0
        self.position = 0
        self._fingerprint = items.fingerprint()
        self._drawn: tuple[tuple[int, int], Int64, npt.NDArray[np.bool_]] | None = None
        self._ahead: Iterator[ImageBatch | DataError] | None = None

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.items) // self.batch_size

    def __iter__(self) -> ImageBatches:
        return self

    def __next__(self) -> ImageBatch:
        if self.workers:
            if self._ahead is None:
                self._ahead = self._read_ahead()
            ahead = next(self._ahead)
            if isinstance(ahead, DataError):
                raise ahead
            batch = ahead
        else:
            batch = self.peek()
        self.epoch, self.position = self._after(self.epoch, self.position)
        return batch

    def peek(self) -> ImageBatch:
        """The batch that comes next, which stays the next."""
        return _collate([_read(self.items, *key) for key in self._keys(self.epoch, self.position)])

    def close(self) -> None:
        """Ends the worker processes; the next batch starts others."""
        self._ahead = None

    def _after(self, epoch: int, position: int) -> tuple[int, int]:
        return (epoch, position + 1) if position + 1 < len(self) else (epoch + 1, 0)

    def _keys(self, epoch: int, position: int) -> list[tuple[int, bool]]:
        """(item, mirrored) of every row of a batch."""
        if self._drawn is None or self._drawn[0] != (self.seed, epoch):
            n = len(self.items)
            words = np.random.SeedSequence([self.seed % 2**64, epoch, *b"flip"]).generate_state(1, np.uint64)
            coins = torch.rand(n, generator=torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))).numpy()
            self._drawn = ((self.seed, epoch), permutation(n, self.seed, epoch), coins < self.items.flip)
        _, order, mirrored = self._drawn
        start = position * self.batch_size
        return [(int(i), bool(mirrored[i])) for i in order[start : start + self.batch_size]]

    def _read_ahead(self) -> Iterator[ImageBatch | DataError]:
        def keys() -> Iterator[list[tuple[int, bool]]]:
            at = self.epoch, self.position
            while True:
                yield self._keys(*at)
                at = self._after(*at)

        loader = DataLoader(
            _Reader(self.items),
            batch_sampler=keys(),
            num_workers=self.workers,
            collate_fn=_passed_on,
            generator=torch.Generator(),  # or it would draw from the global one
        )
        return iter(loader)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch comes from, JSON-able: seed, epoch, position (in batches), batch size, data, chance."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "batch_size": self.batch_size,
            "flip": self.items.flip,
            "data": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken: the following batches are the same to the bit.

        Raises:
            DataError: the state belongs to another batch size, to other data or another chance of mirroring.
        """
        for key, mine in (("batch_size", self.batch_size), ("data", self._fingerprint), ("flip", self.items.flip)):
            if state[key] != mine:
                raise DataError(
                    f"batches: the saved state has {key} {state[key]}; this run has {mine}. "
                    "Resume with the same data, options and batch size."
                )
        self.seed, self.epoch, self.position = int(state["seed"]), int(state["epoch"]), int(state["position"])
        self.close()


Item = tuple[Tensor, int, bool]


class _Reader(Dataset[Item | DataError]):
    """What a worker process holds. Errors are handed over as values, without the worker's traceback around them."""

    def __init__(self, items: Views) -> None:
        self.items = items

    def __getitem__(self, key: tuple[int, bool]) -> Item | DataError:
        try:
            return _read(self.items, *key)
        except DataError as error:
            return DataError(str(error))


def _passed_on(rows: list[Item | DataError]) -> ImageBatch | DataError:
    read = [row for row in rows if not isinstance(row, DataError)]
    return _collate(read) if len(read) == len(rows) else next(row for row in rows if isinstance(row, DataError))


def _read(items: Views, i: int, mirrored: bool) -> Item:
    return items.view(i, mirrored), i, mirrored


def _collate(rows: list[Item]) -> ImageBatch:
    x, indices, flipped = zip(*rows, strict=True)
    return ImageBatch(torch.stack(x), torch.tensor(indices), torch.tensor(flipped))
