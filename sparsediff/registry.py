"""Registries: one file of a package is one entry, its name is the file's name.

`names()` only lists the package's folder, so `--help` knows every model, data set and method without importing torch;
`get(name)` imports the one file that is asked for, and that file registers itself with the decorator.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """The entries of one package, by name.

    Args:
        kind: what an entry is, for messages ("method").
        package: dotted name of the package whose files are the entries; files that begin with `_` are not entries.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters an object under `name`, which must be the name of its file."""

        def enter(entry: T) -> T:
            self._entries[name] = entry
            return entry

        return enter

    def names(self) -> list[str]:
        """Sorted names of all entries; imports none of them."""
        return sorted(set(entry_names(self.package)) | set(self._entries))

    def get(self, name: str) -> T:
        """The entry called `name`, importing its file if need be.

        Raises:
            ValueError: there is no such entry; the message lists those that exist.
        """
        if name not in self._entries:
            known = self.names()
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"unknown {self.kind} {name!r}; expected one of {', '.join(known)}.{hint}")
            importlib.import_module(f"{self.package}.{name}")
        return self._entries[name]


def entry_names(package: str) -> list[str]:
    """Names of the files in `package` that are entries, without importing the package itself."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        return []
    modules = pkgutil.iter_modules(spec.submodule_search_locations)
    return sorted(module.name for module in modules if not module.name.startswith("_"))
