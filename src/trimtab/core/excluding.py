"""What ``exclude=`` takes away from the targets: the same clauses, of which each must take something."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from trimtab.core.errors import NoMatch, TrimtabError, Unsupported
from trimtab.core.selection import Place, clauses_of
from trimtab.core.site import Site

__all__ = ["Exclusion"]


class Exclusion:
    """Clauses that take places away, a module with all that is below it.

    Args:
        exclude: clauses, as ``targets`` has them; None: nothing.
        find: the places of one clause.

    Raises:
        NoMatch: a clause matches nothing in the model.
    """

    def __init__(self, exclude: str | Iterable[str] | None, find: Callable[[str], list[Place]]):
        given = list(exclude) if isinstance(exclude, Iterable) and not isinstance(exclude, str | bytes) else exclude
        self.clauses = [] if given is None or given == [] else clauses_of(given, "leave exclude out to keep all targets")
        self.places = {clause: find(clause) for clause in self.clauses}
        self.taken = dict.fromkeys(self.clauses, 0)
        self.halves: dict[str, str] = {}  # clause -> the fused place that is targeted whole

    def left(self, places: list[Place]) -> list[Place]:
        """``places`` without what is taken away."""
        return [place for place in places if not self._takes(place.path, place.tensor, place.part)]

    def takes(self, site: Site) -> bool:
        """Whether a site of a place that is left is taken away."""
        return self._takes(site.path, site.tensor, site.part)

    def _takes(self, path: str, tensor: str | None, part: str | None) -> bool:
        hit = False
        for clause, places in self.places.items():
            for place in places:
                inside = place.path == path or path.startswith(f"{place.path}.")
                if not inside or (place.tensor is not None and place.tensor != tensor):
                    continue
                if place.part is not None and place.part != part:
                    self.halves[clause] = self.halves.get(clause, path) if part is None else ""
                    continue
                self.taken[clause] += 1
                hit = True
                break
        return hit

    def unused(self, count: int) -> list[TrimtabError]:
        """An error for each clause that took nothing away from the targets, of which ``count`` are left."""
        found: list[TrimtabError] = []
        for clause in [clause for clause, taken in self.taken.items() if not taken]:
            if self.halves.get(clause):
                found.append(
                    Unsupported(
                        f"exclude={clause!r} names rows of {self.halves[clause]}, which is targeted whole; target the parts that "
                        "are to learn instead, such as 'attn.k | attn.v'"
                    )
                )
            else:
                found.append(
                    NoMatch(
                        f"exclude={clause!r} matches {len(self.places[clause])} places, none of which is targeted ({count} are); "
                        "leave it out, or name what the targets have"
                    )
                )
        return found
