"""Downloads: pooch with progress and a checksum, and one message when there is no network."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ._strokes import DataError


def download(urls: Sequence[str], target: Path, *, known_hash: str | None, remedy: str) -> Path:
    """Makes sure that `target` exists and is what it should be.

    Where the publisher's checksum is not known, the SHA-256 of the first download is kept beside the file
    (`<file>.sha256`) and every later use is checked against it.

    Args:
        urls: addresses of the same file, tried in order.
        target: where the file belongs. An existing file is checked, not fetched.
        known_hash: "md5:…" or "sha256:…", or None.
        remedy: what a person without network can do by hand: what to fetch and where to put it.

    Returns:
        `target`.

    Raises:
        DataError: none of the addresses answered, or the file is not what its checksum says.
    """
    record = target.with_name(target.name + ".sha256")
    if target.exists():
        expected = known_hash or (record.read_text().strip() if record.exists() else None)
        if expected and _digest(target, expected) != expected:
            raise DataError(
                f"{target}: checksum {expected} expected; got {_digest(target, expected)}. The file was changed or "
                f"damaged: delete it and {record.name} to fetch it again."
            )
        return target
    try:
        import pooch
    except ImportError as error:
        raise DataError(
            f"{target.name}: downloads need pooch ({error}): pip install pooch tqdm, or {remedy}"
        ) from error
    failures = []
    for url in urls:
        try:
            pooch.retrieve(
                url,
                known_hash,
                fname=target.name,
                path=target.parent,
                downloader=pooch.HTTPDownloader(progressbar=True),
            )
        except (OSError, ValueError) as error:
            failures.append(f"{url}: {_reason(error)}")
            continue
        if known_hash is None:
            record.write_text(_digest(target, "sha256:") + "\n")
        return target
    raise DataError(f"{target.name} could not be downloaded. " + " ".join(f"[{f}]" for f in failures) + f" {remedy}")


def _digest(path: Path, like: str) -> str:
    kind = like.partition(":")[0]
    with open(path, "rb") as stream:
        digest = hashlib.new(kind, usedforsecurity=False)
        while block := stream.read(1 << 20):
            digest.update(block)
    return f"{kind}:{digest.hexdigest()}"


def _reason(error: Exception) -> str:
    # The errors of requests, which pooch downloads with, are OSErrors; their texts for a missing network fill a screen.
    if "Connect" in type(error).__name__ or "Timeout" in type(error).__name__:
        return "no connection (offline, or the address is blocked)."
    return f"{error}".rstrip(".") + "."
