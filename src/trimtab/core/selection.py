"""Which places a ``targets`` value means. Every clause must match, otherwise ``NoMatch`` with the nearest names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from trimtab.core import anatomy as anatomy_module
from trimtab.core.anatomy import Anatomy, is_matrix
from trimtab.core.errors import NoMatch, TrimtabError, Unsupported, nearest, raise_all
from trimtab.core.site import Rows
from trimtab.core.sublayers import SUBLAYERS, Sublayer

__all__ = ["GROUPS", "ROLES", "SUBLAYERS", "Place", "clauses_of", "describe", "select"]

ROLES = (
    "attn.q", "attn.k", "attn.v", "attn.o", "attn.qkv", "attn.kv", "mlp.gate", "mlp.up", "mlp.gate_up", "mlp.down",
    "norm", "embedding", "head", "block", "conv", "router",
)  # fmt: skip
_MATRIX = ("attn.", "mlp.", "linear")
#: group -> test of a role
GROUPS: dict[str, Callable[[str], bool]] = {
    "attention": lambda role: role.startswith("attn."),
    "mlp": lambda role: role.startswith("mlp."),
    "linear": lambda role: role.startswith(_MATRIX),
    "all-linear": lambda role: role.startswith(_MATRIX),
}


@dataclass(frozen=True)
class Place:
    """A place that a clause matched.

    Attributes:
        path: dotted path of the module.
        module: the module.
        tensor: the parameter, where the module's own matrix is not meant (packed projections, expert banks).
        part, rows: q, k or v of a fused matrix, and its rows.
        role: the anatomy's name for it.
        block: index of its block.
        source: path of another module whose first input is read here, for methods on activations; None: the module's own.
        source_module: that module.
        clause: the clause of ``targets`` that named it; None where the method's default did.
    """

    path: str
    module: nn.Module
    tensor: str | None = None
    part: str | None = None
    rows: Rows | None = None
    role: str | None = None
    block: int | None = None
    source: str | None = None
    source_module: nn.Module | None = None
    clause: str | None = None

    @property
    def key(self) -> tuple[str, str | None, str | None]:
        """What tells two places apart."""
        return self.path, self.tensor, self.part


Targets = str | Iterable[str] | Callable[[str, nn.Module], bool] | None


def select(
    model: nn.Module,
    targets: Targets,
    *,
    layers: Sequence[int] | None = None,
    anatomy: Anatomy | None = None,
    default: str = "linear",
    leaves: Callable[[nn.Module], bool] | None = None,
    containers: bool = False,
    reads: str | None = None,
    wanted: str = "",
) -> list[Place]:
    """The places that ``targets`` means, in model order, each once.

    A clause is tried as a role or group of roles (``attn.q``, ``attention``), then as a name or dotted suffix, then as a
    regular expression that must match a path or a dotted suffix of it in full. A clause that names a container means the
    places below it.

    Args:
        targets: clauses joined by ``|``, a list of them, a callable ``(path, module) -> bool``, or None for ``default``, of which
            one clause must match.
        layers: block indices to stay within.
        leaves: what counts as a place; None: modules with a matrix, packed projections, expert banks.
        containers: take a matched module itself, even if it is no leaf.
        reads: for methods on activations, which parts of a branch they see: ``"output"``, ``"input"`` or ``"residual"``. The
            clauses ``attn``, ``cross`` and ``mlp`` then mean whole attentions and feed-forwards, one place each.
        wanted: what a place must have, as a message says it, where ``leaves`` looks for it.

    Raises:
        NoMatch: clauses that match nothing, all together; or no clause at all.
        Unsupported: a fused matrix is selected both whole and in part; or what ``reads`` asks for is not known there.
    """
    anatomy = anatomy or anatomy_module.of(model)
    problems: list[TrimtabError] = []
    allowed = _layers(anatomy, layers, problems)
    raise_all(problems)
    search = _Search(anatomy, leaves, containers, allowed, reads, wanted)
    value = default if targets is None else targets
    found: dict[tuple, Place] = {}
    if callable(value):
        hits = [place for path, module in anatomy.modules.items() if path and value(path, module) for place in search.at(path)]
        if not hits:
            problems.append(NoMatch(f"the callable matches none of {len(anatomy.modules)} modules{search.hint()}"))
        found = {place.key: replace(place, clause="the callable") for place in hits}
    else:
        for clause in clauses_of(value, f"leave targets out for the method's own default, {default!r}, or name places"):
            hits = search.clause(clause)
            if not hits:
                problems.append(NoMatch(search.explain(clause)))
            name = None if targets is None else clause
            found.update({place.key: replace(place, clause=name) for place in hits if place.key not in found})
        if targets is None and found:
            problems.clear()  # a default means what there is of it
    if reads is not None:
        found = _as_modules(search, found, problems)
    _collisions(found, problems)
    raise_all(problems)
    order = {path: index for index, path in enumerate(anatomy.modules)}
    return sorted(found.values(), key=lambda place: (order[place.path], place.tensor or "", place.rows.start if place.rows else 0))


def describe(anatomy: Anatomy) -> str:
    """What exists, grouped and counted: ``attn.q x 12, norm x 25``."""
    return ", ".join(f"{role} x {count}" for role, count in anatomy.count().items())


def _layers(anatomy: Anatomy, layers: Sequence[int] | None, problems: list[TrimtabError]) -> set[int] | None:
    if layers is None:
        return None
    many = isinstance(layers, Iterable) and not isinstance(layers, str | bytes)
    given = list(layers) if many else [layers]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in given):
        problems.append(NoMatch(f"layers are numbers of blocks, as in layers=[0, 1], found {layers!r}"))
        return None
    wanted = set(given)
    bad = sorted(i for i in wanted if not 0 <= i < len(anatomy.blocks))
    if bad or not wanted:
        valid = f"0 to {len(anatomy.blocks) - 1}" if anatomy.blocks else "none: no repeated blocks were found"
        problems.append(
            NoMatch(f"layers={sorted(wanted)} names blocks that do not exist ({bad or 'no index given'}); valid: {valid}")
        )
    return wanted


def clauses_of(value: str | Iterable[str], advice: str) -> list[str]:
    """The clauses of an expression, or of a list of expressions.

    Raises:
        NoMatch: there is none. Unsupported: something else than texts.
    """
    if not isinstance(value, str | Iterable) or isinstance(value, bytes):
        raise Unsupported(f"places are named by a text, a list of texts or a callable (path, module) -> bool, found {value!r}")
    texts = [value] if isinstance(value, str) else list(value)
    bad = [text for text in texts if not isinstance(text, str)]
    if bad:
        raise Unsupported(f"a list of places holds texts, found {bad[0]!r} of type {type(bad[0]).__name__}")
    found = [clause for text in texts for clause in _split(text)]
    if not any(found):
        raise NoMatch(f"{value!r} names no place, so that nothing would learn; {advice}")
    return found


def _split(value: str) -> list[str]:
    """Clauses of an expression: split at ``|`` outside brackets."""
    clauses, depth, start = [], 0, 0
    for index, letter in enumerate(value):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "|" and depth == 0:
            clauses.append(value[start:index])
            start = index + 1
    return [clause.strip() for clause in [*clauses, value[start:]]]


@dataclass
class _Search:
    anatomy: Anatomy
    leaves: Callable[[nn.Module], bool] | None
    containers: bool
    allowed: set[int] | None
    reads: str | None = None
    wanted: str = ""

    def inside(self, path: str) -> bool:
        """Whether the layers' restriction lets ``path`` through."""
        return self.allowed is None or self.anatomy.block_of(path) in self.allowed

    def clause(self, clause: str) -> list[Place]:
        """All places that one clause means."""
        if self.reads is not None and clause in SUBLAYERS:
            hits = [self.branch(s) for s in self.anatomy.sublayers if s.role == clause and self.inside(s.where)]
            if hits:
                return hits
        if clause in ROLES or clause in GROUPS:
            hits = self.role(clause)
            if hits:
                return hits
        paths = [p for p in self.anatomy.modules if p and (p == clause or p.endswith(f".{clause}"))]
        if not paths:
            paths = self.regex(clause)
        found = [place for path in paths for place in self.at(path)]
        return found or self.named_tensor(clause)

    def branch(self, s: Sublayer) -> Place:
        """The place of a whole attention or feed-forward: its module, or its output matrix and the module that reads for it."""
        alone = self.reads == "output" and s.output is not None
        path = s.output if alone else s.where
        source = s.reader if self.reads == "input" and s.path is None else None
        return replace(
            self.place(path, role=self.anatomy.roles.get(path) if path == s.output != s.path else s.role),
            source=source,
            source_module=None if source is None else self.anatomy.modules[source],
        )

    def regex(self, clause: str) -> list[str]:
        try:
            pattern = re.compile(rf"(?:.*\.)?(?:{clause})", re.DOTALL)
        except re.error:
            return []
        return [path for path in self.anatomy.modules if path and pattern.fullmatch(path)]

    def named_tensor(self, clause: str) -> list[Place]:
        """A bank's parameter by its own name (``experts.gate_up_proj``)."""
        return [
            self.place(path, tensor=tensor, role=role)
            for path, tensors in self.anatomy.banks.items()
            for tensor, role in tensors.items()
            if self.inside(path) and f".{path}.{tensor}".endswith(f".{clause}")
        ]

    def role(self, clause: str) -> list[Place]:
        test = GROUPS.get(clause, lambda role: role == clause)
        places: list[Place] = []
        for path, role in self.anatomy.roles.items():
            parts = self.anatomy.parts.get(path, {})
            part = clause.removeprefix("attn.")
            if not self.inside(path):
                continue
            if self.reads is not None and clause == "attn.qkv" and isinstance(self.anatomy.modules[path], nn.MultiheadAttention):
                raise Unsupported(f"{path} packs its projections, whose output nothing shows; target the attention, 'attn'")
            if test(role):
                places += self.at(path, role=role)
            elif part in parts and clause.startswith("attn."):
                places += [replace(whole, part=part, rows=parts[part], role=clause) for whole in self.at(path)]
        for path, tensors in self.anatomy.banks.items():
            if self.leaves is None and self.inside(path):
                places += [self.place(path, tensor=tensor, role=role) for tensor, role in tensors.items() if test(role)]
        return places

    def at(self, path: str, *, role: str | None = None) -> list[Place]:
        """The place at ``path``, or the places below it if it is no place itself."""
        module = self.anatomy.modules[path]
        if self.containers or self._leaf(module):
            return [self.place(path, role=role)] if self.inside(path) else []
        banks = self.anatomy.banks.get(path, {}) if self.leaves is None else {}
        if banks:
            return [self.place(path, tensor=tensor, role=name) for tensor, name in banks.items()] if self.inside(path) else []
        below = [p for p in self.anatomy.modules if p.startswith(f"{path}.") and (self._leaf(self.anatomy.modules[p]))]
        # what a packed projection holds below it is reached by its own path
        return [self.place(p) for p in below if self.inside(p)]

    def place(self, path: str, *, tensor: str | None = None, role: str | None = None) -> Place:
        module = self.anatomy.modules[path]
        if tensor is None and self.leaves is None and isinstance(module, nn.MultiheadAttention):
            tensor = "in_proj_weight"
        return Place(path, module, tensor, role=role or self.anatomy.roles.get(path), block=self.anatomy.block_of(path))

    def _leaf(self, module: nn.Module) -> bool:
        if self.leaves is not None:
            return self.leaves(module)
        if isinstance(module, nn.MultiheadAttention):
            return module.in_proj_weight is not None
        return is_matrix(module) or isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd))

    def hint(self) -> str:
        whole = Counter(s.role for s in self.anatomy.sublayers) if self.reads is not None else {}
        branches = "".join(f", {role} x {n} (whole)" for role, n in whole.items())
        return f"; there are: {describe(self.anatomy)}{branches}"

    def explain(self, clause: str) -> str:
        """Why a clause matched nothing, and what is near it."""
        if not clause:
            return f"an empty clause names no place{self.hint()}"
        test = GROUPS.get(clause, lambda role: role == clause)
        there = [path for path, role in self.anatomy.roles.items() if test(role) and self.inside(path)]
        if there and self.wanted:
            return f"{clause!r} means {len(there)} places ({there[0]}, ...), of which none has {self.wanted}{self.hint()}"
        where = "" if self.allowed is None else f" in the layers {sorted(self.allowed)}"
        if clause in (*ROLES, *GROUPS, *SUBLAYERS):
            return f"there is no {clause!r} in this model{where}{self.hint()}"
        here = list(dict.fromkeys(self.anatomy.roles.values()))
        known = [*here, *(group for group, test in GROUPS.items() if any(map(test, here)))]
        known += [s.role for s in self.anatomy.sublayers] if self.reads is not None else []
        known += list(dict.fromkeys(path.rpartition(".")[2] for path in self.anatomy.roles))
        known += list(self.anatomy.modules)
        return f"{clause!r} matches no place{where}{nearest(clause, [k for k in dict.fromkeys(known) if k])}{self.hint()}"


