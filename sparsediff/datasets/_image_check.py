"""The check pass: every image is decoded once before a run depends on it, and the verdict is kept.

A verdict belongs to an image's name, its stamp (size and time of last change) and the rules. It holds a digest of the
image's bytes, which identifies the data, and what is wrong with it. So the next start reads no image, and a changed
file is checked again, alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sparsediff.files import write_atomically

from ._cache import ENVIRONMENT
from ._image_sources import ImageSource
from ._images import VERSION, BadImage, Rules

_AT_ONCE = 64  # images that an interruption waits for


@dataclass(frozen=True)
class Verdict:
    """What the check found.

    Args:
        digest: of the image's bytes; empty where they could not be read.
        wrong: why it cannot be used; None where it can.
    """

    digest: str
    wrong: str | None


def check(
    source: ImageSource, chosen: Sequence[int], rules: Rules, folder: Path | None, *, threads: int = 0
) -> list[Verdict]:
    """Verdicts on the images `chosen`, from the cache where it has them.

    Args:
        source: the images.
        chosen: which to check.
        rules: what counts as usable.
        folder: where verdicts are kept; None: nowhere.
        threads: that decode; 0: as many as CPUs, at most 8.
    """
    file = None if folder is None else _file(source, rules, folder)
    known = {} if file is None else _load(file)
    stamps = {i: source.stamp(i) for i in chosen}
    todo = [i for i in chosen if known.get(source.names[i], ("",))[0] != stamps[i]]
    if todo:
        from tqdm import tqdm

        bar = tqdm(total=len(todo), desc=f"checking {source.place.name}", unit="image", leave=False, disable=None)
        try:
            # Filters are global to the process: set here, not in the threads.
            with bar, warnings.catch_warnings(), ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
                warnings.simplefilter("ignore")  # remarks on metadata
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                for start in range(0, len(todo), _AT_ONCE):
                    part = todo[start : start + _AT_ONCE]
                    for i, verdict in zip(part, pool.map(lambda i: _judge(source, i, rules), part), strict=True):
                        known[source.names[i]] = (stamps[i], verdict.digest, verdict.wrong)
                        bar.update()
        finally:
            if file is not None:  # also what an interrupted pass has seen
                _save(file, known)
    return [Verdict(*known[source.names[i]][1:]) for i in chosen]


def _judge(source: ImageSource, i: int, rules: Rules) -> Verdict:
    digest = ""
    try:
        content = source.content(i)
        digest = hashlib.sha256(content).hexdigest()[:32]
        source.decoded(content, rules)
    except BadImage as error:
        return Verdict(digest, str(error))
    return Verdict(digest, None)


Known = dict[str, tuple[str, str, str | None]]


def _file(source: ImageSource, rules: Rules, folder: Path) -> Path:
    key = json.dumps([VERSION, str(source.place.resolve()), type(source).__name__, rules.convert, rules.max_pixels])
    return folder / "checked" / f"{source.place.name}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"


def _load(file: Path) -> Known:
    try:
        return {name: (stamp, digest, wrong) for name, (stamp, digest, wrong) in json.loads(file.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        warnings.warn(f"{file}: damaged ({error}); the images are checked again.", stacklevel=3)
        return {}


def _save(file: Path, known: Known) -> None:
    try:
        write_atomically(file, json.dumps(known, ensure_ascii=True))
    except OSError as error:
        warnings.warn(
            f"verdicts on images cannot be kept in {file.parent} ({error}); every start will check them again. "
            f"Point {ENVIRONMENT} to a folder that can be written to.",
            stacklevel=3,
        )
