"""save and load: one safetensors file and a manifest, strict both ways, written so that no interruption loses anything."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core import cut, fingerprint
from trimtab.core.adapter_folder import MANIFEST, VERSION, adapter_in, read_manifest, read_saved, read_tensors, write_folder
from trimtab.core.adapter_folder import seal_of as _seal
from trimtab.core.adapter_folder import sha256_of as _hash
from trimtab.core.attach import mount_group, remove_group
from trimtab.core.bank import shapes_only
from trimtab.core.contracts import Adapter
from trimtab.core.errors import CheckpointMismatch, NoMatch, ShapeMismatch, TrimtabError, Unsupported, nearest, raise_all
from trimtab.core.folders import writing
from trimtab.core.kinds import site_for
from trimtab.core.notes import notes_of
from trimtab.core.places import module_site
from trimtab.core.reading import check_finite, scale_problems
from trimtab.core.recognition import check_options, recognise
from trimtab.core.registry import config_from_dict, config_to_dict
from trimtab.core.selection import Place
from trimtab.core.site import Cohort, Rows, Site
from trimtab.core.state import ATTRIBUTE, Group, adapter_group, shapes_by_place, state_of, tensors_of, unwrap

__all__ = [
    "FORMATS", "MANIFEST", "VERSION", "_hash", "_seal", "fill", "formats", "install", "load", "place_entry", "read_manifest",
    "read_saved", "read_tensors", "rebuild", "save", "save_group", "site_of", "write_folder",
]  # fmt: skip

#: other formats by name, filled by trimtab.compat; trimtab/compat/formats.py says what each offers
FORMATS: dict[str, Any] = {}


def save(model: nn.Module, path: str | os.PathLike, *, name: str | None = None, format: str = "trimtab", **options: Any) -> Path:
    """Write one adapter to the folder ``path``: ``manifest.json`` and one safetensors file; base weights never.

    The tensors are written first, under a name that holds their hash, then the manifest replaces the old one in one
    step; an interrupted save leaves the old adapter whole.

    Args:
        name: the adapter; may be left out if there is one.
        format: ``"trimtab"``, ``"peft"`` (with ``base_name=`` as an option) or ``"diffusers"`` (with ``component=``).

    Raises:
        NoMatch: no such adapter. Unsupported: unknown format, or a method the format cannot hold.
        CheckpointMismatch: a tensor holds NaN or has no values. WriteError: a full disk or a read-only folder; what was there is
        left as it was.
    """
    root = unwrap(model)
    state = state_of(root)
    group = adapter_group(state, _only(list(state.groups), name))
    if format != "trimtab":
        _refuse_bad(tensors_of(group))
        cut.refuse(root, f"the format {format!r}")
        check_options(format, _format(format), options, Path(path), verb="save")
        with writing(Path(path)):
            return _format(format).save(root, Path(path), group.name, **options)
    check_options(format, None, options, Path(path))
    sample = fingerprint.take(root, group.adapters)
    return save_group(group, Path(path), base=sample, **notes_of(root, group.adapters), **cut.entry(root))


def save_group(group: Group, folder: Path, *, base: dict[str, Any], **more: Any) -> Path:
    """Write adapters that need not be on a model; ``base``: the sample of its weights; ``more`` goes into the manifest."""
    tensors = tensors_of(group)
    _refuse_bad(tensors)
    unique, aliases = _without_copies(tensors)
    manifest = {
        "format": "trimtab",
        "version": VERSION,
        "name": group.name,
        "places": [place_entry(adapter) for adapter in group.adapters],
        "tensors": {key: {"shape": list(v.shape), "dtype": str(v.dtype).removeprefix("torch.")} for key, v in tensors.items()},
        "aliases": aliases,
        "base": base,
        **more,
    }
    return write_folder(folder, unique, manifest)


def load(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    name: str | None = None,
    trainable: bool = False,
    active: bool | None = None,
    check_base: bool = True,
    **options: Any,
) -> str:
    """Attach the adapter saved in the folder or file ``path``; returns its name.

    Strict: every stored tensor is used, every needed one is there, shapes agree, and the base's weights are those the
    adapter was made for. Nothing is attached on error. Other adapters, and what is trainable, stay as they are.

    Args:
        name: its name on this model; None: the name it was saved with.
        trainable: whether its parameters learn.
        active: whether it acts; None: only if no other adapter is on the model.
        check_base: compare a sample of the base's weights with the sample in the manifest.
        options: of another library's format, as for ``tt.convert``: ``part`` (kohya), ``alpha``, ``permute`` (torchtune), ...

    Raises:
        CheckpointMismatch: damaged or foreign files, or another base. ShapeMismatch: sizes differ. NoMatch: a place is
        missing. Unsupported: the name is taken, or an option that the format does not have.
    """
    root = unwrap(model)
    folder = Path(path)
    folder = adapter_in(folder, name)
    kind = recognise(folder, formats)
    other = formats()[kind] if kind != "trimtab" else None
    check_options(kind, other, options, folder)
    if other is not None:
        return other.load(root, folder, name=name, trainable=trainable, active=active, check_base=check_base, **options)
    manifest, tensors = read_saved(folder)
    name = name or manifest["name"]
    cut.check(root, manifest, str(folder))
    adapters = rebuild(root, manifest)
    if check_base:
        fingerprint.compare(root, manifest["base"], str(folder), adapters=adapters)
    return install(root, adapters, tensors, name=name, trainable=trainable, active=active, source=str(folder))


def install(
    root: nn.Module, adapters: list[Adapter], tensors: dict[str, Tensor], *, name: str, trainable: bool, active: bool | None,
    source: str,
) -> str:  # fmt: skip
    """Fill adapters that have shapes only with stored tensors, then mount them. Used by every format's reader."""
    state = state_of(root, create=False) if ATTRIBUTE in root.__dict__ else None
    if state is not None and name in state.groups:
        raise Unsupported(f"an adapter named {name!r} is attached already; load it with name=..., or tt.detach it first")
    if not isinstance(name, str) or not name:
        raise Unsupported(f"an adapter's name is a non-empty text, found {name!r}")
    fill(adapters, tensors, source)
    try:
        mount_group(root, name, adapters, trainable=trainable)
    except BaseException:
        if ATTRIBUTE in root.__dict__ and name in state_of(root).groups:
            remove_group(root, name)
        raise
    state = state_of(root)
    if active or (active is None and len(state.groups) == 1):
        state.active = (*state.active, name)
        state.refresh()
    return name


