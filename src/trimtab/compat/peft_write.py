"""The writing half of ``peft.py``: an adapter as peft's own form of the method, or as an exact LoRA, or not at all."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.compat.peft_beside import bank_tensors, biases, is_bank, key_of, row_tensors, rows, target_parameters
from trimtab.compat.peft_files import NORM_COPY, NORMS, PREFIX, targeted, write_folder
from trimtab.compat.peft_prompts import write_prompts
from trimtab.compat.peft_table import Twin, layer_of
from trimtab.compat.peft_twins import LORA, TWINS
from trimtab.core import fingerprint
from trimtab.core.contracts import Adapter, Reparameterization, Selection
from trimtab.core.errors import TrimtabError, Unsupported, raise_all
from trimtab.core.site import Site, gathered
from trimtab.core.state import adapter_group, state_of

__all__ = ["write"]


class _Form(NamedTuple):
    """A config's own fields, and tensors by peft's full names."""

    twin: Twin
    fields: dict[str, Any]
    tensors: dict[str, Tensor]


def write(root: nn.Module, path: Path, name: str, base_name: str | None = None) -> Path:
    """Write the adapter ``name`` of ``root`` to the folder ``path``; see ``PeftFolder.save``."""
    base_name = base_name or _name_of(root)
    adapters = adapter_group(state_of(root), name).adapters
    base = fingerprint.take(root, adapters)
    tokens = [a for a in adapters if type(a.config).__name__ == "TokenRows"]
    rest = [a for a in adapters if not isinstance(a, Selection) and a not in tokens]
    word, beside, selections = biases(root, rest, [a for a in adapters if isinstance(a, Selection)], name)
    copies = [a for a in selections if getattr(a.config, "beneath", False)]
    saved, whole = _saved_modules([a for a in selections if a not in copies])
    if not rest and not tokens and all(type(a.config).__name__ == "NormTuning" for a in adapters):
        paths = sorted({a.site.path for a in adapters})
        norms = {f"{k.rpartition('.')[0]}.{NORM_COPY}.{k.rpartition('.')[2]}": v for k, v in whole.items()}
        own = {"peft_type": NORMS, "modules_to_save": None}
        return write_folder(path, _common(root, paths, base_name) | own, norms, base=base)
    if not rest and tokens and not selections:
        config, tensors = _rows_alone(root, tokens, name, base_name)
        return write_folder(path, config, tensors, base=base)
    if not rest:
        raise Unsupported(
            f"the adapter {name!r} only replaces parameters of the base, for which peft has no adapter type; "
            "save it in trimtab's own format, or tt.merge it and save the base"
        )
    prompts = write_prompts(root, rest, name) if not selections and not tokens and not beside else None
    if prompts is not None:
        own, tensors = prompts
        common = {key: value for key, value in _common(root, [], base_name).items() if key != "target_modules"}
        return write_folder(path, common | own, tensors, base=base)
    form = _native(rest) or _low_rank(rest, name)
    order = {p: i for i, (p, _) in enumerate(root.named_modules())}
    paths = sorted({a.site.path for a in rest if not is_bank(a)}, key=order.__getitem__)
    config = {
        **_common(root, paths, base_name),
        "peft_type": form.twin.peft_type,
        "modules_to_save": _whole_names(root, saved) or None,
        **form.fields,
        **_besides(root, form, rest, tokens, word, name),
    }
    if any(layer_of(a.site) == "Conv1D" for a in rest):
        config["fan_in_fan_out"] = True
    adapted = {a.site.path for a in rest}
    for each in copies:  # peft loads it into the base
        value = each.site.unmatrix(gathered(each.value.detach())).reshape(each.site.parameter().shape)
        beside[f"{PREFIX}{each.site.path}{'.base_layer' * (each.site.path in adapted)}.{each.site.tensor}"] = value
    beside |= row_tensors(rows(tokens)[1], alone=False)
    return write_folder(path, config, form.tensors | whole | beside, base=base)


def _besides(
    root: nn.Module, form: _Form, adapters: list[Adapter], tokens: list[Adapter], word: str, name: str
) -> dict[str, Any]:
    """Fields for what stands beside the layers, all of which peft has in its LoRA alone."""
    banks = [a for a in adapters if is_bank(a)]
    found: dict[str, Any] = {"bias": word} if word != "none" else {}
    if banks:
        found["target_parameters"] = target_parameters(root, banks)
    if tokens:
        found["trainable_token_indices"] = rows(tokens)[0]
    if found and form.twin is not LORA:
        raise Unsupported(
            f"the adapter {name!r} has {' and '.join(found)} beside {form.twin.peft_type}, which peft offers beside LoRA alone; "
            "save it in trimtab's own format"
        )
    if banks and form.fields.get("lora_dropout"):
        raise Unsupported(f"peft's LoRA on parameters takes no dropout, and {name!r} has one; save it in trimtab's own format")
    return found


def _rows_alone(
    root: nn.Module, tokens: list[Adapter], name: str, base_name: str | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of rows of tokens without anything else."""
    named, values = rows(tokens)
    if len(named) > 1:
        raise Unsupported(f"the adapter {name!r} has rows of {len(named)} tables, of which peft takes one alone; add a LoRA to it")
    own = {"peft_type": "TRAINABLE_TOKENS", "token_indices": next(iter(named.values()))}
    return _common(root, list(named), base_name) | own, row_tensors(values, alone=True)


