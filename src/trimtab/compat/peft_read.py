"""The reading half of ``peft.py``: what the tensors of a folder are, place by place; all problems are collected and raised once.

The file decides: which modules are adapted and which parameters were trained whole, its tensors say, never a rule that is
made again from the config. The config gives what tensors cannot tell (scales, seeds, starts). A contradiction is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.compat.peft_experts import Experts
from trimtab.compat.peft_files import CONFIG, read_tensors, report, targeted
from trimtab.compat.peft_names import DELTA, Layout, Stored, split
from trimtab.compat.peft_table import Tensors, layer_of
from trimtab.compat.peft_twins import TWINS
from trimtab.compat.peft_whole import Whole
from trimtab.core import anatomy
from trimtab.core.bank import shapes_only
from trimtab.core.contracts import Adapter, MethodConfig
from trimtab.core.errors import CheckpointMismatch, ShapeMismatch, TrimtabError, Unsupported, nearest, raise_all
from trimtab.core.kinds import site_for
from trimtab.core.selection import Place
from trimtab.core.site import Cohort, Site

__all__ = ["Reader"]

#: fields that every config has and that do not change the function, or that the tensors tell
_HARMLESS = frozenset({
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "runtime_config",
    "megatron_core", "fan_in_fan_out", "bias", "target_parameters", "trainable_token_indices", "token_indices",
    "ensure_weight_tying", "modules_to_tie", "target_modules_to_tie",
})  # fmt: skip
_HINTS = {"layer_replication": "replicate the layers in the base and save it"}


class Reader:
    """One folder, being read onto one model.

    Attributes:
        problems, missing, unused: what does not fit.
        adapters, values: what was found.
    """

    def __init__(self, root: nn.Module, folder: Path, config: dict[str, Any], trainable: bool):
        self.root, self.folder, self.config, self.trainable = root, folder, config, trainable
        kind = config["peft_type"]
        if kind not in TWINS:
            raise Unsupported(
                f"{folder} holds a peft adapter of type {kind}, which trimtab does not read{nearest(kind, TWINS)}; "
                "merge it in peft and save the merged base"
            )
        self.twin = TWINS[kind]
        raise_all(self._unread_fields(trainable))
        if isinstance(config.get("target_modules"), list):
            config["target_modules"] = frozenset(config["target_modules"])
        self.modules = {p: m for p, m in root.named_modules() if "trimtab" not in p.split(".")}
        self.layout = Layout(root, self.modules)
        self.anatomy = anatomy.of(root)
        self.rng = torch.Generator()
        self.problems: list[TrimtabError] = []
        self.missing: list[str] = []
        self.unused: list[str] = []
        self.adapters: list[Adapter] = []
        self.values: dict[str, Tensor] = {}

    def _unread_fields(self, trainable: bool) -> list[TrimtabError]:
        """What the config says that cannot be honoured."""
        twin, problems = self.twin, []
        known = _HARMLESS | set(twin.fields) | set(twin.harmless) | set(twin.training) | set(twin.patterns.values())
        for key, value in self.config.items():
            if key in known or not value:
                continue
            hint = _HINTS.get(key, "load it with peft, merge it there, and use the merged base")
            problems.append(Unsupported(f"{self.folder / CONFIG} says {key}={value!r}, which trimtab does not read; {hint}"))
        for key, default in twin.fields.items():
            if default is ... and self.config.get(key) is None:
                problems.append(
                    CheckpointMismatch(
                        f"{self.folder / CONFIG} does not say {key}, without which the adapter's function is not known; "
                        "add the value it was trained with"
                    )
                )
        for key in twin.training:
            if trainable and self.config.get(key):
                problems.append(
                    Unsupported(
                        f"{self.folder / CONFIG} says {key}={self.config[key]!r}, which acts while training and which "
                        f"{twin.methods[0]} does not have; load it with trainable=False"
                    )
                )
        return problems

    def read(self) -> tuple[list[Adapter], dict[str, Tensor]]:
        """Adapters without values, and their values; raises all problems together."""
        every = split(read_tensors(self.folder), self.twin.names, self.folder)
        shared = {f"base_model.{e.tail}": e.value for e in every if e.origin == "shared"}
        entries = [e for e in every if e.origin != "shared"]
        experts = Experts(self)
        entries = experts.take(entries)
        self.layout.resolve([e.path for e in entries], str(self.folder))
        entries = experts.take_parameters(entries)
        inner = [e for e in entries if e.origin == "adapter" and e.tail != DELTA]
        places: dict[str, dict[str, Stored]] = {}
        for e in inner:
            places.setdefault(self.layout.found[e.path], {})[e.tail] = e
        sites = {path: site for path in self.modules if path in places and (site := self.site(path)) is not None}
        raise_all(self.problems)
        self._adapt(sites, places, shared)
        experts.finish()
        whole = Whole(self, [e for e in entries if e not in inner])
        whole.finish()
        self.unused += list(shared)
        self._expected(places.keys() | experts.paths)
        if self.missing or self.unused:
            used = sorted(e.key for e in every if e.key not in self.unused)
            table = report(used, self.missing, self.unused)
            self.problems.append(CheckpointMismatch(f"{self.folder} and this model do not fit together:\n{table}"))
        if not self.adapters and not self.problems:
            self.problems.append(CheckpointMismatch(f"{self.folder} holds no tensor of an adapter; it was saved without them"))
        raise_all(self.problems)
        return self.adapters, self.values

    def place(self, path: str) -> Place:
        """The module at ``path``, with what the anatomy knows of it."""
        return Place(path, self.modules[path], role=self.anatomy.roles.get(path), block=self.anatomy.block_of(path))

    def site(self, path: str) -> Site | None:
        """The site of the matrix at ``path``, or None with the problem noted."""
        module = self.modules[path]
        if module._parameters.get("weight") is None:
            self.problems.append(
                Unsupported(f"{self.folder} acts on {path}, a {type(module).__name__} without a parameter 'weight'")
            )
            return None
        site = site_for(self.place(path), "weight")
        if layer_of(site) in self.twin.layers:
            return site
        self.problems.append(
            Unsupported(
                f"{self.folder} acts on {path}, a {layer_of(site)}, on which trimtab has no exact form of peft's "
                f"{self.twin.peft_type}; it has one on {', '.join(sorted(self.twin.layers))}; merge the adapter in peft instead"
            )
        )
        return None

    def _adapt(self, sites: dict[str, Site], places: dict[str, dict[str, Stored]], shared: Tensors) -> None:
        twin = self.twin
        common = twin.common(twin.at(self.config, ""), list(sites.values()), shared)
        plan: list[tuple[Site, MethodConfig, dict[str, Tensor]]] = []
        cohorts: dict[MethodConfig, Cohort] = {}
        for path, site in sites.items():
            here = places[path]
            theirs = next(iter(here.values())).path  # ranks and scales were looked up by the name that it had then
            try:
                fields = twin.at(self.config, theirs) | {"path": theirs}
                found = {tail: e.value for tail, e in here.items()}
                if wrong := twin.against(self.config, theirs, found, site):
                    raise CheckpointMismatch(f"{CONFIG} contradicts the tensors: {wrong}")
                stored = twin.unpack(found, fields, site, common)
                config = twin.read(fields, stored)
            except TrimtabError as error:
                self.problems.append(type(error)(f"{self.folder}, {path}: {error}"))
                continue
            site.cohort = cohorts.setdefault(config, Cohort())
            site.cohort.sites.append(site)
            plan.append((site, config, stored))
        raise_all(self.problems)
        for site, config, stored in plan:
            adapter = shapes_only(config, site, self.rng)
            self.adapters.append(adapter)
            self._take(adapter, stored)

    def _take(self, adapter: Adapter, stored: dict[str, Tensor]) -> None:
        """A place's tensors in our layout; what is left over or missing is noted."""
        site, rules = adapter.site, {rule.ours: rule for rule in self.twin.tensors}
        for key, wanted in adapter.state_dict().items():
            rule = rules[key]
            value = stored.pop(rule.name(site), None)
            theirs = rule.shape(site, tuple(wanted.shape))
            if value is None:
                self.missing.append(f"{site.path}.{rule.name(site)}")
            elif tuple(value.shape) != theirs:
                self.problems.append(
                    ShapeMismatch(
                        f"{site.path}.{rule.name(site)} is {tuple(value.shape)} in {self.folder}; {adapter.config} on this "
                        f"model's {layer_of(site)} of shape {site.shape} needs {theirs}; load the base it was trained on"
                    )
                )
            else:
                self.values[f"{site.path}.{site.slot}.{key}"] = value.reshape(wanted.shape)
        self.unused += [f"{site.path}.{name}" for name in stored]

    def _expected(self, found: set[str]) -> None:
        """Modules that the config says have an adapter, and for which the file has none."""
        names = self.config.get("target_modules")
        if names == "all-linear" or not self.twin.layers:
            return
        for path, module in self.modules.items():
            if not path or path in found or module._parameters.get("weight") is None:
                continue
            if not targeted(self.config, self.layout.file_path(path)):
                continue
            if layer_of(site_for(Place(path, module), "weight")) in self.twin.layers:
                self.missing.append(f"{path}.*")
