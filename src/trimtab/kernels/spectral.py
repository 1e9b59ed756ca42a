"""The leading singular triplets of a matrix, exact or randomised, from an explicit generator."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["full_precision", "top_svd"]


def full_precision(M: Tensor) -> Tensor:
    """``M`` detached, in float32 unless it is float64: decompositions have no half-precision form."""
    return M.detach() if M.dtype == torch.float64 else M.detach().float()


def top_svd(
    M: Tensor, k: int, *, iterations: int | None = None, width: int | None = None, rng: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(U, S, Vh)`` of the ``k`` largest singular values of ``M`` (out, in): shapes (out, k), (k,), (k, in).

    Args:
        M: any float dtype; the result has at least float32.
        k: at most ``min(out, in)``.
        iterations: None for the exact decomposition; else power iterations of the randomised one (Halko, Martinsson,
            Tropp, arXiv 0909.4061, Algorithm 4.4).
        width: columns of the random sketch; default ``2 k``.
        rng: CPU generator of the sketch.
    """
    M = full_precision(M)
    width = min(2 * k if width is None else width, *M.shape)
    if iterations is None or width == min(M.shape):
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    else:
        sketch = torch.randn(M.shape[1], width, generator=rng, dtype=torch.float32).to(M)
        Q, _ = torch.linalg.qr(M @ sketch)
        for _ in range(iterations):
            Q, _ = torch.linalg.qr(M.t() @ Q)
            Q, _ = torch.linalg.qr(M @ Q)
        U, S, Vh = torch.linalg.svd(Q.t() @ M, full_matrices=False)
        U = Q @ U
    return U[:, :k], S[:k], Vh[:k]
