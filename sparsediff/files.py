"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Another name to write a file under, which becomes `path` when the block ends well and is gone when it does not;
    makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> Path:
    """Writes `text` (UTF-8) under another name and renames it, making the folder; returns `path`."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
