"""LoKr: a Kronecker product beside the frozen weight.

``W' = W + (alpha / r) w1 (x) w2`` with ``w1`` (o1, i1), ``w2`` (o2, i2), ``out = o1 o2``, ``in = i1 i2``. ``w2 = w2a w2b`` has
rank r where ``r < max(o2, i2) / 2`` and is full elsewhere (the scale stays). One factor starts at zero, so training starts
at the base. Rank of the update: ``rank(w1) rank(w2)``. Source: LyCORIS, arXiv 2309.14859, Sec. 3.3; shapes and start as in
LyCORIS and peft. Trainable: ``o1 i1 + r (o2 + i2)``. Saved for backward: ``x`` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.contracts import MethodConfig, Reparameterization
from trimtab.core.registry import method
from trimtab.core.site import Operation, Site
from trimtab.kernels.beside import beside
from trimtab.kernels.divisors import factorization
from trimtab.kernels.kronecker import Kronecker, kron, plan

__all__ = ["LoKr", "LoKrAdapter"]


@dataclass(frozen=True)
class LoKr(MethodConfig):
    """Kronecker update: high rank from very few parameters.

    Not for widths without useful divisors (a prime number of inputs gives a plain thin matrix).

    Args:
        rank: r of the larger factor; that factor is full from ``r >= max(o2, i2) / 2`` on.
        alpha: scale numerator; None means ``rank``, a scale of 1.
        factor: size of ``w1``'s sides where it divides the widths; -1: the divisor pair nearest to the square root.
        decompose_both: give ``w1`` rank r too where ``r < max(o1, i1) / 2``.
        zero: which factor starts at zero, ``"w1"`` (peft's default) or ``"w2"`` (LyCORIS).
    """

    search = {"rank": (4, 8, 16, 32, 64), "factor": (-1, 4, 8, 16)}

    rank: int = 8
    alpha: float | None = None
    factor: int = -1
    decompose_both: bool = False
    zero: str = "w1"

    def __post_init__(self) -> None:
        self.require_rank(self.rank)
        self.require(self.alpha is None or self.alpha != 0, "alpha 0 would switch the adapter off")
        self.require(isinstance(self.factor, int) and (self.factor == -1 or self.factor >= 1),
                     f"factor must be -1 or an integer of at least 1, found {self.factor!r}")
        self.require(self.zero in ("w1", "w2"), f'zero must be "w1" or "w2", found {self.zero!r}')

    @property
    def scale(self) -> float:
        """The factor in front of the product."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def _sizes(config: LoKr, site: Site) -> tuple[int, int, bool, bool]:
    """Rows and columns of ``w1``, and whether ``w1`` and ``w2`` are of low rank, as the config cuts the widths."""
    out, fan_in = site.shape
    # a convolution's kernel stays within w2, as in LyCORIS
    channels = site.parameter().shape[1] if site.kind in ("conv", "grouped") else fan_in
    (o1, o2), (i1, i2) = factorization(out, config.factor), factorization(channels, config.factor)
    return o1, i1, config.decompose_both and config.rank < max(o1, i1) / 2, config.rank < max(o2, i2) / 2


def _stored(shapes: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]) -> tuple[int, int, bool, bool] | None:
    """The same of stored tensors, which may be cut otherwise than any ``factor`` does; None if they are no product of ``shape``."""
    thin1, thin2 = "w1a" in shapes and "w1b" in shapes, "w2a" in shapes and "w2b" in shapes
    if not (thin1 or "w1" in shapes) or not (thin2 or "w2" in shapes):
        return None
    left = (shapes["w1a"][0], shapes["w1b"][-1]) if thin1 else shapes["w1"]
    right = (shapes["w2a"][0], shapes["w2b"][-1]) if thin2 else shapes["w2"]
    if len(left) != 2 or len(right) != 2 or (left[0] * right[0], left[1] * right[1]) != tuple(shape):
        return None
    return *left, thin1, thin2


@method(
    LoKr, paper="arXiv:2309.14859 Sec. 3.3",
    tests=({"rank": 8, "alpha": 4.0}, {"rank": 1, "factor": 2, "zero": "w2"},
           {"rank": 1, "factor": 4, "decompose_both": True}),
)
class LoKrAdapter(Reparameterization):
    """Factors ``w1`` or ``w1a w1b``, and ``w2`` or ``w2a w2b``."""

    fast = frozenset({"linear"})
    needs_weight = False

    def __init__(self, config: LoKr, site: Site, *, rng: torch.Generator):
        super().__init__(config, site)
        out, fan_in = site.shape
        o1, i1, thin1, thin = _stored(site.stored, site.shape) or _sizes(config, site)
        o2, i2 = out // o1, fan_in // i1
        self._factor("w1", o1, i1, thin1, rng)
        self._factor("w2", o2, i2, thin, rng)
        self.order = plan(o1, i1, o2, i2, config.rank if thin else None)
        self.rule = Kronecker(o1, i1, left=self.order != "w1 first", right=self.order != "w2 first")

    @property
    def resized(self) -> bool:
        """Whether the factors are not those that the config makes: of a file whose writer cuts the widths otherwise."""
        held = {name: tuple(value.shape) for name, value in self.named_parameters()}
        return _stored(held, self.site.shape) != _sizes(self.config, self.site)

    def _factor(self, name: str, rows: int, columns: int, thin: bool, rng: torch.Generator) -> None:
        """Register ``name``, or ``name + "a"`` and ``name + "b"`` if it is of low rank."""
        r, zero = self.config.rank, self.config.zero == name

        def draw(*shape: int, zero: bool) -> nn.Parameter:
            return self.zeros(*shape) if zero else self.kaiming(*shape, rng=rng)

        if thin:
            self.register_parameter(name + "a", draw(rows, r, zero=zero and name == "w1"))
            self.register_parameter(name + "b", draw(r, columns, zero=zero and name == "w2"))
        else:
            self.register_parameter(name, draw(rows, columns, zero=zero))

    def _full(self, name: str) -> Tensor:
        whole = self._parameters.get(name)
        return getattr(self, name + "a") @ getattr(self, name + "b") if whole is None else whole

    def weight(self, W: Tensor) -> Tensor:
        return W + kron(self.config.scale * self._full("w1"), self._full("w2"))

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        w2 = (self.w2b, self.w2a) if self.order == "thin" else (self._full("w2"),)
        return beside(self.rule, x, base, self.config.scale * self._full("w1"), *w2)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        pairs = []
        for name in ("w1", "w2"):
            whole = self._parameters.get(name)
            if whole is None:
                pairs.append((getattr(self, name + "a"), getattr(self, name + "b")))
            else:
                pairs.append((whole, torch.eye(whole.shape[1], dtype=whole.dtype, device=whole.device)))
        (b1, a1), (b2, a2) = pairs
        if a1.shape[0] * a2.shape[0] >= min(self.site.shape):
            return None
        return self.config.scale * kron(b1, b2), kron(a1, a2)