def _only(names: list[str], name: str | None) -> str:
    if name is not None:
        return name
    if len(names) != 1:
        raise NoMatch(f"say which adapter to save with name=...; attached: {', '.join(map(repr, names))}")
    return names[0]


def formats() -> dict[str, Any]:
    """The other formats; their modules are imported by the first folder that has no manifest."""
    import trimtab.compat.formats  # noqa: F401  fills FORMATS

    return FORMATS


def _format(format: str) -> Any:
    if format not in formats():
        raise Unsupported(f"unknown format {format!r}{nearest(format, ['trimtab', *FORMATS])}")
    return FORMATS[format]


def _refuse_bad(tensors: dict[str, Tensor]) -> None:
    problems: list[TrimtabError] = []
    for key, value in tensors.items():
        if value.is_meta or (value.numel() and value.untyped_storage().nbytes() == 0):
            problems.append(CheckpointMismatch(f"{key} has no values (sharded or on the meta device); gather it before saving"))
        elif value.is_floating_point() and not bool(torch.isfinite(value).all()):
            problems.append(CheckpointMismatch(f"{key} holds NaN or infinite values; the last good save is left as it is"))
    raise_all(problems)


def _without_copies(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store, and those equal to a stored one in storage, shape and stride: ``key -> stored key``."""
    seen: dict[tuple, str] = {}
    unique, aliases = {}, {}
    for key, value in tensors.items():
        mark = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype)
        if value.numel() and mark in seen:
            aliases[key] = seen[mark]
        else:
            seen[mark] = key
            # a view of a larger storage is stored on its own
            unique[key] = value.detach().to("cpu").contiguous().clone()
    return unique, aliases


def place_entry(adapter: Adapter) -> dict[str, Any]:
    site = adapter.site
    entry: dict[str, Any] = {"path": site.path, "tensor": site.tensor, "kind": site.kind, "shape": list(site.shape)}
    if site.part is not None:
        rows = site.rows
        entry |= {"part": site.part, "rows": [rows.start, rows.size, rows.blocks, rows.stride]}
    if site.source_path is not None:
        entry["source"] = site.source_path
    scale = getattr(adapter.config, "scale", None)
    if scale is not None:
        entry["scale"] = scale
    if adapter.origin is not None:
        entry["origin"] = list(adapter.origin)
    return entry | {"role": site.role, "block": site.block, "method": config_to_dict(adapter.config)}


def rebuild(root: nn.Module, manifest: dict[str, Any]) -> list[Adapter]:
    """Adapters with shapes only, for every place in the manifest."""
    cohorts: dict[str, Cohort] = {}
    problems: list[TrimtabError] = []
    adapters = []
    rng = torch.Generator()
    for entry in manifest["places"]:
        try:
            site, config = site_of(root, entry), config_from_dict(entry["method"])
            site.cohort = cohorts.setdefault(json.dumps(entry["method"], sort_keys=True), Cohort())
            site.layer = type(config).adapter_class.layer(config)
            adapters.append((site, config))
            site.cohort.sites.append(site)
        except TrimtabError as error:
            problems.append(error)
        except (TypeError, ValueError, AttributeError) as error:
            problems.append(_impossible(entry, error))
    raise_all(problems)
    stored = shapes_by_place(manifest["tensors"], [site for site, _ in adapters])
    built = []
    for (site, config), shapes, entry in zip(adapters, stored, manifest["places"], strict=True):
        try:
            built.append(shapes_only(config, site, rng, shapes))
        except TrimtabError as error:
            problems.append(error)
        except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError, ArithmeticError) as error:
            problems.append(_impossible(entry, error))
    raise_all(problems)
    for adapter, entry in zip(built, manifest["places"], strict=True):
        adapter.origin = tuple(entry["origin"]) if "origin" in entry else None
    return built


def _impossible(entry: dict[str, Any], error: Exception) -> TrimtabError:
    """A method's own code met values that no save writes."""
    return CheckpointMismatch(f"what is saved for {entry['path']} cannot be built from its description, {entry['method']}: {error}")


def find_module(root: nn.Module, path: str) -> nn.Module:
    """The module at ``path``; its cost does not depend on how many adapters are on the model.

    Raises:
        NoMatch: there is none; the message has the nearest paths.
    """
    try:
        return root.get_submodule(path)
    except AttributeError:
        known = [name for name, _ in root.named_modules() if "trimtab" not in name.split(".")]
        raise NoMatch(f"the adapter acts on {path}, which this model does not have{nearest(path, known)}") from None


def site_of(root: nn.Module, entry: dict[str, Any]) -> Site:
    path, tensor = entry["path"], entry["tensor"]
    module = find_module(root, path)
    rows = Rows(*entry["rows"]) if "rows" in entry else None
    source = entry.get("source")
    known = {key: entry.get(key) for key in ("part", "role", "block", "source")}
    place = Place(
        path=path, module=module, tensor=tensor or None, rows=rows, **known,
        source_module=None if source is None else find_module(root, source),
    )  # fmt: skip
    if not tensor:
        site = module_site(place, entry["shape"][-1])
    elif module._parameters.get(tensor) is None:
        raise NoMatch(f"the adapter acts on the parameter {tensor!r} of {path}, which this model does not have")
    else:
        site = site_for(place, tensor)
    if list(site.shape) != entry["shape"]:
        raise ShapeMismatch(
            f"{site.name} is {'x'.join(map(str, site.shape))} in this model; the adapter was made for "
            f"{'x'.join(map(str, entry['shape']))}"
        )
    if rows is not None:
        last, whole = rows.start + (rows.blocks - 1) * rows.stride + rows.size, tuple(site.parameter().shape)
        if last > max(whole) or rows.blocks < 1 or (rows.blocks > 1 and rows.stride < rows.size):
            raise ShapeMismatch(f"{site.name} is said to be the rows {entry['rows']} of {whole}, which has no such rows")
    return site


def fill(adapters: list[Adapter], tensors: dict[str, Tensor], source: str) -> None:
    """Move stored tensors into the adapters.

    Raises:
        CheckpointMismatch: missing or unused tensors, NaN or infinite values, as a list. ShapeMismatch: sizes differ.
    """
    check_finite(tensors, source)
    problems: list[TrimtabError] = scale_problems(adapters, source)
    used: set[str] = set()
    shared: dict[tuple, Tensor] = {}
    for adapter in adapters:
        prefix = f"{adapter.site.path}.{adapter.site.slot}."
        values = {}
        learning = dict(adapter.named_parameters(remove_duplicate=False))
        for key, wanted in adapter.state_dict().items():
            found = tensors.get(prefix + key)
            used.add(prefix + key)
            if found is None:
                problems.append(CheckpointMismatch(f"{source} lacks {prefix + key}"))
            elif found.is_floating_point() != wanted.is_floating_point():
                problems.append(CheckpointMismatch(f"{prefix + key} is {found.dtype} in {source}, {wanted.dtype} is needed"))
            elif found.shape != wanted.shape:
                problems.append(
                    ShapeMismatch(f"{prefix + key} is {tuple(found.shape)} in {source}, {tuple(wanted.shape)} is needed")
                )
            else:
                # one storage stays one storage, and one parameter stays one
                mark = id(found), adapter.site.device, key in learning
                if mark not in shared:
                    found = found.to(adapter.site.device)
                    shared[mark] = nn.Parameter(found, requires_grad=False) if key in learning else found
                values[key] = shared[mark]
        if not problems:
            adapter.load_state_dict(values, strict=True, assign=True)
            adapter.rebuild()
    unused = sorted(set(tensors) - used)
    if unused:
        problems.append(
            CheckpointMismatch(
                f"{source} has {len(unused)} tensors that no place uses: {', '.join(unused[:3])}{' ...' if len(unused) > 3 else ''}"
            )
        )
    raise_all(problems)


def inspect(path: str | os.PathLike) -> dict[str, Any]:
    """The manifest, after checking the tensors' file against it; needs no model. A compressed adapter has one too.

    Raises:
        CheckpointMismatch: damaged, or no adapter. Unsupported: another library's.
    """
    folder = adapter_in(Path(path))
    kind = recognise(folder, formats)
    if kind != "trimtab":
        return formats()[kind].inspect(folder)
    manifest, tensors = read_saved(folder)
    if sorted(tensors) != sorted(manifest["tensors"]):
        raise CheckpointMismatch(f"{path} is damaged: its tensors are not those that the manifest lists")
    return manifest
