"""A sample of the base's weights, so that an adapter is not put on another base by mistake.

Sizes alone do not tell two checkpoints of one architecture apart. The sample holds up to ``SAMPLES`` evenly spaced values of up
to ``TENSORS`` evenly chosen adapted tensors, and how each was stored. Entries that the adapter replaces as they are (a new head,
the rows of new tokens) are left out: they may be anything. If nothing else is left, matrices of the model's blocks are sampled.

What passes depends on how the weights were stored then and are stored now:

===================================  =====================================================================
then and now                         may differ by
===================================  =====================================================================
both dense (fp64, fp32, bf16, fp16)  the rounding of the two dtypes, in every sampled value
the same quantised storage           3 %, relative, over all values: ties are broken differently by devices
8 bits in one of them                5 %
float8 in one of them                8 %
4 bits, or a storage not known       17 %; sketches of 3 and 2 bits 28 % and 40 %
===================================  =====================================================================

So on dense weights a fine-tuned sibling is told apart if it moved any of the sampled values by more than rounding, and on
quantised ones only if it moved them by more than quantisation does: a sibling that is nearer than that passes. Tensors without an
adapter are not looked at. Manifests from before storages were noted may differ as 4 bits do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.contracts import Adapter, Selection
from trimtab.core.errors import CheckpointMismatch
from trimtab.core.site import Site, dense, gathered, is_quantised

__all__ = ["compare", "difference", "join", "storage", "take"]

TENSORS = 32
SAMPLES = 32
#: half the distance of two neighbouring numbers over their size
_ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
_DIGITS = 5e-9  # that a manifest drops, relative
_OLD_DIGITS = 5e-9  # absolute, before storages were noted
_SMALLEST = 2.0**-24  # of fp16, below which it rounds to zero
_SAME, _EIGHT, _FLOAT8, _FOUR = 0.03, 0.05, 0.08, 0.17
_SKETCH = {8: _EIGHT, 4: _FOUR, 3: 0.28, 2: 0.40, 1: 0.70}
_UNKNOWN = "unknown"


def storage(stored: Tensor) -> str:
    """How a weight is stored: its dtype, or its quantised class with its bits, ``"Params4bit nf4 64"``."""
    if not is_quantised(stored):
        return str(stored.dtype).removeprefix("torch.")
    details = [getattr(stored, name, None) for name in ("quant_type", "blocksize", "target_dtype", "bits")]
    if getattr(stored, "qdata", None) is not None:  # torchao's
        details.append(stored.qdata.dtype)
    return " ".join([type(stored).__name__, *(str(d).removeprefix("torch.") for d in details if d is not None)])


def _tolerance(kind: str) -> float:
    """The relative error that a storage makes, root mean square over many values."""
    words = kind.split()
    if words[0] in _ROUNDING:
        return 0.0
    if words[0] == "SketchedWeight":
        return _SKETCH.get(int(words[1]), _FOUR) if len(words) > 1 and words[1].isdigit() else _FOUR
    if any(word.startswith("float8") for word in words):
        return _FLOAT8
    if words[0] == "Int8Params" or ("int8" in words and not any("int4" in w for w in words)):
        return _EIGHT
    return _FOUR


def take(
    root: nn.Module, places: Iterable[Adapter | Site], *, value: Callable[[Site], Tensor | None] | None = None
) -> dict[str, Any]:
    """The base's class, ``{path.tensor: values}`` for evenly chosen places, and their storages.

    A value that the adapter replaces is None.

    Args:
        places: adapters, or sites of which nothing is replaced.
        value: a site's tensor as it is stored, for a base whose values are elsewhere; None: the module's, before any merge.
    """
    read = value or (lambda site: original(root, site.module, site.tensor))
    every = [(place.site, place) if isinstance(place, Adapter) else (place, None) for place in places]
    found: dict[tuple[str, str], list] = {}
    for site, adapter in every:
        if site.tensor:
            found.setdefault((site.path, site.tensor), []).append((site, adapter))
    samples: dict[str, list[float | None]] = {}
    kinds: dict[str, str] = {}
    for (path, tensor), here in _spread(list(found.items())):
        _add(samples, kinds, f"{path}.{tensor}", read(here[0][0]), here)
    if every and not samples and value is None:
        for path, module in _block_matrices(root):
            _add(samples, kinds, f"{path}.weight", original(root, module, "weight"), [], module)
    return {"class": type(root).__name__, "samples": samples, "storage": kinds}


def _add(samples: dict, kinds: dict, key: str, stored: Tensor | None, here: list, module: nn.Module | None = None) -> None:
    """Sample one tensor, unless it has no values or all of them are replaced."""
    if stored is None or stored.is_meta:
        return
    values, where = _sample(stored, module if module is not None else here[0][0].module)
    replaced = torch.zeros(len(where), dtype=torch.bool)
    for _, adapter in here:
        if adapter is not None:
            replaced |= adapter.replaces(where)
    if not replaced.all():
        samples[key] = [None if gone else float(f"{v:.9g}") for v, gone in zip(values.tolist(), replaced.tolist(), strict=True)]
        kinds[key] = storage(stored)


def _spread(entries: list) -> list:
    """At most ``TENSORS`` of the entries, from the first to the last."""
    if len(entries) <= TENSORS:
        return entries
    return [entries[i * (len(entries) - 1) // (TENSORS - 1)] for i in range(TENSORS)]


def _block_matrices(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules with a matrix inside the model's blocks, whose weights a checkpoint always has."""
    from trimtab.core import anatomy

    known = anatomy.of(root)
    inside = [
        (path, module)
        for path, module in known.modules.items()
        if known.block_of(path) is not None and (w := module._parameters.get("weight")) is not None and w.dim() > 1
    ]
    return _spread(inside)


