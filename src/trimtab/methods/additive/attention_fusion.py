"""AttentionFusion: adapters that were trained apart, mixed token by token with learned attention.

At a place with output ``y`` and adapters n that would change it by ``c_n``::

    p = softmax_n( (Q y + q) . (K c_n) )          y' = y + V sum_n p_n c_n

``Q``, ``K`` (r, d), ``q`` (r,), ``V`` (d, d). The adapters stay as they are; Q, q, K and V learn. ``V`` starts at the identity and
Q and K at N(0, 0.02): training starts near the adapters' mean. Source: arXiv 2005.00247, Eq. 3-6; there r = d, and whether ``c_n``
holds y as well is left open. A bias of K would cancel in the softmax. Trainable: ``2 r d + r + d^2`` a place. Saved for
backward: ``y``, and the place's input where an adapter reads it; everything else is computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trimtab.core.anatomy import Anatomy
from trimtab.core.contracts import ActivationAdapter, Adapter, MethodConfig, Reparameterization, Span
from trimtab.core.errors import Unsupported
from trimtab.core.registry import method
from trimtab.core.site import Site
from trimtab.kernels.mode import fused

__all__ = ["AttentionFusion", "AttentionFusionAdapter"]


@dataclass(frozen=True)
class AttentionFusion(MethodConfig):
    """A learned mixture of adapters that are on the model already: for every token, attention says how much of each.

    Not where the model is wide: with the defaults ``3 d^2`` numbers a place, more than its adapters; set ``rank`` and
    ``value=False`` there. Not for adapters that change weights other than by a low-rank sum.

    Args:
        adapters: names of the adapters to mix, at least one, attached or loaded before, and best not trainable. They act through
            the mixture, whether active or not.
        rank: r of query and key; None means the width.
        value: whether ``V`` is there and learns; else it is the identity.
    """

    search = {"value": (False, True)}
    learning_rate = Span(1e-5, 1e-3, log=True)

    adapters: tuple[str, ...] = ()
    rank: int | None = None
    value: bool = True

    def __post_init__(self) -> None:
        names = self.adapters
        self.require(
            isinstance(names, tuple) and all(isinstance(n, str) and n for n in names) and len(set(names)) == len(names),
            f"adapters must be a tuple of different names, found {names!r}",
        )
        self.require_count("rank", optional=True)


@method(
    AttentionFusion, paper="arXiv:2005.00247 Eq. 3-6",
    tests=({"adapters": ("one", "two")}, {"adapters": ("one", "two", "three"), "rank": 2, "value": False}),
)  # fmt: skip
class AttentionFusionAdapter(ActivationAdapter):
    """``query`` and ``key`` (r, out), ``query_bias`` (r,), ``value`` (out, out) or None."""

    targets = "where its adapters act"
    identity_at_start = False

    def __init__(self, config: AttentionFusion, site: Site, *, rng: Generator):
        super().__init__(config, site)
        d = site.out_features
        r = config.rank or d
        self.query, self.key = self.normal(r, d, std=0.02, rng=rng), self.normal(r, d, std=0.02, rng=rng)
        self.query_bias = self.zeros(r)
        self.value = self.parameter(torch.eye(d)) if config.value else None

    @classmethod
    def needs(cls, config: AttentionFusion) -> tuple[str, ...]:
        return config.adapters

    @classmethod
    def places(cls, config: AttentionFusion, anatomy: Anatomy) -> str:
        hosts = {path: module._modules["trimtab"] for path, module in anatomy.modules.items() if "trimtab" in module._modules}
        found = [path for path, host in hosts.items() if config.adapters and all(host.adapters(name) for name in config.adapters)]
        if not found:
            raise Unsupported(
                f"{config} finds no place where all of its adapters act; name some of those on the model in adapters=(...), "
                "attached at common places"
            )
        return " | ".join(found)

    @classmethod
    def check(cls, config: AttentionFusion, site: Site) -> None:
        if not config.adapters:
            raise Unsupported("AttentionFusion mixes adapters that are on the model; name them with adapters=(...)")
        for name in config.adapters:
            for source in _sources(site, name):
                if not _mixable(source, site):
                    raise Unsupported(
                        f"AttentionFusion at {site.path} cannot mix {name!r} ({type(source.config).__name__}): it mixes adapters "
                        "on a module's output that read the same, and low-rank updates of a whole Linear"
                    )

    def mixed(self, x: Tensor, y: Tensor) -> Tensor:
        """``sum_n p_n c_n``, through ``V``; shape of ``y``."""
        c = torch.stack([_change(a, x, y) for name in self.config.adapters for a in _sources(self.site, name)], -2)  # (..., n, out)
        dtype = c.dtype
        query = F.linear(y.to(dtype), self.query.to(dtype), self.query_bias.to(dtype)) @ self.key.to(dtype)  # (..., out)
        scores = (c @ query[..., None]).to(torch.promote_types(dtype, torch.float32))
        p = scores.softmax(-2).to(dtype)  # (..., n, 1)
        mean = (c.transpose(-1, -2) @ p)[..., 0]
        return (mean if self.value is None else F.linear(mean, self.value.to(dtype))).to(y.dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        sources = (a for name in self.config.adapters for a in _sources(self.site, name))
        if all(isinstance(a, ActivationAdapter) and a.reads(a.config) == "output" for a in sources):
            x = y  # nobody reads x: it need not be kept
        if torch.is_grad_enabled() and fused(x, y, *self.parameters()):
            return y + checkpoint(self.mixed, x, y, use_reentrant=False)
        return y + self.mixed(x, y)


def _sources(site: Site, name: str) -> list[Adapter]:
    """The adapters called ``name`` at ``site``'s module."""
    host = site.module._modules.get("trimtab")
    return [] if host is None else host.adapters(name)


def _mixable(source: Adapter, site: Site) -> bool:
    if isinstance(source, ActivationAdapter):
        same = source.site.source_path == site.source_path or source.reads(source.config) == "output"
        return same and not source.at_input
    low_rank = isinstance(source, Reparameterization) and source.site.kind == "linear" and source.factors() is not None
    return low_rank and source.site.part is None and site.source_path is None


def _change(source: Adapter, x: Tensor, y: Tensor) -> Tensor:
    """What ``source`` alone would add to ``y``."""
    if isinstance(source, ActivationAdapter):
        return source.change(x, y)
    B, A = source.factors()
    return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)).to(y.dtype)
