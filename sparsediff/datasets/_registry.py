"""The data sets by name.

A data set is a subclass of `Dataset` in a file of this package that has its name, decorated with
`@DATASETS.register(name)`. It says where its files are (`locate`) and reads them into absolute polylines (`read`);
preparation, splits and cache are common.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sparsediff.registry import Registry

from . import _cache as caching
from ._preparation import Complaints, Drawings, Preparation, prepare
from ._strokes import DataError, StrokeData


@dataclass(frozen=True)
class Request:
    """What a caller asked a data set for.

    Args:
        path: the caller's file or folder; None: the data set's own place.
        category: of a data set that has categories.
        folder: where downloads of this data set belong.
        preparation: the common options.
        options: the data set's own options, defaults filled in.
    """

    path: Path | None
    category: str | None
    folder: Path
    preparation: Preparation
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """Where a request's drawings come from.

    Args:
        files: what `read` opens.
        text: for provenance: what this is, in words that another person can follow.
        identity: JSON-able; equal identities mean equal content.
        kind: tells `read` which of several formats this is.
    """

    files: tuple[Path, ...]
    text: str
    identity: Mapping[str, Any]
    kind: str = ""


class Entry:
    """One registered data set, of drawings (`Dataset`) or of images (`ImageDataset`)."""

    name: ClassVar[str]
    summary: ClassVar[str]
    licence: ClassVar[str]


class Dataset(Entry):
    """One registered data set of drawings.

    `options` maps the name of every own option to its allowed values, the default first. `preparation` holds the data
    set's defaults of common options where they differ.
    """

    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    preparation: ClassVar[Mapping[str, Any]] = {}
    has_categories: ClassVar[bool] = False
    needs_path: ClassVar[bool] = False

    def locate(self, request: Request) -> Source:
        """Finds the files, downloading what has a public address.

        Raises:
            DataError: they are not there; the message says what to put where.
        """
        raise NotImplementedError

    def read(self, request: Request, source: Source, complaints: Complaints) -> Drawings:
        """Reads them.

        Raises:
            DataError: a file, or an item under on_bad="error", is unusable.
        """
        raise NotImplementedError


DATASETS: Registry[type[Entry]] = Registry("data set", __name__.rpartition(".")[0])


def names() -> list[str]:
    """The names of all data sets, sorted; imports none of them."""
    return DATASETS.names()


def get(name: str) -> type[Entry]:
    """The data set `name`.

    Raises:
        DataError: there is none.
    """
    try:
        return DATASETS.get(name)
    except ValueError as error:
        raise DataError(str(error)) from None


def load(
    name: str,
    *,
    path: str | os.PathLike[str] | None = None,
    category: str | None = None,
    cache: str | os.PathLike[str] | bool | None = None,
    **options: Any,
) -> StrokeData:
    """Loads a data set of drawings, prepared and split.

    Args:
        name: one of `names()`.
        path: the file or folder with the data; None: the data set's own place, downloaded where it has a public
            address.
        category: for data sets that have categories.
        cache: the folder of downloads and prepared drawings (see `cache.data_dir`); False: do not use prepared
            drawings.
        **options: the fields of `Preparation`, and the data set's own (`get(name).options`).

    Returns:
        The drawings. They depend on the source and the options alone.

    Raises:
        DataError: unknown name or option, missing or unusable data.
    """
    entry = get(name)
    if not issubclass(entry, Dataset):
        raise DataError(
            f"{name}: holds images, not drawings; expected another --dataset (`load_images` reads this one)."
        )
    dataset = entry()
    request = _request(dataset, path, category, None if isinstance(cache, bool) else cache, options)
    source = dataset.locate(request)
    preparation = dataclasses.asdict(request.preparation)
    chosen = {**preparation, **request.options, **({"category": category} if category else {})}
    kept = caching.prepared_path(request.folder.parent, name, {"source": dict(source.identity), "options": chosen})
    if cache is not False:
        data = caching.load(kept)
        if data is not None:
            return data
    complaints = Complaints(request.preparation.on_bad)
    raw = dataset.read(request, source, complaints)
    train, valid, test = prepare(raw, request.preparation, complaints)
    provenance = {
        "source": source.text,
        "identity": {k: v for k, v in source.identity.items() if k not in ("path", "changed_ns")},
        "licence": dataset.licence,
        "options": {k: list(v) if isinstance(v, tuple) else v for k, v in chosen.items()},
        "read": len(raw),
        "dropped": dict(complaints.counts),
    }
    data = StrokeData(name, train, valid, test, request.preparation.scale, provenance)
    if cache is not False:
        caching.save(kept, data)
    return data


def _request(
    dataset: Dataset,
    path: str | os.PathLike[str] | None,
    category: str | None,
    folder: str | os.PathLike[str] | None,
    options: Mapping[str, Any],
) -> Request:
    fields = {f.name for f in dataclasses.fields(Preparation)}
    unknown = sorted(set(options) - fields - set(dataset.options))
    if unknown:
        allowed = ", ".join(sorted(fields | set(dataset.options)))
        raise DataError(f"{dataset.name}: unknown option {', '.join(unknown)}; expected some of: {allowed}.")
    own = {}
    for key, allowed_values in dataset.options.items():
        # Compared as text, which is what the command line has: true for True.
        by_text = {str(value).lower(): value for value in allowed_values}
        given = options.get(key, allowed_values[0])
        if str(given).lower() not in by_text:
            allowed = ", ".join(map(repr, allowed_values))
            raise DataError(f"{dataset.name}: {key} must be one of {allowed}; got {given!r}.")
        own[key] = by_text[str(given).lower()]
    if category is not None and not dataset.has_categories:
        raise DataError(f"{dataset.name}: has no categories; got category={category!r}. Leave it out.")
    if dataset.needs_path and path is None:
        raise DataError(
            f"{dataset.name}: has no place of its own: give the file with path= (--data on the command line)."
        )
    preparation = Preparation(**{**dataset.preparation, **{k: v for k, v in options.items() if k in fields}})
    return Request(
        None if path is None else Path(path).expanduser(),
        category,
        caching.data_dir(folder) / dataset.name,
        preparation,
        own,
    )
