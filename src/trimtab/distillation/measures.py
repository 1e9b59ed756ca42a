"""How far made inputs are from real ones, and how well scores tell them apart."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["area_under_curve", "squared_mmd"]


def area_under_curve(positive: Tensor, negative: Tensor) -> float:
    """Probability that a random positive's score is above a random negative's, ties counting half: (n,), (m,) -> AUC."""
    order = torch.cat([positive, negative]).double()
    ranks = _mean_ranks(order)[: len(positive)]
    n, m = len(positive), len(negative)
    return float((ranks.sum() - n * (n + 1) / 2) / (n * m))


def _mean_ranks(values: Tensor) -> Tensor:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts.double() - 1) / 2)[inverse]


def squared_mmd(x: Tensor, y: Tensor, *, bandwidth: float | None = None) -> float:
    """Biased squared maximum mean discrepancy of two samples (n, d), (m, d) under a Gaussian kernel.

    ``mean k(x, x') + mean k(y, y') - 2 mean k(x, y)``, ``k = exp(-|u - v|^2 / (2 s^2))``.

    Args:
        bandwidth: s; None: the median distance between different points of both samples.
    """
    both = torch.cat([x, y]).double()
    distances = torch.cdist(both, both)
    if bandwidth is None:
        upper = torch.triu_indices(len(both), len(both), 1)
        bandwidth = float(distances[upper[0], upper[1]].median()) or 1.0
    k = torch.exp(-(distances**2) / (2 * bandwidth**2))
    n = len(x)
    return float(k[:n, :n].mean() + k[n:, n:].mean() - 2 * k[:n, n:].mean())
