"""What ``layers=`` means: indices within one tower of blocks, or a tower's name and indices in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from trimtab.core.blocks import Tower
from trimtab.core.errors import NoMatch, TrimtabError, raise_all

if TYPE_CHECKING:
    from trimtab.core.anatomy import Anatomy
    from trimtab.core.selection import Place

__all__ = ["Layers", "chosen_blocks"]

Layers = Sequence[int] | Mapping[str, Sequence[int]] | None


def chosen_blocks(anatomy: Anatomy, layers: Layers, targeted: Callable[[], list[Place]]) -> set[int] | None:
    """Indices of the blocks that ``layers`` means, None for all.

    Args:
        layers: indices, which count within the one tower that the targets stand in; or tower -> indices.
        targeted: the places that the targets mean without ``layers``; asked for where a model has several towers.

    Raises:
        NoMatch: an index, or a tower's name, that does not exist; or indices alone where several towers are targeted.
    """
    if layers is None:
        return None
    if isinstance(layers, Mapping):
        return _by_name(anatomy, layers)
    indices = _indices(layers)
    towers = anatomy.towers
    if len(towers) > 1:
        hit = {place.block for place in targeted() if place.block is not None}
        towers = tuple(t for t in towers if hit & set(t.blocks))
        if len(towers) > 1:
            raise NoMatch(
                f"layers={indices} does not say what it counts: the targets stand in {len(towers)} towers, {_told(towers)}; say "
                f"layers={{{_short(towers[0], anatomy.towers)!r}: {indices}}}, or name targets in one of them"
            )
    problems: list[TrimtabError] = []
    found = _in(towers[0] if towers else None, indices, problems)
    raise_all(problems)
    return found


def _by_name(anatomy: Anatomy, layers: Mapping[str, Sequence[int]]) -> set[int]:
    problems: list[TrimtabError] = []
    found: set[int] = set()
    if not layers:
        problems.append(NoMatch(f"layers={{}} names no tower; there are: {_told(anatomy.towers)}"))
    for name, given in layers.items():
        hits = [t for t in anatomy.towers if t.path == name] or [t for t in anatomy.towers if f".{name}." in f".{t.path}."]
        if len(hits) == 1:
            found |= _in(hits[0], _indices(given), problems)
        else:
            what = f"means {len(hits)} towers" if hits else "is no tower of this model"
            problems.append(NoMatch(f"layers: {name!r} {what}; there are: {_told(anatomy.towers) or 'none'}"))
    raise_all(problems)
    return found


def _indices(given: int | Sequence[int]) -> list[int]:
    many = isinstance(given, Iterable) and not isinstance(given, str | bytes)
    indices = list(given) if many else [given]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in indices):
        raise NoMatch(f"layers are numbers of blocks, as in layers=[0, 1], or tower -> numbers, found {given!r}")
    return sorted(set(indices))


def _in(tower: Tower | None, indices: list[int], problems: list[TrimtabError]) -> set[int]:
    """The blocks at ``indices`` of a tower."""
    count = 0 if tower is None else len(tower.blocks)
    bad = [i for i in indices if not 0 <= i < count]
    if bad or not indices:
        where = f" in {tower.path}" if tower is not None else ""
        valid = f"0 to {count - 1}{where}" if count else "none: no repeated blocks were found"
        problems.append(NoMatch(f"layers={indices} names blocks that do not exist ({bad or 'no index given'}); valid: {valid}"))
        return set()
    return {tower.blocks[i] for i in indices}  # type: ignore[union-attr]


def _told(towers: Sequence[Tower]) -> str:
    return ", ".join(f"{t.path} ({len(t.blocks)} blocks)" for t in towers)


def _short(tower: Tower, towers: Sequence[Tower]) -> str:
    """The first part of a tower's path that no other tower has, or the path."""
    others = [f".{t.path}." for t in towers if t is not tower]
    parts = [p for p in tower.path.split(".") if p != "*" and not any(f".{p}." in other for other in others)]
    return parts[0] if parts else tower.path
