"""Transformers' attention modules ask a registry for their attention function, by a name in their config. A module with learned
keys and values reads another name there, whose function is ``attend`` around the one that the model was loaded with (eager,
sdpa, flash). The config itself stays as it is, and so does every other module.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from trimtab.core.errors import Unsupported
from trimtab.core.flows import listens
from trimtab.core.site import base_class
from trimtab.core.tokens import Call, Inserted, passages
from trimtab.core.tokens import attend as joined

__all__ = ["ATTRIBUTE", "asks_registry", "attend", "reachable", "redirected"]

NAME = "trimtab"
#: the attribute of an attention module that names its function
ATTRIBUTE = "config"


def _names(cls: type) -> tuple[str, ...]:
    return getattr(inspect.unwrap(cls.forward), "__code__", _names.__code__).co_names


def asks_registry(module: nn.Module) -> bool:
    """Whether an attention module takes its function from transformers' registry."""
    return "ALL_ATTENTION_FUNCTIONS" in _names(base_class(module))


def reachable(module: nn.Module) -> bool:
    """Whether learned keys and values can join in an attention module: by the registry, or at torch's own function."""
    return (
        isinstance(module, nn.MultiheadAttention)
        or asks_registry(module)
        or "scaled_dot_product_attention" in _names(base_class(module))
    )


class _Redirected:
    """A config whose attention function is ours, and which is the model's own in all else."""

    def __init__(self, config: Any):
        self.__dict__["_config"] = config

    def __getattr__(self, name: str) -> Any:
        return NAME if name == "_attn_implementation" else getattr(self.__dict__["_config"], name)


def redirected(module: nn.Module, config: Any) -> Any:
    """What ``module.config`` reads as: the config, or the redirected one while learned tokens act there."""
    if config is None or not listens(module._modules["trimtab"]):
        return config
    return _Redirected(config)


def register() -> None:
    """Put ``attend`` into transformers' registry; called when the first attention module that asks it is adapted."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    if NAME not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(NAME, attend)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: ``(n, heads, t, size)`` in, ``(n, t, heads, size)`` and weights out."""
    host = module._modules["trimtab"]
    name = module.__dict__[ATTRIBUTE]._attn_implementation or "eager"
    function = _function(module, name)
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise Unsupported(
            f"learned tokens at {host.path} do not join the attention {name!r}, whose mask is a {type(attention_mask).__name__}; "
            "load the model with attn_implementation='sdpa'"
        )
    causal = kwargs.pop("is_causal", None)
    causal = bool(getattr(module, "is_causal", False)) if causal is None else causal
    call = Call(
        query, key, value, attention_mask,
        # eager attention is causal by its mask alone; flash attention aligns the pattern with the last token
        causal=causal and attention_mask is None and query.shape[2] > 1 and name != "eager" and "flash" not in name,
        additive=name == "eager",
        scale=kwargs.get("scaling"),
        bare=name == "sdpa" and not kwargs.get("dropout") and kwargs.get("position_bias") is None,
    )  # fmt: skip
    bias = kwargs.pop("position_bias", None)
    inserted = sum(passage.count for passage in passages() if isinstance(passage, Inserted))
    if bias is not None and inserted and bias.shape[-1] == key.shape[2]:
        bias = bias[..., inserted:, inserted:]  # by distance: the sequence's own part is the same without the tokens in front

    def models(call: Call) -> tuple[Tensor, Tensor | None]:
        more = dict(kwargs)
        if bias is not None:
            more["position_bias"] = _fitted(bias, call)
        if "flash" in name:
            more["is_causal"] = causal
        elif name != "eager":
            more["is_causal"] = call.causal
        return function(module, call.query, call.key, call.value, call.mask, **more)

    return joined(host.path, host.extras(query.shape[0]), call, models, axis=1)


def _fitted(bias: Tensor, call: Call) -> Tensor:
    """A bias of the scores ``(1 or n, heads, t, s)``, zero for learned tokens in front."""
    from torch.nn.functional import pad

    rows = call.query.shape[-2] - bias.shape[-2] if bias.shape[-2] > 1 else 0
    return pad(bias, (call.key.shape[-2] - bias.shape[-1], 0, rows, 0))


def _function(module: nn.Module, name: str) -> Callable:
    """The function that the model was loaded with; its eager one stands in the file of the module's class."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    for cls in base_class(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise Unsupported(f"no attention function {name!r} was found for {type(module).__name__}; load with attn_implementation='sdpa'")
