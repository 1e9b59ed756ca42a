"""Sums of Kronecker products beside a frozen matrix: ``dW = sum_k s_k U_k (x) V_k - sum_k s0_k U0_k (x) V0_k``.

Parameters everywhere: ``s`` (r,), ``U`` (r, m, n), ``V`` (r, p, q), and a start ``s0, U0, V0`` that is subtracted and gets
no gradient. Two forms, both of which keep the input alone: on activations (``KroneckerSum``) and as a dense weight
(``DenseKroneckerSum``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.kernels.beside import Rule
from trimtab.kernels.kpsvd import Shape, restore
from trimtab.kernels.kronecker import Kronecker, plan
from trimtab.kernels.rebuilt import Pull, Recipe

_RUN = 1 << 18  # entries of a temporary in one run of tokens

__all__ = ["DenseKroneckerSum", "KroneckerSum", "dense_is_cheaper", "kron_sum"]


def kron_sum(s: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """``sum_k s_k U_k (x) V_k``, (m p, n q): one product (m n, r)(r, p q), then its blocks in place."""
    shape = (*U.shape[1:], *V.shape[1:])
    return restore((s[:, None] * U.flatten(1)).t() @ V.flatten(1), shape)


def dense_is_cheaper(tokens: int, shape: Shape, terms: int, frozen: int = 0, *, learn: bool, through: bool) -> bool:
    """Whether the weight form takes fewer multiplications than the activation form.

    On activations a term costs ``c = min(n p (q + m), m q (n + p))`` a token for the output, the same for the input's gradient
    and for its own. The dense update costs ``m n p q`` a term, once for each pass, and the gradient of the weight as much
    a token. So the weight form wins for inference on more than ``m n p q / c`` tokens, and in training with more than
    ``m n p q / (3 c)`` terms (with a frozen start of as many terms: ``/ (5 c)``).

    Args:
        terms, frozen: numbers of terms that learn and that were taken out at the start.
        learn: whether gradients of the terms are needed.
        through: whether the gradient of the input is needed.
    """
    m, n, p, q = shape
    thin, matrix = min(n * p * (q + m), m * q * (n + p)), m * n * p * q
    passes = (1 + through) * (terms + frozen)
    activations = tokens * thin * (passes + learn * terms)
    return matrix * (passes + learn * (tokens + 2 * terms)) < activations


class KroneckerSum(Rule):
    """The activation form: both sums as one stack of Kronecker terms."""

    def __init__(self, shape: Shape):
        m, n, p, q = shape
        self.shape = shape
        self.v_first = plan(m, n, p, q, None) == "w2 first"
        self.rule = Kronecker(m, n, left=self.v_first, right=not self.v_first)

    def map(self, x: Tensor, *params: Tensor) -> Tensor:
        return self.rule.map(x, *self._stack(*_joined(*params)))

    def add_(self, y: Tensor, x: Tensor, kept: Tensor | None, *params: Tensor) -> None:
        stack = self._stack(*_joined(*params))
        for run in self._runs(x, params[0].shape[0] + params[3].shape[0]):
            self.rule.add_(y[run], x[run], kept, *stack)

    def pull(self, dy: Tensor, x: Tensor, gx: Tensor | None, needs: Sequence[bool], *params: Tensor) -> tuple[Tensor | None, ...]:
        s, U, V, s0, U0, V0 = params
        stack, start = self._stack(s, U, V), self._stack(-s0, U0, V0)
        asked = needs[0] or needs[1], needs[2]
        total: list[Tensor | None] = [None, None]
        wide = torch.promote_types(x.dtype, torch.float32)  # sums over runs of tokens
        for run in self._runs(x, s.shape[0]):
            part = None if gx is None else gx[run]
            for i, g in enumerate(self.rule.pull(dy[run], x[run], part, asked, *stack)):
                if asked[i]:
                    total[i] = g.to(wide) if total[i] is None else total[i].add_(g)
            if gx is not None:
                self.rule.pull(dy[run], x[run], part, (False, False), *start)
        gU, gV = self._unstack(*total)
        return *_scaled_gradients(gU, s, U), gV, None, None, None

    def _runs(self, x: Tensor, terms: int) -> list[slice]:
        """Rows in runs whose (run, n r, p) temporaries stay in the cache; one run on an accelerator."""
        m, n, p, q = self.shape
        wide = terms * (n * p if self.v_first else m * q)
        step = max(x.shape[0], 1) if x.is_cuda else max(16, _RUN // wide)
        return [slice(i, i + step) for i in range(0, x.shape[0], step)]

    def _stack(self, s: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """The terms as ``Kronecker`` takes a stack of them."""
        U = s[:, None, None] * U
        if self.v_first:
            return U.permute(1, 2, 0).flatten(1), V.flatten(0, 1)
        return U.transpose(0, 1).flatten(0, 1), V.transpose(0, 1).flatten(1)

    def _unstack(self, g1: Tensor | None, g2: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of a stack -> of ``s U`` (r, m, n) and of ``V`` (r, p, q)."""
        m, n, p, q = self.shape
        if self.v_first:
            return (
                None if g1 is None else g1.view(m, n, -1).permute(2, 0, 1),
                None if g2 is None else g2.view(-1, p, q),
            )
        return (
            None if g1 is None else g1.view(m, -1, n).transpose(0, 1),
            None if g2 is None else g2.view(p, -1, q).transpose(0, 1),
        )


class DenseKroneckerSum(Recipe):
    """The weight form: one batched product writes all blocks of ``W + dW`` where they belong; no relayout of W or its gradient.

    Row ``(i, a)`` of W, i below m and a below p, is the (n, q) matrix ``sum_k (s_k U_k[i])^T V_k[a]``.
    """

    def __init__(self, shape: Shape):
        self.shape = shape

    def delta(self, *params: Tensor) -> Tensor:
        return kron_sum(*params[:3]) - kron_sum(*params[3:])

    def remake(self, W: Tensor | None, needs: Sequence[bool], *params: Tensor) -> tuple[Tensor, Pull]:
        m, n, p, q = self.shape
        s, U, V = _joined(*params)
        r, k = params[0].shape[0], s.shape[0]
        left = (s[:, None, None] * U).permute(1, 2, 0)[:, None].expand(m, p, n, k).reshape(m * p, n, k)
        right = V.transpose(0, 1).expand(m, p, k, q).reshape(m * p, k, q)
        made = torch.bmm(left, right) if W is None else torch.baddbmm(W.reshape(m * p, n, q), left, right)

        def pull(G: Tensor) -> tuple[Tensor | None, ...]:
            G = G.view(m * p, n, q)
            gU = gV = None
            if needs[0] or needs[1]:
                gU = torch.bmm(G, right[:, :r].transpose(1, 2)).view(m, p, n, r).sum(1).permute(2, 0, 1)
            if needs[2]:
                gV = torch.bmm(left[:, :, :r].transpose(1, 2), G).view(m, p, r, q).sum(0).transpose(0, 1)
            return *_scaled_gradients(gU, params[0], params[1]), gV, None, None, None

        return made.view(m * p, n * q), pull


def _joined(s: Tensor, U: Tensor, V: Tensor, s0: Tensor, U0: Tensor, V0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both sums as one, of r + r0 terms."""
    return torch.cat([s, -s0]), torch.cat([U, U0]), torch.cat([V, V0])


def _scaled_gradients(g: Tensor | None, s: Tensor, U: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """``(ds, dU)`` from the gradient ``g`` of ``s U``."""
    return (None, None) if g is None else ((g * U).sum((1, 2)), g * s[:, None, None])
