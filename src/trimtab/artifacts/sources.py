"""What is compressed: the tensors of an adapter, or of a full checkpoint, each with the start that its update is counted from."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.artifacts import starts
from trimtab.artifacts.packed import Entry
from trimtab.artifacts.weights import Weights
from trimtab.core.checkpoint import MANIFEST, inspect, read_tensors
from trimtab.core.contracts import Selection
from trimtab.core.errors import CheckpointMismatch, NoMatch, ShapeMismatch, TrimtabError, Unsupported, nearest, raise_all
from trimtab.core.registry import config_from_dict

__all__ = ["Source", "content_of", "from_adapter", "from_weights", "unpack_base"]

OWN = ("format", "version", "tensors", "file", "sha256", "seal", "base")  # of a manifest: what is written anew
BASE_TENSORS = 4  # of the base's sample in a manifest; 128 values tell two bases apart


@dataclass
class Source:
    """Tensors and their starts.

    Attributes:
        entries: a plan for each tensor, in the order that the ranking breaks ties by.
        header: what a reader needs besides the entries.
        value, start: read one tensor by its key; a start of None is 0.
    """

    entries: list[Entry]
    header: dict[str, Any]
    value: Callable[[str], Tensor]
    start: Callable[[str], Tensor | None]

    @property
    def ternary(self) -> list[Entry]:
        """The entries that become ternary."""
        return [entry for entry in self.entries if entry.store == "ternary"]

    def update(self, entry: Entry) -> Tensor:
        """``value - start``, (n,) in float32.

        Raises:
            CheckpointMismatch: it holds NaN or infinite values.
        """
        start = self.start(entry.key)
        value = self.value(entry.key).detach().float().reshape(-1)
        update = value if start is None else value - start.detach().float().reshape(-1)
        if not bool(torch.isfinite(update).all()):
            raise CheckpointMismatch(f"{entry.key} holds NaN or infinite values, or its start does; nothing was written")
        return update

    def updates(self) -> Iterator[tuple[Entry, Tensor]]:
        """Every ternary entry with its update, one in memory at a time."""
        for entry in self.ternary:
            yield entry, self.update(entry)


def keep_matching(entries: list[Entry], keep: Sequence[str], rest: str) -> list[Entry]:
    """The entries, those that a pattern of ``keep`` matches stored as they are, ``rest`` naming how floats are kept.

    Raises:
        NoMatch: a pattern matches no tensor.
    """
    keys = [entry.key for entry in entries]
    problems: list[TrimtabError] = []
    kept: set[str] = set()
    for pattern in keep:
        hits = [key for key in keys if fnmatch.fnmatchcase(key, pattern) or fnmatch.fnmatchcase(key, f"*{pattern}*")]
        if not hits:
            problems.append(NoMatch(f"keep={pattern!r} matches no tensor{nearest(pattern, keys)}"))
        kept.update(hits)
    raise_all(problems)
    plain = [replace(e, store="raw", start="zero") if e.key in kept and e.store == "ternary" else e for e in entries]
    return [replace(e, store=rest) if e.store == "raw" and getattr(torch, e.dtype).is_floating_point else e for e in plain]


def _pack_base(base: Mapping[str, Any]) -> dict[str, Any]:
    """The sample of the base's weights with four of its tensors, in bfloat16."""
    keys = list(base["samples"])
    chosen = keys[:: max(1, len(keys) // BASE_TENSORS)][:BASE_TENSORS]
    kinds = base.get("storage")
    packed = []
    for key in chosen:  # a value that the adapter replaces is none
        values = torch.tensor([float("nan") if v is None else v for v in base["samples"][key]]).bfloat16()
        packed.append([key, base64.b64encode(values.view(torch.uint8).numpy().tobytes()).decode()])
    stored = {"class": base["class"], "samples": packed, "digits": "bfloat16"}
    return stored if kinds is None else stored | {"storage": {key: kinds[key] for key in chosen}}


def unpack_base(stored: Any, source: str) -> dict[str, Any]:
    """The inverse of ``_pack_base``, up to the tensors and digits that were left out.

    Args:
        source: where it was read, for messages.

    Raises:
        CheckpointMismatch: it is no such sample.
    """

    def read(text: str) -> list[float | None]:
        data = base64.b64decode(text, validate=True)
        values = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).tolist() if data else []
        return [None if v != v else v for v in values]

    try:
        return {**stored, "samples": {str(key): read(text) for key, text in stored["samples"]}}
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointMismatch(f"{source} is damaged: its sample of the base is none ({error})") from None


def from_adapter(
    folder: Path, *, model: nn.Module | None, reference: str | Path, keep: Sequence[str], rest: str
) -> Source:
    """A saved adapter.

    Args:
        reference: ``auto`` (see ``starts.py``), ``zero`` (random starts count as 0), or the folder of another adapter of the
            same places.

    Raises:
        Unsupported: a start needs the base, and ``model`` is None.
    """
    manifest = inspect(folder)
    tensors = read_tensors(folder, manifest)
    keys = sorted(key for key in tensors if key not in manifest["aliases"])
    if isinstance(reference, Path):
        known, tags, header = _against(folder, reference, tensors)
    else:
        known, tags, header = _own(folder, manifest, model, reference)
    parameters, selections = _parameters(manifest, model, known=set(known))
    entries = []
    for key in keys:
        value = tensors[key]
        tag = tags.get(key, "zero")
        store = "ternary" if key in parameters and value.is_floating_point() else "raw"
        if tag in ("made", "held", "other") and torch.equal(known[key].to(value.dtype), value):
            store = "start"
        elif key in selections and tag != "other" and (tag == "zero" or _fresh_head(manifest, key)):
            store, tag = "raw", "zero"
        elif store == "raw":
            tag = "zero"
        entries.append(Entry(key, str(value.dtype).removeprefix("torch."), tuple(value.shape), store, tag))
    entries = keep_matching(entries, keep, rest)
    used = [known[entry.key] for entry in entries if entry.start in ("made", "base")]
    header |= {
        "kind": "adapter",
        "sketch": starts.sketch(used) if used else [],
        "needs_base": any(entry.start == "base" for entry in entries),
        "source": manifest["sha256"],
        "manifest": {key: value for key, value in manifest.items() if key not in OWN} | {"base": _pack_base(manifest["base"])},
    }
    counted = {entry.key for entry in entries if entry.start != "zero"}
    return Source(entries, header, tensors.__getitem__, lambda key: known[key] if key in counted else None)


def _parameters(manifest: Mapping[str, Any], model: nn.Module | None, known: set[str]) -> tuple[set[str], set[str]]:
    """Keys of parameters, and those of selections' parameters."""
    parameters: set[str] = set()
    selections: set[str] = set()
    for adapter in starts.shells(manifest, model):
        prefix = f"{adapter.site.path}.{adapter.site.slot}."
        names = {prefix + name for name, _ in adapter.named_parameters()}
        parameters |= names
        if isinstance(adapter, Selection):
            selections |= names
    return parameters, selections


def _fresh_head(manifest: Mapping[str, Any], key: str) -> bool:
    """Whether the tensor is a head that learns whole: it may have been fresh, and then no base holds its start."""
    for entry in manifest["places"]:
        prefix = f"{entry['path']}." if entry["path"] else ""
        whole = issubclass(config_from_dict(entry["method"]).adapter_class, Selection)
        if whole and key.startswith(prefix) and entry.get("role") == "head":
            return True
    return False


def _own(
    folder: Path, manifest: dict[str, Any], model: nn.Module | None, reference: str
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """Starts that the adapter's own manifest and buffers give."""
    if reference not in ("auto", "zero"):
        raise Unsupported(f"reference must be 'auto', 'zero' or a path, found {reference!r}{nearest(reference, ['auto', 'zero'])}")
    found = starts.find(manifest, model, random=reference == "auto")
    known = {**found.base, **found.made}
    tags = dict.fromkeys(found.base, "base") | dict.fromkeys(found.made, "made")
    tensors = read_tensors(folder, manifest)
    lacking = set()
    for adapter, entry in zip(starts.shells(manifest, model), manifest["places"], strict=True):
        prefix = f"{adapter.site.path}.{adapter.site.slot}."
        inside = {prefix + name for name, _ in adapter.named_parameters()}
        for name, buffer in starts.held(adapter).items():
            known[prefix + name], tags[prefix + name] = tensors[prefix + buffer], "held"
        missing = (inside & found.lacking) - set(known)
        if missing and not isinstance(adapter, Selection) and reference == "auto":
            lacking.add(entry["method"]["name"])
    if lacking:
        raise Unsupported(
            f"the starts of {', '.join(sorted(lacking))} in {folder} are made from the base's weights: pass the base as model=, or "
            "reference='zero' to compress the values themselves"
        )
    return known, tags, {"reference": reference}


def _against(folder: Path, reference: Path, tensors: Mapping[str, Tensor]) -> tuple[dict, dict[str, str], dict[str, Any]]:
    """Starts from another adapter of the same places."""
    other = inspect(reference)
    values = read_tensors(reference, other)
    shapes = ({key: tuple(value.shape) for key, value in found.items()} for found in (tensors, values))
    _same(folder, next(shapes), reference, next(shapes))
    marks = {"reference_id": other["sha256"], "reference_content": content_of(values)}
    return values, dict.fromkeys(values, "other"), {"reference": "other", **marks}


def content_of(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, shapes, dtypes and all values: equal for two saves of one adapter, whatever their files' bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        digest.update(repr((key, str(value.dtype), tuple(value.shape))).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _same(a: Path, ours: Mapping[str, tuple], b: Path, theirs: Mapping[str, tuple]) -> None:
    """Raise all differences of two sets of shapes."""
    problems: list[TrimtabError] = []
    for key in sorted(set(ours) ^ set(theirs)):
        here, there = (a, b) if key in ours else (b, a)
        problems.append(CheckpointMismatch(f"{key} is in {here} and not in {there}"))
    for key in sorted(set(ours) & set(theirs)):
        if ours[key] != theirs[key]:
            problems.append(ShapeMismatch(f"{key} is {ours[key]} in {a} and {theirs[key]} in {b}"))
    raise_all(problems)


def from_weights(path: Path, *, reference: Path, keep: Sequence[str], rest: str) -> Source:
    """A full checkpoint; its update is the difference to the checkpoint ``reference``.

    Raises:
        CheckpointMismatch, ShapeMismatch: names, shapes or dtypes that differ, all of them.
    """
    if (path / MANIFEST).is_file() or (reference / MANIFEST).is_file():
        raise Unsupported(f"{path} and {reference} are an adapter and a checkpoint; give two of one sort")
    ours, theirs = Weights(path), Weights(reference)
    _same(path, {k: s for k, (_, s) in ours.info.items()}, reference, {k: s for k, (_, s) in theirs.info.items()})
    entries = []
    for key in theirs:
        dtype, shape = ours.info[key]
        floating = getattr(torch, dtype).is_floating_point and getattr(torch, theirs.info[key][0]).is_floating_point
        same = dtype == theirs.info[key][0] and torch.equal(ours[key], theirs[key])
        store = "start" if same else "ternary" if floating else "raw"
        entries.append(Entry(key, dtype, shape, store, "zero" if store == "raw" else "other"))
    entries = keep_matching(entries, keep, rest)
    header = {"kind": "checkpoint", "reference": "other", "reference_id": theirs.identity(list(theirs))}
    counted = {entry.key for entry in entries if entry.start == "other"}
    return Source(entries, header, ours.__getitem__, lambda key: theirs[key] if key in counted else None)
