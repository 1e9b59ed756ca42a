"""ReFT: representations are edited in a low-rank subspace, at all tokens or at chosen ones.

For a hidden state ``h`` (d,) at a block's output::

    h' = h + R^T (W h + b - R h)          R (r, d) with orthonormal rows, W (r, d), b (r,)

that is, ``h``'s coordinates in the subspace of R become ``W h + b``. R is the orthonormal factor of a free matrix ``p`` (QR of its
transpose, with a positive diagonal). Source: arXiv 2404.03592, Eq. 2 (LoReFT); without ``- R h`` Eq. 3's DiReFT, with
``orthogonal=False`` the same with free matrices. ``start="base"``: ``W = R``, ``b = 0``, so training starts at the base; the
authors' start is that of a linear layer. Trainable: ``2 r d + r`` a place (twice that if not ``tied``). Saved for backward: the
states that are edited, and r numbers for each where ``16 r <= d``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from trimtab.core.contracts import ActivationAdapter, MethodConfig, Span
from trimtab.core.errors import NoMatch, ShapeMismatch, TooSmall, Unsupported
from trimtab.core.registry import method
from trimtab.core.scope import Owner, entered, plan_for, within
from trimtab.core.site import CHILD, Site
from trimtab.kernels.bottleneck import Parts, bottleneck

__all__ = ["ReFT", "ReFTAdapter", "spans"]


@dataclass(frozen=True)
class ReFT(MethodConfig):
    """Edits of a block's hidden states within a learned subspace; very few numbers.

    Not for new knowledge or another modality, for which a few coordinates a block are too little, and not where the edit must
    merge into weights.

    Args:
        rank: r, at most the width.
        first: number of tokens at the start that are edited, half of the text at most; None with ``last`` None: all tokens. Use
            ``tt.spans`` to say where each row's text starts and stops: else padding, and in training the answer, count as text.
        last: number of tokens at the end that are edited, half of the text at most.
        tied: whether first and last tokens share one edit.
        orthogonal: whether R has orthonormal rows (LoReFT, DiReFT) or is free.
        subtract: whether ``R h`` is taken away (LoReFT) or ``W h + b`` is added to it (DiReFT).
        start: ``"base"`` or ``"paper"``, see above.
        dropout: probability of zeroing a coordinate of the edit while training.
    """

    search = {"rank": (1, 2, 4, 8, 16, 32), "start": ("base", "paper")}
    learning_rate = Span(1e-4, 1e-2, log=True)

    rank: int = 4
    first: int | None = None
    last: int | None = None
    tied: bool = True
    orthogonal: bool = True
    subtract: bool = True
    start: str = "base"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.require_rank(self.rank)
        for name in ("first", "last"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            self.require(value is None or whole, f"{name} must be None or a number of tokens, found {value!r}")
        self.require(self.everywhere or (self.first or 0) + (self.last or 0) > 0, "first and last of 0 leave no token to edit")
        self.require(self.tied or bool(self.first and self.last), "untied edits need both first and last tokens")
        self.require_choice("start", ("base", "paper"))
        self.require_probability("dropout", self.dropout)

    @property
    def everywhere(self) -> bool:
        """Whether all tokens are edited."""
        return self.first is None and self.last is None


@method(
    ReFT, paper="arXiv:2404.03592 Eq. 2",
    tests=({"rank": 2}, {"rank": 2, "first": 1, "last": 2, "tied": False, "start": "paper"},
           {"rank": 3, "last": 1, "subtract": False, "orthogonal": False}),
)  # fmt: skip
class ReFTAdapter(ActivationAdapter):
    """``p`` and ``w`` (k, r, d), ``b`` (k, r): one edit, or (k = 2) one for the first tokens and one for the last."""

    targets = "block"

    def __init__(self, config: ReFT, site: Site, *, rng: Generator):
        super().__init__(config, site)
        k, r, d = 1 if config.tied else 2, config.rank, site.out_features
        if site.is_meta:
            self.p, self.w, self.b = self.zeros(k, r, d), self.zeros(k, r, d), self.zeros(k, r)
            return
        p = torch.stack([orthonormal(torch.randn(r, d, generator=rng)) for _ in range(k)])
        self.p = self.parameter(p)
        if config.start == "paper":
            self.w, self.b = (self.uniform(*shape, bound=d**-0.5, rng=rng) for shape in ((k, r, d), (k, r)))
        else:
            self.w, self.b = (self.parameter(p) if config.subtract else self.zeros(k, r, d)), self.zeros(k, r)

    @classmethod
    def check(cls, config: ReFT, site: Site) -> None:
        if config.rank > site.out_features:
            raise TooSmall(f"rank {config.rank} is larger than the {site.out_features} features of {site.name}")

    @classmethod
    def reads(cls, config: ReFT) -> str:
        return "output"

    @classmethod
    def merges(cls, config: ReFT, site: Site) -> bool:
        return config.everywhere

    @classmethod
    def identity(cls, config: ReFT) -> bool:
        return config.start == "base"

    def made(self, p: Tensor, w: Tensor, b: Tensor) -> Parts:
        """The edit as a thin network: ``W - R`` (or W), b, ``R^T``."""
        R = orthonormal(p) if self.config.orthogonal else p
        return (w - R if self.config.subtract else w), b, R.t(), None

    def edit(self, h: Tensor, k: int, y: Tensor | None = None) -> Tensor:
        """``y`` (None: ``h``) with the change of the states ``h`` (..., d) by edit ``k`` added."""
        factors = (self.p[k], self.w[k], self.b[k])
        p = self.config.dropout * self.training
        return bottleneck(h if y is None else y, None if y is None else h, factors, make=self.made, hidden_dropout=p)

    @property
    def owner(self) -> Owner:
        """The model, as contexts know it."""
        return self.site.module._modules[CHILD].owner

    @property
    def span(self) -> tuple[Tensor, Tensor, int] | None:
        """What ``tt.spans`` says here: starts and stops of the rows' texts, and the largest stop."""
        plan = plan_for(self.owner)
        return None if plan is None else plan.spans

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.config.everywhere:
            return self.edit(y, 0)
        span = self.span
        if y.dim() < 2 or y.shape[-2] < (2 if span is None else span[2]):
            return y  # a step of generation: the prompt's states were edited when it was read
        return self._at_ends(y) if span is None else self._within(y, *span[:2])

    def _at_ends(self, y: Tensor) -> Tensor:
        """The first and last tokens edited, each half of them at most, as the authors count."""
        tokens = y.shape[-2]
        first, last = (min(n or 0, tokens // 2) for n in (self.config.first, self.config.last))
        sets = [range(first), range(tokens - last, tokens)]
        for k, places in enumerate([[*sets[0], *sets[1]]] if self.config.tied else sets):
            if len(places):
                index = torch.tensor(list(places), device=y.device)
                h = y.index_select(-2, index)
                # index_add would keep what it adds
                y = y.scatter_add(-2, index[:, None].expand_as(h), self.edit(h, k, torch.zeros_like(h)))
        return y

    def _within(self, y: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """The same for every row's own span."""
        if torch._C._functorch.maybe_current_level() is not None:
            raise Unsupported(
                "tt.routed and tt.spans do not go together: rows of a routed batch are run one by one; run one batch an adapter"
            )
        if y.shape[0] % start.shape[0]:
            raise ShapeMismatch(f"tt.spans was given {start.shape[0]} rows, but {self.site.name} got a batch of {y.shape[0]}")
        repeat = y.shape[0] // start.shape[0]  # beams
        start, stop = (t.to(y.device).repeat_interleave(repeat)[:, None] for t in (start, stop))
        first, last = self.config.first or 0, self.config.last or 0
        head = start + torch.arange(first, device=y.device)  # (n, first)
        tail = stop - last + torch.arange(last, device=y.device)
        half = (stop - start) // 2
        pairs = [(head, head < start + half.clamp(max=first)), (tail, tail >= stop - half.clamp(max=last))]
        if self.config.tied:
            pairs = [tuple(torch.cat(both, 1) for both in zip(*pairs, strict=True))]
        for k, (index, valid) in enumerate(pairs):
            index = index.clamp(0, y.shape[1] - 1)[..., None].expand(-1, -1, y.shape[-1])  # (n, tokens, d)
            h = y.gather(1, index)
            y = y.scatter_add(1, index, self.edit(h, k, torch.zeros_like(h)) * valid[..., None].to(y.dtype))
        return y


def orthonormal(p: Tensor) -> Tensor:
    """Orthonormal rows that span those of ``p`` (r, d), in float32 at least; ``p`` itself if its rows are orthonormal already."""
    Q, upper = torch.linalg.qr(p.to(torch.promote_types(p.dtype, torch.float32)).t())
    return (Q * upper.diagonal().sign()).t().to(p.dtype)


@contextmanager
def spans(model: nn.Module, stop: Tensor, *, start: Tensor | None = None) -> Iterator[None]:
    """Say which tokens of each row are its text, or its prompt, inside the block: ``start`` to ``stop``, (rows,), stop excluded.

    ReFT then counts its first and last tokens from there. Steps of generation with a cache see fewer tokens than that and
    are left alone, so that generating with and without a cache agree.

    Raises:
        NoMatch: no ReFT is on the model. ShapeMismatch: the bounds are not two vectors of one length, in order.
    """
    found = [module for module in model.modules() if isinstance(module, ReFTAdapter)]
    if not found:
        raise NoMatch(f"tt.spans says which tokens ReFT edits, and no ReFT is attached to this {type(model).__name__}")
    start = torch.zeros_like(stop) if start is None else start
    if stop.dim() != 1 or stop.shape != start.shape or bool((start >= stop).any()) or bool((start < 0).any()):
        raise ShapeMismatch(f"tt.spans takes two vectors of one length with 0 <= start < stop, found {start} and {stop}")
    with ExitStack() as stack:
        for owner in dict.fromkeys(adapter.owner for adapter in found):
            stack.enter_context(entered(owner, within(owner, spans=(start, stop, int(stop.max())))))
        yield
