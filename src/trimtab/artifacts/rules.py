"""Merge rules: how the updates of several adapters at one place become one. A rule is a function under a decorator::

    @tt.merge_rule("median", url="https://example.org")
    def median(updates, weights):
        return torch.stack(updates).median(0).values

``updates`` has one update an adapter that acts there, each of the weight's shape; ``weights`` one number each. Keyword arguments
are the rule's parameters; their names, types and defaults are read from the signature, and the command line offers them. A rule
marked ``thin`` uses sums and scales alone, so that it may get and give factors (``kernels/thin.py``) in place of dense tensors.
A keyword ``rng`` receives a generator that depends on the seed and the place, whatever the order of work.

All rules work on the updates themselves, ``D_i = W_i - W``. Averaging the factors A and B apart, as some libraries do under
the names linear, ties and dare, leaves cross terms as large as the answer, and is not offered.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.core.errors import NoMatch, ShapeMismatch, TrimtabError, Unsupported, nearest, raise_all
from trimtab.core.table import Table
from trimtab.kernels.thin import Update

__all__ = ["RuleEntry", "merge_rule", "merge_rules", "rule_entry"]

_RULES: dict[str, RuleEntry] = {}
#: names under which other libraries know something else than a rule
_ELSEWHERE = {
    "cat": "that is rule='linear' without a rank: concatenated, exact",
    "svd": "that is rule='linear' with rank=...: the best at that rank",
    "dare_linear": "here it is rule='dare'",
    "uniform": "that is rule='linear' without weights",
}


@dataclass(frozen=True)
class RuleEntry:
    """One registered rule.

    Attributes:
        name: as ``rule=`` and ``--rule`` take it.
        function: ``(updates, weights, **parameters) -> update``.
        url: the source.
        thin: whether it takes factors.
        share: whether weights that are not given are 1/n each; else 1 each.
        parameters: name -> default of what it takes besides, ``rng`` left out.
    """

    name: str
    function: Callable[..., Update]
    url: str
    thin: bool
    share: bool
    parameters: Mapping[str, Any]

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (self.function.__doc__ or "").strip().splitlines()[0]

    @property
    def random(self) -> bool:
        """Whether it draws."""
        return "rng" in inspect.signature(self.function).parameters

    def default_weights(self, count: int) -> list[float]:
        """Weights where none are given."""
        return [1 / count if self.share else 1.0] * count

    def bind(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters with their values, checked against the signature.

        Raises:
            NoMatch: an unknown name. ShapeMismatch: a value of another type than the signature says.
        """
        kinds = typing.get_type_hints(self.function)
        problems: list[TrimtabError] = []
        for key, value in given.items():
            if key not in self.parameters:
                problems.append(NoMatch(f"the rule {self.name!r} has no parameter {key!r}{nearest(key, self.parameters)}"))
            elif not _fits(value, kinds.get(key, Any)):
                problems.append(ShapeMismatch(f"the rule {self.name!r} takes {key} as {_words(kinds[key])}; found {value!r}"))
        raise_all(problems)
        return {**self.parameters, **given}

    def __call__(self, updates: Sequence[Update], weights: Sequence[float], parameters: Mapping[str, Any], *, seed: int) -> Update:
        """The merged update; ``seed`` is the place's own."""
        more = {"rng": torch.Generator().manual_seed(seed)} if self.random else {}
        return self.function(list(updates), list(weights), **parameters, **more)


def merge_rule(name: str, *, url: str, thin: bool = False, share: bool = True) -> Callable[[Callable], Callable]:
    """Decorator that registers a function as the merge rule ``name``; see the module.

    Raises:
        Unsupported: the name is taken by another function, or a parameter has no default.
    """

    def register(function: Callable[..., Update]) -> Callable[..., Update]:
        known = _RULES.get(name)
        if known is not None and known.function.__qualname__ != function.__qualname__:
            raise Unsupported(f"the merge rule {name!r} is taken by {known.function.__module__}.{known.function.__qualname__}")
        extra = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY and p.name != "rng"]
        bare = [p.name for p in extra if p.default is p.empty]
        if bare:
            raise Unsupported(f"the parameters {', '.join(bare)} of the merge rule {name!r} need defaults")
        _RULES[name] = RuleEntry(name, function, url, thin, share, {p.name: p.default for p in extra})
        return function

    return register


def rule_entry(name: str) -> RuleEntry:
    """The rule ``name``.

    Raises:
        NoMatch: there is none; the message has the nearest names.
    """
    if name not in _RULES:
        hint = f"; {_ELSEWHERE[name]}" if name in _ELSEWHERE else nearest(name, _RULES)
        raise NoMatch(f"there is no merge rule {name!r}{hint}")
    return _RULES[name]


