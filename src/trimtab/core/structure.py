"""The bare structure of a model: its modules without adapters, what is a matrix or a norm, and what stands in which block."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from trimtab.core.naming import ATTENTION, ATTENTION_CLASS, attention_role, leaf

__all__ = ["base_modules", "class_of", "container", "has_matrix", "is_matrix", "is_norm", "leaf", "named_by", "owners", "qkv_role",
           "sizes"]  # fmt: skip

_GENERIC = re.compile(r"\d+|linear|dense|layer|proj|projection|lin|fc|module|net|op", re.IGNORECASE)
_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)", re.IGNORECASE)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, by structure: weight (in, out) and the attribute ``nf``."""
    return hasattr(module, "nf") and getattr(module, "weight", None) is not None and not isinstance(module, nn.Linear)


def is_matrix(module: nn.Module) -> bool:
    """Linear-like: Linear and subclasses, quantised linears, Conv1D."""
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return True
    return hasattr(module, "in_features") and hasattr(module, "out_features") and "weight" in module._parameters


def sizes(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear-like module."""
    if is_conv1d(module):
        return module.weight.shape[1], module.weight.shape[0]
    return module.out_features, module.in_features


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules but adapters, each once, by path."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        found[path] = module
        for name, child in module._modules.items():
            if child is not None and name != "trimtab":
                walk(f"{path}.{name}" if path else name, child)

    walk("", model)
    return found


def is_norm(path: str, module: nn.Module) -> bool:
    if "Norm" in class_of(module).__name__:
        return not has_matrix(module)  # a branch may be wrapped together with its norm (PreNorm)
    own = [p for p in module._parameters.values() if p is not None]
    return bool(own) and not module._modules and all(p.dim() == 1 for p in own) and bool(_NORM.search(leaf(path)))


def qkv_role(path: str, module: nn.Module) -> str | None:
    """``attn.q``, ``attn.kv``, ... of a matrix whose name says so."""
    role = attention_role(leaf(path)) if is_matrix(module) else None
    return "attn.qkv" if role == "weak_qkv" else role


def named_by(path: str, block: str, modules: Mapping[str, nn.Module]) -> str:
    """The path whose last part names a matrix: its own, or that of a module which holds nothing else (``q_proj.linear``)."""
    while _GENERIC.fullmatch(leaf(path)):
        parent = path.rpartition(".")[0]
        if not parent or len(parent) <= len(block) or sum(map(is_matrix, modules[parent].modules())) > 1:
            break
        path = parent
    return path


def container(path: str, block: str, modules: Mapping[str, nn.Module]) -> str:
    """The outermost of ``modules`` below the block, on the way to ``path``, that is called attention; else the direct parent."""
    names = path.split(".")
    start = len(block.split(".")) if block else 0
    for depth in range(start + 1, len(names)):
        around = ".".join(names[:depth])
        if around in modules and (ATTENTION.search(names[depth - 1]) or ATTENTION_CLASS.search(class_of(modules[around]).__name__)):
            return around
    return ".".join(names[:-1])


def class_of(module: nn.Module) -> type:
    return getattr(type(module), "_trimtab_base", type(module))


def has_matrix(module: nn.Module) -> bool:
    return any(is_matrix(m) or isinstance(m, (nn.MultiheadAttention, nn.modules.conv._ConvNd)) for m in module.modules())


def owners(modules: dict[str, nn.Module], blocks: tuple[str, ...]) -> dict[str, int]:
    index = {block: i for i, block in enumerate(blocks)}
    owner = {}
    for path in modules:
        names = path.split(".")
        for depth in range(len(names), 0, -1):
            found = index.get(".".join(names[:depth]))
            if found is not None:
                owner[path] = found
                break
    return owner
