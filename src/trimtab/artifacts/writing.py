"""New adapters written to disk: low-rank factors or whole values at a site, in trimtab's format or another."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.artifacts.base import Base
from trimtab.artifacts.skeleton import skeleton
from trimtab.core.attach import mount_group, remove_group
from trimtab.core.bank import shapes_only
from trimtab.core.checkpoint import fill, formats, place_entry, save_group
from trimtab.core.contracts import Adapter, MethodConfig
from trimtab.core.errors import Unsupported, nearest
from trimtab.core.recognition import check_options
from trimtab.core.registry import get
from trimtab.core.site import Cohort, Site
from trimtab.core.state import ATTRIBUTE, Group
from trimtab.kernels.thin import Thin

__all__ = ["as_low_rank", "as_value", "write_adapters"]


def as_low_rank(site: Site, factors: Thin) -> Adapter:
    """A LoRA of scale 1 at ``site`` with these factors, (..., out, r) and (..., r, in); float32, or float64 on such a base."""
    config = get("LoRA")(rank=factors.rank, alpha=float(factors.rank))
    return _filled(config, site, {"b": factors.b, "a": factors.a})


def as_value(site: Site, value: Tensor, config: MethodConfig | None) -> Adapter:
    """A selection at ``site`` that puts ``value`` (of the site's shape) in its place; ``config`` None: ``Unfreeze``."""
    return _filled(config or get("Unfreeze")(), site, {"value": value})


def _filled(config: MethodConfig, site: Site, values: dict[str, Tensor]) -> Adapter:
    own = copy.copy(site)
    own.cohort, own.layer = Cohort([own]), type(config).adapter_class.layer(config)
    if own.is_meta:
        own.device = torch.device("cpu")
    adapter = shapes_only(config, own, torch.Generator())
    dtype = torch.float64 if own.dtype == torch.float64 else torch.float32
    fill([adapter], {f"{own.path}.{own.slot}.{key}": v.to(dtype).contiguous() for key, v in values.items()}, "the merge")
    return adapter.eval().requires_grad_(False)


def write_adapters(
    adapters: Sequence[Adapter],
    out: Path,
    *,
    name: str,
    base: dict[str, Any],
    model: Base | None,
    format: str = "trimtab",
    made: dict[str, Any] | None = None,
    notes: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Save ``adapters`` as one, atomically.

    Args:
        base: the sample of the base's weights for the manifest.
        model: the base, if there is one; other formats name its modules.
        format: ``"trimtab"`` or another that can be written.
        made: how it came about, for the manifest.
        notes: what it remembers of its model, likewise.
        options: of the format's ``save``.

    Raises:
        Unsupported: the format is unknown, or cannot hold the adapters.
    """
    more = {key: value for key, value in (("made", made), ("model", notes)) if value}
    if format == "trimtab":
        check_options(format, None, options, out)
        save_group(Group(name, list(adapters), trainable=False), out, base=base, **more)
        return
    if format not in formats():
        raise Unsupported(f"unknown format {format!r}{nearest(format, ['trimtab', *formats()])}")
    check_options(format, formats()[format], options, out, verb="save")
    root = model.root if model is not None else _modules_of(adapters, base["class"])
    if model is None:
        adapters = [_on(root, adapter) for adapter in adapters]
    state = root.__dict__.get(ATTRIBUTE)
    while state is not None and name in state.groups:  # the base may be a model at work
        name += "'"
    mount_group(root, name, list(adapters), trainable=False)
    try:
        formats()[format].save(root, out, name, **options)
    finally:
        remove_group(root, name)


def _modules_of(adapters: Sequence[Adapter], class_name: str) -> nn.Module:
    """The adapters' modules alone, which tell another format what it needs to know where no base is given."""
    unknown = [a.site for a in adapters if a.site.rows is not None or a.site.kind in ("conv", "grouped")]
    if unknown:
        what = "rows of a fused layer, whose whole size" if unknown[0].rows is not None else "a convolution, whose kernel's shape"
        raise Unsupported(f"{unknown[0].name} is {what} the base alone knows; say which base it is for: base=...")
    return skeleton([place_entry(adapter) for adapter in adapters], class_name)


def _on(root: nn.Module, adapter: Adapter) -> Adapter:
    """The same adapter on the module of ``root``."""
    adapter.site = copy.copy(adapter.site)
    adapter.site.module = root.get_submodule(adapter.site.path)
    return adapter
