"""combine: several saved adapters, of any methods, merged into one.

At every place the updates ``D_i = W_i - W`` are merged by a rule (``artifacts/rules.py``) and stored as a LoRA of scale 1. With
a rule of sums and low-rank updates everything stays in the factors: exact by concatenation, or the best at a rank by a QR and an
SVD of their small core. Any other mixture goes through the dense update of one place at a time. Parameters that are no matrix
(biases, norms) and whole parameters (a trained head) are stored as new values of their own.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.artifacts.base import Base, LiveBase
from trimtab.artifacts.heads import check_heads, check_sizes, common_notes, head_value, is_fresh
from trimtab.artifacts.rules import RuleEntry, rule_entry
from trimtab.artifacts.saved import Saved, class_of, open_saved
from trimtab.artifacts.updates import Place, places, reference, update_of, whole_value
from trimtab.artifacts.writing import as_low_rank, as_value, write_adapters
from trimtab.core import fingerprint
from trimtab.core.contracts import Adapter, Selection
from trimtab.core.errors import CheckpointMismatch, NotMergeable, ShapeMismatch, TrimtabError, Unsupported, raise_all
from trimtab.core.folders import apart
from trimtab.core.site import Site
from trimtab.core.table import Table
from trimtab.kernels.thin import Thin, Update, cut, dense, distance, norm

__all__ = ["check_size", "check_weights", "combine", "merge_all", "common_base", "open_base", "place_seed"]


def combine(
    adapters: Sequence[str | os.PathLike] | str | os.PathLike,
    out: str | os.PathLike,
    *,
    weights: Sequence[float] | None = None,
    rule: str = "linear",
    rank: int | None = None,
    max_error: float | None = None,
    base: str | os.PathLike | nn.Module | None = None,
    name: str | None = None,
    seed: int = 0,
    format: str = "trimtab",
    heads: str = "average",
    **parameters: Any,
) -> Table:
    """Merge saved adapters into one, saved at ``out``; the same function as ``trimtab merge A B --out OUT``.

    A place that some adapters lack gets nothing from them; weights are not changed for it. No adapter needs to have the others'
    method, rank or places.

    Args:
        adapters: folders or files of any format that ``tt.load`` reads; a single path is a list of one.
        out: a folder that is none of them.
        weights: one an adapter; None: 1/n each (``task_arithmetic``: 1 each). Negative ones subtract.
        rule: see ``tt.merge_rules()``.
        rank: of the result at every place, the best at that rank; None: exact, or what ``max_error`` needs.
        max_error: the largest relative error ``||stored - merged|| / ||merged||`` that the rank may cost at a place.
        base: the model that the adapters were made for, a folder or a module; needed where an update depends on its weights,
            as DoRA's or OFT's, and for checking that the adapters are for it.
        name: the new adapter's; None: the names joined with ``+``.
        seed: of rules that draw; a place's draws depend on it and on the place's name alone.
        format: ``"trimtab"`` or ``"peft"``.
        heads: what becomes of heads that the adapters bring along and the base has no values for, whatever the rule:
            ``"average"`` of those that have it, in the proportion of their weights; the ``"first"`` adapter's; ``"drop"``.
        parameters: the rule's own, such as ``density=0.2``.

    Returns:
        A row a place: rank, ``error`` (against the exact weighted sum, relative, Frobenius) and ``cut`` (what storing at that
        rank lost of the merged update). The manifest carries the errors too.

    Raises:
        NoMatch: unknown rule or parameter. ShapeMismatch: weights or ranks that do not fit. CheckpointMismatch: damaged files,
        or adapters of different bases. NotMergeable: something that is no update of a weight. Unsupported: the base is needed,
        or ``out`` is one of the adapters.
    """
    adapters = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
    entry = rule_entry(rule)
    values = entry.bind(parameters)
    factors = check_weights(adapters, weights, entry)
    apart(out, [*adapters, base])
    check_size(rank, max_error)
    check_heads(heads)
    if base is not None:
        check_sizes(adapters, heads)
    model = open_base(base, adapters)
    opened = [open_saved(path, model) for path in adapters]
    sample, notes = common_base(opened), common_notes(opened, heads)
    merged, report = merge_all(opened, factors, entry, values, model, rank=rank, max_error=max_error, seed=seed, heads=heads)
    made = {
        "by": "combine", "rule": rule, "weights": factors, "parameters": values, "seed": seed, "heads": heads,
        "from": [{"name": s.group.name, "source": Path(s.source).name, "mark": s.mark} for s in opened],
        "errors": {row["path"]: row["error"] for row in report},
    }  # fmt: skip
    name = name or "+".join(s.group.name for s in opened)
    write_adapters(merged, Path(out), name=name, base=sample, model=model, format=format, made=made, notes=notes)
    return report


def check_weights(adapters: Sequence[Any], weights: Sequence[float] | None, rule: RuleEntry) -> list[float]:
    """One finite weight an adapter.

    Raises:
        ShapeMismatch: no adapter, one twice, or weights that are not as many finite numbers.
    """
    if not adapters:
        raise ShapeMismatch("there is nothing to merge: no adapter was given")
    paths = [os.path.realpath(path) for path in adapters]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise ShapeMismatch(f"{twice[0]} is given twice; give it once, with the sum of its weights")
    if weights is None:
        return rule.default_weights(len(adapters))
    found = [float(w) for w in weights]
    if len(found) != len(adapters) or not all(map(math.isfinite, found)):
        raise ShapeMismatch(f"{len(adapters)} adapters need as many finite weights; found {list(weights)}")
    return found


def check_size(rank: int | None, max_error: float | None) -> None:
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ShapeMismatch(f"a rank is an integer of at least 1; found {rank!r}")
    if max_error is not None and not 0 <= max_error < 1:
        raise ShapeMismatch(f"max_error is relative, at least 0 and below 1; found {max_error!r}")


def open_base(base: str | os.PathLike | nn.Module | None, adapters: Iterable[str | os.PathLike]) -> Base | None:
    """The base of the adapters: a module as it is, a folder by its config and its files' headers, None for None."""
    if base is None:
        return None
    if isinstance(base, nn.Module):
        return LiveBase(base)
    from trimtab.artifacts.folder_base import open_folder

    return open_folder(base, [class_of(Path(path)) for path in adapters], adapters)


