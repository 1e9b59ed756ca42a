"""average: checkpoints of one run become one adapter, weighted by what was measured of each.

``theta = sum_i w_i theta_i`` over the saved numbers, heads included, with weights from ``average_weights.py`` (arXiv 2504.18580;
uniform weights are its base line). It is computed as ``theta_1 + sum_i w_i (theta_i - theta_1)``, one tensor at a time in
float32, which returns equal checkpoints to the bit.

Averaging the factors of an update is not averaging the updates: with ``D_i = B_i A_i``::

    sum_i w_i D_i - (sum_i w_i B_i)(sum_i w_i A_i) = sum_i w_i (B_i - B)(A_i - A)

Along one run this is of second order in the drift and small. Between runs it is as large as the update itself, because factors
are fixed only up to ``(B Q)(Q^-1 A)``. So the gap is measured and reported, adapters of other starts are refused where it is more
than rounding, and ``space="update"`` averages the updates.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.artifacts.average_gap import gap as measure
from trimtab.artifacts.average_weights import checkpoint_weights, effective_count, last_of
from trimtab.core.checkpoint import MANIFEST, inspect, read_tensors, write_folder
from trimtab.core.errors import CheckpointMismatch, NoMatch, NotMergeable, ShapeMismatch, TrimtabError, Unsupported, raise_all
from trimtab.core.folders import apart

__all__ = ["Average", "Checkpoint", "average", "checkpoints_of", "mean"]

STEPS, RECORD = "steps", "record.json"
#: which way recorded values get better: of every run, and of tasks of runs that did not record it yet
BETTER = {
    **dict.fromkeys(["loss", "last_loss", "eval_loss"], "lower"), "step": "higher",
    **dict.fromkeys(["eval_accuracy", "eval_macro_f1", "eval_token_accuracy"], "higher"),
}  # fmt: skip
SAME = 1e-3  # a relative gap that rounding explains


@dataclass(frozen=True)
class Checkpoint:
    """One adapter of a run.

    Attributes:
        folder: where it is.
        record: what was measured when it was saved: ``step``, ``loss`` (the mean of the training loss since the checkpoint
            before), ``last_loss``, ``eval_...``; ``metric``, the one that the run chose its best adapter by, and ``better``,
            which way each gets better.
    """

    folder: Path
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Average:
    """What averaging gave.

    Attributes:
        path: the adapter's folder.
        used: the folders that count, in the run's order, with their ``weights``.
        setting: scheme, metric, strength and selection.
        gap: ``|sum w D - D(sum w theta)| / |sum w D|`` over all places; None where it cannot be measured without the base.
        space: ``factors`` or ``update``.
        trials: a row for each setting that was tried on data.
    """

    path: Path
    used: list[Path]
    weights: list[float]
    setting: dict[str, Any]
    gap: float | None
    space: str
    trials: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        shown = ", ".join(f"{folder.name} {weight:.4f}" for folder, weight in zip(self.used, self.weights, strict=True))
        count = effective_count(self.weights)
        gap = "not measured (needs the base)" if self.gap is None else f"{self.gap:.2e} of the averaged update"
        how = ", ".join(f"{key} {value}" for key, value in self.setting.items() if value is not None)
        return (
            f"{self.path}: {len(self.used)} checkpoints, as many as {count:.2f} of equal weight ({how})\n{shown}\n"
            f"averaging the {self.space}; the factors' average differs from the updates' by {gap}"
        )


def checkpoints_of(source: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Checkpoint]:
    """The checkpoints in the order of the run: those that ``keep_adapters`` left in a run's folder, or folders as given.

    Raises:
        NoMatch: the run kept none. CheckpointMismatch: a folder holds no adapter, or is given twice.
    """
    if isinstance(source, (str, os.PathLike)):
        run = Path(source)
        steps = run / STEPS if (run / STEPS).is_dir() else run
        found = {int(p.name[5:]): p for p in steps.glob("step-*") if p.name[5:].isdigit()} if steps.is_dir() else {}
        if not found:
            raise NoMatch(f"{run} keeps no adapters of its checkpoints: train it with keep_adapters=10, or give their folders")
        folders = [found[step] for step in sorted(found)]
    else:
        folders = [Path(folder) for folder in source]
    if not folders:
        raise NoMatch("there is no checkpoint to average")
    problems: list[TrimtabError] = []
    for folder in folders:
        if not (folder / MANIFEST).is_file():
            problems.append(CheckpointMismatch(f"{folder} holds no adapter"))
        if sum(folder.resolve() == other.resolve() for other in folders) > 1:
            problems.append(CheckpointMismatch(f"{folder} is given twice; a weight is how to count it more"))
    raise_all(problems)
    return [Checkpoint(folder, _record(folder)) for folder in folders]


def _record(folder: Path) -> dict[str, Any]:
    file = folder / RECORD
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def average(
    checkpoints: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    scheme: str | Sequence[str] = "power",
    by: str = "loss",
    strength: float | Sequence[float] = 0.7,
    values: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    last: int | None | Sequence[int | None] = None,
    stride: int = 1,
    best: int | None = None,
    metric: str | None = None,
    better: str | None = None,
    space: str = "factors",
    rank: int | None = None,
    model: nn.Module | None = None,
    score: Callable[[nn.Module], float] | None = None,
) -> Average:
    """Average checkpoints of one run into one adapter, at no cost when it is used.

    Not for adapters of different tasks or runs: merge those by their updates, with ``tt.combine``.

    Args:
        checkpoints: a run's folder (trained with ``keep_adapters``), or adapters' folders in the order of the run.
        out: the folder to write, in one step.
        scheme, by, strength: how a checkpoint's weight follows from its metric; see ``average_weights.log_weights``. The default
            is ``(1 / loss)^0.7``. Several schemes and strengths are tried on data.
        values: the metric of each checkpoint, instead of what the run recorded.
        weights: the weights themselves, of sum 1.
        last, stride: the newest ``last`` checkpoints, every ``stride``-th counted back from the newest; several ``last`` are tried.
        best: of those, the ``best`` by validation metric alone.
        metric: the recorded value that ``by`` and ``best`` mean, such as ``last_loss``, ``eval_loss`` or ``eval_accuracy``; None:
            the training loss for ``by="loss"``, and the metric that the run chose by for ``by="score"`` and ``best``.
        better: ``"higher"`` or ``"lower"``, of a ``metric`` whose run did not record it.
        space: ``factors`` averages what is saved; ``update`` what it does to the weights, stored as a LoRA of ``rank``.
        rank: of ``space="update"``; None: exact, the sum of the ranks.
        model: the base, for trials and for updates that depend on it.
        score: what the model reaches on validation data, higher is better. The best setting is taken.

    Raises:
        NoMatch: no checkpoints, or a metric that was not recorded. CheckpointMismatch, ShapeMismatch: different places, configs,
        shapes or buffers, all of them. NotMergeable: factors of different starts. Unsupported: a missing base, or bad choices.
    """
    found = checkpoints_of(checkpoints)
    apart(out, [*(checkpoint.folder for checkpoint in found), *_paths(checkpoints)])
    settings = _settings(scheme, strength, last)
    if space not in ("factors", "update"):
        raise Unsupported(f"space must be 'factors' or 'update', found {space!r}")
    if rank is not None and space == "factors":
        raise Unsupported("a rank belongs to space='update'; averaged factors keep the rank that they have")
    choose = {"by": by, "values": values, "weights": weights, "stride": stride, "best": best, "metric": metric, "better": better}
    plans = [(setting, *_weighted(found, setting, **choose)) for setting in settings]
    trials: list[dict[str, Any]] = []
    if len(plans) > 1:
        if score is None or model is None:
            raise Unsupported("several settings are tried on data: pass the base as model= and score=")
        plan, trials = _try(plans, model, score)
    else:
        plan = plans[0]
    setting, used, given = plan
    plain = weights is not None or setting["scheme"] == "uniform"
    setting = {**setting, "by": None if plain else by, "stride": stride, "best": best}
    folders = [checkpoint.folder for checkpoint in used]
    manifests, tensors = _opened(folders)
    gap = measure(manifests[0], tensors, given, mean(tensors, given), model)
    result = Average(Path(out), folders, given, setting, gap, space, trials)
    if space == "update":
        from trimtab.artifacts.combine import combine

        combine(folders, out, weights=given, rank=rank, base=model, name=manifests[0]["name"])
        return result
    _refuse_other_starts(folders, manifests, gap)
    kept = {key: value for key, value in mean(tensors, given).items() if key not in manifests[0]["aliases"]}
    made = {"by": "average", **setting, "weights": given, "from": [m["sha256"] for m in manifests], "gap": gap}
    fresh = {key: value for key, value in manifests[-1].items() if key not in ("file", "sha256", "seal", "made")}
    write_folder(Path(out), kept, fresh | {"made": made})
    return result


def _paths(checkpoints: Any) -> list[Any]:
    return [checkpoints] if isinstance(checkpoints, str | os.PathLike) else list(checkpoints)


def _settings(scheme: Any, strength: Any, last: Any) -> list[dict[str, Any]]:
    """All combinations; a uniform average has no strength."""
    many = lambda value: list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]  # noqa: E731
    rows = []
    for name, power, count in itertools.product(many(scheme), many(strength), many(last)):
        row = {"scheme": name, "strength": None if name in ("uniform", "linear") else power, "last": count}
        if row not in rows:
            rows.append(row)
    return rows


def _weighted(
    found: list[Checkpoint], setting: Mapping[str, Any], *, by: str, values: Sequence[float] | None,
    weights: Sequence[float] | None, stride: int, best: int | None, metric: str | None, better: str | None,
) -> tuple[list[Checkpoint], list[float]]:  # fmt: skip
    """Which checkpoints count, and their weights of sum 1."""
    for name, each in (("values", values), ("weights", weights)):
        if each is not None and len(each) != len(found):
            raise ShapeMismatch(f"{len(each)} {name} for {len(found)} checkpoints")
    try:
        chosen = last_of(len(found), setting["last"], stride)
        if best is not None:
            chosen = _best(found, chosen, best, metric, better)
        if weights is not None:
            picked = [float(weights[i]) for i in chosen]
            if not all(map(math.isfinite, picked)) or not math.isclose(math.fsum(picked), 1, abs_tol=1e-6):
                raise ShapeMismatch(f"the weights {picked} do not sum to 1")
            return [found[i] for i in chosen], picked
        if setting["scheme"] == "uniform":
            return [found[i] for i in chosen], [1 / len(chosen)] * len(chosen)
        if values is None:
            key = _key(found[-1], by, metric)
            _check_direction(found[-1], key, by, better)
            values = [_recorded(checkpoint, key) if i in chosen else math.nan for i, checkpoint in enumerate(found)]
        strength = 1.0 if setting["strength"] is None else setting["strength"]
        given = checkpoint_weights([values[i] for i in chosen], scheme=setting["scheme"], by=by, strength=strength)
    except ValueError as error:
        if isinstance(error, TrimtabError):
            raise
        raise Unsupported(str(error)) from None
    return [found[i] for i in chosen], given


def _recorded(checkpoint: Checkpoint, key: str) -> float:
    if key not in checkpoint.record:
        known = ", ".join(sorted(set(checkpoint.record) - {"metric", "better"})) or "nothing"
        raise NoMatch(f"{checkpoint.folder} has no {key} recorded (there is {known}); pass values=, or another metric=")
    return float(checkpoint.record[key])


def _key(checkpoint: Checkpoint, by: str, metric: str | None) -> str:
    """The recorded value that counts."""
    if by == "step":
        return "step"
    return metric or (checkpoint.record.get("metric", "eval_accuracy") if by == "score" else "loss")


def _direction(checkpoint: Checkpoint, key: str, better: str | None) -> str:
    """Which way the recorded value ``key`` gets better; no name is guessed at."""
    if better is not None and better not in ("higher", "lower"):
        raise Unsupported(f"better must be 'higher' or 'lower', found {better!r}")
    found = {**BETTER, **checkpoint.record.get("better", {})}.get(key)
    if better is not None and found not in (None, better):
        raise Unsupported(f"{checkpoint.folder} has recorded that {key} is better when {found}, and better={better!r} was asked")
    if found is None and better is None:
        raise Unsupported(f"{checkpoint.folder} does not tell which way {key} gets better; pass better='lower' or better='higher'")
    return found or better


def _check_direction(checkpoint: Checkpoint, key: str, by: str, better: str | None) -> None:
    wanted = "lower" if by == "loss" else "higher"
    if key in checkpoint.record and _direction(checkpoint, key, better) != wanted:
        other = "score" if by == "loss" else "loss"
        raise Unsupported(f"{key} is not better when {wanted}, which is what by={by!r} weighs more; take by={other!r}")


def _best(found: list[Checkpoint], chosen: list[int], best: int, metric: str | None, better: str | None) -> list[int]:
    """The ``best`` of the chosen by a validation metric, in the run's order; of equals the later ones."""
    if best < 1:
        raise Unsupported(f"best must be at least 1, found {best}")
    key = _key(found[-1], "score", metric if metric is not None and metric.startswith("eval_") else None)
    values = {i: _recorded(found[i], key) for i in chosen}
    sign = 1.0 if _direction(found[-1], key, better) == "higher" else -1.0
    goodness = {i: -math.inf if math.isnan(value) else sign * value for i, value in values.items()}
    order = sorted(chosen, key=lambda i: (goodness[i], i), reverse=True)
    return sorted(order[:best])


