"""The Kronecker-product SVD (KPSVD): the nearest sum of Kronecker products to a matrix, and how many of its terms to keep.

``R`` moves the block (i, j) of ``W`` (m p, n q), flattened, into the row (i, j) of an (m n, p q) matrix. It is linear and keeps
the Frobenius norm, and ``R(U (x) V) = vec(U) vec(V)^T``. So the SVD of ``R(W)`` gives ``W = sum_k s_k U_k (x) V_k``, whose first
terms are the best ones in that norm. Source: Van Loan and Pitsianis, Approximation with Kronecker products, 1993.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.kernels.spectral import full_precision, top_svd

__all__ = ["ELBOWS", "Shape", "elbow_terms", "energy_terms", "kpsvd", "rearrange", "restore"]

#: ``(m, n, p, q)``: the factors are (m, n) and (p, q), the matrix (m p, n q)
Shape = tuple[int, int, int, int]
#: the rules of ``elbow_terms``
ELBOWS = ("chord", "second_difference")


def rearrange(W: Tensor, shape: Shape) -> Tensor:
    """``R(W)``: (m p, n q) -> (m n, p q)."""
    m, n, p, q = shape
    return W.reshape(m, p, n, q).permute(0, 2, 1, 3).reshape(m * n, p * q)


def restore(R: Tensor, shape: Shape) -> Tensor:
    """The inverse of ``rearrange``: (m n, p q) -> (m p, n q)."""
    m, n, p, q = shape
    return R.reshape(m, n, p, q).permute(0, 2, 1, 3).reshape(m * p, n * q)


def kpsvd(
    W: Tensor, shape: Shape, terms: int, *, iterations: int | None = None, rng: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(s, U, V)``, shapes (terms,), (terms, m, n), (terms, p, q), of the largest terms of ``W``; s falls.

    The factors are orthonormal in the Frobenius product. A zero matrix gives s = 0 with random orthonormal factors.

    Args:
        W: (m p, n q), any float dtype; the result has at least float32.
        terms: at most ``min(m n, p q)``.
        iterations: None for the exact SVD; else power iterations of the randomised one.
        rng: CPU generator of the random sketch.
    """
    m, n, p, q = shape
    R = rearrange(full_precision(W), shape)
    if not R.any():
        draw = [torch.randn(size, terms, generator=rng, dtype=torch.float32).to(R) for size in R.shape]
        left, right = (torch.linalg.qr(one)[0].t() for one in draw)
        s = R.new_zeros(terms)
    else:
        left, s, right = top_svd(R, terms, iterations=iterations, rng=rng)
        left = left.t()
    return s, left.reshape(terms, m, n), right.reshape(terms, p, q)


def energy_terms(s: Sequence[float], total: float, tau: float) -> int:
    """The fewest terms whose squares sum to ``tau * total``; all of ``s`` if they do not reach it.

    Args:
        s: singular values, falling, possibly only the largest.
        total: the sum of all squares, ``||W||_F^2``.
        tau: share of the energy to keep, in (0, 1].
    """
    kept = 0.0
    for k, value in enumerate(s, 1):
        kept += value**2
        if kept >= tau * total:
            return k
    return len(s)


def elbow_terms(s: Sequence[float], rule: str) -> int:
    """The number of terms up to the spectrum's elbow; all of ``s`` if it has none (fewer than three values, or flat).

    Args:
        s: singular values, falling.
        rule: ``"chord"``: the point farthest from the line through the first and the last value, both axes scaled to [0, 1],
            the point itself kept. ``"second_difference"``: the terms before the point of the largest second difference.
            Ties go to the fewer terms.
    """
    if len(s) < 3 or s[0] <= s[-1]:
        return len(s)
    inner = range(1, len(s) - 1)
    if rule == "second_difference":
        return max(inner, key=lambda k: s[k - 1] - 2 * s[k] + s[k + 1])
    # both end points are (0, 1) and (1, 0), hence the distance is |x + y - 1| up to a constant
    return 1 + max(inner, key=lambda k: abs(k / (len(s) - 1) + (s[k] - s[-1]) / (s[0] - s[-1]) - 1))
