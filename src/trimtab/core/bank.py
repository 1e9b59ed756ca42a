"""Building adapters; and expert banks: one adapter an expert, its parameters stacked, the definition mapped over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trimtab.core.contracts import Adapter, MethodConfig, Reparameterization, Selection
from trimtab.core.site import Site

__all__ = ["Bank", "build_adapter", "shapes_only"]


class _Weight(nn.Module):
    """Calls an adapter's ``weight`` as a forward, so that ``functional_call`` can."""

    def __init__(self, adapter: Reparameterization):
        super().__init__()
        self.adapter = adapter

    def forward(self, W: Tensor) -> Tensor:
        return self.adapter.weight(W)


class _Factors(_Weight):
    """Calls an adapter's ``factors`` as a forward."""

    def forward(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.adapter.factors()


class Bank(Reparameterization):
    """``weight(W)`` for W of shape (experts, out, in): expert e's matrix goes through expert e's own parameters.

    Parameters and buffers carry the method's names and a leading axis of experts.
    """

    def __init__(self, config: MethodConfig, site: Site, *, rng: torch.Generator):
        super().__init__(config, site)
        cls = type(config).adapter_class
        matrices = None if site.is_meta else site.weight.detach()
        one = [_Expert(site, None if matrices is None else matrices[e], e) for e in range(site.shape[0])]
        adapters = [cls(config, expert, rng=rng) for expert in one]
        self.identity_at_start = cls.identity(config)
        self.needs_gradient = False
        self.additive = cls.additive
        for key, _ in adapters[0].named_parameters():
            stack = torch.stack([dict(a.named_parameters())[key].detach() for a in adapters])
            self.register_parameter(key.replace(".", "__"), nn.Parameter(stack))
        for key, _ in adapters[0].named_buffers():
            stack = torch.stack([dict(a.named_buffers())[key] for a in adapters])
            self.register_buffer(key.replace(".", "__"), stack)
        # the template holds shapes only; object.__setattr__ keeps it out of the module tree and of the state dict
        shapes = one[0].shapes_only()
        shapes.matrix = None
        template = cls(config, shapes, rng=rng)
        object.__setattr__(self, "_template", _Weight(template))

    def weight(self, W: Tensor) -> Tensor:
        self._template.train(self.training)
        return torch.vmap(lambda tensors, w: functional_call(self._template, tensors, (w,)))(self._stacks(), W)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """The experts' factors, (experts, out, r) and (experts, r, in), if the method has factors."""
        adapter = self._template.adapter
        if adapter.factors() is None:
            return None
        return torch.vmap(lambda tensors: functional_call(_Factors(adapter), tensors, ()))(self._stacks())

    def _stacks(self) -> dict[str, Tensor]:
        """The stacked tensors by the names that the template has for them."""
        return {f"adapter.{k.replace('__', '.')}": v for k, v in (*self.named_parameters(), *self.named_buffers())}


class _Expert(Site):
    """One expert's matrix of a bank, while its adapter is being built."""

    kind = "bare"

    def __init__(self, bank: Site, matrix: Tensor | None, index: int):
        gradient = None if bank.gradient is None else bank.gradient[index]
        super().__init__(
            module=bank.module,
            path=f"{bank.path}[{index}]",
            tensor=bank.tensor,
            shape=bank.shape[1:],
            role=bank.role,
            block=bank.block,
            device=bank.device,
            dtype=bank.dtype,
            adapter_dtype=bank.adapter_dtype,
            cohort=bank.cohort,
            gradient=gradient,
            head_size=bank.head_size,
        )
        self.matrix = matrix

    @property
    def weight(self) -> Tensor:
        return self.matrix


def build_adapter(config: MethodConfig, site: Site, rng: torch.Generator) -> Adapter:
    """The adapter for one site; a bank of them where the site is a bank."""
    cls = type(config).adapter_class
    config = cls.fit(config, site)
    if site.kind == "bare" and len(site.shape) == 3 and not issubclass(cls, Selection):
        return Bank(config, site, rng=rng)
    if issubclass(cls, Selection):
        return cls(config, site)
    return cls(config, site, rng=rng)


def shapes_only(config: Any, site: Site, rng: torch.Generator, stored: Mapping[str, tuple[int, ...]] | None = None) -> Adapter:
    """The adapter without values, its site the real one; ``install`` fills it.

    Args:
        stored: shapes of the tensors that will fill it, for methods whose sizes the data chose.
    """
    twin = site.shapes_only()
    twin.stored = stored or {}
    adapter = build_adapter(config, twin, rng)
    adapter.site = site
    _resize(adapter, twin.stored)
    return adapter


def _resize(adapter: Adapter, stored: Mapping[str, tuple[int, ...]]) -> None:
    """Give it the stored number of ranks, which a schedule may have changed; the same one in all tensors that carry ranks."""
    axes = type(adapter).rank_axes
    if len({stored[name][dim] for name, dim in axes.items() if len(stored.get(name, ())) > dim}) != 1:
        return
    for name, dim in axes.items():
        own = getattr(adapter, name)
        if name in stored and stored[name][:dim] + stored[name][dim + 1 :] == own.shape[:dim] + own.shape[dim + 1 :]:
            own.data = own.data.new_empty(stored[name])
