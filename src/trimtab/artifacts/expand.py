"""expand: a compressed update back to an adapter's folder, a checkpoint, or values on a model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab.artifacts import starts
from trimtab.artifacts.fitting import spread
from trimtab.artifacts.packed import Entry, Packed
from trimtab.artifacts.sources import content_of, unpack_base
from trimtab.artifacts.weights import Weights
from trimtab.core import cut, fingerprint
from trimtab.core.checkpoint import VERSION, read_saved, write_folder
from trimtab.core.errors import CheckpointMismatch, ShapeMismatch, TrimtabError, Unsupported, raise_all
from trimtab.core.folders import apart
from trimtab.core.manifest import check_manifest
from trimtab.core.reading import check_fields
from trimtab.core.state import adapter_group, state_of, unwrap

__all__ = ["adapter_manifest", "adapter_tensors", "exchange", "expand"]


def expand(
    packed: str | os.PathLike,
    out: str | os.PathLike,
    *,
    model: nn.Module | None = None,
    reference: str | os.PathLike | None = None,
) -> Path:
    """Write what ``tt.compress`` compressed as an adapter's folder that ``tt.load`` reads, or as a checkpoint.

    ``value = start + scale * s``, s the stored entries -1, 0, +1. ``tt.load(model, packed)`` does the same without a folder.

    Args:
        packed: the compressed file.
        out: the folder to write, in one step; an adapter that is there already is replaced, a checkpoint is not.
        model: the base, for adapters that start from its weights.
        reference: the adapter or checkpoint that the update was counted from, if it was one. A checkpoint is written in
            its files, with the other files of its folder beside them.

    Raises:
        CheckpointMismatch: a damaged, truncated or foreign file, or another reference or base than it was written against.
        Unsupported: ``model`` or ``reference`` is needed and missing.
    """
    opened, target = Packed(packed), apart(out, [packed, reference])
    given = None if reference is None else Path(reference)
    if opened.kind == "adapter":
        manifest = adapter_manifest(opened)
        tensors = adapter_tensors(opened, model, reference=given)
        unique = {key: value.contiguous() for key, value in tensors.items() if key not in manifest["aliases"]}
        return write_folder(target, unique, manifest)
    if given is None:
        raise Unsupported(f"{opened.path} is the difference to a checkpoint: say which with reference=")
    return _write_checkpoint(opened, target, given)


def adapter_manifest(packed: Packed) -> dict[str, Any]:
    """The manifest of a compressed adapter, as ``tt.save`` would write it.

    Raises:
        Unsupported: the file is the difference of two checkpoints. CheckpointMismatch: its header is damaged.
    """
    if packed.kind != "adapter":
        raise Unsupported(f"{packed.path} is the difference of two checkpoints, not an adapter; tt.expand it beside its reference")
    stored = packed.header.get("manifest")
    aliases = stored.get("aliases") if isinstance(stored, dict) else None
    tensors = {entry.key: {"shape": list(entry.shape), "dtype": entry.dtype} for entry in packed.entries}
    if not isinstance(aliases, dict) or not all(isinstance(name, str) and name in tensors for name in aliases.values()):
        raise CheckpointMismatch(f"the header of {packed.path} is damaged: its manifest lacks or garbles 'aliases'")
    check_fields(packed.header, {"reference": str, "needs_base": bool, "sketch": list}, f"the header of {packed.path}")
    lacking = [key for key in ("reference", "needs_base", "sketch") if packed.header.get(key) is None]
    numbers = [v for v in packed.header.get("sketch") or () if isinstance(v, bool) or not isinstance(v, int | float)]
    if lacking or numbers:
        raise CheckpointMismatch(f"the header of {packed.path} is damaged: it lacks or garbles {', '.join(lacking) or 'sketch'}")
    base = unpack_base(stored.get("base"), f"the header of {packed.path}")
    tensors |= {key: tensors[source] for key, source in aliases.items()}
    made = {"name": None, "places": None} | stored
    made |= {"format": "trimtab", "version": VERSION, "tensors": tensors, "base": base}
    check_manifest(made, f"the header of {packed.path}")
    return made


def _adapter_starts(packed: Packed, model: nn.Module | None, reference: Path | None) -> dict[str, Tensor]:
    """Starts that are not in the file, by key."""
    header, manifest = packed.header, adapter_manifest(packed)
    if header["reference"] == "other":
        if reference is None:
            raise Unsupported(f"{packed.path} is counted from another adapter: say which with reference=")
        found, tensors = read_saved(reference)
        same = found["sha256"] == header["reference_id"] or content_of(tensors) == header.get("reference_content")
        if not same:
            raise CheckpointMismatch(f"{packed.path} is counted from another adapter than {reference}")
        return tensors
    wanted = [entry for entry in packed.entries if entry.start in ("made", "base")]
    if not wanted:
        return {}
    if header["needs_base"] and model is None:
        raise Unsupported(f"{packed.path} starts from its base's weights: load it onto the base, or pass the base as model=")
    found = starts.find(manifest, model if header["needs_base"] else None, random=header["reference"] == "auto")
    values = {**found.base, **found.made}
    lost = [entry.key for entry in wanted if entry.key not in values]
    if lost:
        raise CheckpointMismatch(f"the start of {lost[0]} and {len(lost) - 1} others cannot be built for {packed.path}")
    starts.compare_sketch((values[entry.key] for entry in wanted), header["sketch"], str(packed.path))
    return values


def adapter_tensors(packed: Packed, model: nn.Module | None, *, reference: Path | None = None) -> dict[str, Tensor]:
    """All tensors of a compressed adapter, aliases included, on the CPU."""
    known = _adapter_starts(packed, model, reference)
    manifest = adapter_manifest(packed)
    if any(entry.start == "held" for entry in packed.entries):
        buffers: dict[str, str] = {}
        for adapter in starts.shells(manifest, model):
            prefix = f"{adapter.site.path}.{adapter.site.slot}."
            buffers |= {prefix + name: prefix + buffer for name, buffer in starts.held(adapter).items()}
    else:
        buffers = {}
    found: dict[str, Tensor] = {}

    def start(key: str, tag: str) -> Tensor | None:
        return None if tag == "zero" else found[buffers[key]] if tag == "held" else known[key]

    for key, value in _values(packed, start):
        found[key] = value
    for key, source in manifest["aliases"].items():
        found[key] = found[source]
    return found


def _values(packed: Packed, start: Callable[[str, str], Tensor | None]) -> Iterator[tuple[str, Tensor]]:
    """``(key, value)`` in the order of the file; what equals its start comes last, large tensors when their last rows are there."""
    factors: dict[int, Tensor] = {}
    for frame, payload, offset in packed.payloads():
        if frame.tag == b"raw ":
            entry = packed.entries[frame.pieces[0][0]]
            yield entry.key, packed.raw(entry, payload, offset)
            continue
        if frame.tag == b"fits":
            factors = packed.factors(frame, payload, offset)
            continue
        for number, first, last, symbols in packed.symbols(frame, payload, offset):
            entry = packed.entries[number]
            if first == 0:
                value = _origin(entry.shape, entry.dtype, start(entry.key, entry.start))
            columns = entry.rows[1]
            part = value[first * columns : last * columns]
            part.copy_(part.float().add_(_scaled(entry, factors.get(number), torch.from_numpy(symbols), first, last)))
            if last == entry.rows[0]:
                yield entry.key, value.reshape(entry.shape)
    for entry in packed.entries:
        empty = entry.store == "ternary" and not entry.numel
        if entry.store == "start" or empty:
            yield entry.key, _origin(entry.shape, entry.dtype, start(entry.key, entry.start)).reshape(entry.shape)


def _scaled(entry: Entry, factors: Tensor | None, symbols: Tensor, first: int, last: int) -> Tensor:
    """``c m s`` of the rows from ``first`` to ``last``, (n,)."""
    piece = replace(entry, shape=(last - first, entry.rows[1]))
    by_rows = entry.rows[0] < entry.rows[1]
    if factors is None or not by_rows:
        return spread(piece, factors, symbols, by_rows=False)
    return spread(piece, factors[first:last], symbols, by_rows=True)


def _origin(shape: tuple[int, ...], dtype: str, start: Tensor | None) -> Tensor:
    """A flat copy of the start in the tensor's dtype."""
    kind = getattr(torch, dtype)
    if start is None:
        return torch.zeros(torch.Size(shape).numel(), dtype=kind)
    if tuple(start.shape) != shape:
        raise ShapeMismatch(f"a start of {tuple(start.shape)} for a tensor of {shape}")
    return start.detach().to("cpu", kind, copy=True).reshape(-1)


