"""WaRA on patch tokens: the thin features of a low-rank branch are weighed band by band in the tokens' own 2-D grid.

For a place with input ``x`` (..., prefix + h w, in) and output ``y``, with ``T`` the 2-D wavelet analysis over the grid::

    y' = y + (alpha / r) T^-1[ g_band * T[x A^T] ] B^T        A (r, in), B (out, r), g (4,)

``T^-1[g T[.]]`` acts on the r channels only: the transform commutes with A and B. Tokens before the grid (CLS, registers) pass
with weight 1. ``B`` starts at zero, so training starts at the base; the gates, of LL, LH, HL and HH (first letter: height), at 1.
With equal gates and no activation the transform cancels, and what is left is LoRA. The paper (arXiv 2506.24092 v2) describes
that collapsing form; the gates and the activation are readings of this library. So is TinyWaRA, where ``A = S_r^1/2 V_r^T`` and
``B = U_r S_r^1/2`` of the place's W are fixed, and an (r, r) matrix between them learns from zero.

Trainable: ``r (in + out) + 4``; TinyWaRA ``r^2 + 4``. Saved for backward: ``x`` and 2 r numbers a token; TinyWaRA 2 r and no ``x``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from trimtab.core.contracts import ActivationAdapter, MethodConfig, Span
from trimtab.core.errors import ShapeMismatch, Unsupported
from trimtab.core.registry import method
from trimtab.core.site import Site, dense
from trimtab.kernels.spectral import top_svd
from trimtab.kernels.wavelet import WAVELETS, grid_transform
from trimtab.methods.reparameterized.lora import check_rank

__all__ = ["TinyWaRA", "TinyWaRAAdapter", "WaRASpatial", "WaRASpatialAdapter"]


@dataclass(frozen=True)
class WaRASpatial(MethodConfig):
    """A low-rank branch on patch tokens with a learned weight for every wavelet band of the patch grid.

    Not for text, and not where the adapter must merge: it mixes tokens, which no weight does.

    Args:
        rank: r, at most ``min(in, out)``.
        alpha: scale numerator; None means ``rank``, a scale of 1.
        wavelet: name of the filters: haar, db2, db3, db4, sym4 or bior2.2 (biorthogonal).
        bands: ``"gated"``, a weight for each of the four bands; ``"shared"``, none: LoRA unless there is an activation.
        act: ``"none"`` or ``"gelu"``, applied to the gated coefficients.
        grid: (height, width) of the patch tokens, both even, row by row.
        prefix: number of tokens in front of the grid.
    """

    search = {"rank": (4, 8, 16, 32), "wavelet": ("db2", "db4", "haar"), "act": ("gelu", "none")}

    rank: int = 8
    alpha: float | None = None
    wavelet: str = "haar"
    bands: str = "gated"
    act: str = "none"
    grid: tuple[int, int] = (14, 14)
    prefix: int = 1

    def __post_init__(self) -> None:
        self.require_rank(self.rank)
        self.require(self.alpha is None or self.alpha != 0, "alpha 0 would switch the adapter off")
        self.require_choice("wavelet", tuple(WAVELETS))
        self.require_choice("bands", ("gated", "shared"))
        self.require_choice("act", ("none", "gelu"))
        taps = WAVELETS[self.wavelet].taps
        pair = isinstance(self.grid, tuple) and len(self.grid) == 2
        self.require(
            pair and all(isinstance(n, int) and n >= taps and n % 2 == 0 for n in self.grid),
            f"grid must be two even numbers of at least {taps}, the length of {self.wavelet}; found {self.grid!r}",
        )
        self.require(isinstance(self.prefix, int) and self.prefix >= 0, f"prefix must be at least 0, found {self.prefix!r}")

    @property
    def scale(self) -> float:
        """The factor in front of the branch."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class TinyWaRA(WaRASpatial):
    """The spatial form with a fixed basis from W's leading singular vectors: ``rank^2 + 4`` numbers a place.

    Not for text, and not for tasks far from the base's own: the update cannot leave the leading singular subspaces of W.

    Args:
        rank: r, number of singular triplets, at most ``min(in, out)``.
        alpha: scale numerator; None means ``rank``, a scale of 1.
        wavelet: name of the filters: haar, db2, db3, db4, sym4 or bior2.2 (biorthogonal).
        bands: ``"gated"``, a weight for each of the four bands; ``"shared"``, none: LoRA-XS unless there is an activation.
        act: ``"none"`` or ``"gelu"``, applied to the gated coefficients.
        grid: (height, width) of the patch tokens, both even, row by row.
        prefix: number of tokens in front of the grid.
    """

    search = {"rank": (4, 8, 16, 32, 64), "wavelet": ("db2", "db4", "haar"), "act": ("gelu", "none")}
    learning_rate = Span(3e-4, 3e-2, log=True)


