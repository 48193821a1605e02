"""metrics.jsonl: one JSON object a line, in the order of training steps, also across kills and resumed runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends records to a file that never names a step twice.

    A run that dies may have logged steps beyond its newest checkpoint; those are cut off when it resumes there, as is
    a line that was only half written.

    Args:
        path: the file; made if need be.
        step: records of later steps are removed.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        kept = sum(len(line) for line in _lines(path, step))
        self._file = path.open("ab")
        self._file.truncate(kept)

    def write(self, step: int, **values: Any) -> None:
        """Appends a record; it outlives a kill of the process."""
        self._file.write(json.dumps({"step": step, **values}).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Makes what was written outlive a power cut: called before a checkpoint that stands on it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete records of a log."""
    return [json.loads(line) for line in _lines(path, None)]


def _lines(path: Path, last_step: int | None) -> list[bytes]:
    if not path.exists():
        return []
    kept: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            break
        if not line.endswith(b"\n") or (last_step is not None and step > last_step):
            break
        kept.append(line)
    return kept
