"""A module's call seen from outside: its first input, its first output, and what it hands to adapters at other modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from trimtab.core.contracts import ActivationAdapter
from trimtab.core.errors import Unsupported
from trimtab.core.sublayers import SUBLAYERS

__all__ = ["first_of", "first_tensor", "handed", "replace_first", "replace_output"]


def handed(output: ActivationAdapter, fed: dict[str, tuple[Tensor, Any]], given: Tensor) -> Tensor:
    """The input of the module that ``output`` reads from; ``given`` is its own place's."""
    site = output.site
    kind = type(output.config).__name__
    if site.source_path not in fed:
        raise Unsupported(
            f"{kind} at {site.path} reads the input of {site.source_path}, which has not run before it in this forward; a block "
            "with its norms behind has no norm in front of a branch: let the adapter read the branch's own input there"
        )
    before, after = fed[site.source_path]
    if output.reads(output.config) == "residual" and site.role in SUBLAYERS and after is not given:
        raise Unsupported(
            f"{kind} at {site.path} reads the input of the norm in front of it, taken to be {site.source_path}, but {site.path} "
            "does not read that norm's output; let the adapter read the branch's own input"
        )
    return before


def first_of(args: tuple, kwargs: dict) -> Any:
    """The call's first input."""
    return args[0] if args else next(iter(kwargs.values()))


def replace_first(args: tuple, kwargs: dict, change: Callable[[Tensor], Tensor]) -> tuple[tuple, dict]:
    """The call's arguments with its first input changed."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    key = next(iter(kwargs))
    return args, {**kwargs, key: change(kwargs[key])}


def first_tensor(y: Any) -> Tensor:
    """A module's output, or its first tensor."""
    return y if isinstance(y, Tensor) else y[0] if isinstance(y, tuple | list) else next(iter(y.values()))


def replace_output(y: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A module's output with its first tensor changed: a tensor, a tuple, or a model output with named fields."""
    if isinstance(y, Tensor):
        return change(y)
    if isinstance(y, tuple | list):
        rest = (change(y[0]), *y[1:])
        return type(y)(*rest) if hasattr(y, "_fields") else type(y)(rest)
    key = next(iter(y.keys()))
    y[key] = change(y[key])
    return y
