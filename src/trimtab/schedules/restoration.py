"""Adapters of a cut base, on a cut base and on the whole one: both give the same function.

An adapter that was trained after a cut is saved small, with the units that are left in its manifest. It serves in two exact modes:

- ``index``: the base is cut likewise when the adapter is loaded; memory and time are those of the small model. ``view`` gives a
  model of its own for each task, all sharing one base's other weights.
- ``mask``: the base stays whole; the adapter's tensors are padded with zeros to full size, and a constant mask (``UnitMask``,
  stored with the adapter from then on) multiplies the units that are not left by zero, before the adapter. Adapters of several
  tasks then stand on one base, switch, and are routed row by row.

Zero padding without masks is a third function, that of neither; it is not offered.
Source: arXiv 2406.03792 claims that its adapters are plug-and-play; its code has neither mode.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core import anatomy as anatomy_module
from trimtab.core import checkpoint, fingerprint
from trimtab.core.attach import remove_group
from trimtab.core.bank import build_adapter
from trimtab.core.cut import Kept, Slice, by_units, cut_of, unpacked
from trimtab.core.errors import TrimtabError, Unsupported
from trimtab.core.registry import config_from_dict, config_to_dict
from trimtab.core.site import Rows
from trimtab.core.state import ATTRIBUTE as STATE
from trimtab.core.state import ModelState, state_of, tensors_of, unwrap
from trimtab.methods.additive.unit_mask import UnitMask
from trimtab.schedules import surgery

__all__ = ["load", "restore", "view", "widened"]

Pack = tuple[list[dict[str, Any]], dict[str, Tensor]]


def load(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    mode: str = "index",
    name: str | None = None,
    trainable: bool = False,
    active: bool | None = None,
    check_base: bool = True,
    originals: str = "keep",
) -> str:
    """Attach the adapter saved in the folder ``path``, cut base or not; returns its name. ``tt.load``, which see, for a whole base.

    Args:
        mode: ``"index"`` cuts the base as it was cut for the adapter, unless it is cut so already; ``"mask"`` leaves it whole.
        originals: what becomes of the uncut parameters: ``"keep"``, ``"host"``, ``"drop"``.

    Raises:
        Unsupported: other adapters are on the base that would be cut; or, with ``mask``, the base is cut.
        CheckpointMismatch, ShapeMismatch, NoMatch: as ``tt.load``; the model is then as before.
    """
    root, folder = unwrap(model), Path(path)
    if mode not in ("index", "mask"):
        raise ValueError(f'mode must be "index" or "mask", found {mode!r}')
    options = {"name": name, "trainable": trainable, "active": active}
    if not (folder / checkpoint.MANIFEST).exists():
        return checkpoint.load(root, folder, check_base=check_base, **options)
    manifest = checkpoint.read_manifest(folder)
    kept = unpacked(manifest["cut"]) if "cut" in manifest else None
    if kept is None or (mode == "index" and cut_of(root) is not None):
        return checkpoint.load(root, folder, check_base=check_base, **options)
    if mode == "mask":
        places, tensors, left = widened(root, manifest, checkpoint.read_tensors(folder, manifest))
        adapters = checkpoint.rebuild(root, places)
        if check_base:
            fingerprint.compare(root, manifest["base"], str(folder), view=left)
        options["name"] = name or manifest["name"]
        return checkpoint.install(root, adapters, tensors, source=str(folder), **options)
    if root.__dict__.get(STATE) is not None:
        raise Unsupported(
            f"the base would be cut for {folder}, and other adapters are on it, which would lose units that they use; "
            'load with mode="mask", or into a model of its own: trimtab.schedules.restoration.view(base, path)'
        )
    record = surgery.cut(root, kept, originals="keep")
    try:
        found = checkpoint.load(root, folder, check_base=check_base, **options)
    except TrimtabError:
        surgery.put_back(root)
        raise
    surgery.settle(record, originals)
    return found


def widened(
    root: nn.Module, manifest: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor], Callable[[str, Tensor], Tensor]]:
    """A saved adapter of a cut base as one of the whole base: masks first, its own tensors padded with zeros.

    Returns:
        The manifest with the places and tensors at full size, the tensors, and what of the base's tensors the sample was taken of.

    Raises:
        Unsupported: ``root`` is cut itself. NoMatch, ShapeMismatch: it is another base.
    """
    kept = unpacked(manifest["cut"])
    slices = _whole(root, kept)
    pack = _widened(root, manifest["places"], tensors, kept, slices)
    return manifest | _manifest(pack), pack[1], lambda key, tensor: _left(root, slices, key, tensor)


def view(base: nn.Module, path: str | os.PathLike, **options: Any) -> nn.Module:
    """A small model for one task, cut out of ``base``, which stays whole; what is not cut is shared with it.

    Args:
        base: without adapters.
        options: of ``load``.

    Raises:
        Unsupported: adapters are on ``base``. Further as ``load``.
    """
    if unwrap(base).__dict__.get(STATE) is not None:
        raise Unsupported("a view is cut out of a base without adapters; detach them, or take a model of its own for them")
    twin = surgery.shared_copy(base)
    load(twin, path, mode="index", originals="drop", **options)
    return twin


@torch.no_grad()
def restore(model: nn.Module, source: Any = None) -> None:
    """Put the whole base back, bit for bit, under the adapters, which go on giving what they gave, in ``mask`` mode.

    The adapters' parameters are new objects afterwards: an optimizer that held the old ones is made anew.

    Args:
        source: of the uncut parameters, if they were dropped: a state dict, a model, a safetensors file or a folder of them.

    Raises:
        Unsupported: nothing was cut, an adapter is merged or was attached since and cannot be padded, or there is no source.
        CheckpointMismatch: the source is another base.
    """
    root = unwrap(model)
    record = cut_of(root)
    if record is None:
        raise Unsupported("nothing was cut out of this model")
    state: ModelState | None = root.__dict__.get(STATE)
    surgery.check_followers(state, record.slices)
    groups = list(state.groups.values()) if state else []
    active = state.active if state else ()
    packs = [(group, [checkpoint.place_entry(a) for a in group.adapters], tensors_of(group)) for group in groups]
    surgery.put_back(root, source)
    ready = []
    for group, places, tensors in packs:
        copies = {key: value.clone() for key, value in tensors.items()}
        pack = _widened(root, places, copies, record.kept, record.slices)
        ready.append((group, checkpoint.rebuild(root, _manifest(pack)), pack[1]))
    for group in groups:
        remove_group(root, group.name)
    for group, adapters, tensors in ready:
        checkpoint.install(root, adapters, tensors, name=group.name, trainable=group.trainable, active=False, source="this model")
    if groups:
        state = state_of(root)
        state.active = active
        state.refresh()


def _whole(root: nn.Module, kept: Kept) -> Mapping[str, Slice]:
    if cut_of(root) is not None:
        raise Unsupported("the base is cut; restore(model) puts it back, and mask mode needs it whole")
    return surgery.slices_of(root, kept)[0]


def _left(root: nn.Module, slices: Mapping[str, Slice], key: str, tensor: Tensor) -> Tensor:
    """What a cut would leave of the base's ``tensor``, called ``key``."""
    path, _, name = key.rpartition(".")
    piece = slices.get(path)
    if piece is None or (name == "bias" and piece.side == "in"):
        return tensor
    return tensor.detach().index_select(surgery.axis(root.get_submodule(path), name, piece.side), piece.index.to(tensor.device))


