"""WaRA: a small low-rank pair shared by the two bands of a wavelet transform along the channels.

With ``L, H`` (in/2, in) the analysis and ``R_L, R_H`` (out, out/2) the synthesis matrices of one wavelet level, ``A`` (r, in/2),
``B`` (out/2, r)::

    W' = W + (alpha / r) (R_L B A L + R_H B A H)

``B`` starts at zero, so training starts at the base. The paper (arXiv 2506.24092 v1, overview figure) transforms channels and
tokens of the input; the pair does not touch the token axis, where transform and inverse cancel, so this static update is the
same map for every number of tokens. It is a LoRA of rank 2r, ``B' = [R_L B, R_H B]``, ``A' = [A L; A H]``, and runs as one:
the transforms are laid into the factors, O(r (in + out)) a step, and never touch activations. With Haar the update is
``kron(B A, I_2)``. Scale, start, wavelet and boundary are choices of this library; the abstract does not state them.

Trainable: ``r (in + out) / 2``; four pairs (``bands="independent"``): ``2 r (in + out)``. Saved for backward: ``x``, the two
folded factors, and ``x A'^T`` where it is thin (see lowrank.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from trimtab.core.contracts import MethodConfig, Reparameterization
from trimtab.core.errors import ShapeMismatch, Unsupported
from trimtab.core.registry import method
from trimtab.core.site import Operation, Site
from trimtab.kernels.lowrank import low_rank
from trimtab.kernels.wavelet import WAVELETS, fold
from trimtab.methods.reparameterized.lora import check_rank

__all__ = ["WaRA", "WaRAAdapter"]


@dataclass(frozen=True)
class WaRA(MethodConfig):
    """A low-rank pair shared by the coarse and the detail band of the channels: rank 2r from half of LoRA's parameters.

    Not for channels without an order: neighbours are coupled as if their position meant something. Not where a step must
    cost what LoRA of the same ``rank`` costs: it costs that of twice the rank.

    Args:
        rank: r of a pair; the update has rank 2r (up to 4r with independent bands). At LoRA's budget, twice LoRA's rank.
        alpha: scale numerator; None means ``rank``, a scale of 1.
        wavelet: name of the filters: haar, db2, db3, db4, sym4 or bior2.2 (biorthogonal).
        bands: ``"shared"``, one pair for both bands; ``"independent"``, a pair for each of the four blocks of bands.
        pad: treat an odd number of channels as one more, zero at the input and cut off at the output; False: refuse it. None:
            refuse it, unless nothing else is given either.
        dropout: probability of zeroing an entry of the update's input while training.
    """

    search = {"rank": (4, 8, 16, 32), "wavelet": ("db2", "db4", "haar"), "bands": ("independent", "shared")}

    rank: int = 8
    alpha: float | None = None
    wavelet: str = "haar"
    bands: str = "shared"
    pad: bool | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.require_rank(self.rank)
        self.require(self.alpha is None or self.alpha != 0, "alpha 0 would switch the adapter off")
        self.require_choice("wavelet", tuple(WAVELETS))
        self.require_choice("bands", ("shared", "independent"))
        self.require_probability("dropout", self.dropout)

    @property
    def scale(self) -> float:
        """The factor in front of the update."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """``(output band, input band)`` of every pair; 0 is the low band."""
        return ((0, 0), (1, 1)) if self.bands == "shared" else ((0, 0), (0, 1), (1, 0), (1, 1))


@method(
    WaRA, paper="arXiv:2506.24092 v1",
    tests=({"rank": 2}, {"rank": 3, "wavelet": "db2", "alpha": 1.5}, {"rank": 1, "wavelet": "bior2.2", "bands": "independent"}),
)  # fmt: skip
class WaRAAdapter(Reparameterization):
    """``a`` (r, in/2) and ``b`` (out/2, r); independent bands: (4, r, in/2) and (4, out/2, r), in the order of ``config.pairs``."""

    kinds = frozenset({"linear", "conv", "grouped", "bare"})
    fast = frozenset({"linear", "conv"})
    needs_weight = False

    def __init__(self, config: WaRA, site: Site, *, rng: Generator):
        config = self.fit(config, site)
        super().__init__(config, site)
        out, fan_in = (-(-size // 2) for size in site.shape)
        leading = () if config.bands == "shared" else (len(config.pairs),)
        self.a = self.uniform(*leading, config.rank, fan_in, bound=1 / math.sqrt(fan_in), rng=rng)
        self.b = self.zeros(*leading, out, config.rank)

    @classmethod
    def fit(cls, config: WaRA, site: Site) -> WaRA:
        if config.pad is not None:
            return config
        return replace(config, pad=config == WaRA() and any(size % 2 for size in site.shape[-2:]))

    @classmethod
    def check(cls, config: WaRA, site: Site) -> None:
        config = cls.fit(config, site)
        check_rank(config.rank, site, least=2)
        if site.kind in ("conv", "grouped") and site.parameter()[0, 0].numel() > 1:
            raise Unsupported(
                f"WaRA transforms channels, and the matrix of {site.name} mixes them with a kernel of "
                f"{tuple(site.parameter().shape[2:])}; it acts on Linear layers and convolutions of kernel size 1"
            )
        for size, what in zip(site.shape[-2:], ("outputs", "inputs"), strict=True):
            if size % 2 and not config.pad:
                raise ShapeMismatch(
                    f"WaRA halves the channels, but {site.name} has {size} {what}, an odd number; choose another place, "
                    f"or allow one more channel of zeros with pad=True"
                )
            taps = WAVELETS[config.wavelet].taps
            if taps > size + size % 2:
                raise ShapeMismatch(
                    f"the {taps} taps of {config.wavelet} are longer than the {size} {what} of {site.name}; use a shorter wavelet"
                )

    def factors(self) -> tuple[Tensor, Tensor]:
        b, a = self.folded()
        return self.config.scale * b, a

    def folded(self) -> tuple[Tensor, Tensor]:
        """``B'`` (out, k r) and ``A'`` (k r, in) for k pairs of bands, without the scale; in float32 or wider."""
        out, fan_in = self.site.shape[-2:]
        wavelet, pairs = WAVELETS[self.config.wavelet], self.config.pairs
        wide = torch.promote_types(self.a.dtype, torch.float32)
        a, b = self.a.to(wide), self.b.to(wide).transpose(-1, -2)
        if self.config.bands == "shared":
            A, B = fold(a, wavelet.analysis), fold(b, wavelet.synthesis)
        else:
            A = torch.cat([fold(a[i], (wavelet.analysis[into],)) for i, (_, into) in enumerate(pairs)])
            B = torch.cat([fold(b[i], (wavelet.synthesis[outof],)) for i, (outof, _) in enumerate(pairs)])
        if self.config.pad:
            A, B = A[:, :fan_in], B[:, :out]
        return B.t(), A

    def weight(self, W: Tensor) -> Tensor:
        b, a = self.factors()
        return W + b @ a

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        b, a = self.folded()
        return low_rank(x, base, a, b, scale=self.config.scale, dropout=self.config.dropout * self.training)
