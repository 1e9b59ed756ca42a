"""The base that saved adapters were made for, as the tools of this folder see it: modules with shapes, and values on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trimtab.core import fingerprint
from trimtab.core.contracts import Adapter
from trimtab.core.site import Site
from trimtab.core.state import ATTRIBUTE

__all__ = ["Base", "LiveBase", "check", "sample_of", "values_in"]


class Base(Protocol):
    """What is needed of a base.

    Attributes:
        root: its modules; their parameters may be on the meta device.
    """

    root: nn.Module

    def value(self, path: str, tensor: str) -> Tensor | None:
        """The values of a parameter as it is stored (quantised or not), or None if the base has none of that name."""
        ...


class LiveBase:
    """A model in memory."""

    def __init__(self, root: nn.Module):
        self.root = root

    def value(self, path: str, tensor: str) -> Tensor | None:
        """See ``Base``."""
        module = self.root.get_submodule(path)
        state = self.root.__dict__.get(ATTRIBUTE)
        merged = [entry for entries in state.originals.values() for entry in entries] if state is not None else []
        # of several merges the first one saw the base's own
        value = next((old for owner, name, old, _ in merged if owner is module and name == tensor), module._parameters.get(tensor))
        return None if value is None or value.is_meta else value


def check(
    base: Base, stored: dict[str, Any], source: str, *, adapters: Sequence[Adapter],
    view: Callable[[str, Tensor], Tensor] | None = None,
) -> None:  # fmt: skip
    """Compare the sample of a base's weights that ``adapters`` carry with ``base``; ``view``: what of a tensor it was taken of.

    Raises:
        CheckpointMismatch: they are another base's.
    """
    more = {} if view is None else {"view": view}
    fingerprint.compare(base.root, stored, source, value=base.value, adapters=adapters, **more)


def sample_of(base: Base, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The sample of a base's weights that ``adapters`` carry."""
    taken = fingerprint.take(base.root, adapters, value=lambda site: base.value(site.path, site.tensor))
    return taken | {"class": getattr(base, "class_name", taken["class"])}


@contextmanager
def values_in(base: Base, sites: Sequence[Site]) -> Iterator[None]:
    """The parameters of ``sites`` with their values, inside the block; a site that the base has no value for stays as it is."""
    before = []
    for key, site in {(id(site.module), site.tensor): site for site in sites}.items():
        stored = site.parameter()
        value = base.value(site.path, site.tensor) if stored is not None and stored.is_meta else None
        if value is not None:
            before.append((site.module, key[1], stored))
            new = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
            site.module._parameters[site.tensor] = new
    try:
        with torch.no_grad():
            yield
    finally:
        for module, tensor, stored in before:
            module._parameters[tensor] = stored
