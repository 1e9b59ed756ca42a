"""What is registered by decorators in the files of one package: methods, schedules. A new file is all that a new one needs."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from trimtab.core.errors import NoMatch, Unsupported, nearest

__all__ = ["Catalogue", "arguments"]


class Named(Protocol):
    """An entry: anything with a name."""

    @property
    def name(self) -> str: ...


E = TypeVar("E", bound=Named)


class Catalogue(Generic[E]):
    """Entries by name; reading it imports every file of its package once.

    Args:
        kind: what an entry is, for messages: ``"method"``.
        package: dotted name of the package whose files register.
        holds: the attribute of an entry with the class that implements it.
    """

    def __init__(self, kind: str, package: str, holds: str):
        self.kind, self.package, self.holds = kind, package, holds
        self._entries: dict[str, E] = {}
        self._scanned = False

    def add(self, entry: E) -> None:
        """Register ``entry``; a class of the same qualified name may replace its own (a notebook's cell that runs again).

        Raises:
            Unsupported: the name is taken by another class.
        """
        if entry.name in self._entries:
            cls, other = (getattr(each, self.holds) for each in (entry, self._entries[entry.name]))
            if other.__qualname__ != cls.__qualname__:
                raise Unsupported(
                    f"the {self.kind} name {entry.name} is taken by {other.__module__}.{other.__qualname__}; choose another"
                )
        self._entries[entry.name] = entry

    def entries(self) -> list[E]:
        """All entries, by name."""
        self._scan()
        return [self._entries[name] for name in sorted(self._entries)]

    def names(self) -> list[str]:
        """The names of all entries, sorted."""
        return [found.name for found in self.entries()]

    def entry(self, name: str) -> E:
        """The entry ``name``.

        Raises:
            NoMatch: there is none; the message has the nearest names.
        """
        self._scan()
        if name not in self._entries:
            raise NoMatch(f"there is no {self.kind} named {name!r}{nearest(name, sorted(self._entries))}")
        return self._entries[name]

    def _scan(self) -> None:
        if self._scanned:
            return
        package = importlib.import_module(self.package)
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            importlib.import_module(found.name)
        self._scanned = True


def arguments(values: Mapping[str, Any], known: Sequence[str], owner: str, what: str) -> dict[str, Any]:
    """``values`` as keyword arguments; their types are the owner's to check (``core.fieldtypes``).

    Raises:
        NoMatch: a key that ``owner`` does not take; ``what`` is what it calls them.
    """
    for key in values:
        if key not in known:
            raise NoMatch(f"{owner} has no {what} {key!r}{nearest(key, known)}")
    return dict(values)
