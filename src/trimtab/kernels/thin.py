"""Updates as thin factors: sums of them without a dense matrix, the best approximation at a rank, and exact distances.

``D = B A`` with ``B`` (..., out, r) and ``A`` (..., r, in). A sum is a concatenation, ``[B1 B2] [A1; A2]``, exact for every scale,
sign and rank. The best approximation at rank k (Eckart-Young) is found in the space of the factors: ``B = Q_b R_b``,
``A^T = Q_a R_a``, then an SVD of the (r, r) core ``R_b R_a^T``; its singular values are those of ``D``. Cost O((out + in) r^2),
where a dense SVD costs O(out in min(out, in)). Decompositions run in float64: they are small, and the error is reported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.errors import ShapeMismatch
from trimtab.kernels.spectral import top_svd

__all__ = ["Thin", "Update", "cut", "dense", "distance", "norm"]

#: from this side on a dense update's leading triplets are found by a randomised decomposition
EXACT_SIDE = 1024
POWER_ITERATIONS = 4


@dataclass(frozen=True, eq=False)
class Thin:
    """``b @ a``, shapes (..., out, r) and (..., r, in); adds, and multiplies with numbers, like the dense matrix it stands for."""

    b: Tensor
    a: Tensor

    def __post_init__(self) -> None:
        if self.b.shape[-1] != self.a.shape[-2] or self.b.shape[:-2] != self.a.shape[:-2]:
            raise ShapeMismatch(f"factors of shapes {tuple(self.b.shape)} and {tuple(self.a.shape)} have no product")

    @property
    def shape(self) -> torch.Size:
        """Of the product, (..., out, in)."""
        return torch.Size((*self.b.shape[:-1], self.a.shape[-1]))

    @property
    def rank(self) -> int:
        """Columns of ``b``: a bound of the product's rank."""
        return self.b.shape[-1]

    def __mul__(self, factor: float) -> Thin:
        return Thin(self.b * factor, self.a)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Thin:
        return self * (1 / divisor)

    def __neg__(self) -> Thin:
        return self * -1

    def __add__(self, other: Update | int) -> Update:
        if isinstance(other, Thin):
            b, a = (torch.promote_types(x.dtype, y.dtype) for x, y in ((self.b, other.b), (self.a, other.a)))
            return Thin(torch.cat([self.b.to(b), other.b.to(b)], -1), torch.cat([self.a.to(a), other.a.to(a)], -2))
        return self if isinstance(other, int) and other == 0 else self.dense() + other

    __radd__ = __add__

    def __sub__(self, other: Update) -> Update:
        return self + (-other)

    def dense(self) -> Tensor:
        """The product, (..., out, in)."""
        return self.b @ self.a

    def core(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(Q_b, M, Q_a)`` in float64 with ``b a = Q_b M Q_a^T``, the outer two with orthonormal columns."""
        q, r = torch.linalg.qr(self.b.detach().double())
        p, s = torch.linalg.qr(self.a.detach().double().transpose(-1, -2))
        return q, r @ s.transpose(-1, -2), p


#: what is added to a weight: factors, or a dense tensor of the weight's shape
Update = Thin | Tensor


def dense(update: Update) -> Tensor:
    """The update as a tensor of the weight's shape."""
    return update.dense() if isinstance(update, Thin) else update


def norm(update: Update) -> float:
    """The Frobenius norm; of factors without their product."""
    value = update.core()[1] if isinstance(update, Thin) else update.detach()
    return torch.linalg.vector_norm(value, dtype=torch.float64).item()


def distance(x: Update, y: Update) -> float:
    """``||x - y||_F``, exact also where the two are nearly equal; factors stay factors."""
    if isinstance(x, Thin) and isinstance(y, Thin):
        return norm(x - y)
    return norm(dense(x) - dense(y))


def cut(update: Update, *, rank: int | None = None, max_error: float | None = None) -> tuple[Thin, float]:
    """The best factors at a rank, or the fewest within a relative error, and that error ``||D - B A||_F / ||D||_F``.

    The singular values are shared by both factors evenly, so that either may be trained further. A dense update of large
    sides is decomposed by a randomised method (arXiv 0909.4061) where ``rank`` is given; the error is that of the result.

    Args:
        update: (..., out, in); leading axes (a bank of experts) share the rank.
        rank: None: as many as ``max_error`` needs, or all.
        max_error: relative; None: no bound.
    """
    if isinstance(update, Thin):
        left, middle, right = update.core()
        u, s, vh = torch.linalg.svd(middle, full_matrices=False)
        u, vh = left @ u, vh @ right.transpose(-1, -2)
        energy, dtype = s.square().sum().item(), update.b.dtype
    else:
        u, s, vh = _dense_svd(update, rank if max_error is None else None)
        energy, dtype = norm(update) ** 2, update.dtype
    kept = _enough(s, energy, rank, max_error)
    if isinstance(update, Thin) or s.shape[-1] == min(update.shape[-2:]):
        lost = s[..., kept:].square().sum().item()
    else:  # not all singular values are known
        lost = max(0.0, energy - s[..., :kept].square().sum().item())
    root = s[..., :kept].sqrt()
    b, a = u[..., :kept] * root[..., None, :], root[..., :, None] * vh[..., :kept, :]
    dtype = torch.promote_types(dtype, torch.float32)
    return Thin(b.to(dtype), a.to(dtype)), math.sqrt(lost / energy) if energy > 0 else 0.0


def _dense_svd(update: Tensor, rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """``(U, S, Vh)``, exact on small sides or without a rank."""
    value = update.detach().double() if min(update.shape[-2:]) <= EXACT_SIDE else update.detach().float()
    if rank is None or min(update.shape[-2:]) <= EXACT_SIDE:
        return torch.linalg.svd(value, full_matrices=False)
    rng = torch.Generator().manual_seed(0)
    parts = [
        top_svd(m, rank, iterations=POWER_ITERATIONS, width=2 * rank + 10, rng=rng) for m in value.reshape(-1, *value.shape[-2:])
    ]
    u, s, vh = (torch.stack([part[i] for part in parts]).double() for i in range(3))
    lead = value.shape[:-2]
    return tuple(t.reshape(*lead, *t.shape[1:]) for t in (u, s, vh))


def _enough(s: Tensor, energy: float, rank: int | None, max_error: float | None) -> int:
    """How many triplets to keep: at least one, at most ``rank``, and as few as ``max_error`` lets."""
    most = s.shape[-1] if rank is None else min(rank, s.shape[-1])
    if max_error is None or energy == 0:
        return max(1, most if energy else 1)
    per = s.square().reshape(-1, s.shape[-1]).sum(0)
    left = (energy - per.cumsum(0)).clamp_min(0)
    fits = (left <= energy * max_error**2 * (1 + 1e-12)).nonzero()
    return min(most, int(fits[0]) + 1 if len(fits) else s.shape[-1])