def _common(root: nn.Module, paths: list[str], base_name: str | None) -> dict[str, Any]:
    """Fields of every config."""
    return {
        "task_type": _task(root),
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "target_modules": _targets(root, paths),
    }


def _name_of(root: nn.Module) -> str | None:
    """The base's name, by which peft's auto classes and servers find it; asked for where the model has none."""
    found = getattr(getattr(root, "config", None), "_name_or_path", None) or None
    if found is None:
        warnings.warn(
            f"this {type(root).__name__} has no name, so that the folder says base_model_name_or_path=null: peft's auto classes "
            'and servers cannot find its base; say it with base_name="..." (--base-name)',
            stacklevel=5,
        )
    return found


def _task(root: nn.Module) -> str | None:
    causal = type(root).__name__.endswith(("ForCausalLM", "LMHeadModel")) and hasattr(root, "prepare_inputs_for_generation")
    return "CAUSAL_LM" if causal else None


def _targets(root: nn.Module, paths: list[str]) -> list[str] | str:
    """The modules' paths, or a regular expression where peft would take a path as the end of another one too."""
    names = {"target_modules": frozenset(paths)}
    hit = {p for p, _ in root.named_modules() if "trimtab" not in p.split(".") and targeted(names, p)}
    return paths if hit == set(paths) else "|".join(map(re.escape, paths))


def _whole_names(root: nn.Module, paths: list[str]) -> list[str]:
    """``modules_to_save``; peft takes every path that ends in one of them.

    Raises:
        Unsupported: it would take another module too.
    """
    every = [p for p, _ in root.named_modules() if "trimtab" not in p.split(".")]
    raise_all([
        Unsupported(f"peft would store {other} too, whose path ends like that of {path}; save in trimtab's own format")
        for path in paths for other in every if other.endswith(path) and other not in paths
    ])  # fmt: skip
    return paths


def _native(adapters: list[Adapter]) -> _Form | None:
    """peft's own form of the method, if it has one and can express all places."""
    methods = {type(a.config).__name__ for a in adapters}
    twin = next((t for t in TWINS.values() if methods <= set(t.methods)), None)
    banks = [a for a in adapters if is_bank(a)]
    layers = [a for a in adapters if a not in banks]
    if twin is None or any(a.site.rows is not None or a.resized for a in adapters):
        return None
    if any(layer_of(a.site) not in twin.layers for a in layers):
        return None
    each = {key_of(a): twin.write(a.config) for a in adapters}
    common = twin.pack_common(adapters)
    if common is None or None in each.values():
        return None
    fields = _spread(twin, each)
    if fields is None:
        return None
    rules = {rule.ours: rule for rule in twin.tensors}
    tensors = dict(common)
    tensors |= bank_tensors(banks)
    for adapter in layers:
        stored = {rules[key].name(adapter.site): _shaped(rules[key], adapter.site, v) for key, v in adapter.state_dict().items()}
        for key, value in twin.pack(stored, fields, adapter).items():
            tensors[f"{PREFIX}{adapter.site.path}.{key}"] = value
    return _Form(twin, fields | twin.gather(adapters), tensors)


def _shaped(rule: Any, site: Site, value: Tensor) -> Tensor:
    value = gathered(value.detach())
    return value.reshape(rule.shape(site, tuple(value.shape)))


