"""How much units, modules and ranks matter, and how many of them go: the numbers of Light-PEFT's estimation stage.

- a module's: the mean over tokens of ``||delta(x)|| / ||base(x)||``, norms over features, ``base(x)`` the place's output without
  this adapter, bias included; padding does not count, and a ratio that is not finite counts as 0;
- a rank's: ``s_k = |mean(A_k * gA_k)| + |mean(B_k * gB_k)|``, means of signed products of parameters and their gradients over the
  rank's entries in each factor (for LoRA: ``|<B_k, gB_k>| (1 / in + 1 / out)``), once an optimizer step, averaged over steps.

Counts come from whole numbers alone, no threshold is compared with a score. Among equal scores, the one that comes later in
the model goes first. Source: arXiv 2406.03792 and its code (NLU/estimate.py, nlu_utils.py, trainer_base.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.contracts import ActivationAdapter, Adapter, Reparameterization, Selection, TokenAdapter
from trimtab.core.errors import Unsupported
from trimtab.core.host import Host, whole_site
from trimtab.core.kinds import PartOperation, Through
from trimtab.core.site import Operation
from trimtab.core.state import host

__all__ = ["ModuleRatios", "RankScores", "keep_best", "keep_best_of_all", "measured", "prune_count", "rank_scores", "ranks_of"]


def prune_count(amount: int | float, n: int, *, official: bool = False) -> int:
    """How many of ``n`` go: ``amount`` itself if it is an integer, else the nearest whole number to ``amount * n``, half up.

    The ratio is read as the simplest fraction within a millionth, so that 0.333333333 is a third.

    Args:
        official: ``floor(ratio * (n - 1)) + 1`` instead, what the authors' strict comparison with a quantile leaves out of
            ``n`` different scores; none for a ratio of 0.
    """
    if isinstance(amount, int):
        return amount
    ratio = Fraction(amount).limit_denominator(10**6)
    if official:
        return math.floor(ratio * (n - 1)) + 1 if ratio else 0
    return math.floor(ratio * n + Fraction(1, 2))


def _order(scores: Tensor) -> Tensor:
    """Indices from what goes first to what goes last: by score, among equals the later first."""
    return len(scores) - 1 - scores.flip(0).argsort(stable=True)


def keep_best(scores: Tensor, gone: int, *, least: int = 1) -> Tensor:
    """The indices, ascending, of what is left of ``scores`` (n,) when the ``gone`` lowest go; at least ``least`` stay.

    Raises:
        ValueError: a score is not finite.
    """
    if not bool(scores.isfinite().all()):
        raise ValueError("a score is NaN or infinite: the masks or gradients of the estimation stage have diverged")
    gone = max(0, min(gone, len(scores) - least))
    return _order(scores.detach().cpu())[gone:].sort().values


def keep_best_of_all(scores: Sequence[Tensor], gone: int, *, least: int = 1, align: int = 1) -> list[Tensor]:
    """As ``keep_best`` over several places together: the ``gone`` lowest of all go, while every place keeps ``least``.

    Args:
        align: counts that are left are rounded to a multiple of it, at least one, where the place has as many.

    Raises:
        ValueError: a score is not finite.
    """
    best = [keep_best(s, len(s) - least, least=least) for s in scores]  # these stay whatever the others score
    free = [torch.ones(len(s), dtype=torch.bool).index_fill(0, b, False) for s, b in zip(scores, best, strict=True)]
    flat = torch.cat([s.detach().cpu().double()[f] for s, f in zip(scores, free, strict=True)])
    owner = torch.cat([torch.full((int(f.sum()),), i) for i, f in enumerate(free)])
    going = owner[_order(flat)[: min(gone, len(flat))]].bincount(minlength=len(scores)).tolist()
    left = [len(s) - g for s, g in zip(scores, going, strict=True)]
    if align > 1:
        rounded = [max(align, (n + align // 2) // align * align) for n in left]
        left = [min(n, len(s)) for n, s in zip(rounded, scores, strict=True)]
    return [keep_best(s, len(s) - n, least=least) for n, s in zip(left, scores, strict=True)]


# -- modules


def measured(adapter: Adapter) -> bool:
    """Whether an adapter changes an output beside which its size can be measured: not what replaces values, nor tokens."""
    return isinstance(adapter, (Reparameterization, ActivationAdapter)) and not isinstance(adapter, (Selection, TokenAdapter))


class ModuleRatios:
    """Sums and counts of the ratios of some adapters, filled by forward hooks while ``on``.

    Attributes:
        adapters: whose.
        total: ``(adapters, 2)``, sum and count over the steps taken in.
        on: whether forward passes are looked at.
        tokens: which tokens of the present batch count, (batch, tokens); None: all.
    """

    def __init__(self, adapters: Sequence[Adapter]):
        hidden = [a.site.name for a in adapters if a.site.substitutes]
        if hidden:
            raise Unsupported(f"the size of the update at {hidden[0]} cannot be measured, for no output is its own; set modules=0")
        self.adapters = list(adapters)
        self.rows = {id(a): i for i, a in enumerate(self.adapters)}
        device = next((p.device for a in self.adapters for p in a.parameters()), torch.device("cpu"))
        self.total, self.pending = (torch.zeros(len(self.adapters), 2, dtype=torch.float64, device=device) for _ in range(2))
        self.on = False
        self.tokens: Tensor | None = None

    def hooks(self) -> list[Any]:
        """Register the hooks; their handles."""
        inner = [a for a in self.adapters if isinstance(a, ActivationAdapter)]
        outer = {a.site.module for a in self.adapters if not isinstance(a, ActivationAdapter)}
        handles = [a.register_forward_hook(_seeing_outputs(self)) for a in inner]
        return handles + [m.register_forward_hook(_seeing(self), with_kwargs=True) for m in outer]

    def take(self) -> None:
        """The step counts."""
        self.total += self.pending
        self.drop()

    def drop(self) -> None:
        """The step does not count."""
        self.pending.zero_()

    def means(self) -> Tensor:
        """(adapters,)."""
        return self.total[:, 0] / self.total[:, 1].clamp_min(1)

    @torch.no_grad()
    def see(self, here: Host, x: Tensor, y: Tensor) -> None:
        """One call of a module with input ``x`` and output ``y``, for the adapters on its matrix."""
        acts = here.acts
        if not acts.on_matrix:
            return
        op: Operation = acts.whole[0].site if acts.whole else whole_site(acts.parts[0][0])
        op = self._chain(acts.whole, op, x, None if acts.parts or acts.outputs else y)
        for chain in acts.parts:
            self._chain(chain, PartOperation(chain[0].site, op, x, op(x)), x, None)

    def _chain(self, chain: Sequence[Adapter], op: Operation, x: Tensor, y: Tensor | None) -> Operation:
        for adapter in chain:
            if id(adapter) in self.rows:
                self.add(adapter, *_norms(adapter, op, x, y if len(chain) == 1 else None))
            op = Through(adapter, op)
        return op

    def add(self, adapter: Adapter, delta: Tensor, base: Tensor) -> None:
        """Norms of the update and of what it is added to, one a token."""
        ratio = (delta / base).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        weights = torch.ones_like(ratio)
        if self.tokens is not None and self.tokens.numel() == ratio.numel():
            weights = self.tokens.reshape(ratio.shape).to(ratio)
        self.pending[self.rows[id(adapter)]] += torch.stack([(ratio * weights).sum(), weights.sum()]).to(self.pending)


def _seeing(ratios: ModuleRatios) -> Callable:
    # plain functions: a copy of the model shares them, and does not copy what they see
    def see(module: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> None:
        if ratios.on:
            ratios.see(host(module), args[0] if args else next(iter(kwargs.values())), y)

    return see


def _seeing_outputs(ratios: ModuleRatios) -> Callable:
    @torch.no_grad()
    def see(adapter: ActivationAdapter, args: tuple, y: Tensor) -> None:
        if ratios.on:
            before = args[1]
            ratios.add(adapter, _norm(y - before, -1), _norm(before, -1))

    return see


def _norm(v: Tensor, axis: int) -> Tensor:
    """Norms over features, in float32 at least."""
    return torch.linalg.vector_norm(v, dim=axis, dtype=torch.promote_types(v.dtype, torch.float32))


def _norms(adapter: Adapter, op: Operation, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """``||delta(x)||`` and ``||base(x)||`` of every token; dropout is left out of both.

    With factors the update is never formed: ``||B u||^2 = u^T (B^T B) u`` with ``u = A x``; where ``y = base + delta`` is known,
    ``||base||^2 = ||y||^2 - 2 <y, delta> + ||delta||^2`` spares the base's product.
    """
    axis = 1 if op.kind in ("conv", "grouped") else -1
    factors = adapter.factors() if op.kind == "linear" else None
    if factors is None:
        base = op(x)
        training = adapter.training
        adapter.training = False
        delta = adapter.run(x, op) - base
        adapter.training = training
        return _norm(delta, axis), _norm(base, axis)
    B, A = factors
    wide = torch.promote_types(x.dtype, torch.float32)
    u = F.linear(x, A.to(x.dtype)).to(wide)
    gram = (B.t() @ B).to(wide)
    delta = ((u @ gram) * u).sum(-1)
    if y is None or (getattr(adapter.config, "dropout", 0) and adapter.training):
        return delta.clamp_min(0).sqrt(), _norm(op(x), -1)
    cross = ((y @ B.to(y.dtype)).to(wide) * u).sum(-1)
    square = _norm(y, -1).to(wide).square()
    base = square - 2 * cross + delta
    base = torch.where(base > 64 * torch.finfo(x.dtype).eps * (square + delta), base, 0)  # what cancels is nothing
    return delta.clamp_min(0).sqrt(), base.sqrt()


# -- ranks


class RankScores:
    """Sums of the scores of some adapters' ranks.

    Attributes:
        adapters: whose; those without ranks of their own are left out.
        total: one vector (r,) an adapter.
        steps: how many steps are in it.
    """

    def __init__(self, adapters: Sequence[Adapter]):
        self.adapters = [a for a in adapters if a.rank_axes]
        self.total = [torch.zeros(ranks_of(a), dtype=torch.float64, device=next(a.parameters()).device) for a in self.adapters]
        self.steps = 0

    @torch.no_grad()
    def take(self) -> None:
        """The gradients of a step, complete and unscaled."""
        for adapter, total in zip(self.adapters, self.total, strict=True):
            total += rank_scores(adapter)
        self.steps += 1

    def means(self) -> list[Tensor]:
        """(r,) for every adapter."""
        return [total / max(1, self.steps) for total in self.total]


def ranks_of(adapter: Adapter) -> int:
    """How many ranks an adapter has now."""
    name, dim = next(iter(adapter.rank_axes.items()))
    return getattr(adapter, name).shape[dim]


def rank_scores(adapter: Adapter) -> Tensor:
    """``s_k`` of an adapter's ranks from the gradients that stand, (r,), float64."""
    total = torch.zeros(ranks_of(adapter), dtype=torch.float64, device=next(adapter.parameters()).device)
    for name, dim in adapter.rank_axes.items():
        p = getattr(adapter, name)
        if p.requires_grad and p.grad is not None and p.dim() == 2 and min(p.shape) > 0:
            total += (p * p.grad).mean(1 - dim, dtype=torch.float64).abs()
    return total
