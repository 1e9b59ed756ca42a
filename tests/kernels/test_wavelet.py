"""Wavelet filters and the folded transform: reconstruction, moments, PyWavelets' values where it is installed."""

from __future__ import annotations

import pytest
import torch

from trimtab.core.account import saved_bytes
from trimtab.kernels.wavelet import WAVELETS, _plain, fold, grid_transform

D = torch.float64
MOMENTS = {"haar": 1, "db2": 2, "db3": 3, "db4": 4, "sym4": 4, "bior2.2": 2}


def matrices(name: str, n: int) -> tuple[torch.Tensor, ...]:
    """``L, H`` (n/2, n) and ``R_L, R_H`` (n, n/2)."""
    wavelet, eye = WAVELETS[name], torch.eye(n // 2, dtype=D)
    low, high = fold(eye, wavelet.analysis).chunk(2)
    return low, high, *(half.t() for half in fold(eye, wavelet.synthesis).chunk(2))


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


@pytest.mark.parametrize("bands", [1, 2])
@pytest.mark.parametrize("name", WAVELETS)
def test_the_fused_fold_is_the_plain_one_and_keeps_nothing(name, bands):
    filters = WAVELETS[name].analysis[:bands]
    t = torch.randn(3, 8, dtype=D, requires_grad=True)
    with saved_bytes(beside=(t,)) as saved:
        whole = fold(t, filters)
    assert saved.total == 0
    plain = torch.cat([_plain(t, taps) for taps in filters])
    torch.testing.assert_close(whole, plain, atol=1e-14, rtol=0)
    seed = torch.randn(whole.shape, dtype=D)
    got, want = (torch.autograd.grad(y, t, seed)[0] for y in (whole, plain))
    torch.testing.assert_close(got, want, atol=1e-14, rtol=0)
    torch.testing.assert_close(torch.vmap(lambda t: fold(t, filters))(t[None])[0], plain, atol=1e-14, rtol=0)


def test_fold_is_periodic():
    t, filters = torch.randn(3, 8, dtype=D), WAVELETS["db4"].analysis
    torch.testing.assert_close(fold(t.roll(1, -1), filters), fold(t, filters).roll(2, -1))


@pytest.mark.parametrize("name", WAVELETS)
def test_dense_transforms_of_a_grid_axis_invert_each_other(name):
    forth, back = grid_transform(WAVELETS[name], 14)
    torch.testing.assert_close(back @ forth, torch.eye(14, dtype=D), atol=1e-14, rtol=0)
    torch.testing.assert_close(forth, torch.cat(matrices(name, 14)[:2]), atol=0, rtol=0)


@pytest.mark.parametrize("n", [8, 14])
@pytest.mark.parametrize("name", WAVELETS)
def test_periodization_of_pywavelets(name, n):
    pywt = pytest.importorskip("pywt")
    eye, half = torch.eye(n, dtype=D).numpy(), torch.eye(n // 2, dtype=D).numpy()
    kind = {"wavelet": name, "mode": "periodization", "axis": 0}
    want = (*pywt.dwt(eye, **kind), pywt.idwt(half, None, **kind), pywt.idwt(None, half, **kind))
    for got, other in zip(matrices(name, n), want, strict=True):
        torch.testing.assert_close(got, torch.from_numpy(other), atol=1e-12, rtol=0)
