"""Codes that make up for each other: columns are rounded one after the other, each error is spread over the columns to come.

With ``H = 2 / n sum x x^T`` over the layer's inputs, the loss of ``D = W - W_hat`` is ``tr(D H D^T)``. ``U`` is the upper
triangular factor of ``H^-1 = U^T U``; in the order of the sweep, ``U_ii^2`` is the first diagonal entry of the inverse of H
restricted to columns i and on: the denominator of the best correction. Column i takes its nearest table entry q, and with
``e = (w_i - q) / U_ii`` what follows becomes ``W - e U[i, :]``; all rows at once, in blocks of columns. The tables are learnt
before, by k-means with column weights ``U_jj^-p``.

Sources: arXiv 2210.17323 (the sweep), 2407.10032 (tables by weighted k-means), 2410.06364 (groups along a row).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.errors import ShapeMismatch, TrimtabError
from trimtab.kernels.kmeans import assign, kmeans, midpoints

__all__ = ["Curvature", "Hessian", "SingularHessian", "codebook", "curvature", "nearest_codes", "sweep"]

_BLOCK = 128
_RETRIES = 3


class SingularHessian(TrimtabError, ValueError):
    """The inputs' second moments have no Cholesky factor at this damping."""


class Hessian:
    """``2 / sequences * sum of x x^T``, a running mean over sequences, (in, in)."""

    def __init__(self, size: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.value = torch.zeros(size, size, device=device, dtype=dtype)
        self.sequences = self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Take in the inputs ``x`` (..., tokens, in) of one call; its first axis counts sequences, if it has three or more."""
        count = x.shape[0] if x.dim() > 2 else 1
        flat = x.detach().reshape(-1, x.shape[-1]).to(self.value.dtype)
        self.value.mul_(self.sequences / (self.sequences + count))
        self.sequences += count
        self.tokens += flat.shape[0]
        self.value.addmm_(flat.t(), flat, alpha=2 / self.sequences)


@dataclass
class Curvature:
    """What the sweep needs of H.

    Attributes:
        upper: U (in, in), columns in the order of the sweep.
        order: the original column at each step (in,).
        dead: inputs that were always zero (in,), in the original order.
        damping: that was needed, as a share of the mean diagonal.
    """

    upper: Tensor
    order: Tensor
    dead: Tensor
    damping: float

    def importance(self, power: float) -> Tensor:
        """``U_jj^-p`` in the original order (in,), scaled to a mean of one; zero for dead inputs."""
        steps = self.upper.diagonal().double().log()
        weights = torch.empty_like(steps)
        weights[self.order] = (-power * (steps - steps.mean())).exp()
        weights[self.dead] = 0
        return weights / weights.mean().clamp(min=torch.finfo(weights.dtype).tiny)


def curvature(H: Tensor, *, damping: float = 0.1, act_order: bool = True) -> Curvature:
    """The factor U of ``H`` (in, in), damped by ``damping`` times the mean of its diagonal.

    Args:
        act_order: sweep the columns with the largest diagonal first.

    Raises:
        ShapeMismatch: H is not square or not finite.
        SingularHessian: no factor at ``damping``, nor at 10, 100 and 1,000 times as much.
    """
    if H.dim() != 2 or H.shape[0] != H.shape[1]:
        raise ShapeMismatch(f"the inputs' second moments are a square matrix, found {tuple(H.shape)}")
    if not bool(torch.isfinite(H).all()):
        raise ShapeMismatch("the inputs' second moments hold NaN or infinite values; look at the calibration data and the model")
    H = H.to(torch.promote_types(H.dtype, torch.float32)).clone()
    diagonal = H.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(len(H), device=H.device)
    H = H[order][:, order]
    mean, tried = H.diagonal().mean(), damping
    for attempt in range(_RETRIES + 1):
        # H = R R^T with R upper triangular: Cholesky with both axes turned round; then U = R^-1
        turned = H.flip(0, 1)
        turned.diagonal().add_(tried * mean)
        low, failed = torch.linalg.cholesky_ex(turned)
        if not int(failed):
            one = torch.eye(len(H), dtype=H.dtype, device=H.device)
            upper = torch.linalg.solve_triangular(low, one, upper=False).flip(0, 1)
            if bool(torch.isfinite(upper.diagonal()).all()):
                return Curvature(upper, order, dead, tried)
        if attempt < _RETRIES:
            following = tried * 10 or 0.01
            warnings.warn(f"the inputs' second moments are singular at damping {tried:g}; trying {following:g}", stacklevel=2)
            tried = following
    raise SingularHessian(
        f"the inputs' second moments have no Cholesky factor, with damping up to {tried:g}; give more calibration data, or "
        f"damping={tried * 10:g}"
    )


def codebook(
    W: Tensor,
    bits: int,
    groups: int,
    *,
    weights: Tensor | None = None,
    restarts: int = 4,
    rng: torch.Generator,
) -> Tensor:
    """Tables by k-means of every row's groups: ``W`` (out, in) -> (out, groups, 2^bits) float64, ascending.

    Args:
        weights: of the columns, (in,).
    """
    out, fan_in = W.shape
    if weights is not None:
        weights = weights.view(1, groups, -1).expand(out, -1, -1).reshape(out * groups, -1)
    values = W.reshape(out * groups, fan_in // groups)
    return kmeans(values, 1 << bits, weights=weights, restarts=restarts, rng=rng).view(out, groups, -1)


def nearest_codes(W: Tensor, table: Tensor) -> Tensor:
    """The nearest entry of its group's table for every weight: (out, in), (out, groups, K) -> (out, groups, s) uint8."""
    out, groups, size = table.shape
    return assign(W.reshape(out * groups, -1), table.reshape(-1, size)).view(out, groups, -1)


def sweep(W: Tensor, table: Tensor, found: Curvature) -> Tensor:
    """Codes that keep ``tr(D H D^T)`` small for fixed tables: (out, in), (out, groups, K) -> (out, groups, s) uint8.

    Args:
        table: ascending, as it will be stored.
    """
    out, fan_in = W.shape
    dtype = found.upper.dtype
    tables = table.to(dtype)
    bounds = midpoints(tables)
    group_of = (torch.arange(fan_in, device=W.device) // (fan_in // table.shape[1]))[found.order].tolist()
    rest = W.to(dtype).t()[found.order].contiguous()  # (in, out): a column of W is a row here
    codes = torch.empty(fan_in, out, dtype=torch.uint8, device=W.device)
    for begin in range(0, fan_in, _BLOCK):
        end = min(begin + _BLOCK, fan_in)
        errors = rest.new_empty(end - begin, out)
        for i in range(begin, end):
            w, known = rest[i], i - begin
            if known:  # what the block's earlier columns left over
                w = torch.addmv(w, errors[:known].t(), found.upper[begin:i, i], alpha=-1)
            group = group_of[i]
            code = (w[:, None] > bounds[:, group]).sum(1)
            q = tables[:, group].gather(1, code[:, None]).squeeze(1)
            torch.div(w - q, found.upper[i, i], out=errors[known])
            codes[i] = code
        rest[end:].addmm_(found.upper[begin:end, end:].t(), errors, alpha=-1)
    original = torch.empty_like(codes)
    original[found.order] = codes
    return original.t().reshape(out, table.shape[1], -1).contiguous()