def common_base(opened: Sequence[Saved]) -> dict[str, Any]:
    """The samples of the adapters' base, together.

    Raises:
        CheckpointMismatch: two adapters carry samples of different bases.
    """
    for number, saved in enumerate(opened):
        for other in opened[:number]:
            reason = fingerprint.difference(saved.base, other.base)
            if reason is not None:
                raise CheckpointMismatch(f"{saved.source} and {other.source} were made for different bases: {reason}")
    return fingerprint.join([saved.base for saved in opened])


def place_seed(seed: int, name: str) -> int:
    """The seed of one place, the same in whatever order places are visited."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1


def merge_all(
    opened: Sequence[Saved],
    weights: list[float],
    rule: RuleEntry,
    values: dict[str, Any],
    base: Base | None,
    *,
    rank: int | None,
    max_error: float | None,
    seed: int,
    heads: str = "average",
) -> tuple[list[Adapter], Table]:
    """New adapters, and their report; all problems together."""
    report = Table(("path", "shape", "method", "rank", "error", "cut"))
    merged: list[Adapter] = []
    problems: list[TrimtabError] = []
    total = [0.0, 0.0]
    for place in places(opened):
        try:
            with torch.no_grad():
                if _whole_alone(place, rule, weights, base):
                    made = _whole(place, weights, heads if is_fresh(place, base) else "average", report)
                else:
                    made = _merge_place(place, weights, rule, values, base, rank=rank, max_error=max_error, seed=seed)
        except TrimtabError as error:
            problems.append(error)
            continue
        if made is None:
            continue
        adapter, exact, stored, lost = made
        size, off = norm(exact), distance(stored, exact)
        total[0] += off**2
        total[1] += size**2
        merged.append(adapter)
        kind = type(adapter.config).__name__
        report.add(
            place.name, "x".join(map(str, place.site.shape)), kind, getattr(adapter.config, "rank", ""),
            off / size if size else (0.0 if off == 0 else math.inf), lost,
        )  # fmt: skip
    raise_all(problems)
    if not merged:
        raise NotMergeable('nothing is left to store: the adapters hold heads alone, and heads="drop" leaves them out')
    overall = math.sqrt(total[0] / total[1]) if total[1] else 0.0
    listed = ", ".join(f"{w:.4g} {s.group.name}" for w, s in zip(weights, opened, strict=True))
    report.title = f"{rule.name} of {listed}; overall error against the weighted sum {overall:.3g}"
    return merged, report


def _merge_place(
    place: Place, weights: list[float], rule: RuleEntry, values: dict[str, Any], base: Base | None, *,
    rank: int | None, max_error: float | None, seed: int,
) -> tuple[Adapter, Update, Update, float]:  # fmt: skip
    """The new adapter of one place, the exact weighted sum, what is stored in its stead, and the relative loss of storing."""
    site = place.site
    mine = [weights[number] for number, _ in place.effects]
    wholes = [whole_value(effect) for _, effect in place.effects]
    W = None
    if all(value is not None for value in wholes):
        W = _start(place, wholes, base)
        updates: list[Update] = [value.to(W.dtype) - W for value in wholes]
    else:
        updates = [update_of(effect, site, base) for _, effect in place.effects]
    bad = [u.shape for u in updates if tuple(u.shape) != tuple(site.shape)]
    if bad:
        raise ShapeMismatch(f"{place.name} is {tuple(site.shape)} for one adapter and {tuple(bad[0])} for another")
    exact = sum(w * u for w, u in zip(mine, updates, strict=True))
    dense_rule = not rule.thin or any(isinstance(u, Tensor) for u in updates)
    given = [dense(u).to(_dtype(site)) for u in updates] if dense_rule else updates
    merged = rule(given, mine, values, seed=place_seed(seed, place.name))
    if not math.isfinite(norm(merged)):
        raise NotMergeable(f"the merged update of {place.name} holds NaN or infinite values; nothing was written")
    if W is None and site.kind == "vector":
        W = reference(site, base, _dtype(site))
        if W is None:
            raise Unsupported(f"{place.name} is no matrix and is stored as its new values; say which base it is for: base=...")
    if W is not None:
        config = next((e.config for _, e in place.effects if isinstance(e, Selection)), None)
        return as_value(site, W + dense(merged), config), exact, merged, 0.0
    if isinstance(merged, Thin) and rank is None and max_error is None and merged.rank <= min(site.shape[-2:]):
        return as_low_rank(site, merged), exact, _stored(site, merged), 0.0
    if rank is None and max_error is None and not isinstance(merged, Thin):
        raise Unsupported(
            f"the merged update of {place.name} is dense; say at which rank to store it, or how large an error the rank may make: "
            "rank=... or max_error=..., or merge into the base, which takes it as it is"
        )
    factors, lost = cut(merged, rank=rank, max_error=max_error)
    return as_low_rank(site, factors), exact, _stored(site, factors), lost


def _dtype(site: Site) -> torch.dtype:
    return torch.float64 if site.dtype == torch.float64 else torch.float32


def _stored(site: Site, factors: Thin) -> Thin:
    """The factors as they are written."""
    return Thin(factors.b.to(_dtype(site)), factors.a.to(_dtype(site)))


def _start(place: Place, wholes: list[Tensor], base: Base | None) -> Tensor:
    """The base's own values, which whole values are changes of.

    Raises:
        Unsupported: there is no base.
    """
    W = reference(place.site, base, torch.promote_types(wholes[0].dtype, torch.float32))
    if W is None:
        raise Unsupported(
            f"{place.name} is replaced as a whole, and no base is given to measure the change from: base=... (--base); without it "
            "only an average (rule='linear', weights that sum to 1) of adapters that all have it is defined"
        )
    return W


def _whole_alone(place: Place, rule: RuleEntry, weights: list[float], base: Base | None) -> bool:
    """Whether a place has whole values which no values of the base enter: a fresh head, or an average of all, where they cancel."""
    wholes = [whole_value(effect) for _, effect in place.effects]
    if any(value is None for value in wholes) or reference(place.site, base, torch.float32) is not None:
        return False
    everywhere = {number for number, _ in place.effects} == set(range(len(weights)))
    return is_fresh(place, base) or (rule.name == "linear" and everywhere and abs(sum(weights) - 1) < 1e-9)


def _whole(place: Place, weights: list[float], heads: str, report: Table) -> tuple[Adapter, Update, Update, float] | None:
    """As ``_merge_place``, for whole values alone; None where they are left out. Says what became of a head."""
    wholes = [whole_value(effect) for _, effect in place.effects]
    value, factors = head_value(place, wholes, weights, heads)
    if len(weights) > 1 and is_fresh(place, None):
        what = {"average": "the average of the adapters' heads", "first": "the first adapter's", "drop": "left out"}[heads]
        report.notes.append(f"{place.name} is a head: {what}")
    if value is None:
        return None
    exact = sum(factor * whole.to(value.dtype) for factor, whole in zip(factors, wholes, strict=True) if factor)
    config = next(effect.config for _, effect in place.effects if isinstance(effect, Selection))
    return as_value(place.site, value, config), exact, value, 0.0
