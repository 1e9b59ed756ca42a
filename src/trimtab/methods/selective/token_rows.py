"""TokenRows: the embedding rows of a few tokens learn, all others stay.

``E'[t] = value_j`` for the j-th of the given tokens t, ``E'[t] = E[t]`` for all others; E (entries, width) is the embedding's
table, ``value`` (k, width) starts at its rows. Where the output head is tied to the embedding, one ``value`` serves both; an untied
head is a place of its own. Values are stored, not differences: rows that a vocabulary has grown by are drawn anew in every process.
Source: peft's "trainable tokens". Trainable: ``k * width``. Saved for backward: ids at the embedding, ``x`` at the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trimtab.core.contracts import MethodConfig, Reparameterization, Span
from trimtab.core.errors import ShapeMismatch, Unsupported
from trimtab.core.registry import method
from trimtab.core.site import Operation, Site
from trimtab.kernels.mode import fused

__all__ = ["TokenRows", "TokenRowsAdapter"]


@dataclass(frozen=True)
class TokenRows(MethodConfig):
    """The rows of a few tokens, new or old, beside any other method: kilobytes where the whole embedding has hundreds of megabytes.

    For tokens that were added to the vocabulary, after ``model.resize_token_embeddings(...)``::

        ids = [tokenizer.convert_tokens_to_ids(t) for t in new_tokens]
        tt.attach(model, tt.LoRA(rank=8), name="task")
        tt.attach(model, tt.TokenRows(ids), name="task")

    Untied models learn the input's rows; ``targets="embedding | head"`` learns those of the head too, with values of their own.
    Not for most of a vocabulary: there ``tt.LoRA`` on the embedding, or ``tt.Unfreeze``.

    Args:
        indices: ids of the tokens, each once; a list, a range or a tensor will do.
    """

    learning_rate = Span(1e-4, 1e-2, log=True)

    indices: tuple[int, ...] | range | Tensor = ()  # kept as a tuple

    def __post_init__(self) -> None:
        ids = tuple(self.indices.flatten().tolist() if isinstance(self.indices, Tensor) else self.indices)
        self.require(
            all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids),
            f"indices must be token ids of at least 0, found {self.indices!r}",
        )
        twice = sorted({i for i in ids if ids.count(i) > 1}) if len(set(ids)) < len(ids) else []
        self.require(not twice, f"indices names a token twice: {', '.join(map(str, twice[:5]))}")
        object.__setattr__(self, "indices", ids)


@method(TokenRows, paper="https://huggingface.co/docs/peft/package_reference/trainable_tokens", tests=({"indices": (0, 3, 2)},))
class TokenRowsAdapter(Reparameterization):
    """``value`` (k, width), shared by all ends of a tie."""

    targets = "embedding"
    kinds = frozenset({"linear", "embedding", "bare"})
    fast = frozenset({"linear", "embedding"})
    needs_weight = False
    additive = False
    whole_ties = True

    def __init__(self, config: TokenRows, site: Site, *, rng: torch.Generator):
        super().__init__(config, site)
        self.rebuild()
        self.value = site.cohort.share(("TokenRows", id(site.parameter()), site.is_meta), self._start)

    @classmethod
    def layer(cls, config: TokenRows) -> str:
        """It may stand beside another method of the same name on the same table."""
        return "rows"

    @classmethod
    def check(cls, config: TokenRows, site: Site) -> None:
        if site.rows is not None or len(site.shape) != 2:
            raise Unsupported(f"{site.name} is no table with a row a token; target the embedding or the head")
        if not config.indices:
            raise Unsupported("TokenRows() names no tokens; say which rows learn: tt.TokenRows([32000, 32001])")
        entries = site.shape[1] if site.kind == "embedding" else site.shape[0]
        outside = [i for i in config.indices if i >= entries]
        if outside:
            raise ShapeMismatch(
                f"{site.name} has {entries} rows, and TokenRows names {', '.join(map(str, outside[:5]))}; "
                "grow the vocabulary first: model.resize_token_embeddings(...)"
            )
        if getattr(site.module, "max_norm", None) is not None:
            raise Unsupported(f"{site.name} renormalises its rows (max_norm), which writes the base's own")

    def rebuild(self) -> None:
        """The tokens' ids (k,), and for every entry of the table its number among them, or -1."""
        site = self.site
        index = torch.tensor(self.config.indices, dtype=torch.int64)
        number = torch.full((site.shape[self._axis],), -1, dtype=torch.int32)
        number[index] = torch.arange(len(index), dtype=torch.int32)
        self.register_buffer("index", index.to(site.device), persistent=False)
        self.register_buffer("number", number.to(site.device), persistent=False)

    @property
    def _axis(self) -> int:
        """The axis of the matrix that tokens stand on."""
        return 1 if self.site.kind == "embedding" else 0

    def _start(self) -> nn.Parameter:
        site = self.site
        width = site.shape[1 - self._axis]
        if site.is_meta:
            return self.zeros(len(self.config.indices), width)
        rows = site.weight.detach().index_select(self._axis, self.index.to(site.device))
        return self.parameter(rows.t() if self._axis else rows)

    def replaces(self, where: Tensor) -> Tensor:
        """Those of its rows."""
        across = getattr(self.site, "transposed", False) and self.site.kind == "linear"
        token = where % self.site.shape[0] if across else where // self.site.shape[1 - self._axis]
        return torch.isin(token, torch.tensor(self.config.indices))

    def weight(self, W: Tensor) -> Tensor:
        value = self.value.to(W.dtype)
        return W.index_copy(self._axis, self.index, value.t() if self._axis else value)

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        return self._looked_up(x, base) if base.kind == "embedding" else self._scored(x, base)

    def _looked_up(self, x: Tensor, base: Operation) -> Tensor:
        """At the embedding: ids (...) -> (..., width)."""
        module = self.site.module
        if module.scale_grad_by_freq:
            return self.derived(x, base)
        y = base(x)
        number = self.number[x].long()
        pad = self.config.indices.index(module.padding_idx) if module.padding_idx in self.config.indices else None
        own = F.embedding(number.clamp(min=0), self.value.to(y.dtype), pad)
        return torch.where((number >= 0).unsqueeze(-1), own, y)

    def _scored(self, x: Tensor, base: Operation) -> Tensor:
        """At the head: (..., width) -> (..., entries)."""
        y, own = base(x), base.project(x, self.value)
        if base.bias is not None:
            own = own + base.bias[self.index].to(own.dtype)
        own = own.to(y.dtype)
        if not fused(y, own):
            return y.index_copy(-1, self.index, own)
        # in place on what the base has just made: the scores of a whole vocabulary are large
        return _Columns.apply(y if base is self.site and y._base is None else y.clone(), own, self.index)


class _Columns(torch.autograd.Function):
    """``y`` with the columns ``index`` replaced by ``own``, in place; torch's own operation keeps ``own`` for backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, own: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.mark_dirty(y)
        return y.index_copy_(-1, index, own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return dy.index_fill(-1, index, 0.0), dy.index_select(-1, index), None