def _spread(twin: Twin, each: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """One config for all places: a field's value, with a pattern where places differ; None if they cannot."""
    config: dict[str, Any] = {}
    for key in next(iter(each.values())):
        values = {path: fields[key] for path, fields in each.items()}
        config[key] = Counter(values.values()).most_common(1)[0][0]
        odd = {path: value for path, value in values.items() if value != config[key]}
        if odd and key not in twin.patterns:
            return None
        if odd:
            config[twin.patterns[key]] = odd
    for exact in (False, True):  # a path that is the end of another one needs a pattern that says where it starts
        if exact:
            for patterns in twin.patterns.values():
                config |= {patterns: {f"^{re.escape(p)}": v for p, v in config.get(patterns, {}).items()}}
        read = {path: twin.at(config, path) for path in each}
        if all(read[path][key] == fields[key] for path, fields in each.items() for key in twin.patterns):
            return config
    return None


def _low_rank(adapters: list[Adapter], name: str) -> _Form:
    """An exact LoRA of every place's factors, scale 1.

    Raises:
        Unsupported: a place has none, or no LoRA layer of peft's computes the same.
    """
    problems: list[TrimtabError] = []
    parts: dict[str, tuple[Site, list[Tensor], list[Tensor]]] = {}
    for adapter in adapters:
        site = adapter.site
        factors = adapter.factors() if isinstance(adapter, Reparameterization) else None
        if factors is None or layer_of(site) not in LORA.layers:
            reason = "its update has no exact low-rank form" if factors is None else "peft has no LoRA there that computes the same"
            problems.append(
                Unsupported(
                    f"{site.name} of the adapter {name!r} ({adapter.config} on {layer_of(site)}) cannot be written for peft: "
                    f"peft has no layer of its own for it as it is, and {reason}; save it in trimtab's own format, or tt.merge it "
                    "and save the base"
                )
            )
            continue
        b, a = (gathered(v.detach()) for v in factors)
        if site.rows is not None:
            total = getattr(site.module, "out_features", None) or site.matrix(site.parameter()).shape[-2]
            b = site.put(b.new_zeros(total, b.shape[1]), b)
        parts.setdefault(site.path, (site, [], []))
        parts[site.path][1].append(b)
        parts[site.path][2].append(a)
    raise_all(problems)
    rules = {rule.ours: rule for rule in LORA.tensors}
    each, tensors = {}, {}
    for path, (site, bs, as_) in parts.items():
        b, a = torch.cat(bs, dim=1), torch.cat(as_)
        if not a.shape[0]:  # all ranks were cut: peft knows no rank of 0
            b, a = b.new_zeros(b.shape[0], 1), a.new_zeros(1, a.shape[1])
        each[path] = {
            "r": a.shape[0], "lora_alpha": a.shape[0], "lora_dropout": 0.0, "init_lora_weights": True,
            "use_rslora": False, "use_dora": False, "bias": "none",
        }  # fmt: skip
        for key, value in (("a", a), ("b", b)):
            tensors[f"{PREFIX}{path}.{rules[key].name(site)}"] = _shaped(rules[key], site, value)
    fields = _spread(LORA, each)
    if fields is None:
        raise Unsupported(f"the ranks of the adapter {name!r} cannot be told apart by peft's patterns; use one rank")
    return _Form(LORA, fields, tensors)


def _saved_modules(selections: list[Selection]) -> tuple[list[str], dict[str, Tensor]]:
    """``modules_to_save`` and their tensors, for selections that together replace whole modules.

    Raises:
        Unsupported: a module of which other parameters stay the base's, which peft would store too.
    """
    modules: dict[str, dict[str, Selection]] = {}
    problems: list[TrimtabError] = []
    for adapter in selections:
        modules.setdefault(adapter.site.path, {})[adapter.site.slot] = adapter
    tensors = {}
    for path, found in modules.items():
        module = next(iter(found.values())).site.module
        needed = [t for t, v in module._parameters.items() if v is not None]
        if set(found) != set(needed) or any(c for n, c in module._modules.items() if n != "trimtab"):
            lacking = sorted(set(needed) - set(found)) or ["what lies below it"]
            problems.append(
                Unsupported(
                    f"peft stores whole modules, and of {path} {', '.join(lacking)} stay the base's; unfreeze the whole module, "
                    "or save the adapter in trimtab's own format"
                )
            )
            continue
        for tensor, adapter in found.items():
            value = gathered(adapter.value.detach())
            tensors[f"{PREFIX}{path}.{tensor}"] = adapter.site.unmatrix(value).reshape(adapter.site.parameter().shape)
    raise_all(problems)
    return list(modules), tensors
