"""Wavelet filters and the folded transform: reconstruction, moments, PyWavelets' values where it is installed."""

from __future__ import annotations

import pytest
import torch

from trimtab.kernels.wavelet import WAVELETS, fold, low_projector

D = torch.float64
MOMENTS = {"haar": 1, "db2": 2, "db3": 3, "db4": 4, "sym4": 4, "bior2.2": 2}


def matrices(name: str, n: int) -> tuple[torch.Tensor, ...]:
    """``L, H`` (n/2, n) and ``R_L, R_H`` (n, n/2)."""
    wavelet, eye = WAVELETS[name], torch.eye(n // 2, dtype=D)
    low, high = (fold(eye, taps) for taps in wavelet.analysis)
    return low, high, *(fold(eye, taps).t() for taps in wavelet.synthesis)


@pytest.mark.parametrize("n", [8, 14, 32])
@pytest.mark.parametrize("name", WAVELETS)
def test_synthesis_inverts_analysis(name, n):
    L, H, RL, RH = matrices(name, n)
    torch.testing.assert_close(RL @ L + RH @ H, torch.eye(n, dtype=D), atol=1e-14, rtol=0)
    torch.testing.assert_close(torch.cat([L, H]) @ torch.cat([RL, RH], 1), torch.eye(n, dtype=D), atol=1e-14, rtol=0)
    if WAVELETS[name].orthonormal:
        assert torch.equal(L, RL.t()) and torch.equal(H, RH.t())


@pytest.mark.parametrize("name", WAVELETS)
def test_high_pass_filters_ignore_polynomials(name):
    """The details of a polynomial of degree below the number of vanishing moments are zero."""
    for taps in (WAVELETS[name].analysis[1], WAVELETS[name].synthesis[1]):
        t = torch.tensor(taps, dtype=D)
        at = torch.arange(len(taps), dtype=D)
        for degree in range(MOMENTS[name]):
            assert abs((t * at**degree).sum()) < 1e-12
    assert abs(sum(WAVELETS[name].low) - 2**0.5) < 1e-14


def test_fold_is_batched_and_periodic():
    t = torch.randn(2, 3, 8, dtype=D)
    whole = fold(t, WAVELETS["db4"].low)
    assert whole.shape == (2, 3, 16)
    torch.testing.assert_close(whole[1, 2], fold(t[1, 2], WAVELETS["db4"].low))
    torch.testing.assert_close(fold(t.roll(1, -1), WAVELETS["db4"].low), whole.roll(2, -1))


@pytest.mark.parametrize("name", WAVELETS)
def test_the_low_projector_is_idempotent_of_half_rank(name):
    P = low_projector(WAVELETS[name], 14)
    torch.testing.assert_close(P @ P, P, atol=1e-14, rtol=0)
    assert torch.linalg.matrix_rank(P) == 7


@pytest.mark.parametrize("n", [8, 14])
@pytest.mark.parametrize("name", WAVELETS)
def test_periodization_of_pywavelets(name, n):
    pywt = pytest.importorskip("pywt")
    eye, half = torch.eye(n, dtype=D).numpy(), torch.eye(n // 2, dtype=D).numpy()
    kind = {"wavelet": name, "mode": "periodization", "axis": 0}
    want = (*pywt.dwt(eye, **kind), pywt.idwt(half, None, **kind), pywt.idwt(None, half, **kind))
    for got, other in zip(matrices(name, n), want, strict=True):
        torch.testing.assert_close(got, torch.from_numpy(other), atol=1e-12, rtol=0)
