"""Kernelised low-rank merges, made sparse by competition: ``dW^T = U(K)``, in tiles; nothing of weight size is kept.

``K[i, o] = sum_p c_p ||A_p[i] - B_p[o]||`` (in, out) of factors ``A`` (P, in, q) and ``B`` (P, out, q); with a softmax,
``K = D + alpha softmax(D / gamma, over o) + beta`` for that distance D. ``U = K gain(K)`` is zero where ``|K| <= t``.

One autograd function makes ``y = x (W^T + U) + bias``: for one tile of inputs after the other it builds ``W^T + U`` and
adds one product; backward builds the tile again, for ``dx`` and, from ``G = x^T dy`` of the tile, the factors' gradients:
with ``gD = dL/dD`` and ``Q_p = c_p gD / D_p``, ``gA_p = rowsum(Q_p) A_p - Q_p B_p`` and ``gB_p = colsum(Q_p) B_p - Q_p^T A_p``.
Saved for backward: ``x`` and the factors. A tile holds whole rows, so that its softmax is complete.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.core.site import Operation
from trimtab.kernels.mode import compute_dtype, fused, given, if_learnt

__all__ = ["Competition", "gain", "kernel_delta", "kernelized", "quantile"]

_TILE = 1 << 17  # entries of a tile: a dozen temporaries of this size is all that is held; larger ones are no faster
_SAMPLE = 256  # rows and columns of the sub-grid that brackets a quantile


@dataclass(frozen=True)
class Competition:
    """Which entries win, and what they become.

    Attributes:
        rule: ``"dense"``: all, as they are; ``"square"``: ``K |K|``; ``"paper"``: ``K (|K| - t)``; ``"hard"``: K;
            ``"soft"``: ``sign(K) (|K| - t)``; all but the first for ``|K| > t`` alone.
        through: whether gradients also flow through the factor of K that depends on it; else it is a constant.
    """

    rule: str = "square"
    through: bool = False

    def slope(self, K: Tensor, t: Tensor | None) -> Tensor:
        """dU/dK as backward uses it."""
        if not self.through or self.rule in ("dense", "hard"):
            return gain(self.rule, K, t)
        won = (K.abs() > t).to(K.dtype)
        return {"square": lambda: 2 * K.abs() * won, "paper": lambda: (2 * K.abs() - t) * won, "soft": lambda: won}[self.rule]()


def gain(rule: str, K: Tensor, t: Tensor | None) -> Tensor:
    """``U / K`` by a ``Competition``'s rule."""
    if rule == "dense":
        return torch.ones_like(K)
    size = K.abs()
    won = (size > t).to(K.dtype)
    if rule == "square":
        return size * won
    if rule == "paper":
        return (size - t).clamp_min(0)
    return won if rule == "hard" else won * (1 - t / size.clamp_min(torch.finfo(K.dtype).tiny))


