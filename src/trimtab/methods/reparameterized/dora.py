"""DoRA: direction and magnitude of every output row learn apart.

``W' = m * V / ||V||`` row by row, ``V = W + s B A``, ``A`` (r, in), ``B`` (out, r), ``m`` (out,) starting at ``||W||``, so
training starts at the base; ``s = alpha / r``. The norm is a constant to the gradient (Sec. 4.3); the bias is not
scaled. Norms are of *rows* of (out, in), as in all published code and as the paper's parameter counts imply, although it
writes columns. Source: arXiv 2402.09353, Eqs. 5 and 11. Trainable: ``r (in + out) + out``.

Cost: the norms come from ``n^2 = ||W||^2 + 2 s sum((W A^T) * B) + s^2 sum((B A A^T) * B)``, row sums, which never forms ``B A``.
Kept for backward: ``x`` and one (tokens, out) tensor, ``V x``, without which ``dm`` would need ``dY^T x``. Dropout acts on the
input of ``B A`` alone; the authors' code also drops the input of W there, which takes a second product with W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.site import Operation, Site
from trimtab.kernels.gain import Unbiased, gained
from trimtab.kernels.lowrank import low_rank
from trimtab.methods.reparameterized.lora import LoRA, LowRank

__all__ = ["DoRA", "DoRAAdapter", "row_norms"]


@dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA on the rows' directions and a learned magnitude for each row; nearer to full fine-tuning at low ranks.

    Not where activations are short of memory: it keeps a second output a place, and needs W in every step.

    Args:
        rank: r, at most ``min(in, out)``.
        alpha: scale numerator; None means ``2 * rank``, a scale of 2.
        dropout: probability of zeroing an entry of the low-rank branch's input while training.
    """


def row_norms(W: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``||W + scale * b a||`` of every row, shape (out,), in the factors' dtype, without a matrix of W's size."""
    a, b = a.detach(), b.detach()
    W = W.detach()
    square = torch.linalg.vector_norm(W, dim=1, dtype=b.dtype).square()
    cross = ((W @ a.to(W.dtype).t()).to(b.dtype) * b).sum(1)
    own = ((b @ (a @ a.t())) * b).sum(1)
    # a row of zeros has no direction: its norm counts as tiny, so that the row stays zero instead of becoming NaN
    return (square + 2 * scale * cross + scale**2 * own).clamp_min(torch.finfo(b.dtype).tiny).sqrt()


@method(DoRA, paper="arXiv:2402.09353 Eq. 5", tests=({"rank": 2}, {"rank": 3, "alpha": 1.5}))
class DoRAAdapter(LowRank):
    """LoRA's factors and the magnitudes ``m`` (out,)."""

    fast = frozenset({"linear"})
    needs_weight = True
    additive = False
    out_axes = {"b": 0, "m": 0}

    def __init__(self, config: DoRA, site: Site, *, rng: torch.Generator):
        super().__init__(config, site, rng=rng)
        if site.is_meta:
            self.m = self.zeros(site.shape[0])
        else:
            self.m = self.parameter(row_norms(site.weight, self.a, self.b, config.scale))

    @torch.no_grad()
    def losing(self, *, inputs: Tensor | None = None, outputs: Tensor | None = None) -> None:
        """A row that loses entries loses length: its magnitude shrinks likewise, so that the entries left keep their values."""
        if inputs is not None:
            V = self.site.weight + self.config.scale * (self.b @ self.a)
            before, after = (torch.linalg.vector_norm(v, dim=1) for v in (V, V[:, inputs.to(V.device)]))
            self.m.mul_((after / before.clamp_min(torch.finfo(V.dtype).tiny)).to(self.m.dtype))

    def weight(self, W: Tensor) -> Tensor:
        V = W + self.config.scale * (self.b @ self.a)
        norm = torch.linalg.vector_norm(V.detach(), dim=-1, keepdim=True).clamp_min(torch.finfo(V.dtype).tiny ** 0.5)
        return self.m[:, None] / norm * V

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        scale, dropout = self.config.scale, self.config.dropout * self.training
        v = low_rank(x, Unbiased(base), self.a, self.b, scale=scale, dropout=dropout)
        return gained(v, self.m / row_norms(base.weight, self.a, self.b, scale), base.bias)

    def factors(self) -> None:
        """None: the rows are rescaled, which is not low-rank."""
        return None
