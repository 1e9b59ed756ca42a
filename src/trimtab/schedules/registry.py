"""The registry of schedules: one decorator fills it; the command line, the configuration and the tests read it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from trimtab.core.errors import NoMatch, Unsupported, nearest
from trimtab.core.table import Table
from trimtab.schedules.contract import OWNERSHIPS, Schedule

__all__ = ["ScheduleEntry", "check_owners", "entries", "entry", "from_dict", "names", "schedule", "table"]

_ENTRIES: dict[str, ScheduleEntry] = {}
_SCANNED = False
T = TypeVar("T", bound="type[Schedule]")


@dataclass(frozen=True)
class ScheduleEntry:
    """One registered schedule.

    Attributes:
        name: the class's name, which is the schedule's public name.
        schedule: the class.
        paper: source, ``arXiv:...`` or a URL.
        tests: keyword arguments that the suite uses for runs of a few steps on small models, one parametrisation each.
    """

    name: str
    schedule: type[Schedule]
    paper: str
    tests: tuple[dict[str, Any], ...] = ()

    @property
    def summary(self) -> str:
        """First line of the class's docstring."""
        return (self.schedule.__doc__ or "").strip().splitlines()[0]


def schedule(*, paper: str, tests: tuple[dict[str, Any], ...] = ({},)) -> Callable[[T], T]:
    """Class decorator that registers a ``Schedule``; it can then be named in a configuration and as ``tt.<Name>``.

    Raises:
        Unsupported: the name is taken by another class, or the class owns something unknown.
    """

    def register(cls: T) -> T:
        known = _ENTRIES.get(cls.__name__)
        if known is not None and known.schedule.__qualname__ != cls.__qualname__:
            taken = f"{known.schedule.__module__}.{known.schedule.__qualname__}"
            raise Unsupported(f"the schedule name {cls.__name__} is taken by {taken}; choose another")
        unknown = sorted(cls.owns - set(OWNERSHIPS))
        if unknown:
            raise Unsupported(f"{cls.__name__} owns {unknown[0]!r}{nearest(unknown[0], OWNERSHIPS)}")
        _ENTRIES[cls.__name__] = ScheduleEntry(cls.__name__, cls, paper, tests)
        return cls

    return register


def _scan() -> None:
    """Import every file of ``trimtab.schedules`` once, so that a new file is all that a new schedule needs."""
    global _SCANNED
    if _SCANNED:
        return
    package = importlib.import_module("trimtab.schedules")
    for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(found.name)
    _SCANNED = True


def entries() -> list[ScheduleEntry]:
    """All registered schedules, by name."""
    _scan()
    return [_ENTRIES[name] for name in sorted(_ENTRIES)]


def names() -> list[str]:
    """The names of all registered schedules, sorted."""
    return [found.name for found in entries()]


def entry(name: str) -> ScheduleEntry:
    """The registered schedule ``name``.

    Raises:
        NoMatch: there is no such schedule; the message has the nearest names.
    """
    _scan()
    if name not in _ENTRIES:
        raise NoMatch(f"there is no schedule named {name!r}{nearest(name, sorted(_ENTRIES))}")
    return _ENTRIES[name]


def from_dict(stored: Mapping[str, Any]) -> Schedule:
    """The schedule of ``{"name": ..., <arguments>}``, as a configuration states it.

    Raises:
        NoMatch: no such schedule, or no such argument. ValueError: a value out of its range.
    """
    values = dict(stored)
    if "name" not in values:
        raise NoMatch(f"a schedule needs its name, as in {{name: IST}}; found the keys {sorted(values)}")
    cls = entry(values.pop("name")).schedule
    known = list(inspect.signature(cls).parameters)
    for key in values:
        if key not in known:
            raise NoMatch(f"{cls.__name__} has no argument {key!r}{nearest(key, known)}")
    return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


def check_owners(schedules: Sequence[Schedule]) -> None:
    """At most one schedule of a run may own a thing.

    Raises:
        ValueError: two own the same; the message names both and what it is.
    """
    owners: dict[str, Schedule] = {}
    for each in schedules:
        for thing in sorted(each.owns):
            other = owners.setdefault(thing, each)
            if other is not each:
                raise ValueError(
                    f"{type(other).__name__} and {type(each).__name__} both own {thing}: of two schedules that change it, each "
                    "would undo what the other did; keep one of them"
                )


def table() -> Table:
    """One row a registered schedule: source, what it owns, and its summary."""
    rows = Table(("schedule", "paper", "owns", "needs the run's length", "summary"), title="schedules", limit=200)
    for found in entries():
        owns = ", ".join(sorted(found.schedule.owns))
        rows.add(found.name, found.paper, owns, found.schedule.needs_steps, found.summary)
    return rows