def _opened(folders: Sequence[Path]) -> tuple[list[dict[str, Any]], list[dict[str, Tensor]]]:
    """Manifests and tensors, after checking that they are one adapter at different times."""
    manifests = [inspect(folder) for folder in folders]
    tensors = [read_tensors(folder, manifest) for folder, manifest in zip(folders, manifests, strict=True)]
    problems: list[TrimtabError] = []
    first = manifests[0]
    plain = lambda places: [{k: v for k, v in place.items() if k != "origin"} for place in places]  # noqa: E731
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        for key in sorted(set(first["tensors"]) ^ set(manifest["tensors"])):
            problems.append(CheckpointMismatch(f"{key} is not in both {folders[0]} and {folder}"))
        for key in sorted(set(first["tensors"]) & set(manifest["tensors"])):
            if first["tensors"][key] != manifest["tensors"][key]:
                found = f"{first['tensors'][key]} in {folders[0]} and {manifest['tensors'][key]} in {folder}"
                problems.append(ShapeMismatch(f"{key} is {found}"))
        if plain(first["places"]) != plain(manifest["places"]):
            problems.append(CheckpointMismatch(f"{folders[0]} and {folder} have other places, methods or hyperparameters"))
    raise_all(problems)
    for key in first["tensors"]:
        if not tensors[0][key].is_floating_point() and any(not torch.equal(tensors[0][key], t[key]) for t in tensors[1:]):
            problems.append(NotMergeable(f"{key} holds integers that differ between the checkpoints: they cannot be averaged"))
    raise_all(problems)
    return manifests, tensors


