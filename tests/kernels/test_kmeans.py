"""Batched k-means of numbers against the exact optimum, by dynamic programming, and against scikit-learn where it is installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.core.errors import ShapeMismatch
from trimtab.kernels.kmeans import assign, kmeans, midpoints


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def cost(values: torch.Tensor, centres: torch.Tensor, weights: torch.Tensor | float = 1.0) -> torch.Tensor:
    values = values.double()
    return (weights * (values - centres.gather(1, assign(values, centres).long())).square()).sum(1)


def optimum(values: torch.Tensor, weights: torch.Tensor, size: int) -> float:
    """The least weighted cost of one row in ``size`` runs."""
    v, order = values.double().sort()
    w = weights.double()[order]
    sums = [np.concatenate([[0.0], np.cumsum(x.numpy())]) for x in (w, w * v, w * v * v)]
    n = len(v)
    zero, one, two = (s[None, :] - s[:, None] for s in sums)  # [i, j]: of the run i..j-1
    runs = np.where(zero > 0, two - one**2 / np.where(zero > 0, zero, 1), 0)
    runs[np.tril_indices(n + 1, -1)] = np.inf
    best = runs[0]
    for _ in range(size - 1):
        best = (best[:, None] + runs).min(0)
    return float(best[n])


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("weighted", [False, True])
def test_near_the_optimum(size, weighted):
    values = torch.randn(6, 300, generator=seeded())
    weights = torch.rand(6, 300, generator=seeded()) ** 4 if weighted else torch.ones(6, 300)
    centres = kmeans(values, size, weights=weights, restarts=8, rng=seeded())
    assert (centres.diff(dim=1) >= 0).all()
    best = torch.tensor([optimum(v, w, size) for v, w in zip(values, weights, strict=True)], dtype=torch.float64)
    found = cost(values, centres, weights)
    assert (found >= best * (1 - 1e-9)).all()
    assert (found / best).mean() < 1.05


def test_no_worse_than_scikit_learn():
    """One start of k-means++ there, one or four here."""
    cluster = pytest.importorskip("sklearn.cluster")
    values = torch.randn(8, 1024, generator=seeded())
    theirs = [cluster.KMeans(16, n_init=1, random_state=0, max_iter=100, tol=1e-6).fit(v[:, None].numpy()).inertia_ for v in values]
    for restarts, bound in ((1, 1.05), (4, 1.0)):
        ours = cost(values, kmeans(values, 16, restarts=restarts, rng=seeded())).mean().item()
        assert ours < bound * float(np.mean(theirs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_few_distinct_values_are_kept_to_the_bit(dtype):
    """Neighbouring floats too, which no midpoint separates."""
    values = torch.randn(16, generator=seeded()).to(dtype)
    values[1] = torch.nextafter(values[0], torch.tensor(9.0, dtype=dtype))
    rows = values[torch.randint(0, 16, (20, 200), generator=seeded())]
    rows[0] = 0.5
    centres = kmeans(rows, 16, rng=seeded()).to(dtype)
    assert torch.equal(centres.gather(1, assign(rows, centres).long()), rows)


def test_a_row_alone_is_the_row_among_others():
    """Rows do not depend on each other but for the draws."""
    values = torch.cat([torch.randint(0, 5, (3, 64), generator=seeded()).float(), torch.randn(3, 64, generator=seeded())])
    centres = kmeans(values, 8, restarts=16, rng=seeded())
    for row in range(6):
        alone = kmeans(values[row : row + 1], 8, restarts=16, rng=seeded())
        assert cost(values[row : row + 1], alone)[0] <= 1.05 * cost(values, centres)[row] + 1e-12


def test_weights_decide_and_empty_clusters_are_filled():
    values = torch.cat([torch.zeros(1, 50), torch.linspace(1, 2, 50)[None]], 1)
    weights = torch.cat([torch.ones(1, 50), torch.zeros(1, 50)], 1)
    assert cost(values, kmeans(values, 4, weights=weights, rng=seeded()), weights).item() == 0
    nothing = kmeans(values, 4, weights=torch.zeros(1, 100), rng=seeded())
    assert cost(values, nothing).item() < 1.0
    clumps = torch.cat([torch.randn(1, 30) * 1e-3 + centre for centre in (-5.0, 0.0, 0.1, 7.0)], 1)
    assert (kmeans(clumps, 4, restarts=1, rng=seeded()).diff(dim=1) > 0.05).all()


def test_midpoints_keep_a_centre_with_itself():
    low = torch.tensor([1.0])
    high = torch.nextafter(low, torch.tensor([2.0]))
    centres = torch.stack([low, high, high], 1)
    assert (midpoints(centres)[0] < high).tolist() == [True, False]
    assert assign(torch.stack([low, high], 1), centres).tolist() == [[0, 1]]


def test_bad_input():
    with pytest.raises(ShapeMismatch, match="NaN or infinite values"):
        kmeans(torch.tensor([[1.0, float("nan")]]), 2, rng=seeded())
    with pytest.raises(ShapeMismatch, match="negative"):
        kmeans(torch.ones(1, 2), 2, weights=-torch.ones(2), rng=seeded())
