"""peft's learned tokens: PROMPT_TUNING and P_TUNING are ``tt.PromptTuning`` here, PREFIX_TUNING is ``tt.PrefixTuning``.

A folder of any of them holds one tensor, ``prompt_embeddings``: the tokens (p, width), or the keys and values of all layers
(p, 2 layers * key width), key before value; the networks that made them stay behind, as peft leaves them.

peft moves the sequence's positions up by p, trimtab leaves them. Where positions are rotations the two differ in nothing for tokens
in front. For learned keys, which neither rotates, ``(R(p + i) q) . k = (R(i) q) . (R(-p) k)``: the keys change by one rotation.
Where the model has a table of positions no tokens make up for the move, and reading and writing are refused.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.compat.bodies import rotates
from trimtab.compat.peft_files import CONFIG, read_tensors, report
from trimtab.core import anatomy
from trimtab.core.attach import plan_sites
from trimtab.core.bank import shapes_only
from trimtab.core.contracts import Adapter, MethodConfig
from trimtab.core.errors import CheckpointMismatch, ShapeMismatch, Unsupported
from trimtab.core.registry import get
from trimtab.core.site import Site, gathered
from trimtab.core.stacks import key_value_widths, stacks

__all__ = ["PROMPTS", "read_prompts", "write_prompts"]

PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
KEY = "prompt_embeddings"


def read_prompts(root: nn.Module, folder: Path, config: dict[str, Any]) -> tuple[list[Adapter], dict[str, Tensor]]:
    """Adapters with shapes only, and their tensors.

    Raises:
        CheckpointMismatch: damaged files, missing or unused tensors. ShapeMismatch: another base.
        Unsupported: the base's positions are no rotations, or the folder holds what trimtab does not read.
    """
    stored = read_tensors(folder)
    if set(stored) != {KEY}:
        table = report([KEY] if KEY in stored else [], [] if KEY in stored else [KEY], sorted(set(stored) - {KEY}))
        raise CheckpointMismatch(f"{folder} is no folder of peft's learned tokens:\n{table}")
    if (config.get("num_transformer_submodules") or 1) != 1:
        raise Unsupported(f"{folder / CONFIG}: tokens for encoder and decoder at once, which trimtab does not read")
    if config.get("modules_to_save"):
        raise Unsupported(f"{folder / CONFIG} says modules_to_save={config['modules_to_save']!r} beside tokens; load it with peft")
    body, values = _body(root, str(folder)), stored[KEY]
    if config["peft_type"] == "PREFIX_TUNING":
        sites = _sites(root, get("PrefixTuning")(tokens=len(values)))
        method, tensors = get("PrefixTuning")(tokens=len(values)), _split(values, sites, folder)
        for found, site in zip(tensors, sites, strict=True):
            found["k"] = _rotated(found["k"], -len(values), body, root, site)
    else:
        method = get("PromptTuning")(tokens=len(values), init="normal")
        sites, tensors = _sites(root, method), [{"p": values}]
        if values.shape[1] != sites[0].in_features:
            raise ShapeMismatch(f"{folder}: tokens of width {values.shape[1]}, and this model's are {sites[0].in_features} wide")
    adapters = [shapes_only(method, site, torch.Generator()) for site in sites]
    return adapters, {
        f"{site.path}.{site.slot}.{key}": value.contiguous()
        for site, found in zip(sites, tensors, strict=True) for key, value in found.items()
    }  # fmt: skip


def write_prompts(root: nn.Module, adapters: Sequence[Adapter], name: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Config fields and tensors of token adapters; None if these are none that peft has.

    Raises:
        Unsupported: the model's positions are no rotations, or peft has no form for these tokens.
    """
    methods = {type(a.config).__name__ for a in adapters}
    if not methods <= {"PromptTuning", "PTuning", "PrefixTuning"}:
        return None
    if len(methods) > 1 or len({a.config for a in adapters}) > 1:
        raise Unsupported(f"the adapter {name!r} mixes kinds of tokens, for which peft has no form; save it in trimtab's own")
    body = _body(root, f"the adapter {name!r}")
    folded = [a.folded() for a in adapters]
    values = [a.state_dict() if found is None else found[1] for a, found in zip(adapters, folded, strict=True)]
    fields: dict[str, Any] = {"num_transformer_submodules": 1}
    if methods != {"PrefixTuning"}:
        tokens = gathered(values[0]["p"].detach())
        fields |= {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", "token_dim": tokens.shape[1]}
        return fields | {"num_virtual_tokens": len(tokens)}, {KEY: tokens}
    if adapters[0].config.gated:
        raise Unsupported(f"the adapter {name!r} is a gated prefix, for which peft has no form; save it in trimtab's own")
    sites = [a.site for a in adapters]
    every = [site.path for site in _sites(root, get("PrefixTuning")())]
    if sorted(every) != sorted(site.path for site in sites):
        raise Unsupported(f"the adapter {name!r} has a prefix in {len(sites)} of {len(every)} layers; peft has one in each")
    order, rows = {path: i for i, path in enumerate(every)}, []
    for site, found in sorted(zip(sites, values, strict=True), key=lambda pair: order[pair[0].path]):
        key, value = (gathered(found[which].detach()) for which in "kv")
        rows += [_rotated(key, len(key), body, root, site), value]
    fields |= {"peft_type": "PREFIX_TUNING", "prefix_projection": False, "num_layers": len(every)}
    return fields | {"num_virtual_tokens": len(rows[0])}, {KEY: torch.cat(rows, 1)}


def _sites(root: nn.Module, method: MethodConfig) -> list[Site]:
    return [site for _, site in plan_sites(root, method)]


def _body(root: nn.Module, what: str) -> nn.Module:
    """The one stack of a causal model whose positions are rotations."""
    known = anatomy.of(root)
    found = stacks(known)
    body = known.modules[found[0].body] if len(found) == 1 and found[0].body is not None else None
    if body is None:
        raise Unsupported(f"{what}: {type(root).__name__} is not one causal stack, and its learned tokens are not peft's")
    if not rotates(body):
        raise Unsupported(
            f"{what}: peft moves the sequence's positions up by the tokens' number, trimtab does not, and {type(root).__name__} "
            "has no rotary positions, with which the two are equal; train the tokens again"
        )
    return body


def _split(values: Tensor, sites: Sequence[Site], folder: Path) -> list[dict[str, Tensor]]:
    """Keys and values of each layer."""
    widths = [width for site in sites for width in key_value_widths(site.module)]
    if values.shape[1] != sum(widths):
        raise ShapeMismatch(
            f"{folder}: keys and values of {values.shape[1]} numbers a token; this model's {len(sites)} layers have {sum(widths)}"
        )
    parts = values.split(widths, 1)
    return [{"k": key, "v": value} for key, value in zip(parts[::2], parts[1::2], strict=True)]


def _rotated(keys: Tensor, by: int, body: nn.Module, root: nn.Module, site: Site) -> Tensor:
    """``R(by) k`` of keys (p, heads * size), by the model's own rotation.

    Raises:
        Unsupported: the model's attention does not tell it in transformers' usual form.
    """
    rotations = [module for module in body.modules() if "inv_freq" in module._buffers]
    apply = getattr(sys.modules[type(site.module).__module__], "apply_rotary_pos_emb", None)
    size = getattr(site.module, "head_dim", None)
    if len(rotations) != 1 or apply is None or size is None or getattr(site.module, "sliding_window", None):
        raise Unsupported(f"{site.path}: {type(site.module).__name__} does not tell one rotation of its keys; train it again")
    config = root.config.get_text_config() if hasattr(root.config, "get_text_config") else root.config
    heads = keys.view(1, len(keys), -1, size).transpose(1, 2).double()
    # made anew: the base may be one of shapes alone
    cosine, sine = type(rotations[0])(config)(heads.float(), torch.full((1, len(keys)), by))
    length = torch.hypot(cosine.double(), sine.double())  # some models scale with the rotation
    if cosine.shape[-1] != size:
        raise Unsupported(f"{site.path} rotates {cosine.shape[-1]} of {size} channels a head; train the prefix again")
    turned, _ = apply(heads, heads, cosine.double() / length, sine.double() / length)
    return turned.transpose(1, 2).reshape(keys.shape).to(keys.dtype)
