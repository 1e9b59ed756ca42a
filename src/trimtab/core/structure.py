"""The bare structure of a model: its modules without adapters, what is a matrix or a norm, and which lists hold blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

__all__ = [
    "ATTENTION", "base_modules", "block_paths", "class_of", "container", "has_matrix", "is_matrix", "is_norm", "leaf", "owners",
    "qkv_role", "sizes",
]  # fmt: skip

_QKV = {
    "attn.qkv": r"c_attn|qkv|qkv_proj|wqkv|query_key_value|in_proj|attn_qkv|to_qkv|Wqkv",
    "attn.kv": r"kv|kv_proj|to_kv|c_kv|wkv",
    "attn.q": r"q|query|q_proj|to_q|wq|q_lin|query_proj|q_linear|query_layer|w_q",
    "attn.k": r"k|key|k_proj|to_k|wk|k_lin|key_proj|k_linear|key_layer|w_k",
    "attn.v": r"v|value|v_proj|to_v|wv|v_lin|value_proj|v_linear|value_layer|w_v",
}
_QKV_NAMES = {role: re.compile(pattern, re.IGNORECASE) for role, pattern in _QKV.items()}
ATTENTION = re.compile(r"attn|attention|(^|_)mha($|_)", re.IGNORECASE)
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


def leaf(path: str) -> str:
    return path.rpartition(".")[2]


def is_norm(path: str, module: nn.Module) -> bool:
    if "Norm" in class_of(module).__name__:
        return not has_matrix(module)  # a branch may be wrapped together with its norm (PreNorm)
    own = [p for p in module._parameters.values() if p is not None]
    return bool(own) and not module._modules and all(p.dim() == 1 for p in own) and bool(_NORM.search(leaf(path)))


def qkv_role(path: str, module: nn.Module) -> str | None:
    if not is_matrix(module):
        return None
    name = leaf(path)
    return next((role for role, pattern in _QKV_NAMES.items() if pattern.fullmatch(name)), None)


def container(path: str, block: str) -> str:
    """The outermost module below the block, on the way to ``path``, that is named as attention; else the direct parent."""
    names = path.split(".")
    start = len(block.split(".")) if block else 0
    for depth in range(start + 1, len(names)):
        if ATTENTION.search(names[depth - 1]):
            return ".".join(names[:depth])
    return ".".join(names[:-1])


def _candidates(modules: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Lists of modules that may be blocks: path of the list -> paths of its elements."""
    found = {}
    for path, module in modules.items():
        children = [c for c in module._modules.values() if c is not None]
        sequence = isinstance(module, nn.ModuleList) or (
            isinstance(module, nn.Sequential) and len({class_of(c) for c in children}) == 1
        )
        if not sequence or not children:
            continue
        if all(any(True for _ in c.children()) and has_matrix(c) for c in children):
            found[path] = [f"{path}.{name}" if path else name for name, c in module._modules.items() if c is not None]
    # a list of different things inside an element of another list is that element's make-up (T5), not blocks
    mixed = [p for p in found if len({class_of(modules[e]) for e in found[p]}) > 1]
    elements = [e for listed in found.values() for e in listed]
    for path in mixed:
        if any(path.startswith(f"{element}.") for element in elements):
            del found[path]
    return found


def class_of(module: nn.Module) -> type:
    return getattr(type(module), "_trimtab_base", type(module))


def has_matrix(module: nn.Module) -> bool:
    return any(is_matrix(m) or isinstance(m, (nn.MultiheadAttention, nn.modules.conv._ConvNd)) for m in module.modules())


def block_paths(modules: dict[str, nn.Module]) -> Iterator[str]:
    """The outermost lists whose elements have attention (or else a norm) of their own, outside lists nested in them."""
    candidates = _candidates(modules)
    for test in (_has_own_attention, _has_own_norm):
        chosen: list[str] = []
        for elements in candidates.values():
            inside = any(element.startswith(f"{done}.") for done in chosen for element in elements)
            if not inside and any(test(element, candidates, modules) for element in elements):
                chosen += elements
        if chosen:
            position = {path: i for i, path in enumerate(modules)}
            yield from sorted(chosen, key=position.__getitem__)
            return


def _own(element: str, candidates: dict[str, list[str]], modules: dict[str, nn.Module]) -> Iterator[str]:
    """Paths below ``element`` that no nested list covers."""
    nested = [p for p in candidates if p.startswith(f"{element}.")]
    for path in modules:
        if path.startswith(f"{element}.") and not any(path == n or path.startswith(f"{n}.") for n in nested):
            yield path


def _has_own_attention(element: str, candidates: dict[str, list[str]], modules: dict[str, nn.Module]) -> bool:
    return any(isinstance(modules[p], nn.MultiheadAttention) or qkv_role(p, modules[p]) for p in _own(element, candidates, modules))


def _has_own_norm(element: str, candidates: dict[str, list[str]], modules: dict[str, nn.Module]) -> bool:
    return any(is_norm(p, modules[p]) for p in _own(element, candidates, modules))


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
