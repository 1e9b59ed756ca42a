"""What peft writes beside an adapter's own layers: rows of tokens, biases, and LoRA on parameters instead of modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from trimtab.compat.peft_files import PREFIX
from trimtab.compat.peft_names import DELTA
from trimtab.core.contracts import Adapter, Selection
from trimtab.core.errors import Unsupported
from trimtab.core.site import gathered

__all__ = ["bank_tensors", "biases", "is_bank", "key_of", "row_tensors", "rows", "target_parameters"]

Fields = dict[str, Any]


def is_bank(adapter: Adapter) -> bool:
    """Whether it is a LoRA on a parameter that peft reaches by ``target_parameters``."""
    site = adapter.site
    plain = site.kind == "bare" and site.rows is None and not isinstance(site.module, nn.MultiheadAttention)
    return plain and len(site.shape) in (2, 3) and type(adapter.config).__name__ in ("LoRA", "RsLoRA")


def key_of(adapter: Adapter) -> str:
    """What peft's patterns call the place."""
    site = adapter.site
    return f"{site.path}.{site.tensor}" if site.kind == "bare" else site.path


def bank_tensors(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """The factors of banks under peft's names: one wrapper a parameter of a module, the first innermost."""
    tensors: dict[str, Tensor] = {}
    for adapter in adapters:
        site = adapter.site
        names = [n for n in site.module._parameters if any(a.site.path == site.path and a.site.tensor == n for a in adapters)]
        path = site.path + ".base_layer" * (len(names) - 1 - names.index(site.tensor))
        a, b = (gathered(value.detach()) for value in (adapter.a, adapter.b))
        if a.dim() == 3:  # (experts, r, in) and (experts, out, r)
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        tensors |= {f"{PREFIX}{path}.lora_A.weight": a, f"{PREFIX}{path}.lora_B.weight": b}
    return tensors


def target_parameters(root: nn.Module, adapters: Sequence[Adapter]) -> list[str]:
    """Names of the parameters: their last two words where these mean no other parameter, else whole."""
    every = [name for name, _ in root.named_parameters() if "trimtab" not in name.split(".")]
    names = [key_of(adapter) for adapter in adapters]
    short = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))
    meant = [name for name in every if any(name == s or name.endswith(f".{s}") for s in short)]
    return short if sorted(meant) == sorted(names) else names


def rows(adapters: Sequence[Adapter]) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """Module -> tokens, and module -> rows, of one end of each tie: peft lets the others follow by itself."""
    found: dict[int, Adapter] = {}
    for adapter in sorted(adapters, key=lambda a: a.site.kind == "linear"):  # the embedding before the head
        found.setdefault(id(adapter.value), adapter)
    tokens = {a.site.path: list(a.config.indices) for a in found.values()}
    return tokens, {a.site.path: gathered(a.value.detach()) for a in found.values()}


def row_tensors(values: dict[str, Tensor], *, alone: bool) -> dict[str, Tensor]:
    """Under peft's names, which differ where rows are all that there is."""
    between = "" if alone else ".token_adapter"
    return {f"{PREFIX}{path}{between}.{DELTA}": value for path, value in values.items()}


def biases(
    root: nn.Module, adapters: Sequence[Adapter], selections: Sequence[Selection], name: str
) -> tuple[str, dict[str, Tensor], list[Selection]]:
    """peft's word for the biases that learn, their tensors, and the selections that are left.

    Raises:
        Unsupported: some biases learn, and these are neither all of the model's nor those of the adapted layers.
    """
    whole = {s.site.path for s in selections if s.site.tensor != "bias"}
    mine = [s for s in selections if s.site.tensor == "bias" and s.site.path not in whole]
    rest = [s for s in selections if s not in mine]
    if not mine or not adapters:
        return "none", {}, list(selections)
    paths = {s.site.path for s in mine}
    has = {p for p, m in root.named_modules() if "trimtab" not in p.split(".") and m._parameters.get("bias") is not None}
    adapted = {a.site.path for a in adapters}
    word = "all" if paths == has else "lora_only" if paths == has & adapted else None
    if word is None:
        lacking = sorted((has & adapted) - paths) or sorted(paths - adapted)
        raise Unsupported(
            f"the adapter {name!r} trains the biases of {len(paths)} modules; peft stores whole modules, all biases of a model or "
            f"those of its adapted layers, and {lacking[0]} does not fit; save it in trimtab's own format"
        )
    tensors = {}
    for each in mine:
        inner = f"{each.site.path}.base_layer" if each.site.path in adapted else each.site.path
        tensors[f"{PREFIX}{inner}.bias"] = gathered(each.value.detach())
    return word, tensors, rest
