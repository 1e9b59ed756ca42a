"""SoKA: a sum of Kronecker products that starts at the leading terms of W; each layer's spectrum chooses how many.

``W' = W + sum_k s_k U_k (x) V_k - sum_k s0_k U0_k (x) V0_k`` with ``s`` (r,), ``U`` (r, m, n), ``V`` (r, p, q), ``out = m p``,
``in = n q``. The start ``s0, U0, V0`` is W's Kronecker-product SVD (kernels/kpsvd.py), so training starts at the base; W is
kept and subtracted from lazily. One term can have full rank. Source: arXiv 2506.15251 (abstract; the procedure as public
summaries give it). The paper reshapes the SVD of W itself, which does not approximate W: the rearrangement does.

The number of terms: fewest with ``sum s_k^2 >= tau ||W||_F^2``, and those up to the spectrum's elbow, whichever is less, within
``[r_min, r_max]``; or ``rank``; or, with ``budget``, the largest ``s_k^2 / (m n + p q + 1)`` over all places of one attach.
Trainable: ``r (m n + p q + 1)``. Saved for backward: ``x`` alone, in both forms (kernels/kroneckersum.py).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.contracts import MethodConfig, Reparameterization, Span
from trimtab.core.errors import ShapeMismatch, TooSmall, Unsupported
from trimtab.core.registry import method
from trimtab.core.site import Operation, Site
from trimtab.kernels.beside import beside
from trimtab.kernels.divisors import factorization
from trimtab.kernels.kpsvd import ELBOWS, Shape, elbow_terms, energy_terms, kpsvd
from trimtab.kernels.kroneckersum import DenseKroneckerSum, KroneckerSum, dense_is_cheaper, kron_sum
from trimtab.kernels.mode import fused
from trimtab.kernels.rebuilt import rebuilt

__all__ = ["SoKA", "SoKAAdapter"]

Terms = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class SoKA(MethodConfig):
    """Kronecker terms from the weight's own spectrum, as many as each layer needs: PiSSA's idea in LoKr's family.

    Not for layers of prime width, and not to save parameters at a fixed rank: a term of square factors costs as much as a
    rank of LoRA. A dry run shows the largest number of terms; the spectrum is looked at when the adapter is attached.

    Args:
        rank: number of terms everywhere; None: chosen for each place.
        tau: share of ``||W||_F^2`` to keep, in (0, 1]. The spectrum of a random matrix is flat: r_max decides there.
        elbow: ``"chord"``, ``"second_difference"`` or ``"off"``.
        r_min: fewest terms of a place.
        r_max: most terms of a place, and how much of the spectrum is computed.
        budget: number of terms in all the places of one attach together, instead of tau and elbow; None: no budget.
        shape: ``(m, n, p, q)``; None: the divisors nearest to the square roots, ``m <= p`` and ``n <= q``.
        iterations: power iterations of the randomised SVD; None for the exact one.
    """

    search = {"tau": Span(0.3, 0.99), "elbow": ("chord", "off", "second_difference"), "r_max": (2, 4, 8, 16, 32)}
    learning_rate = Span(1e-5, 1e-3, log=True)

    rank: int | None = None
    tau: float = 0.9
    elbow: str = "chord"
    r_min: int = 1
    r_max: int = 16
    budget: int | None = None
    shape: Shape | None = None
    iterations: int | None = 4

    def __post_init__(self) -> None:
        for name in ("rank", "r_min", "r_max", "budget"):
            value = getattr(self, name)
            self.require(
                (value is None and name in ("rank", "budget")) or (isinstance(value, int) and value >= 1),
                f"{name} must be an integer of at least 1, found {value!r}",
            )
        self.require(0 < self.tau <= 1, f"tau is a share of the energy, above 0 and at most 1; found {self.tau!r}")
        self.require(self.elbow in (*ELBOWS, "off"), f"elbow must be one of {(*ELBOWS, 'off')}, found {self.elbow!r}")
        self.require(self.r_max >= self.r_min, f"r_max {self.r_max} is below r_min {self.r_min}")
        self.require(self.rank is None or self.budget is None, "give rank or budget, not both")
        self.require(
            self.shape is None or (len(self.shape) == 4 and all(isinstance(d, int) and d >= 1 for d in self.shape)),
            f"shape must be four sizes (m, n, p, q), found {self.shape!r}",
        )
        self.require(
            self.iterations is None or self.iterations >= 0,
            f"iterations must be None or at least 0, found {self.iterations!r}",
        )

    def factors_at(self, site: Site) -> Shape:
        """``(m, n, p, q)`` of the factors at ``site``."""
        if self.shape is not None:
            return self.shape
        (m, p), (n, q) = (factorization(width) for width in site.shape[-2:])
        return m, n, p, q

    def computed(self, site: Site) -> int:
        """How many terms are computed at ``site``, and the most that it can keep."""
        return self.rank or min(self.r_max, _all_terms(self.factors_at(site)))

    def chosen(self, s: Tensor, energy: float) -> int:
        """How many of the terms with the singular values ``s`` a place of squared norm ``energy`` keeps."""
        if self.rank is not None:
            return self.rank
        if energy == 0:
            return self.r_min
        values = s.tolist()
        r = energy_terms(values, energy, self.tau)
        if self.elbow != "off":
            r = min(r, elbow_terms(values, self.elbow))
        return max(self.r_min, r)


@method(
    SoKA,
    paper="arXiv:2506.15251",
    tests=({"rank": 2}, {"r_max": 3, "iterations": None}, {"r_max": 3, "budget": 5}, {"rank": 4, "iterations": 2}),
)
class SoKAAdapter(Reparameterization):
    """``s`` (r,), ``u`` (r, m, n), ``v`` (r, p, q), and their starts as buffers ``s0``, ``u0``, ``v0``."""

    fast = frozenset({"linear"})
    needs_weight = False

    def __init__(self, config: SoKA, site: Site, *, rng: torch.Generator):
        super().__init__(config, site)
        self.shape = m, n, p, q = config.factors_at(site)
        if site.is_meta:
            (r,) = site.stored.get("s", (config.computed(site),))
            start = tuple(torch.empty(r, *size, device="meta") for size in ((), (m, n), (p, q)))
        elif config.budget is not None:
            sites = site.cohort.sites or [site]
            start = site.cohort.share(("SoKA", config), lambda: _within_budget(config, sites, rng)).pop(site.name)
        else:
            terms, energy = _decomposed(config, site, rng)
            start = _first(terms, config.chosen(terms[0], energy))
        for name, value in zip("suv", start, strict=True):
            self.register_parameter(name, self.parameter(value))
            self.register_buffer(name + "0", self.constant(value))
        self.thin, self.dense = KroneckerSum(self.shape), DenseKroneckerSum(self.shape)

    def starts(self) -> dict[str, Tensor]:
        return {"s": self.s0, "u": self.u0, "v": self.v0}

    @classmethod
    def check(cls, config: SoKA, site: Site) -> None:
        out, fan_in = site.shape[-2:]
        m, n, p, q = shape = config.factors_at(site)
        if (m * p, n * q) != (out, fan_in):
            raise ShapeMismatch(
                f"the factors ({m}, {n}) and ({p}, {q}) make a matrix ({m * p}, {n * q}); {site.name} is ({out}, {fan_in}): "
                "choose m p = out and n q = in, by overrides= where layers differ, or leave shape out"
            )
        name, least = ("r_min", config.r_min) if config.rank is None else ("rank", config.rank)
        if least > _all_terms(shape):
            raise TooSmall(
                f"{name} {least} at {site.name}: factors ({m}, {n}) and ({p}, {q}) give {_all_terms(shape)} terms at most"
            )
        if len(site.shape) == 3 and config.rank is None:
            raise Unsupported(
                f"{site.name} is a bank of {site.shape[0]} experts, whose adapters are stacked and have one size; give SoKA a rank"
            )
        sites = site.cohort.sites or [site]
        if config.budget is not None and config.budget < config.r_min * len(sites) and site is sites[0]:
            raise ShapeMismatch(
                f"a budget of {config.budget} terms is too small for {len(sites)} places with at least {config.r_min} each"
            )
        if config.shape is None and 1 in (m, n) and min(out, fan_in) > 3:
            warnings.warn(
                f"{site.name} is {out} x {fan_in}, of prime width: the first factor of its Kronecker terms is a vector, ({m}, {n})",
                stacklevel=2,
            )

    def weight(self, W: Tensor) -> Tensor:
        return W + (kron_sum(self.s, self.u, self.v) - kron_sum(self.s0, self.u0, self.v0))

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        params = self.s, self.u, self.v, self.s0, self.u0, self.v0
        graph = torch.is_grad_enabled()
        learn, through = graph and self.s.requires_grad, graph and x.requires_grad
        r, tokens = self.s.shape[0], x.numel() // x.shape[-1]
        if fused(x, *params) and dense_is_cheaper(tokens, self.shape, r, r, learn=learn, through=through):
            return rebuilt(self.dense, x, base, *params)
        return beside(self.thin, x, base, *params)


def _all_terms(shape: Shape) -> int:
    """The number of terms that is exact for every matrix."""
    m, n, p, q = shape
    return min(m * n, p * q)


def _first(terms: Terms, r: int) -> Terms:
    return tuple(t[:r] for t in terms)  # type: ignore[return-value]


def _decomposed(config: SoKA, site: Site, rng: torch.Generator) -> tuple[Terms, float]:
    """The leading terms of the site's matrix, and its squared Frobenius norm."""
    W = site.weight.detach()
    energy = torch.linalg.vector_norm(W, dtype=torch.float64).item() ** 2
    if not energy < float("inf"):
        raise ShapeMismatch(f"the base weight {site.name} holds NaN or infinite values, and has no singular values")
    terms = kpsvd(W, config.factors_at(site), config.computed(site), iterations=config.iterations, rng=rng)
    return terms, energy


def _within_budget(config: SoKA, sites: list[Site], rng: torch.Generator) -> dict[str, Terms]:
    """The start of every site: ``r_min`` terms each, then those of the most energy a parameter, ``budget`` in all."""
    found = {site.name: _decomposed(config, site, rng)[0] for site in sites}
    scores = []
    for name, (s, U, V) in found.items():
        cost = 1 + U[0].numel() + V[0].numel()
        scores += [(value**2 / cost, name) for value in s.tolist()[config.r_min :]]
    kept = dict.fromkeys(found, config.r_min)
    for _, name in sorted(scores, reverse=True)[: config.budget - config.r_min * len(sites)]:
        kept[name] += 1  # the values of a place fall, so that its next one is always the right one
    return {name: _first(terms, kept[name]) for name, terms in found.items()}