def _manifest(pack: Pack) -> dict[str, Any]:
    """What ``rebuild`` reads of a manifest."""
    places, tensors = pack
    return {"places": places, "tensors": {key: {"shape": list(value.shape)} for key, value in tensors.items()}}


def _widened(
    root: nn.Module, places: list[dict[str, Any]], tensors: dict[str, Tensor], kept: Kept, slices: Mapping[str, Slice]
) -> Pack:
    """An adapter of the cut base as one of the whole: the masks first, then its places and tensors at full size."""
    anatomy = anatomy_module.of(root)
    wide_places, wide = _masks(anatomy, kept)
    for entry in places:
        piece = slices.get(entry["path"])
        if piece is None or (entry["kind"] == "vector" and piece.side == "in"):
            wide_places.append(entry)
            continue
        rows, part = anatomy.parts.get(entry["path"], {}).get(entry.get("part")), {}
        if rows is not None:
            part = {"rows": [rows.start, rows.size, rows.blocks, rows.stride]}
        full = list(entry["shape"])
        module = root.get_submodule(entry["path"])
        stored = module._parameters[entry["tensor"]]
        axis = 0 if piece.side == "out" else len(full) - 1
        full[axis] = rows.count if rows else stored.shape[surgery.axis(module, entry["tensor"], piece.side)]
        wide_places.append(entry | part | {"shape": full})
        tensors = tensors | _padded(root, entry, wide_places[-1], tensors, piece, rows)
    return wide_places, tensors | wide


def _padded(
    root: nn.Module, entry: dict[str, Any], full: dict[str, Any], tensors: dict[str, Tensor], piece: Slice, rows: Rows | None
) -> dict[str, Tensor]:
    """The tensors of one place with zeros where its inputs or outputs were cut away."""
    site = checkpoint.site_of(root, full).shapes_only()
    config = config_from_dict(entry["method"])
    site.layer = type(config).adapter_class.layer(config)
    before, axis = site.shape, 0 if piece.side == "out" else -1
    site.shape = tuple(entry["shape"])
    prefix = f"{site.path}.{site.slot}."
    site.stored = {key.removeprefix(prefix): tuple(v.shape) for key, v in tensors.items() if key.startswith(prefix)}
    adapter = build_adapter(config, site, torch.Generator())
    axes = adapter.out_axes if piece.side == "out" else adapter.in_axes
    found = {}
    for name, dim in axes.items():
        small = tensors[prefix + name]
        size = site.shape[axis] // small.shape[dim]
        shape = [*small.shape]
        shape[dim] = before[axis] // size
        index = by_units(piece.local(rows), size).to(small.device)
        found[prefix + name] = small.new_zeros(shape).index_copy_(dim, index, small)
    return found


def _masks(anatomy: anatomy_module.Anatomy, kept: Kept) -> Pack:
    """A constant mask for every reader whose units were cut."""
    config = UnitMask(learn=False)
    places, tensors = [], {}
    for path, (count, index) in ((p, of) for found in kept.values() for p, of in found.items()):
        module = anatomy.modules[path]
        place = {"path": path, "tensor": "weight", "kind": "linear", "role": anatomy.roles[path], "block": anatomy.block_of(path)}
        places.append(place | {"shape": list(anatomy_module.sizes(module)), "method": config_to_dict(config)})
        mask = torch.zeros(count)
        mask[index] = 1
        tensors[f"{path}.weight_mask.m"] = mask
    return places, tensors
