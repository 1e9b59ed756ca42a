"""Roles against what the models do: their attentions run, and autograd says which projection becomes queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sweep.tiny_models import Built, run
from trimtab.core import anatomy
from trimtab.core.structure import is_matrix

__all__ = ["violations"]

#: what of an attention function's arguments a role's output may reach
REACHES = {"attn.q": "q", "attn.k": "k", "attn.v": "v", "attn.kv": "kv", "attn.qkv": "qkv", "attn.qk": "qk"}
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


class _Watch(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.leaves: dict[str, Tensor] = {}
        self.seen: set[tuple[str, str]] = set()

    def hook(self, path: str) -> Callable:
        def cut(module: torch.nn.Module, args: tuple, output: Any) -> Any:
            if not isinstance(output, Tensor):  # a quantised layer gives its scale, too
                return output
            self.leaves[path] = output.detach().requires_grad_()
            return self.leaves[path] * 1.0

        return cut

    def note(self, part: str, tensor: Tensor) -> None:
        """Which projections ``tensor`` is made of."""
        if tensor.requires_grad and self.leaves:
            total = torch.where(tensor.isfinite(), tensor, torch.zeros_like(tensor)).sum()
            found = torch.autograd.grad(total, list(self.leaves.values()), retain_graph=True, allow_unused=True)
            self.seen |= {(path, part) for path, grad in zip(self.leaves, found, strict=True) if grad is not None}

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = [*args, *(kwargs[n] for n in ("query", "key", "value")[len(args) :])]
            for part, tensor in zip("qkv", given[:3], strict=True):
                self.note(part, tensor)
        elif func in _SOFTMAX:
            self.note("s", args[0] if args else kwargs["input"])
        return func(*args, **kwargs)


def _cut(module: torch.nn.Module, args: tuple, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    return tuple(_cut(module, args, each) for each in output) if type(output) is tuple else output


def violations(built: Built) -> tuple[int, list[str]]:
    """How many projections were seen in an attention function or a softmax, and a sentence for each whose role does not fit."""
    found = anatomy.of(built.model)
    chosen = {p: r for p, r in found.roles.items() if r in REACHES and is_matrix(found.modules[p])}
    watch = _Watch()
    hooks = [found.modules[path].register_forward_hook(watch.hook(path)) for path in chosen]
    outputs = [m for p, m in found.modules.items() if found.roles.get(p) == "attn.o" or p in found.blocks]
    hooks += [module.register_forward_hook(_cut) for module in outputs]  # one attention at a time
    try:
        with torch.enable_grad(), watch:
            run(built.model, built.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    wrong = [
        f"{path} is {chosen[path]} and becomes part of the {'scores' if part == 's' else part}"
        for path, part in sorted(watch.seen)
        if (part == "s" and chosen[path] == "attn.v") or (part != "s" and part not in REACHES[chosen[path]])
    ]
    return len({path for path, _ in watch.seen}), wrong
