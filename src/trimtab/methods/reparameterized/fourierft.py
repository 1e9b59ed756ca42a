"""FourierFT: a few trainable Fourier coefficients of the update.

``W' = W + alpha Re(ifft2(F))`` with ``F`` (out, in) zero except n real entries ``c`` at fixed random places, the same for all
places of one shape (``randperm(out in)[:n]`` from the seed); ``ifft2`` includes ``1 / (out in)``. Source: arXiv 2405.03003,
Eq. 2-4 and Alg. 1. Trainable: n. Saved for backward: ``x`` alone. Transforms run in float32 at least.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.contracts import MethodConfig, Reparameterization, Span
from trimtab.core.errors import TooSmall
from trimtab.core.registry import method
from trimtab.core.site import Operation, Site
from trimtab.kernels.beside import beside
from trimtab.kernels.fourier import FourierRule, FourierWeight, Places, dense_update, on_activations
from trimtab.kernels.mode import fused
from trimtab.kernels.rebuilt import rebuilt

__all__ = ["FourierFT", "FourierFTAdapter"]


@dataclass(frozen=True)
class FourierFT(MethodConfig):
    """Spectral update of n coefficients a place: the smallest files, a dense and global change of each weight.

    Not for hard tasks at the default size (peft's benchmark: near zero on GSM8K with n = 1000), nor where steps must be
    cheap on long inputs with large n.

    Args:
        coefficients: n, the number of entries of the spectrum that learn at a place.
        alpha: factor of the update; None means 300, the paper's. It is divided by ``out in`` in the transform.
        seed: seed of the places; equal shapes share them.
        start: ``"zero"``: training starts at the base; ``"normal"``: the paper's N(0, 1), which does not.
    """

    search = {"coefficients": (100, 300, 1000, 3000)}
    learning_rate = Span(1e-3, 1e-1, log=True)

    coefficients: int = 1000
    alpha: float | None = None
    seed: int = 777
    start: str = "zero"

    def __post_init__(self) -> None:
        self.require_count("coefficients")
        self.require(self.alpha is None or self.alpha != 0, "alpha 0 would switch the adapter off")
        self.require_choice("start", ("zero", "normal"))

    @property
    def scale(self) -> float:
        """The factor in front of the inverse transform."""
        return 300.0 if self.alpha is None else self.alpha


@method(
    FourierFT, paper="arXiv:2405.03003 Eq. 2-4",
    tests=({"coefficients": 7}, {"coefficients": 4, "alpha": 50.0, "start": "normal"}),
)
class FourierFTAdapter(Reparameterization):
    """The coefficients ``c`` (n,); their places are a buffer that is made again from the seed."""

    fast = frozenset({"linear"})
    needs_weight = False

    def __init__(self, config: FourierFT, site: Site, *, rng: torch.Generator):
        super().__init__(config, site)
        n = config.coefficients
        self.c = self.zeros(n) if config.start == "zero" else self.normal(n, std=1.0, rng=rng)
        self.register_buffer("index", self._index(), persistent=False)
        self._places: Places | None = None

    @classmethod
    def identity(cls, config: FourierFT) -> bool:
        return config.start == "zero"

    @classmethod
    def check(cls, config: FourierFT, site: Site) -> None:
        out, fan_in = site.shape[-2:]
        if config.coefficients > out * fan_in:
            raise TooSmall(
                f"{config.coefficients} coefficients are more than the {out * fan_in} entries of {site.name} "
                f"{(out, fan_in)}; use at most {out * fan_in}"
            )

    def _index(self) -> Tensor:
        """(n,) places in the flattened spectrum, the draw that peft makes."""
        site, n, seed = self.site, self.config.coefficients, self.config.seed
        out, fan_in = site.shape
        if site.is_meta:
            return torch.empty(n, dtype=torch.long, device="meta")

        def draw() -> Tensor:
            return torch.randperm(out * fan_in, generator=torch.Generator().manual_seed(seed))[:n].clone().to(site.device)

        return site.cohort.share(("fourier", out, fan_in, n, seed, site.device), draw)

    def rebuild(self) -> None:
        self.index, self._places = self._index(), None

    def weight(self, W: Tensor) -> Tensor:
        return W + dense_update(self.index, self.c, self.config.scale, *W.shape[-2:])

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        if not fused(x, self.c):
            return base(x) + base.project(x, dense_update(self.index, self.c, self.config.scale, *self.site.shape))
        if self._places is None or self._places.rows.device != self.index.device:
            self._places = Places(self.index, *self.site.shape)
        if on_activations(x.numel() // max(x.shape[-1], 1), self.config.coefficients, *self.site.shape):
            return beside(FourierRule(self._places, self.index, self.config.scale), x, base, self.c)
        return rebuilt(FourierWeight(self._places, self.index, self.config.scale), x, base, self.c)