def mean(tensors: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """``theta_1 + sum_i w_i (theta_i - theta_1)`` of floats, in float32 or wider, in their own dtype again; the rest as it is."""
    found = {}
    for key, first in tensors[0].items():
        if not first.is_floating_point():
            found[key] = first
            continue
        wide = torch.promote_types(first.dtype, torch.float32)
        total = first.to(wide, copy=True)
        for one, weight in zip(tensors[1:], weights[1:], strict=True):
            total.add_(one[key].to(wide) - first.to(wide), alpha=weight)
        found[key] = total.to(first.dtype)
    return found


def _refuse_other_starts(folders: Sequence[Path], manifests: Sequence[Mapping[str, Any]], gap: float | None) -> None:
    origins = [[place.get("origin") for place in manifest["places"]] for manifest in manifests]
    other = next((folder for folder, own in zip(folders, origins, strict=True) if own != origins[0]), None)
    unknown = gap is None or gap > SAME
    if (other is not None and unknown) or (gap is not None and gap > 0.5):
        why = f"{folders[0]} and {other} started from different seeds" if other is not None else "they have drifted far apart"
        size = "" if gap is None else f" (their average's update is off by {gap:.0%})"
        raise NotMergeable(f"these are no checkpoints of one run: {why}{size}; average the updates instead, with space='update'")


@torch.no_grad()
def _try(
    plans: Sequence[tuple[dict[str, Any], list[Checkpoint], list[float]]], model: nn.Module, score: Callable[[nn.Module], float]
) -> tuple[tuple[dict[str, Any], list[Checkpoint], list[float]], list[dict[str, Any]]]:
    """The plan with the best score, the earliest of equals; the adapter stays attached while its values change."""
    from trimtab.artifacts.trials import alone

    rows: list[dict[str, Any]] = []
    with alone(model, plans[0][1][-1].folder) as live:
        for setting, used, weights in plans:
            _, tensors = _opened([checkpoint.folder for checkpoint in used])
            for key, value in mean(tensors, weights).items():
                live[key].copy_(value)
            rows.append({**setting, "score": float(score(model))})
    best = max(range(len(rows)), key=lambda i: -math.inf if math.isnan(rows[i]["score"]) else rows[i]["score"])
    return plans[best], rows
