"""The sites that a method has at a place: a matrix, named tensors, all parameters, or the module itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from trimtab.core.errors import Unsupported
from trimtab.core.kinds import ModuleSite, site_for
from trimtab.core.site import Site, base_class
from trimtab.core.structure import is_matrix, sizes

if TYPE_CHECKING:
    from trimtab.core.contracts import Adapter
    from trimtab.core.selection import Place

__all__ = ["module_site", "sites_of", "widths"]


def module_site(place: Place, width: int | None) -> Site:
    """The site of a whole module; ``width`` is that of its block, for modules that do not tell their own.

    Raises:
        Unsupported: rows of a fused layer, a module without a forward, a convolution, or an unknown width.
    """
    module = place.module
    if place.part is not None:
        raise Unsupported(
            f"{place.role} is rows of the fused layer {place.path}, and this method acts on a whole layer's activations; "
            f"target the layer itself, {place.path!r}"
        )
    if base_class(module).forward is nn.Module.forward:
        raise Unsupported(
            f"{place.path} is a container that is never called ({type(module).__name__}), so that nothing can act on its output; "
            "target what is in it"
        )
    first = next(module.parameters(), None)
    out, fan_in = widths(module, place.path, width)
    if place.source_module is not None:
        fan_in = widths(place.source_module, place.source or "", width)[1]
    if out is None or fan_in is None:
        raise Unsupported(f"the width of {place.path}'s activations cannot be inferred; target a Linear or a block")
    return ModuleSite(
        module=module,
        path=place.path,
        tensor="",
        shape=(out, fan_in),
        role=place.role,
        block=place.block,
        device=torch.device("cpu") if first is None else first.device,
        dtype=torch.float32 if first is None or not first.is_floating_point() else first.dtype,
        source=place.source_module,
        source_path=place.source,
    )


def widths(module: nn.Module, path: str, width: int | None) -> tuple[int | None, int | None]:
    """(out, in): features on the last axis of a module's output and input; ``width`` where it does not tell."""
    if is_matrix(module):
        return sizes(module)
    if isinstance(module, nn.modules.conv._ConvNd):
        raise Unsupported(
            f"{path} is a convolution, whose channels are not its last axis; target a Linear, a module around it, or a block"
        )
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.embedding_dim
    own = getattr(module, "embed_dim", None) if isinstance(module, nn.MultiheadAttention) else None
    weight = module._parameters.get("weight")
    if own is None and not module._modules and weight is not None and weight.dim() == 1:  # a norm
        own = weight.shape[0]
    return (own, own) if own is not None else (width, width)


def sites_of(place: Place, cls: type[Adapter], *, width: int | None = None) -> list[Site]:
    """The sites that a method of class ``cls`` has at ``place``: its matrix, the named tensors, or all parameters.

    Raises:
        Unsupported: the place has nothing that the method acts on.
    """
    if cls.kinds == frozenset({"module"}):
        return [module_site(place, width)]
    found = list(_sites(place, cls))
    bad = [site for site in found if site.kind not in cls.kinds]
    if bad:
        raise Unsupported(f"{cls.__name__} acts on {', '.join(sorted(cls.kinds))} places; {bad[0].name} is of kind {bad[0].kind}")
    return found


def _sites(place: Place, cls: type[Adapter]) -> Iterator[Site]:
    if place.tensor is not None:
        yield site_for(place, place.tensor)
    elif cls.tensors is not None:
        for tensor in cls.tensors:
            if place.module._parameters.get(tensor) is not None:
                yield site_for(place, tensor)
    elif place.module._parameters.get("weight") is not None and "vector" not in cls.kinds:
        yield site_for(place, "weight")
    elif place.rows is not None:
        for tensor in ("weight", "bias", "in_proj_weight", "in_proj_bias"):
            if place.module._parameters.get(tensor) is not None:
                yield site_for(place, tensor)
    else:
        yield from _all_parameters(place, lambda sub, tensor: site_for(sub, tensor))


def _all_parameters(place: Place, make: Callable[[Place, str], Site]) -> Iterator[Site]:
    """Every parameter of the module and below it, adapters left out."""
    for name, module in place.module.named_modules():
        if "trimtab" in name.split("."):
            continue
        path = ".".join(filter(None, (place.path, name)))
        for tensor, value in module._parameters.items():
            if value is not None:
                yield make(replace(place, path=path, module=module), tensor)
