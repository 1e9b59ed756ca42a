"""nn.MultiheadAttention with the keys and values of learned tokens: its own forward, written out, around ``attend``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.errors import Unsupported
from trimtab.core.tokens import Call, attend

if TYPE_CHECKING:
    from trimtab.core.host import Host

__all__ = ["attention"]


def attention(
    host: Host,
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What ``module`` gives, ``(n, t, width)`` (or its own layout) and weights ``(n, t, s)``, with the extras of ``host``.

    Raises:
        Unsupported: an input without a batch axis, or learned biases of keys and values.
    """
    if query.dim() != 3 or module.bias_k is not None or module.add_zero_attn:
        raise Unsupported(f"learned tokens at {host.path} need a batch, and no add_bias_kv or add_zero_attn")
    if not module.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    q, k, v = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in _projected(module, query, key, value))
    call = Call(q, k, v, _visible(module, key_padding_mask, attn_mask, q), additive=need_weights)
    dropout = module.dropout if module.training else 0.0

    def torchs(call: Call) -> tuple[Tensor, Tensor | None]:
        if not need_weights:
            return F.scaled_dot_product_attention(call.query, call.key, call.value, call.mask, dropout), None
        scores = call.query @ call.key.transpose(-1, -2) * call.query.shape[-1] ** -0.5
        weights = (scores if call.mask is None else scores + call.mask).softmax(-1)
        return F.dropout(weights, dropout) @ call.value, weights

    out, weights = attend(host.path, host.extras(q.shape[0]), call, torchs, axis=-2)
    out = F.linear(out.transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias)
    if weights is not None and average_attn_weights:
        weights = weights.mean(1)
    return out if module.batch_first else out.transpose(0, 1), weights


def _projected(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Queries, keys and values, ``(n, t, width)`` each."""
    biases = module.in_proj_bias.chunk(3) if module.in_proj_bias is not None else (None,) * 3
    if module._qkv_same_embed_dim:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]


def _visible(module: nn.MultiheadAttention, padding: Tensor | None, mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The masks as one additive mask ``(1 or n, 1 or heads, 1 or t, s)``; in this module True means hidden."""
    found = None
    if mask is not None:
        mask = mask if mask.dim() == 2 else mask.unflatten(0, (-1, module.num_heads))
        found = _hidden(mask.view((1,) * (4 - mask.dim()) + mask.shape), q.dtype)
    if padding is not None:
        columns = _hidden(padding[:, None, None, :], q.dtype)
        found = columns if found is None else found + columns
    return found


def _hidden(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
