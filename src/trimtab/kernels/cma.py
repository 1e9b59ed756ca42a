"""CMA-ES: minimises a function of a few numbers without gradients, by a normal distribution that learns its own shape.

Samples ``x = m + sigma C^(1/2) z``; the best half moves ``m``, and its steps shape ``C`` (rank one and rank mu) and ``sigma``
(step-size control by the length of an evolution path). Source: Hansen, arXiv 1604.00772, Fig. 6 and Table 1, its default
parameters; samples outside the bounds are put on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["minimise"]


def minimise(
    function: Callable[[Tensor], float],
    start: Tensor,
    *,
    sigma: float,
    bounds: tuple[float, float],
    budget: int,
    rng: torch.Generator,
) -> tuple[Tensor, float]:
    """The best point of ``budget`` evaluations, and its value; the start is evaluated first.

    Args:
        function: (n,) float64 -> a number; not finite counts as worse than everything.
        start: (n,).
        sigma: the first standard deviation.
        bounds: of every coordinate.
        budget: evaluations, at least 1.
        rng: CPU generator.
    """
    best, best_value = start.double().clone(), _value(function, start.double())
    left, state = budget - 1, _State(start.double(), sigma)
    while left > 0:
        count = min(state.samples, left)
        steps = torch.randn(count, len(start), generator=rng, dtype=torch.float64) @ state.root().t()  # (count, n)
        points = (state.mean + state.sigma * steps).clamp(*bounds)
        values = [_value(function, point) for point in points]
        left -= count
        order = sorted(range(count), key=values.__getitem__)
        if values[order[0]] < best_value:
            best, best_value = points[order[0]].clone(), values[order[0]]
        if count == state.samples:
            state.update((points[order] - state.mean) / state.sigma)
    return best, best_value


def _value(function: Callable[[Tensor], float], point: Tensor) -> float:
    value = float(function(point))
    return value if math.isfinite(value) else math.inf


class _State:
    """The distribution, and the constants of Table 1."""

    def __init__(self, mean: Tensor, sigma: float):
        n = len(mean)
        self.mean, self.sigma, self.generation = mean.clone(), sigma, 0
        self.samples = 4 + int(3 * math.log(n))
        raw = math.log((self.samples + 1) / 2) - torch.arange(1, self.samples // 2 + 1, dtype=torch.float64).log()
        self.weights = raw / raw.sum()  # (mu,)
        self.mass = 1 / self.weights.square().sum().item()
        self.cc = (4 + self.mass / n) / (n + 4 + 2 * self.mass / n)
        self.cs = (self.mass + 2) / (n + self.mass + 5)
        self.c1 = 2 / ((n + 1.3) ** 2 + self.mass)
        self.cmu = min(1 - self.c1, 2 * (self.mass - 2 + 1 / self.mass) / ((n + 2) ** 2 + self.mass))
        self.damping = 1 + 2 * max(0.0, math.sqrt((self.mass - 1) / (n + 1)) - 1) + self.cs
        self.length = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))  # of a normal vector, on average
        self.C = torch.eye(n, dtype=torch.float64)
        self.path, self.sigma_path = torch.zeros_like(self.mean), torch.zeros_like(self.mean)

    def root(self) -> Tensor:
        """``C^(1/2)``, symmetric, (n, n)."""
        values, vectors = torch.linalg.eigh(self.C)
        return vectors * values.clamp_min(1e-20).sqrt() @ vectors.t()

    def update(self, steps: Tensor) -> None:
        """Learn from the steps of one generation, best first, (samples, n)."""
        self.generation += 1
        chosen = steps[: len(self.weights)]
        step = self.weights @ chosen
        self.mean = self.mean + self.sigma * step
        whitened = torch.linalg.solve(self.root(), step)
        self.sigma_path = (1 - self.cs) * self.sigma_path + math.sqrt(self.cs * (2 - self.cs) * self.mass) * whitened
        size = self.sigma_path.norm().item()
        limit = (1.4 + 2 / (len(step) + 1)) * self.length * math.sqrt(1 - (1 - self.cs) ** (2 * self.generation))
        slow = float(size < limit)
        self.path = (1 - self.cc) * self.path + slow * math.sqrt(self.cc * (2 - self.cc) * self.mass) * step
        rank_one = torch.outer(self.path, self.path) + (1 - slow) * self.cc * (2 - self.cc) * self.C
        rank_mu = (chosen * self.weights[:, None]).t() @ chosen
        self.C = (1 - self.c1 - self.cmu) * self.C + self.c1 * rank_one + self.cmu * rank_mu
        self.C = (self.C + self.C.t()) / 2
        self.sigma *= math.exp(min(1.0, (self.cs / self.damping) * (size / self.length - 1)))
