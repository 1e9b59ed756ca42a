"""Thin factors against dense sums and exact SVDs."""

from __future__ import annotations

import pytest
import torch

import trimtab as tt
from trimtab.kernels.thin import Thin, cut, dense, distance, norm


def thin(out: int, fan_in: int, r: int, seed: int, *lead: int, dtype=torch.float64) -> Thin:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*lead, *shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    return Thin(draw(out, r), draw(r, fan_in))


def test_sums_and_scales_are_those_of_the_dense_matrices() -> None:
    x, y = thin(12, 9, 2, 0), thin(12, 9, 3, 1)
    for made, expected in (
        (sum([2 * x, y * -0.5]), 2 * x.dense() - 0.5 * y.dense()),
        (x - y, x.dense() - y.dense()),
        (-x / 4, -x.dense() / 4),
    ):
        assert isinstance(made, Thin)
        torch.testing.assert_close(made.dense(), expected)
    assert isinstance(x.dense() + y, torch.Tensor)
    torch.testing.assert_close(x.dense() + y, y + x.dense())
    with pytest.raises(tt.ShapeMismatch, match="no product"):
        Thin(torch.zeros(3, 2), torch.zeros(3, 4))


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("k", [1, 3, 5, 9])
def test_the_cut_is_the_best_one(k, lead) -> None:
    """Equal to a dense SVD cut at the same rank, and its error is the discarded energy."""
    x = sum([0.7 * thin(20, 15, 4, 0, *lead), -1.3 * thin(20, 15, 3, 1, *lead)])
    u, s, vh = torch.linalg.svd(x.dense(), full_matrices=False)
    best = (u[..., :k] * s[..., None, :k]) @ vh[..., :k, :]
    found, error = cut(x, rank=k)
    assert found.rank == min(k, 7)
    torch.testing.assert_close(found.dense(), best, atol=1e-12, rtol=1e-10)
    expected = s[..., k:].square().sum().sqrt().item() / norm(x)
    assert error == pytest.approx(expected, abs=1e-12)
    assert distance(found, x) / norm(x) == pytest.approx(expected, abs=1e-7 if expected < 1e-6 else 1e-12)
    of_dense, error_of_dense = cut(x.dense(), rank=k)
    torch.testing.assert_close(of_dense.dense(), best, atol=1e-12, rtol=1e-10)
    assert error_of_dense == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("bound", [0.0, 0.1, 0.4, 0.9])
@pytest.mark.parametrize("form", [lambda t: t, dense], ids=["thin", "dense"])
def test_the_fewest_that_an_error_bound_needs(bound, form) -> None:
    x = thin(20, 15, 6, 2)
    s = torch.linalg.svdvals(x.dense())
    found, error = cut(form(x), max_error=bound)
    tail = [(s[k:].square().sum().sqrt() / s.norm()).item() for k in range(16)]
    assert error <= bound + 1e-7 and found.rank <= 15
    assert found.rank == 1 or tail[found.rank - 1] > bound
    assert distance(found, x) / norm(x) <= bound + 1e-7


def test_factors_balance_and_zero_has_a_form() -> None:
    found, _ = cut(1e4 * thin(8, 8, 2, 3), rank=2)
    torch.testing.assert_close(found.b.norm(dim=0), found.a.norm(dim=1))
    for zero in (Thin(torch.zeros(4, 2), torch.zeros(2, 5)), torch.zeros(4, 5)):
        found, error = cut(zero, max_error=0.1)
        assert error == 0 and found.rank == 1 and found.dense().abs().max() == 0


def test_a_large_dense_update_is_cut_nearly_as_well_as_possible(monkeypatch) -> None:
    """The randomised way, on a flat spectrum, within a percent of the optimum; its error is the true one."""
    monkeypatch.setattr("trimtab.kernels.thin.EXACT_SIDE", 16)
    x = torch.randn(120, 90, generator=torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(x.double())
    found, error = cut(x, rank=8)
    assert error == pytest.approx(distance(found, x) / norm(x), abs=1e-6)
    assert error <= 1.01 * (s[8:].square().sum().sqrt() / s.norm()).item()


def test_distance_of_nearly_equal_factors_does_not_cancel() -> None:
    x = thin(30, 30, 3, 4)
    y = Thin(x.b + 1e-9, x.a)
    assert distance(x, y) == pytest.approx((x.dense() - y.dense()).norm().item(), rel=1e-4)