@method(
    WaRASpatial, paper="arXiv:2506.24092 v2",
    tests=({"rank": 2, "grid": (2, 2), "prefix": 0}, {"rank": 3, "grid": (2, 2), "prefix": 0, "act": "gelu", "alpha": 1.5}),
)  # fmt: skip
class WaRASpatialAdapter(ActivationAdapter):
    """``a`` (r, in), ``b`` (out, r) and, gated, ``g`` (4,)."""

    def __init__(self, config: WaRASpatial, site: Site, *, rng: Generator):
        super().__init__(config, site)
        self.start(config, site, rng)
        self.g = self.ones(4) if config.bands == "gated" else None
        self.rebuild()

    def start(self, config: WaRASpatial, site: Site, rng: Generator) -> None:
        """Make what ``down`` and ``up`` read."""
        out, fan_in = site.shape
        self.a = self.kaiming(config.rank, fan_in, rng=rng)
        self.b = self.zeros(out, config.rank)

    def rebuild(self) -> None:
        wavelet = WAVELETS[self.config.wavelet]
        for axis, size in zip(("rows", "columns"), self.config.grid, strict=True):
            for name, matrix in zip((axis, f"{axis}_back"), grid_transform(wavelet, size), strict=True):
                self.register_buffer(name, self.constant(matrix), persistent=False)

    @classmethod
    def check(cls, config: WaRASpatial, site: Site) -> None:
        module = site.module
        if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
            raise Unsupported(
                f"{type(config).__name__} acts on Linear layers, whose input and output are (tokens, features); "
                f"{site.name} is a {type(module).__name__}"
            )
        check_rank(config.rank, site)

    def down(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., r)``."""
        return F.linear(x, self.a.to(x.dtype))

    def up(self, z: Tensor) -> Tensor:
        """``(..., r) -> (..., out)``."""
        return F.linear(z, self.b.to(z.dtype))

    def mix(self, z: Tensor) -> Tensor:
        """``T^-1[act(g * T[z])]`` of the grid's thin features, ``(..., h w, r) -> (..., h w, r)``."""
        config, (h, w) = self.config, self.config.grid
        if self.g is None and config.act == "none":
            return z  # transform and inverse cancel
        rows, columns, rows_back, columns_back = (
            m.to(z.dtype) for m in (self.rows, self.columns, self.rows_back, self.columns_back)
        )
        c = (rows @ z.unflatten(-2, (h, w)).flatten(-2)).unflatten(-1, (w, -1))  # (..., h, w, r), rows transformed
        c = columns @ c
        if self.g is not None:
            gates = self.g.to(z.dtype).view(2, 1, 2, 1).expand(2, h // 2, 2, w // 2).reshape(h, w, 1)
            c = c * gates
        if config.act == "gelu":
            c = F.gelu(c)
        c = (columns_back @ c).flatten(-2)
        return (rows_back @ c).unflatten(-1, (w, -1)).flatten(-3, -2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        config, (h, w) = self.config, self.config.grid
        if x.shape[-2] != config.prefix + h * w:
            raise ShapeMismatch(
                f"{self.site.name} got {x.shape[-2]} tokens, but prefix {config.prefix} and a grid of {h} x {w} patches make "
                f"{config.prefix + h * w}; set grid and prefix to the model's, and attach before tokens are dropped"
            )
        z = self.down(x)
        mixed = self.mix(z[..., config.prefix :, :])
        z = torch.cat([z[..., : config.prefix, :], mixed], -2) if config.prefix else mixed
        return y + self.up(config.scale * z).to(y.dtype)


@method(TinyWaRA, paper="arXiv:2506.24092 v2", tests=({"rank": 3, "grid": (2, 2), "prefix": 0},))
class TinyWaRAAdapter(WaRASpatialAdapter):
    """``core`` (r, r) learns between the buffers ``a0`` (r, in) and ``b0`` (out, r); ``g`` (4,) as in the spatial form."""

    @classmethod
    def check(cls, config: TinyWaRA, site: Site) -> None:
        super().check(config, site)
        if site.source is not None:
            raise Unsupported(f"TinyWaRA's basis is that of one layer, and {site.name} stands for a branch; target layers")

    def start(self, config: TinyWaRA, site: Site, rng: Generator) -> None:
        out, fan_in = site.shape
        if site.is_meta:
            b, a = torch.empty(out, config.rank, device="meta"), torch.empty(config.rank, fan_in, device="meta")
        else:
            U, S, Vh = top_svd(dense(site.module._parameters["weight"], site.module), config.rank)
            b, a = U * S.sqrt(), S.sqrt()[:, None] * Vh
        self.register_buffer("a0", self.constant(a))
        self.register_buffer("b0", self.constant(b))
        self.core = self.zeros(config.rank, config.rank)

    def down(self, x: Tensor) -> Tensor:
        z = F.linear(x, self.a0.to(x.dtype))
        return F.linear(z, self.core.to(z.dtype))

    def up(self, z: Tensor) -> Tensor:
        return F.linear(z, self.b0.to(z.dtype))
