"""peft's LN_TUNING: whole copies of normalisation layers, which are ``tt.NormTuning`` here, an adapter a parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.compat.peft_files import CONFIG, NORM_COPY, read_tensors, report, targeted
from trimtab.core.bank import shapes_only
from trimtab.core.contracts import Adapter
from trimtab.core.errors import CheckpointMismatch, NoMatch, ShapeMismatch, TrimtabError, Unsupported, nearest, raise_all
from trimtab.core.kinds import site_for
from trimtab.core.registry import get
from trimtab.core.selection import Place

__all__ = ["read_norms"]


def read_norms(root: nn.Module, folder: Path, config: dict[str, Any]) -> tuple[list[Adapter], dict[str, Tensor]]:
    """Adapters with shapes only, and their tensors.

    Raises:
        CheckpointMismatch: damaged files, missing or unused tensors. NoMatch, ShapeMismatch: another base.
        Unsupported: modules saved beside the norms.
    """
    if config.get("modules_to_save"):
        raise Unsupported(f"{folder / CONFIG} says modules_to_save={config['modules_to_save']!r} beside norms; merge it in peft")
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = frozenset(config["target_modules"])
    stored = read_tensors(folder)
    modules = {path: module for path, module in root.named_modules() if "trimtab" not in path.split(".")}
    adapters: list[Adapter] = []
    values: dict[str, Tensor] = {}
    problems: list[TrimtabError] = []
    unused = [key for key in stored if f".{NORM_COPY}." not in key]
    copies = {tuple(key.split(f".{NORM_COPY}.")): value for key, value in stored.items() if key not in unused}
    for (path, tensor), value in copies.items():
        base = None if path not in modules else modules[path]._parameters.get(tensor)
        if base is None:
            problems.append(NoMatch(f"{folder} acts on {path}.{tensor}, which this model does not have{nearest(path, modules)}"))
        elif base.shape != value.shape:
            problems.append(
                ShapeMismatch(f"{path}.{tensor} is {tuple(value.shape)} in {folder}, {tuple(base.shape)} in this model")
            )
        else:
            site = site_for(Place(path, modules[path]), tensor)
            adapters.append(shapes_only(get("NormTuning")(), site, torch.Generator()))
            values[f"{path}.{site.slot}.value"] = value
    raise_all(problems)
    paths = {path for path, _ in copies}
    expected = {p for p, m in modules.items() if p and targeted(config, p) and m._parameters} | paths
    missing = [f"{p}.{t}" for p in expected for t, v in modules[p]._parameters.items() if v is not None and (p, t) not in copies]
    if missing or unused or not adapters:
        table = report([key for key in stored if key not in unused], missing, unused)
        raise CheckpointMismatch(f"{folder} and this model do not fit together:\n{table}")
    return adapters, values
