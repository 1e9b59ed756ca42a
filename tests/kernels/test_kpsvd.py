"""The Kronecker-product SVD: the rearrangement, the best terms, and how many of them to keep."""

from __future__ import annotations

import pytest
import torch

from trimtab.kernels.kpsvd import elbow_terms, energy_terms, kpsvd, rearrange, restore
from trimtab.kernels.kroneckersum import kron_sum

D = torch.float64
SHAPES = [(4, 3, 5, 6), (6, 2, 3, 8), (2, 8, 9, 3), (1, 3, 7, 4)]  # (m, n, p, q)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def with_spectrum(values: list[float], shape: tuple[int, int, int, int]) -> torch.Tensor:
    m, n, p, q = shape
    left = torch.linalg.qr(random(m * n, len(values)))[0]
    right = torch.linalg.qr(random(p * q, len(values), seed=1))[0]
    return restore(left * torch.tensor(values, dtype=D) @ right.t(), shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_rearrangement_is_an_isometry_and_makes_kronecker_products_rank_one(shape):
    m, n, p, q = shape
    W, U, V = random(m * p, n * q), random(m, n, seed=1), random(p, q, seed=2)
    assert torch.equal(restore(rearrange(W, shape), shape), W)
    assert rearrange(W, shape).norm().item() == pytest.approx(W.norm().item(), rel=1e-14)
    assert torch.equal(rearrange(torch.kron(U, V), shape), torch.outer(U.flatten(), V.flatten()))


def test_all_terms_rebuild_the_matrix():
    W = random(20, 18)
    s, U, V = kpsvd(W, (4, 3, 5, 6), 12)
    assert (kron_sum(s, U, V) - W).abs().max() < 2e-14
    torch.testing.assert_close(kron_sum(s, U, V), sum(s[k] * torch.kron(U[k], V[k]) for k in range(12)))


@pytest.mark.parametrize("terms", [1, 3, 7])
def test_truncation_leaves_the_other_singular_values_and_factors_are_orthonormal(terms):
    W = random(20, 18)
    s, U, V = kpsvd(W, (4, 3, 5, 6), 12)
    left = W - kron_sum(s[:terms], U[:terms], V[:terms])
    torch.testing.assert_close(left.square().sum(), s[terms:].square().sum())
    for F in (U, V):
        torch.testing.assert_close(F.flatten(1) @ F.flatten(1).t(), torch.eye(12, dtype=D), atol=1e-12, rtol=0)


def test_worked_example():
    W = torch.arange(1, 17, dtype=D).view(4, 4)
    R = torch.tensor([[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]], dtype=D)
    assert torch.equal(rearrange(W, (2, 2, 2, 2)), R)
    s, U, V = kpsvd(W, (2, 2, 2, 2), 4)
    torch.testing.assert_close(s, torch.tensor([38.5166517262, 3.5309403571, 0, 0], dtype=D), atol=1e-9, rtol=0)
    energy = s.square().cumsum(0) / W.square().sum()
    torch.testing.assert_close(energy[:2], torch.tensor([0.9916661, 1.0], dtype=D), atol=1e-7, rtol=0)
    one = kron_sum(s[:1], U[:1], V[:1])
    assert (W - one).square().sum().item() == pytest.approx(12.4675398, abs=1e-6)
    torch.testing.assert_close(one[0], torch.tensor([2.857476, 3.218801, 4.319726, 4.865951], dtype=D), atol=1e-6, rtol=0)


def test_the_papers_literal_reading_does_not_approximate_the_matrix():
    """Its SVD of W itself, reshaped: the sum of all terms is not W, but W rearranged."""
    W, shape = random(16, 16), (4, 4, 4, 4)
    U, S, Vh = torch.linalg.svd(W)
    literal = kron_sum(S, U.t().reshape(16, 4, 4), Vh.reshape(16, 4, 4))
    torch.testing.assert_close(rearrange(literal, shape), W)
    assert (literal - W).norm() / W.norm() > 1


@pytest.mark.parametrize(
    ("spectrum", "energy", "chord", "second"),
    [([10, 8, 6, 1, 0.8, 0.6, 0.4, 0.2], [2, 3, 3, 4], 4, 3), ([16 * 0.5**k for k in range(8)], [2, 2, 3, 4], 3, 1)],
)
def test_number_of_terms_of_a_spectrum(spectrum, energy, chord, second):
    total = sum(s**2 for s in spectrum)
    assert [energy_terms(spectrum, total, tau) for tau in (0.8, 0.9, 0.95, 0.99)] == energy
    assert energy_terms(spectrum, total, 1.0) == 8
    assert elbow_terms(spectrum, "chord") == chord
    assert elbow_terms(spectrum, "second_difference") == second


def test_spectra_without_an_elbow_keep_all():
    assert elbow_terms([1.0, 1.0, 1.0, 1.0], "chord") == 4
    assert elbow_terms([2.0, 1.0], "second_difference") == 2
    assert energy_terms([1.0, 1.0], 10.0, 0.9) == 2


def test_randomised_start_is_near_the_exact_one_and_repeatable():
    W = with_spectrum([2.0**-k for k in range(30)], (8, 8, 8, 8)) + 1e-4 * random(64, 64)
    exact = kpsvd(W, (8, 8, 8, 8), 6)
    near = kpsvd(W, (8, 8, 8, 8), 6, iterations=4, rng=torch.Generator().manual_seed(1))
    torch.testing.assert_close(near[0], exact[0], atol=0, rtol=1e-6)
    torch.testing.assert_close(kron_sum(*near), kron_sum(*exact), atol=1e-5, rtol=0)
    again = kpsvd(W, (8, 8, 8, 8), 6, iterations=4, rng=torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(near, again, strict=True))
