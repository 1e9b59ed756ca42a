"""TLoRA: the frozen weight times a learned full-rank matrix in tensor-ring form, and a small residual beside it.

``W' = W T + s Delta`` with ``in = I_1 ... I_D`` and ``out = J_1 ... J_D``. ``T`` (in, in) has cores ``A^d`` (I_d, I_d, R, R); it
is the identity at the start, and a Kronecker product for R = 1 (kernels/ring.py). ``Delta`` is zero at the start:

- ``"lora"``: ``B A``, (out, r)(r, in); ``r (in + out)`` numbers.
- ``"ttv"``: ``trace(B^1[o_1]..B^D[o_D] C^1[i_1]..C^D[i_D])``, cores (J_d, r, r) and (I_d, r, r): a LoRA of rank r^2 with structured
  factors; ``r^2 (sum I_d + sum J_d)`` numbers.
- ``"ttm"``: a tensor-ring matrix, cores (J_d, I_d, r, r); ``r^2 sum I_d J_d`` numbers.

The transform trains ``R^2 sum I_d^2``; ``s = alpha / sqrt(r)``, or ``alpha / r``. ``y = W (T x) + s Delta x``: T acts core by
core and is never made. Source: arXiv 2501.08727, Sec. 3 (there little-endian). Saved for backward: ``x`` alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor, nn

from trimtab.core.contracts import MethodConfig, Reparameterization, Span
from trimtab.core.errors import NoMatch, ShapeMismatch, Unsupported
from trimtab.core.registry import method
from trimtab.core.site import Operation, Site
from trimtab.kernels.lowrank import low_rank
from trimtab.kernels.ring import (
    collapse,
    even_shape,
    ring_apply,
    ring_factors,
    ring_gradients,
    ring_gram,
    ring_matrix,
    transposed,
)
from trimtab.kernels.turned import Parts, turned

__all__ = ["TLoRA", "TLoRAAdapter", "transform_penalty"]

Shape = tuple[int, ...]
RESIDUALS = ("lora", "ttv", "ttm")
#: the factorisations of the authors' release
RELEASED = {320: (4, 8, 10), 640: (8, 8, 10), 768: (8, 8, 12), 1280: (8, 10, 16), 2048: (8, 16, 16)}


@dataclass(frozen=True)
class TLoRA(MethodConfig):
    """A learned transform of the weight's inputs and a small residual; for diffusion models, with fewer parameters than LoRA.

    Not with another transform at the same place (they do not commute), and not with weight decay, which pulls T to zero
    instead of the identity: use ``transform_penalty``.

    Args:
        rank: r of the residual.
        residual: ``"lora"``, ``"ttv"``, ``"ttm"``, or None for the transform alone.
        transform_rank: R of the transform; 0 for the residual alone.
        alpha: scale numerator of the residual.
        rslora: divide alpha by sqrt(r), as the authors do; else by r.
        shapes: factorisations of widths, such as ``((8, 8, 8), (8, 16, 16))`` for the widths 512 and 2048. The widths of
            Stable Diffusion's attention are known.
        order: number of factors, the most even ones, of every other width; None: three, or an unknown width is an error where
            ``shapes`` are given.
        init: ``"paper"``: all R^2 slices of a core are equal, and stay so, which makes T a Kronecker product whatever R is;
            ``"broken_symmetry"``: the slices differ and T is the identity all the same. With R = 1 both are one.
        tr_init: spread of the ``"ttv"`` cores: ``"code"`` as in the authors' code, ``"mup"`` as in the paper.
    """

    search = {"rank": (1, 2, 4, 8, 16), "residual": ("lora", "ttv")}
    learning_rate = Span(2e-5, 2e-3, log=True)

    rank: int = 4
    residual: str | None = "lora"
    transform_rank: int = 1
    alpha: float = 1.0
    rslora: bool = True
    shapes: tuple[Shape, ...] = ()
    order: int | None = None
    init: str = "paper"
    tr_init: str = "code"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", tuple(tuple(shape) for shape in self.shapes))  # a manifest stores lists
        self.require(self.residual in (*RESIDUALS, None), f"residual must be one of {RESIDUALS} or None, found {self.residual!r}")
        if self.residual is not None:
            self.require_rank(self.rank)
        R = self.transform_rank
        self.require(isinstance(R, int) and R >= 0, f"transform_rank must be an integer of at least 0, found {R!r}")
        self.require(R > 0 or self.residual is not None, "transform_rank 0 and no residual leave nothing to train")
        self.require(self.alpha != 0, "alpha 0 would switch the residual off")
        self.require(self.init in ("paper", "broken_symmetry"), f'init must be "paper" or "broken_symmetry", found {self.init!r}')
        self.require(self.tr_init in ("code", "mup"), f'tr_init must be "code" or "mup", found {self.tr_init!r}')
        self.require(self.order is None or self.order >= 2, f"order must be None or at least 2, found {self.order!r}")
        self.require(
            all(len(shape) >= 2 and all(isinstance(d, int) and d >= 1 for d in shape) for shape in self.shapes),
            f"shapes must be factorisations into two or more sizes, found {self.shapes!r}",
        )
        if R > 1 and self.init == "paper":
            warnings.warn(
                f"transform_rank {R} with the paper's init is equivalent to rank 1 at {R} times the learning rate: the slices of "
                'a core stay equal under every element-wise optimiser; use init="broken_symmetry"',
                stacklevel=3,
            )

    @property
    def scale(self) -> float:
        """The factor in front of the residual."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def shape_of(self, width: int) -> Shape | None:
        """The factorisation of ``width``; None if there is none to use."""
        given = next((shape for shape in self.shapes if math.prod(shape) == width), None)
        known = RELEASED.get(width) if self.order in (None, 3) else None
        return given or known or (None if self.order is None else even_shape(width, self.order))