def _write_checkpoint(packed: Packed, out: Path, reference: Path) -> Path:
    from trimtab.training.files import new_directory

    if out.exists():
        raise Unsupported(f"{out} exists already; choose another folder for the checkpoint")
    weights = Weights(reference)
    keys = [entry.key for entry in packed.entries]
    if keys != list(weights) or weights.identity(keys) != packed.header["reference_id"]:
        raise CheckpointMismatch(f"{packed.path} is the difference to another checkpoint than {reference}")
    packed.verify()
    left = {file: sum(other == file for other in weights.files.values()) for file in dict.fromkeys(weights.files.values())}
    waiting: dict[Path, dict[str, Tensor]] = {file: {} for file in left}
    with new_directory(out) as stage:
        for key, value in _values(packed, lambda key, tag: None if tag == "zero" else weights[key]):
            file = weights.files[key]
            waiting[file][key] = value
            if len(waiting[file]) == left[file]:
                save_file(waiting.pop(file), stage / file.name, metadata={"format": "pt"})
        if reference.is_dir():
            for file in reference.iterdir():
                if file.is_file() and file.suffix in (".json", ".txt", ".model", ".md", ".jinja"):
                    shutil.copy2(file, stage / file.name)
    return out


@torch.no_grad()
def exchange(model: nn.Module, packed: str | os.PathLike, *, name: str) -> None:
    """Put the values of a compressed adapter into the attached adapter ``name`` of the same places, in place.

    No module is made and nothing is compiled again, so that one attached adapter can serve many compressed ones in turn.

    Raises:
        CheckpointMismatch, ShapeMismatch: damage, or other places or shapes than the attached adapter's; nothing is changed then.
    """
    root = unwrap(model)
    group = adapter_group(state_of(root), name)
    opened = Packed(packed)
    manifest = adapter_manifest(opened)
    cut.check(root, manifest, str(opened.path))
    fingerprint.compare(root, manifest["base"], str(opened.path))
    live = _live(group.adapters)
    values = adapter_tensors(opened, root)
    problems: list[TrimtabError] = []
    for key in sorted(set(live) ^ set(values)):
        where = f"the attached adapter {name!r}" if key in live else str(opened.path)
        problems.append(CheckpointMismatch(f"{key} is in {where} alone"))
    for key in set(live) & set(values):
        if live[key].shape != values[key].shape:
            found = f"{tuple(live[key].shape)} attached and {tuple(values[key].shape)} in {opened.path}"
            problems.append(ShapeMismatch(f"{key} is {found}"))
    raise_all(problems)
    for key, value in live.items():
        value.copy_(values[key])


def _live(adapters: list[Any]) -> Mapping[str, Tensor]:
    """The tensors of attached adapters by their saved names, not copied."""
    return {
        f"{adapter.site.path}.{adapter.site.slot}.{key}": value
        for adapter in adapters
        for key, value in adapter.state_dict(keep_vars=True).items()
    }
