"""Tied tensors of transformers models: which flags of a config tie them, and what must have values of its own once a tie is cut.

There are two ways to say that tensors are no longer tied. Where the flag only ties (most models), it is turned off. Where it does
more (T5's family scales its output by it, or sets it again whatever is stored), it stays, and transformers leaves tensors alone
that a checkpoint holds both, with different values.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from trimtab.core.errors import NotMergeable, TrimtabError
from trimtab.core.site import Site, base_class
from trimtab.core.state import parameter_users

__all__ = ["FLAG", "called", "flag_paths", "flags", "free", "never_called", "refresh", "separable", "tied_pairs", "twin"]

FLAG = "tie_word_embeddings"


#: path of a transformers model -> the (target, source) pairs that its config ties
Pairs = dict[str, list[tuple[str, str]]]


def _tops(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost transformers models in ``root``, by path; ``root`` itself if it is one."""
    tops: list[str] = []
    for path, module in root.named_modules():
        inside = any(not top or path.startswith(f"{top}.") for top in tops)
        if not inside and hasattr(module, "get_expanded_tied_weights_keys") and hasattr(module, "config"):
            tops.append(path)
            yield path, module


def tied_pairs(root: nn.Module) -> Pairs:
    """The ties that the configs in ``root`` ask for now, told by models of shapes alone: adapters would confuse the tables."""
    found: Pairs = {}
    for top, model in _tops(root):
        for path, module in twin(model, model.config).named_modules():
            if hasattr(module, "get_expanded_tied_weights_keys"):
                whole = ".".join(filter(None, (top, path)))
                under = f"{whole}." if whole else ""
                pairs = module.get_expanded_tied_weights_keys(all_submodels=False)
                found[whole] = [(under + target, under + source) for target, source in pairs.items()]
    return found


def flags(root: nn.Module, names: Iterable[str]) -> list[Any]:
    """The configs in ``root`` whose flag ties one of ``names``, and those that hold the same flag where it is saved.

    A part of a model may work with a copy of the config that is saved: both are named.
    """
    wanted = set(names)
    asking = [root.get_submodule(path).config for path, pairs in tied_pairs(root).items() if any(wanted & {*p} for p in pairs)]
    known = [config for _, config in _config_tree(root)]
    kept = [k for config in asking for k in known if k is config or type(k) is type(config)]
    return list({id(config): config for config in [*asking, *kept] if getattr(config, FLAG, False)}.values())