@dataclass(frozen=True)
class _Rings(Parts):
    """``z = T x`` from the first ``cores`` parameters; the residual from the others, the first ``left`` of them its ``b``."""

    cores: int
    left: int
    residual: str | None
    scale: float

    def prepare(self, *params: Tensor) -> tuple[Tensor | None, Sequence[Tensor]]:
        cores, rest = params[: self.cores], params[self.cores :]
        if self.residual in (None, "ttm"):
            return None, params
        b, a = _thin(self.residual, rest[: self.left], rest[self.left :])
        return b, (*cores, self.scale * a)

    def make(self, x: Tensor, *prepared: Tensor) -> tuple[Tensor, Tensor | None]:
        z, rest = ring_apply(x, prepared[: self.cores]), prepared[self.cores :]
        if self.residual is None:
            return z, None
        return z, self.scale * ring_apply(x, rest) if self.residual == "ttm" else self.beside(x, *prepared)

    def gradients(self, x: Tensor, prepared: Sequence[Tensor], dz: Tensor, du: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        (dx, found), rest = ring_gradients(x, prepared[: self.cores], dz), prepared[self.cores :]
        if self.residual is None:
            return dx, found
        if self.residual == "ttm":
            more, others = ring_gradients(x, rest, self.scale * du)
            return dx.add_(more), found + others
        return torch.addmm(dx, du, rest[0]), [*found, du.t() @ x]

    def beside(self, x: Tensor, *prepared: Tensor) -> Tensor:
        return x @ prepared[-1].t()


def _thin(residual: str, b: Sequence[Tensor], c: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``(B, A)`` of a low-rank residual without its scale."""
    return (b[0], c[0]) if residual == "lora" else ring_factors(b, c)


@method(
    TLoRA,
    paper="arXiv:2501.08727 Sec. 3",
    tests=(
        {"rank": 2, "order": 2},
        {"rank": 2, "residual": "ttv", "transform_rank": 2, "init": "broken_symmetry", "order": 3},
        {"rank": 2, "residual": "ttm", "order": 2, "rslora": False},
        {"residual": None, "order": 3},
        {"transform_rank": 0, "residual": "ttv", "rank": 1, "order": 2},
    ),
)
class TLoRAAdapter(Reparameterization):
    """Transform cores ``t``; the residual's ``b`` and ``c``: lists of one matrix each, or of cores (``"ttm"``: in ``b`` alone).

    A slice of a ParameterList is a new list, which copies what is no Parameter (vmap's values): tuples leave this class.
    """

    targets = "attention"
    # an embedding's "inputs" are its entries: mixing rows of the vocabulary by index means nothing
    kinds = Reparameterization.kinds - {"embedding"}
    fast = frozenset({"linear"})
    needs_weight = False
    additive = False

    def __init__(self, config: TLoRA, site: Site, *, rng: torch.Generator):
        config = self.fit(config, site)
        super().__init__(config, site)
        fan_in = site.shape[-1]
        self.t = nn.ParameterList(self._identity(config.shape_of(fan_in), rng) if config.transform_rank else [])
        b, c = self._residual(config, *site.shape[-2:], rng)
        self.b, self.c = nn.ParameterList(b), nn.ParameterList(c)
        self.parts = _Rings(len(self.t), len(self.b), config.residual, config.scale)

    def _identity(self, shape: Shape, rng: torch.Generator) -> list[nn.Parameter]:
        """Cores of T = I: ``P^d[r, r'] I`` with ``trace(P^1 ... P^D) = 1``."""
        R = self.config.transform_rank
        rings = [torch.full((R, R), 1 / R, dtype=torch.float64) for _ in shape]
        if R > 1 and self.config.init == "broken_symmetry":
            rings = [(0.5 + self.random(R, R, rng=rng).double()) / R for _ in shape]
            rings[0] = rings[0] / reduce(torch.matmul, rings).trace()
        eyes = [torch.eye(size, dtype=torch.float64, device=rings[0].device) for size in shape]
        return [self.parameter(eye[:, :, None, None] * P) for eye, P in zip(eyes, rings, strict=True)]

    def _residual(self, config: TLoRA, out: int, fan_in: int, rng: torch.Generator) -> tuple[list, list]:
        r = config.rank
        if config.residual is None:
            return [], []
        if config.residual == "lora":
            return [self.zeros(out, r)], [self.normal(r, fan_in, std=1 / math.sqrt(3 * fan_in), rng=rng)]
        rows, columns = config.shape_of(out), config.shape_of(fan_in)
        if config.residual == "ttm":
            pairs = list(zip(rows, columns, strict=True))
            kaiming = [self.normal(j, i, r, r, std=1 / math.sqrt(3 * i * r * r), rng=rng) for j, i in pairs[1:]]
            return [self.zeros(*pairs[0], r, r), *kaiming], []
        mup = config.tr_init == "mup"  # std = sqrt(n_out) / n_in with n_out = r, n_in = r times the core's size
        b = [self.normal(j, r, r, std=1 / (j * math.sqrt(r)) if mup else math.sqrt(j) / r**2, rng=rng) for j in rows[1:]]
        c = [self.normal(i, r, r, std=1 / (i * math.sqrt(r)) if mup else 1 / math.sqrt(i), rng=rng) for i in columns]
        return [self.zeros(rows[0], r, r), *b], c

    @classmethod
    def fit(cls, config: TLoRA, site: Site) -> TLoRA:
        open_ = not config.shapes and config.order is None
        return replace(config, order=3) if open_ and list(cls._unknown(config, site)) else config

    @staticmethod
    def _unknown(config: TLoRA, site: Site) -> Iterator[int]:
        """Widths that need a factorisation and have none."""
        out, fan_in = site.shape[-2:]
        needed = {fan_in: config.transform_rank > 0 or config.residual in ("ttv", "ttm")}
        needed[out] = needed.get(out, False) or config.residual in ("ttv", "ttm")
        return (width for width, need in needed.items() if need and config.shape_of(width) is None)

    @classmethod
    def check(cls, config: TLoRA, site: Site) -> None:
        config = cls.fit(config, site)
        out, fan_in = site.shape[-2:]
        for width in cls._unknown(config, site):
            raise ShapeMismatch(
                f"no factorisation of the width {width} of {site.name} is known; give it, such as "
                f"shapes=({even_shape(width, 3)},), or order=3 for the most even one of every width"
            )
        if config.residual == "ttm" and len(config.shape_of(out)) != len(config.shape_of(fan_in)):
            raise ShapeMismatch(
                f'residual="ttm" pairs the factors of both widths; {site.name} has {config.shape_of(out)} for its outputs and '
                f"{config.shape_of(fan_in)} for its inputs: give shapes of one length"
            )
        sites = site.cohort.sites or [site]
        widths = {width for one in sites for width in one.shape[-2:]}
        for shape in config.shapes if site is sites[0] else ():
            if math.prod(shape) not in widths:
                raise ShapeMismatch(
                    f"the shape {shape} has the product {math.prod(shape)}, which is no width here (found: {sorted(widths)})"
                )

    def weight(self, W: Tensor) -> Tensor:
        if len(self.t):
            W = W.to(torch.promote_types(W.dtype, self.t[0].dtype))
            W = ring_apply(W, [core.to(W.dtype) for core in transposed(self.t)])
        residual = self.config.residual
        if residual is None:
            return W
        if residual == "ttm":
            return W + self.config.scale * ring_matrix(tuple(self.b))
        b, a = _thin(residual, tuple(self.b), tuple(self.c))
        return W + self.config.scale * (b @ a)

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        if len(self.t):
            return turned(self.parts, x, base, *self.t, *self.b, *self.c)
        pair = self.factors()
        if pair is None:
            y = base(x)
            return y + self.config.scale * ring_apply(x, [core.to(x.dtype) for core in self.b]).to(y.dtype)
        return low_rank(x, base, pair[1], pair[0])

    def factors(self) -> tuple[Tensor, Tensor] | None:
        if len(self.t) or self.config.residual == "ttm":
            return None
        b, a = _thin(self.config.residual, tuple(self.b), tuple(self.c))
        return self.config.scale * b, a

    def penalty(self, kind: str = "identity") -> Tensor:
        """Squared distance of the cores from the paper's start: ``"identity"``, or ``"orthogonal"`` for those of ``T T^T``."""
        cores = tuple(self.t) if kind == "identity" else ring_gram(tuple(self.t), tuple(self.t))
        eyes = [torch.eye(core.shape[0], dtype=core.dtype, device=core.device)[:, :, None, None] for core in cores]
        return sum((core - eye / core.shape[-1]).square().sum() for core, eye in zip(cores, eyes, strict=True))

    def collapse(self) -> None:
        """Replace a transform whose slices are equal by its Kronecker form, R^2 times smaller and the same matrix.

        Raises:
            Unsupported: the slices differ.
        """
        cores = collapse(tuple(self.t))
        if cores is None:
            raise Unsupported(f"the transform at {self.site.name} has slices that differ; it is no Kronecker product of cores")
        learns = self.t[0].requires_grad
        self.t = nn.ParameterList(nn.Parameter(core.detach().clone(), requires_grad=learns) for core in cores)
        self.config = replace(self.config, transform_rank=1)


def transform_penalty(model: nn.Module, kind: str = "identity") -> Tensor:
    """The regulariser to add to the loss: the mean over all TLoRA transforms of ``penalty(kind)``.

    Args:
        kind: ``"identity"`` (the paper finds it the better one) or ``"orthogonal"``.

    Raises:
        NoMatch: the model has no TLoRA transform, or there is no such penalty.
    """
    found = [m for m in model.modules() if isinstance(m, TLoRAAdapter) and len(m.t)]
    if not found or kind not in ("identity", "orthogonal"):
        raise NoMatch(
            f'transform_penalty needs TLoRA transforms, found {len(found)}, and "identity" or "orthogonal", found {kind!r}'
        )
    return sum(m.penalty(kind) for m in found) / len(found)
