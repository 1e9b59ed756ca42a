"""IA3: keys, values and the feed-forward's hidden activations are multiplied by learned vectors.

At an output, ``W' = diag(l) W`` and ``b' = l * b`` with ``l`` (out,); at an input, ``W' = W diag(l)`` with ``l`` (in,). ``l``
starts at one, so training starts at the base. Source: arXiv 2205.05638, Sec. 3.3, Eq. for ``l_k, l_v, l_ff``: keys and values
at their outputs, the hidden activations at the input of the layer that reads them. Trainable: ``out`` or ``in`` a place.
Saved for backward: the tensor that is multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from trimtab.core.contracts import MethodConfig, Reparameterization, Span
from trimtab.core.errors import Unsupported
from trimtab.core.registry import method
from trimtab.core.site import Operation, Site
from trimtab.kernels.gain import gained

__all__ = ["IA3", "IA3Adapter"]


@dataclass(frozen=True)
class IA3(MethodConfig):
    """Learned gains on keys, values and hidden activations: the smallest of the additive methods.

    Not for tasks far from the pretraining: it can amplify and silence features, and cannot mix them.

    Args:
        side: where the gain acts: ``"output"``, ``"input"``, or ``"auto"``, which is the input at places of the role
            ``mlp.down`` and the output elsewhere, as in the paper.
    """

    search = {"side": ("auto", "input", "output")}
    learning_rate = Span(1e-3, 1e-1, log=True)

    side: str = "auto"

    def __post_init__(self) -> None:
        self.require_choice("side", ("auto", "output", "input"))

    def at_input(self, site: Site) -> bool:
        """Whether the gain stands before the matrix at ``site``."""
        return self.side == "input" or (self.side == "auto" and site.role == "mlp.down")


@method(IA3, paper="arXiv:2205.05638 Sec. 3.3", tests=({}, {"side": "input"}))
class IA3Adapter(Reparameterization):
    """The gain ``l``, (out,) or (in,)."""

    targets = "attn.k | attn.v | mlp.down"
    kinds = frozenset({"linear", "conv", "bare"})
    fast = frozenset({"linear"})
    needs_weight = False
    additive = False
    rebias = True

    def __init__(self, config: IA3, site: Site, *, rng: Generator):
        super().__init__(config, site)
        out, fan_in = site.shape
        self.at_input = config.at_input(site)
        self.l = self.ones(fan_in if self.at_input else out)
        self.in_axes, self.out_axes = ({"l": 0}, {}) if self.at_input else ({}, {"l": 0})

    @classmethod
    def check(cls, config: IA3, site: Site) -> None:
        if site.kind == "conv" and config.at_input(site):
            raise Unsupported(f"{site.name} is a convolution, whose inputs IA3 does not scale; use side='output' there")
        if len(site.shape) == 3 and not config.at_input(site) and site.has_rows_of_bias:
            raise Unsupported(f"{site.name} is a bank with biases of its own, which a gain at its output would leave behind")

    def weight(self, W: Tensor) -> Tensor:
        return W * (self.l if self.at_input else self.l[:, None])

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b if b is None or self.at_input else b * self.l

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        return base(gained(x, self.l, None)) if self.at_input else gained(base(x), self.l, None)