def _as_modules(search: _Search, found: dict[tuple, Place], problems: list[TrimtabError]) -> dict[tuple, Place]:
    """Places for methods on activations: modules that are called, and what is read there."""
    anatomy, result = search.anatomy, {}
    branches = {s.output: s for s in anatomy.sublayers if s.output} | {s.where: s for s in anatomy.sublayers}
    for place in found.values():
        parent = anatomy.modules.get(place.path.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            # out_proj's forward is never called: its parent reads the weight past it, and gives its output
            place = replace(place, path=place.path.rpartition(".")[0], module=parent)
        s = branches.get(place.path)
        if place.part is None and (place.role is None or isinstance(place.module, nn.MultiheadAttention)):
            place = replace(place, role=None if s is None else s.role)
        if search.reads == "residual":
            if s is None or s.norm is None:
                problems.append(
                    Unsupported(
                        f"no norm in front of {place.path} is known, before which the residual stream could be read; name an "
                        "attention or feed-forward of a block with norms in front, or let the adapter read the place's own input"
                    )
                )
                continue
            place = replace(place, source=s.norm, source_module=anatomy.modules[s.norm])
        result.setdefault(place.key, place)
    return result


def _collisions(found: dict[tuple, Place], problems: list[TrimtabError]) -> None:
    for place in found.values():
        if place.part is not None and (place.path, place.tensor, None) in found:
            problems.append(Unsupported(f"{place.path} is selected whole and in part ({place.part}); choose one of them"))
