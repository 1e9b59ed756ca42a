"""The registry of schedules: one decorator fills it; the command line, the configuration and the tests read it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from trimtab.core.catalogue import Catalogue, arguments
from trimtab.core.errors import NoMatch, Unsupported, nearest
from trimtab.core.fieldtypes import checked
from trimtab.core.table import Table
from trimtab.schedules.contract import OWNERSHIPS, Schedule

__all__ = ["ScheduleEntry", "check_owners", "entries", "entry", "from_dict", "names", "schedule", "table"]

_SCHEDULES: Catalogue[ScheduleEntry] = Catalogue("schedule", "trimtab.schedules", holds="schedule")
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
        unknown = sorted(cls.owns - set(OWNERSHIPS))
        if unknown:
            raise Unsupported(f"{cls.__name__} owns {unknown[0]!r}{nearest(unknown[0], OWNERSHIPS)}")
        checked(cls)
        _SCHEDULES.add(ScheduleEntry(cls.__name__, cls, paper, tests))
        return cls

    return register


entries, names, entry = _SCHEDULES.entries, _SCHEDULES.names, _SCHEDULES.entry


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
    return cls(**arguments(values, known, cls.__name__, "argument"))


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