def _centre(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Both without their common mean, piece by piece: distances stay, and ``|a|^2 + |b|^2 - 2 a b`` does not cancel."""
    mean = torch.cat((A, B), 1).detach().mean(1, keepdim=True)
    return A - mean, B - mean


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """(P, rows of a, rows of b); the gradient of a distance of zero is zero."""
    squares = torch.baddbmm(b.square().sum(-1).unsqueeze(1), a, b.mT, alpha=-2).add_(a.square().sum(-1).unsqueeze(2))
    if not squares.requires_grad:
        return squares.clamp_min_(0).sqrt_()
    apart = squares > 0
    return torch.where(apart, squares, 1).sqrt() * apart


def _mixed(D: Tensor, mix: Sequence[Tensor]) -> Tensor:
    """K from the signed distance D and ``(alpha, gamma, beta)``, or D itself."""
    if not mix:
        return D
    alpha, gamma, beta = mix
    return D + alpha * torch.softmax(D / gamma, -1) + beta


def _tiles(A: Tensor, B: Tensor, c: Tensor, mix: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """For every tile of inputs: where it is, its distances D_p, the signed distance D, and K."""
    a, b = _centre(A, B)
    size = max(1, _TILE // b.shape[1])
    for start in range(0, a.shape[1], size):
        here = slice(start, min(start + size, a.shape[1]))
        pieces = _distances(a[:, here], b)
        D = c[0] * pieces[0]
        for p in range(1, len(pieces)):
            D = D + c[p] * pieces[p]
        yield here, pieces, D, _mixed(D, mix)


def kernel_delta(rule: Competition, t: Tensor | None, A: Tensor, B: Tensor, c: Tensor, *mix: Tensor) -> Tensor:
    """``dW`` (out, in) by differentiable operations: the definition. The same tiles, so that the same entries win."""
    U = [K * gain(rule.rule, K if rule.through else K.detach(), t) for *_, K in _tiles(A, B, c, mix)]
    return torch.cat(U).t()


@torch.no_grad()
def quantile(s: float | Tensor, A: Tensor, B: Tensor, c: Tensor, *mix: Tensor) -> Tensor:
    """The s-quantile of ``|K|``, linear between order statistics as ``torch.quantile``, of any number of entries; a scalar.

    Under compile and vmap it sorts; else a sub-grid of K brackets it, one pass over the tiles counts what is below the
    bracket and collects what is inside, and the few of these are sorted. A bracket that misses is widened.
    """
    count = A.shape[1] * B.shape[1]
    if not fused(A, B):
        ordered = torch.cat([K.abs().flatten() for *_, K in _tiles(A, B, c, mix)]).sort().values
        place = torch.as_tensor(s, device=A.device, dtype=torch.float64) * (count - 1)
        first, second = (ordered.gather(0, end.long().view(1)).view(()) for end in (place.floor(), place.ceil()))
        return torch.lerp(first, second, place.frac().to(first.dtype))
    s = float(s)
    position = s * (count - 1)
    low, high = int(position), min(int(position) + 1, count - 1)
    if not bool(torch.isfinite(A.sum() + B.sum())):
        raise ValueError("the factors hold NaN or infinite values, so that no entry can win: lower the learning rate")
    sizes = lambda: (K.abs() for *_, K in _tiles(A, B, c, mix))  # noqa: E731
    if count <= _SAMPLE**2:
        ordered = torch.cat([size.flatten() for size in sizes()]).sort().values
        return torch.lerp(ordered[low], ordered[high], position - low)
    step = lambda rows: max(1, -(-rows // _SAMPLE))  # noqa: E731
    few = _tiles(A[:, :: step(A.shape[1])], B, c, mix)
    sample = torch.cat([K[:, :: step(B.shape[1])].abs().flatten() for *_, K in few]).sort().values
    for margin in (0.01, 0.05, 1.0):
        at = lambda share: int(min(max(share, 0.0), 1.0) * (len(sample) - 1))  # noqa: E731
        bottom = sample[at(s - margin)] if s > margin else sample.new_tensor(-1.0)
        top = sample[at(s + margin)] if s + margin < 1 else sample.new_tensor(float("inf"))
        below, inside = 0, []
        for size in sizes():
            below += int(torch.count_nonzero(size < bottom))
            inside.append(size[(size >= bottom) & (size <= top)])
        found = torch.cat(inside)
        if below <= low and high - below < len(found):
            ordered = found.sort().values
            return torch.lerp(ordered[low - below], ordered[high - below], position - low)
    raise ValueError("the kernel of the factors holds NaN: lower the learning rate")


def kernelized(
    rule: Competition, x: Tensor, base: Operation, t: Tensor | None, A: Tensor, B: Tensor, c: Tensor, *mix: Tensor
) -> Tensor:
    """``base(x) + x U`` for a linear place; ``x`` of shape ``(..., in)``.

    Args:
        t: the threshold, a scalar; None for the dense rule.
        A, B: factors (P, in, q) and (P, out, q).
        c: signs and sizes of the pieces (P,).
        mix: nothing, or the scalars alpha, gamma (above zero) and beta.
    """
    W = base.dense
    if not fused(x, A, B):
        y = base(x)
        return y + base.project(x, kernel_delta(rule, t, A, B, c, *mix)).to(y.dtype)
    if W is None or W.requires_grad or not fused(W):  # quantised, adapted before, sharded, or learning itself
        y = base(x)
        return y + _Kernelized.apply(rule, compute_dtype(x), x, None, None, t, A, B, c, *mix).to(y.dtype)
    return _Kernelized.apply(rule, compute_dtype(x), x, W, base.bias, t, A, B, c, *mix)


def _weight(W: Tensor | None, here: slice, U: Tensor, dtype: torch.dtype) -> Tensor:
    """``(W^T + U)`` of a tile of inputs, (tile, out), summed in the wider dtype."""
    return (U if W is None else U.add_(W[:, here].t()) if W.dtype == U.dtype else U + W[:, here].t()).to(dtype)


class _Kernelized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rule: Competition, dtype: torch.dtype, x: Tensor, W: Tensor | None, bias: Tensor | None,
                t: Tensor | None, A: Tensor, B: Tensor, c: Tensor, *mix: Tensor) -> Tensor:  # fmt: skip
        ctx.save_for_backward(if_learnt(x, ctx.needs_input_grad[6:]), W, t, A, B, c, *mix)
        ctx.rule, ctx.dtype, ctx.bias_dtype = rule, dtype, None if bias is None else bias.dtype
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        y = flat.new_zeros(flat.shape[0], B.shape[1]) if bias is None else bias.to(dtype).repeat(flat.shape[0], 1)
        for here, _, _, K in _tiles(A, B, c, mix):
            U = K.mul_(gain(rule.rule, K, t))
            y.addmm_(flat[:, here], _weight(W, here, U, dtype))
        return given(y, *x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, t, A, B, c, *mix = ctx.saved_tensors
        _, _, needs_x, _, needs_bias, _, *needs = ctx.needs_input_grad
        flat, dy = x.reshape(-1, x.shape[-1]).to(ctx.dtype), dy.reshape(-1, dy.shape[-1])
        gx = torch.empty(flat.shape, device=x.device, dtype=ctx.dtype) if needs_x else None
        gA, gB, gc, gmix = torch.empty_like(A), torch.zeros_like(B), torch.zeros_like(c), [torch.zeros_like(m) for m in mix]
        a, b = _centre(A, B)
        for here, pieces, D, K in _tiles(A, B, c, mix):
            gK = ctx.rule.slope(K, t)
            if needs_x:
                U = K * gain(ctx.rule.rule, K, t)
                torch.mm(dy, _weight(W, here, U, ctx.dtype).t(), out=gx[:, here])
                del U
            if not any(needs):
                continue
            gK.mul_((flat[:, here].t() @ dy).to(gK.dtype))
            gD = gK
            if mix:
                gD, *scalars = _pull_mixed(gK, D, mix)
                for total, part in zip(gmix, scalars, strict=True):
                    total += part
            for p, distance in enumerate(pieces):
                if needs[2]:
                    gc[p] += (gD * distance).sum()
                Q = (gD * c[p]).div_(distance).masked_fill_(distance == 0, 0)
                gA[p, here] = Q.sum(1, keepdim=True) * a[p, here] - Q @ b[p]
                gB[p] += Q.sum(0).unsqueeze(1) * b[p] - Q.t() @ a[p, here]
        gb = dy.sum(0).to(ctx.bias_dtype) if needs_bias else None
        grads = [g if need else None for g, need in zip((gA, gB, gc, *gmix), needs, strict=True)]
        return None, None, None if gx is None else gx.view(x.shape).to(x.dtype), None, gb, None, *grads


def _pull_mixed(gK: Tensor, D: Tensor, mix: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of D, alpha, gamma and beta from ``gK``, for whole rows."""
    alpha, gamma, _ = mix
    S = torch.softmax(D / gamma, -1)
    gS = gK * S
    inner = gS - S * gS.sum(-1, keepdim=True)
    return gK + (alpha / gamma) * inner, gS.sum(), -(alpha / gamma.square()) * (inner * D).sum(), gK.sum()