def merge_rules() -> Table:
    """All rules: name, parameters with their defaults, what it does, source."""
    table = Table(("rule", "parameters", "what it does", "source"))
    for name, entry in sorted(_RULES.items()):
        table.add(name, ", ".join(f"{k}={v!r}" for k, v in entry.parameters.items()), entry.summary, entry.url)
    return table


def _fits(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return not isinstance(kind, type) or isinstance(value, kind)


def _words(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    return {float: "a number", int: "an integer", bool: "true or false", str: "a text"}.get(kind, str(kind))


# -- the rules


@merge_rule("linear", url="https://arxiv.org/abs/2203.05482", thin=True)
def linear(updates: list[Update], weights: list[float]) -> Update:
    """``sum_i w_i D_i``; the average where no weights are given."""
    return sum(w * update for w, update in zip(weights, updates, strict=True))


@merge_rule("task_arithmetic", url="https://arxiv.org/abs/2212.04089", thin=True, share=False)
def task_arithmetic(updates: list[Update], weights: list[float], *, scale: float = 1.0) -> Update:
    """``scale sum_i w_i D_i``; the sum where no weights are given, negative weights forget."""
    return scale * linear(updates, weights)


@merge_rule("magnitude_prune", url="https://arxiv.org/abs/2306.01708")
def magnitude_prune(updates: list[Tensor], weights: list[float], *, density: float = 0.2) -> Tensor:
    """``sum_i w_i trim(D_i)``: of every update the ``density`` largest entries."""
    return linear([trim(update, density) for update in updates], weights)


@merge_rule("ties", url="https://arxiv.org/abs/2306.01708")
def ties(
    updates: list[Tensor],
    weights: list[float],
    *,
    density: float = 0.2,
    scale: float = 1.0,
    vote: Literal["weighted", "sum", "count"] = "weighted",
    divisor: Literal["weights", "count"] = "weights",
) -> Tensor:
    """Trim, elect a sign for every entry, average those that agree with it.

    An entry's sign is that of the ``weighted`` sum of the trimmed values, of their ``sum``, or of their signs' ``count``; zero
    counts as plus. The mean over the agreeing entries divides by their ``weights``, so that a common factor of all weights
    changes nothing, or by their ``count`` (peft's, which wants weights of 1).
    """
    trimmed = [trim(update, density) for update in updates]
    votes = {"weighted": lambda t, w: w * t, "sum": lambda t, w: t, "count": lambda t, w: t.sign()}[vote]
    elected = sum(votes(t, w) for t, w in zip(trimmed, weights, strict=True)) >= 0
    total, mass = torch.zeros_like(trimmed[0]), torch.zeros_like(trimmed[0])
    for t, w in zip(trimmed, weights, strict=True):
        value = w * t if vote == "weighted" else t
        agrees = torch.where(elected, value > 0, value < 0)
        total += torch.where(agrees, w * t, 0)
        mass += agrees * (w if divisor == "weights" else 1.0)
    return scale * torch.where(mass != 0, total / mass.masked_fill(mass == 0, 1), 0)


@merge_rule("dare", url="https://arxiv.org/abs/2311.03099")
def dare(updates: list[Tensor], weights: list[float], *, density: float = 0.5, rng: torch.Generator) -> Tensor:
    """``sum_i w_i drop(D_i)``: every entry is kept with probability ``density`` and divided by it."""
    return linear([drop(update, density, rng) for update in updates], weights)


@merge_rule("dare_ties", url="https://arxiv.org/abs/2311.03099")
def dare_ties(
    updates: list[Tensor], weights: list[float], *, density: float = 0.5, scale: float = 1.0, rng: torch.Generator
) -> Tensor:
    """The updates dropped as by ``dare``, then merged as by ``ties`` without a trim."""
    return ties([drop(update, density, rng) for update in updates], weights, density=1.0, scale=scale)


def trim(update: Tensor, density: float) -> Tensor:
    """The ``floor(density n)`` entries of largest magnitude, at least one; of equals those that come first; zeros elsewhere."""
    _check_density(density)
    flat = update.reshape(-1)
    keep = max(1, int(density * flat.numel()))
    if keep == flat.numel():
        return update
    size = flat.abs()
    threshold = size.kthvalue(flat.numel() - keep + 1).values
    chosen = size > threshold
    ties_at = (size == threshold).nonzero()[: keep - int(chosen.sum()), 0]
    chosen[ties_at] = True
    return torch.where(chosen, flat, 0).reshape(update.shape)


def drop(update: Tensor, density: float, rng: torch.Generator) -> Tensor:
    """Entries kept with probability ``density`` and divided by it, so that the expectation stays; drawn on the CPU."""
    _check_density(density)
    kept = torch.rand(update.shape, generator=rng) < density
    return torch.where(kept.to(update.device), update / density, 0)


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ShapeMismatch(f"density is the share of entries to keep, above 0 and at most 1; found {density!r}")