def _config_tree(root: nn.Module) -> list[tuple[tuple[str, ...], Any]]:
    """The configs that are saved with ``root``: (path of keys, config)."""
    config = getattr(root, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return []
    found: list[tuple[tuple[str, ...], Any]] = [((), config)]
    for path, each in found:
        for key in getattr(each, "sub_configs", None) or ():
            below = getattr(each, key, None)
            if below is not None and hasattr(below, "to_dict"):
                found.append(((*path, key), below))
    return found


def flag_paths(root: nn.Module, configs: Iterable[Any]) -> list[tuple[str, ...]]:
    """Where those of ``configs`` that are saved with ``root`` stand in its ``config.json``."""
    wanted = {id(config) for config in configs}
    return [path for path, config in _config_tree(root) if id(config) in wanted]


def refresh(root: nn.Module) -> None:
    """Let the transformers models in ``root`` read their configs' flags again."""
    for _, model in _tops(root):
        for path, module in twin(model, model.config).named_modules():
            if "all_tied_weights_keys" in module.__dict__:
                model.get_submodule(path).all_tied_weights_keys = dict(module.all_tied_weights_keys)


def separable(root: nn.Module, paths: Iterable[tuple[str, ...]], stored: dict[str, Any] | None = None) -> bool:
    """Whether turning off the flags at ``paths`` of the config of ``root`` unties tensors and does nothing else.

    That is so if it is still off when the config is read again, nothing else in the config follows it, and no forward asks for it.

    Args:
        stored: ``config.json``; None: what the config would be saved as.
    """
    paths = list(paths)
    if not paths or _forwards_ask(root):
        return False
    made = type(root.config)
    before = json.loads(json.dumps(root.config.to_dict() if stored is None else stored, default=str))
    after = copy.deepcopy(before)
    for path in paths:
        _below(after, path)[FLAG] = False
    before, after = (made.from_dict(each).to_dict() for each in (before, after))
    off = [_below(each, path).pop(FLAG, None) for each in (before, after) for path in paths][len(paths) :]
    return not any(off) and before == after


def _below(content: dict[str, Any], path: Iterable[str]) -> dict[str, Any]:
    for key in path:
        content = content.setdefault(key, {})
    return content


def _forwards_ask(root: nn.Module) -> bool:
    """Whether the code of a forward in ``root`` names the flag."""
    found = {inspect.unwrap(base_class(module).forward) for module in root.modules()}
    codes = [function.__code__ for function in found if hasattr(function, "__code__")]
    for code in codes:
        codes += [each for each in code.co_consts if hasattr(each, "co_names")]
    return any(FLAG in code.co_names for code in codes)


def free(root: nn.Module, before: Pairs) -> list[str]:
    """Names that were tied by the flags and no longer are, but for one of each set that still shares a tensor.

    Each of them needs a tensor of its own: a saved checkpoint would leave all but one of a shared tensor's names out, and
    nothing would tie them when it is loaded.

    Args:
        before: ``tied_pairs`` before the flags were changed.
    """
    still, old = ({frozenset(pair) for pairs in found.values() for pair in pairs} for found in (tied_pairs(root), before))
    loose = {name for pair in old - still for name in pair}
    alone = []
    for names in parameter_users(root).values():
        if len(names) > 1 and loose.intersection(names):
            alone += [name for i, name in enumerate(names) if i and not any({name, k} in still for k in names[:i])]
    return alone


def twin(model: nn.Module, config: Any) -> nn.Module:
    """A model of the same class from ``config``, on the meta device."""
    with torch.device("meta"):
        return base_class(model)(copy.deepcopy(config)).eval()


def called(model: nn.Module, paths: Iterable[str]) -> tuple[set[str], bool]:
    """Which of the modules at ``paths`` a forward of ``model`` calls, by a trial on shapes alone, and whether it came to its end.

    Args:
        model: on the meta device.
    """
    ids = torch.ones(1, 4, dtype=torch.long, device="meta")
    inputs = {model.main_input_name: ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    seen: set[str] = set()
    hooks = [model.get_submodule(p).register_forward_pre_hook(lambda module, args, path=p: seen.add(path)) for p in paths]
    try:
        with torch.no_grad():
            model.set_attn_implementation("eager")  # others ask masks for their values
            model(**inputs)
    except Exception:  # any model's own code, on inputs that it may not take
        return seen, False
    finally:
        for hook in hooks:
            hook.remove()
    return seen, True


def never_called(root: nn.Module, sites: Iterable[Site], *, prefix: str = "") -> list[TrimtabError]:
    """A refusal for each of ``sites``, on tied tensors, whose own module the model never calls: what acts there acts nowhere.

    ``shared`` of T5 and BART holds the tensor that the embeddings of encoder and decoder are tied to, and nothing calls it. Where
    the trial breaks off before the module is called, the source of a tie among several embeddings is refused too.

    Args:
        prefix: of the model's names in ``root``, with its dot.
    """
    model = root if not prefix else root.get_submodule(prefix[:-1])
    every = [site for site in sites if isinstance(site.module, nn.Embedding) and site.path.startswith(prefix)]
    if not every or not hasattr(model, "get_expanded_tied_weights_keys"):
        return []
    users = parameter_users(model)
    problems: list[TrimtabError] = []
    for site in every:
        ends = [name.rpartition(".")[0] for name in users.get(id(site.parameter()), ())]
        others = [path for path in ends if path != site.path.removeprefix(prefix)]
        tables = [path for path in others if isinstance(model.get_submodule(path), nn.Embedding)]
        if not tables:
            continue
        own = site.path.removeprefix(prefix)
        seen, whole = called(twin(model, model.config), [own])
        sources = {source for pairs in tied_pairs(model).values() for _, source in pairs}
        if own in seen or not (whole or f"{own}.{site.tensor}" in sources):
            continue
        kind = base_class(model).__name__
        why = f"is never called by this {kind}"
        if not whole:
            why = f"may never be called by this {kind}, whose forward cannot be tried here"
        problems.append(
            NotMergeable(
                f"{site.path} {why}: it holds the tensor of {', '.join(tables)}, and what acts on {site.path} alone would change "
                f"nothing; attach to {' or '.join(tables)} instead"
            )
        )
    return problems
