"""Updates with few Fourier coefficients, ``dW = s Re ifft2(F)``, ``F`` (out, in) real with n entries, in two forms.

With ``X = fft(x)`` and ``D = fft(dy)`` along the features (arXiv 2405.03003, Eq. 2-4, turned into products with activations)::

    y  += s / in  Re ifft_out(Z),  Z[row_k]  += c_k conj X[col_k]
    gx += s / out Re ifft_in(Z'),  Z'[col_k] += c_k conj D[row_k]
    dc_k = s / (out in)  sum over tokens  Re D[row_k] X[col_k]

All inputs are real, so half spectra suffice: an index beyond the middle is its mirror's conjugate, and ``Re ifft`` is the
inverse real transform of the Hermitian part of ``Z``. The weight form takes one inverse real 2-d transform for ``dW`` and one
real transform of ``dL/dW`` for ``dc``. Nothing of the spectrum is kept for backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.kernels.beside import Rule
from trimtab.kernels.rebuilt import Pull, Recipe

__all__ = ["FourierRule", "FourierWeight", "Places", "dense_update", "on_activations"]

_RUN = 1 << 19  # complex numbers of one run of tokens: the gathered rows stay in a core's second-level cache


class Places:
    """Where the n coefficients stand in the half spectra of inputs and outputs; sorted by whether they conjugate.

    Attributes:
        order: (n,) the coefficients in the order used here; the first ``straight`` are not conjugated.
        rows, columns: (n,) their indices in the half spectra, ``min(k, size - k)``.
        row_share, column_share: (n, 1) 1 where an index is its own mirror, else 1/2.
        flat: indices of the Hermitian part of F, (out, in // 2 + 1) flattened; ``source``: the coefficient of each.
        read: (n,) where each coefficient reads in that half spectrum.
    """

    def __init__(self, index: Tensor, out: int, fan_in: int):
        self.out, self.fan_in = out, fan_in
        row, column = index // fan_in, index % fan_in
        conjugate = (row > out // 2) == (column > fan_in // 2)
        self.order = torch.argsort(conjugate.to(torch.int8), stable=True)
        self.straight = int((~conjugate).sum())
        row, column = row[self.order], column[self.order]
        mirror_row, mirror_column = -row % out, -column % fan_in
        self.rows, self.columns = torch.minimum(row, mirror_row), torch.minimum(column, mirror_column)
        self.row_share = torch.where(row == mirror_row, 1.0, 0.5)[:, None]
        self.column_share = torch.where(column == mirror_column, 1.0, 0.5)[:, None]
        half = fan_in // 2 + 1
        own, mirror = column < half, mirror_column < half
        self.flat = torch.cat([(row * half + column)[own], (mirror_row * half + mirror_column)[mirror]])
        self.source = torch.cat([own.nonzero()[:, 0], mirror.nonzero()[:, 0]])
        self.read = torch.where(own, row * half + column, mirror_row * half + mirror_column)


def dense_update(index: Tensor, c: Tensor, scale: float, out: int, fan_in: int) -> Tensor:
    """``scale Re ifft2(F)``, the definition, by plain operations."""
    wide = c.to(torch.promote_types(c.dtype, torch.float32))
    F = torch.zeros(out * fan_in, dtype=wide.dtype, device=c.device).scatter(0, index, wide)
    return scale * torch.fft.ifft2(F.view(out, fan_in)).real


def _wide(x: Tensor) -> Tensor:
    """Transforms have no half-precision form."""
    return x if x.dtype == torch.float64 else x.float()


def _spectrum(x: Tensor) -> Tensor:
    """(tokens, size) -> half spectrum (frequencies, tokens): a frequency is then one contiguous row to gather."""
    return torch.fft.rfft(_wide(x)).t().contiguous()


def _scatter(gathered: Tensor, weights: Tensor, to: Tensor, size: int) -> Tensor:
    """Rows times weights, summed into a half spectrum and transformed back: (n, tokens) -> (tokens, size)."""
    real = torch.view_as_real(gathered).flatten(1).mul_(weights)
    Z = torch.zeros(size // 2 + 1, real.shape[1], dtype=real.dtype, device=real.device).index_add_(0, to, real)
    Z = torch.view_as_complex(Z.view(Z.shape[0], -1, 2))
    return torch.fft.irfft(Z.t().contiguous(), n=size)


class FourierRule(Rule):
    """The activation form. Parameter: ``c`` (n,)."""

    def __init__(self, places: Places, index: Tensor, scale: float):
        self.places, self.index, self.scale = places, index, scale

    def map(self, x: Tensor, c: Tensor) -> Tensor:
        p = self.places
        return x @ dense_update(self.index, c, self.scale, p.out, p.fan_in).to(x.dtype).transpose(-1, -2)

    def add_(self, y: Tensor, x: Tensor, kept: Tensor | None, c: Tensor) -> None:
        p = self.places
        weights = (self.scale / p.fan_in) * _wide(c)[p.order, None] * p.row_share
        for run in self._runs(x):
            y[run] += _scatter(self._conjugated(_spectrum(x[run]), p.columns), weights, p.rows, p.out)

    def pull(
        self, dy: Tensor, x: Tensor, gx: Tensor | None, needs: Sequence[bool], c: Tensor
    ) -> tuple[Tensor | None, ...]:
        p = self.places
        weights = (self.scale / p.out) * _wide(c)[p.order, None] * p.column_share
        gc = torch.zeros_like(_wide(c))
        for run in self._runs(dy):
            D = self._conjugated(_spectrum(dy[run]), p.rows)
            if needs[0]:
                X = torch.view_as_real(_spectrum(x[run]).index_select(0, p.columns)).flatten(1)
                gc.add_(torch.linalg.vecdot(torch.view_as_real(D).flatten(1), X))
            if gx is not None:
                gx[run] += _scatter(D, weights, p.columns, p.fan_in)
        gc.mul_(self.scale / (p.out * p.fan_in))
        return (torch.empty_like(gc).index_copy_(0, p.order, gc) if needs[0] else None,)

    def _conjugated(self, spectrum: Tensor, rows: Tensor) -> Tensor:
        """The coefficients' rows of a half spectrum, those on the mirrored side conjugated."""
        gathered = spectrum.index_select(0, rows)
        gathered[self.places.straight :].conj_physical_()
        return gathered

    def _runs(self, x: Tensor) -> list[slice]:
        step = max(16, _RUN // max(len(self.index), 1))
        return [slice(start, start + step) for start in range(0, x.shape[0], step)]


class FourierWeight(Recipe):
    """The weight form. Parameter: ``c`` (n,)."""

    def __init__(self, places: Places, index: Tensor, scale: float):
        self.places, self.index, self.scale = places, index, scale

    def delta(self, c: Tensor) -> Tensor:
        return dense_update(self.index, c, self.scale, self.places.out, self.places.fan_in)

    def remake(self, W: Tensor | None, needs: Sequence[bool], c: Tensor) -> tuple[Tensor, Pull]:
        p = self.places
        values = (0.5 * self.scale) * c[p.order]
        half = torch.zeros(p.out * (p.fan_in // 2 + 1), 2, dtype=c.dtype, device=c.device)
        half[:, 0].index_add_(0, p.flat, values[p.source])
        weight = torch.fft.irfft2(torch.view_as_complex(half).view(p.out, -1), s=(p.out, p.fan_in))

        def pull(G: Tensor) -> tuple[Tensor]:
            found = torch.view_as_real(torch.fft.rfft2(G).view(-1))[:, 0][p.read]
            return (torch.empty_like(found).index_copy_(0, p.order, found * (self.scale / (p.out * p.fan_in))),)

        return weight if W is None else weight.add_(W), pull


def on_activations(tokens: int, coefficients: int, out: int, fan_in: int) -> bool:
    """Whether transforming activations is cheaper than forming ``dW`` and its gradient.

    In units of one multiply-add of a large product, as measured on a CPU core at width 1024: a coefficient costs 370 a
    token, a feature's transforms 270 a token; an entry of ``dW`` costs 800 for its transforms and 1 a token.
    """
    return tokens * (370 * coefficients + 270 * (out + fan_in)) < out * fan_in * (tokens + 800)
