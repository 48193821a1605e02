"""Collects drawings that come one at a time, as lists of coordinates, into flat arrays."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ._preparation import Drawings


class Collector:
    """A growing `Drawings`."""

    def __init__(self) -> None:
        self._xs, self._ys = array("d"), array("d")
        self._strokes, self._drawings = [0], [0]
        self._labels: list[str] = []
        self._where: list[str] = []

    def add(self, strokes: Iterable[Sequence[Any]], label: str, where: str) -> None:
        """Adds a drawing.

        Args:
            strokes: each stroke is (x…, y…) or (x…, y…, times…), sequences of numbers of one length.
            label: its name.
            where: file and item, for messages.

        Raises:
            TypeError, ValueError: it is not of that form; nothing is added.
        """
        before = len(self._xs), len(self._strokes)
        try:
            for x, y, *_ in strokes:
                if len(x) != len(y):
                    raise ValueError(f"a stroke with {len(x)} x and {len(y)} y")
                self._xs.extend(x)
                self._ys.extend(y)
                self._strokes.append(len(self._xs))
        except (TypeError, ValueError):
            del self._xs[before[0] :], self._ys[before[0] :], self._strokes[before[1] :]
            raise
        self._drawings.append(len(self._strokes) - 1)
        self._labels.append(label)
        self._where.append(where)

    def drawings(self) -> Drawings:
        """Everything added so far."""
        where = list(self._where)
        return Drawings(
            np.stack([np.array(self._xs), np.array(self._ys)], axis=1),
            np.array(self._strokes, dtype=np.int64),
            np.array(self._drawings, dtype=np.int64),
            np.array(self._labels, dtype=np.str_),
            where=lambda i: where[i],
        )