def original(root: nn.Module, module: nn.Module, tensor: str) -> Tensor | None:
    """The base tensor as it was before any merge."""
    state = root.__dict__.get("_trimtab_state")
    for saved in state.originals.values() if state is not None else ():
        for owner, name, value, _ in saved:
            if owner is module and name == tensor:
                return value
    return module._parameters.get(tensor)


def _sample(stored: Tensor, module: nn.Module, *, old: bool = False) -> tuple[Tensor, Tensor]:
    """Evenly spaced values (n,), float64, and their places in the flattened tensor.

    Args:
        old: as before storages were noted: in float32 steps, which miss the last digits of large numbers.
    """
    flat = gathered(dense(stored, module).detach()).reshape(-1)
    count = min(SAMPLES, flat.numel())
    where = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float32 if old else torch.float64).long()
    return flat[where.to(flat.device)].double().cpu(), where


def compare(
    root: nn.Module,
    stored: dict[str, Any],
    source: str,
    *,
    adapters: Iterable[Adapter] = (),
    view: Callable[[str, Tensor], Tensor] = lambda key, tensor: tensor,
    value: Callable[[str, str], Tensor | None] | None = None,
) -> None:
    """Check the sample in a manifest against ``root``'s weights; see the module's docstring for what it can tell.

    Args:
        adapters: those that the sample belongs to: manifests from before storages were noted sampled heads, too.
        view: ``(path.tensor, tensor) -> tensor``: what of a weight the sample was taken of, if not all of it.
        value: ``(path, parameter) -> tensor`` for a base whose values are elsewhere, None where it has none.

    Raises:
        CheckpointMismatch: the weights are another base's.
    """
    pairs: list[_Pair] = []
    kinds = stored.get("storage")
    heads = {f"{a.site.path}.{a.site.tensor}" for a in adapters if isinstance(a, Selection) and a.site.role == "head"}
    for key, values in stored["samples"].items():
        if kinds is None and key in heads:
            continue
        path, _, tensor = key.rpartition(".")
        try:
            module = root.get_submodule(path)
        except AttributeError:
            continue  # sampled beside the adapter's places, which are checked by their names
        parameter = original(root, module, tensor) if value is None else value(path, tensor)
        if parameter is None or parameter.is_meta:
            continue
        found, _ = _sample(view(key, parameter), module, old=kinds is None)
        if len(found) == len(values):
            kept = torch.tensor([v is not None for v in values], dtype=torch.bool)
            theirs = torch.tensor([v or 0.0 for v in values], dtype=torch.float64)
            pairs.append(_Pair(key, found[kept], theirs[kept], storage(parameter), (kinds or {}).get(key, _UNKNOWN)))
    digits = stored.get("digits", "float64")
    if digits not in _ROUNDING:
        raise CheckpointMismatch(f"{source} is damaged: its sample of the base has the unknown digits {digits!r}")
    reason = _difference(pairs, digits)
    if reason is not None:
        raise CheckpointMismatch(
            f"{source} was made for another base: {reason} ({stored['class']} then, {type(root).__name__} now); load the base it "
            "was trained on, or pass check_base=False if the weights were changed on purpose"
        )


def difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Why two stored samples cannot be of one base, in words; None if they can be."""
    pairs = []
    for key, values in one["samples"].items():
        theirs = other["samples"].get(key, ())
        both = [(a, b) for a, b in zip(values, theirs, strict=False) if a is not None and b is not None]
        if both and len(values) == len(theirs):
            now, then = torch.tensor(both, dtype=torch.float64).unbind(1)
            pairs.append(_Pair(key, now, then, *(each.get("storage", {}).get(key, _UNKNOWN) for each in (one, other))))
    digits = {each.get("digits", "float64") for each in (one, other)} - {"float64"}
    return _difference(pairs, digits.pop() if digits else "float64")


def join(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several samples of one base as one; the first that has a tensor counts."""
    known = next((each for each in samples if each["samples"]), samples[0])
    found: dict[str, Any] = {**known, "samples": {}, "storage": {}}
    for each in samples:
        if each.get("digits") == known.get("digits"):
            found["samples"] = {**each["samples"], **found["samples"]}
            found["storage"] = {**each.get("storage", {}), **found["storage"]}
    if any("storage" not in each for each in samples if each["samples"]):
        found.pop("storage")  # one is from before storages were noted
    return found


class _Pair:
    """Values of one tensor now and then, and how both are stored."""

    def __init__(self, key: str, now: Tensor, then: Tensor, stored_now: str, stored_then: str):
        self.key, self.now, self.then, self.kinds = key, now, then, (stored_now, stored_then)
        self.error, self.size = (now - then).norm().item(), max(then.norm().item(), now.norm().item())
        if not torch.isfinite(now).all():
            self.error = math.inf

    def limit(self) -> float:
        """The relative error that the storages explain; 0 where rounding must explain it, value by value."""
        now, then = self.kinds
        if _UNKNOWN in self.kinds:
            return _FOUR
        error = max(_tolerance(now), _tolerance(then))
        return min(error, _SAME) if now == then else error

    def rounded(self, digits: str) -> Tensor:
        """Which values differ by no more than rounding, (n,)."""
        now, then = (_ROUNDING.get(kind, 0.0) for kind in self.kinds)
        if self.kinds[1] == _UNKNOWN:  # of a dense base of any dtype
            then = _ROUNDING["bfloat16"]
        old = self.kinds[1] == _UNKNOWN
        share = 1.01 * (now + then + (_ROUNDING[digits] if digits != "float64" else 0.0) + _DIGITS)
        floor = _SMALLEST if "float16" in self.kinds or old else 0.0
        size = torch.maximum(self.now.abs(), self.then.abs())
        return (self.now - self.then).abs() <= share * size + floor + (_OLD_DIGITS if old else 0.0)


def _difference(pairs: list[_Pair], digits: str) -> str | None:
    """What differs by more than the storages explain, in words."""
    total = sum(len(pair.now) for pair in pairs)
    rounded = [pair for pair in pairs if pair.limit() == 0]
    loose = [pair for pair in pairs if pair.limit() > 0 and not pair.rounded(digits).all()]
    wrong = [(pair, int((~pair.rounded(digits)).sum())) for pair in rounded if not pair.rounded(digits).all()]
    if wrong:
        count, (first, _) = sum(n for _, n in wrong), wrong[0]
        return (
            f"{count} of {total} sampled values of its weights differ by more than rounding explains, first in {first.key}, by "
            f"{100 * first.error / first.size:.2g} % there"
        )
    if not loose:
        return None
    # all that are compared by their size together: 32 values of one tensor are too few
    error = math.sqrt(sum(pair.error**2 for pair in loose))
    size = math.sqrt(sum(pair.size**2 for pair in loose))
    limit = max(pair.limit() for pair in loose)
    far = next((pair for pair in loose if pair.error > 3 * pair.limit() * pair.size), None)
    if error <= limit * size and far is None:
        return None
    return (
        f"sampled values of its weights differ by {100 * error / size:.2g} % where {' and '.join(sorted(set(loose[0].kinds)))} "
        f"explain {100 * limit:.2g} %" + (f"; most in {far.key}" if far else "")
    )
