"""Reader and writer of huggingface/peft's adapter folders (``adapter_config.json`` and its tensors), without peft.

``tt.load(model, folder)`` recognises such a folder; ``tt.save(model, folder, format="peft")`` writes one. Reading is strict:
every tensor is used, none is missing, every config field is known to be harmless or is honoured. Writing takes peft's own
form of the method where there is one (``peft_twins.py``), else an exact LoRA of the update's factors (PiSSA, OLoRA, LoRA-GA:
rank 2r on the untouched base; rows of a fused projection; ranks by place where peft has one rank), else it refuses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.compat.peft_files import (
    CONFIG,
    TENSORS,
    factor_places,
    others_config,
    read_config,
    read_tensors,
    report,
    saved_whole,
    targeted,
)
from trimtab.compat.peft_norms import read_norms
from trimtab.compat.peft_prompts import PROMPTS, read_prompts
from trimtab.compat.peft_table import layer_of
from trimtab.compat.peft_twins import TWINS
from trimtab.compat.peft_write import write
from trimtab.core import anatomy
from trimtab.core.bank import shapes_only
from trimtab.core.checkpoint import FORMATS, install
from trimtab.core.contracts import Adapter, MethodConfig
from trimtab.core.errors import (
    CheckpointMismatch,
    NoMatch,
    ShapeMismatch,
    TrimtabError,
    Unsupported,
    nearest,
    raise_all,
)
from trimtab.core.folders import steady
from trimtab.core.kinds import site_for
from trimtab.core.registry import get
from trimtab.core.selection import Place
from trimtab.core.site import Cohort, Site

__all__ = ["PeftFolder"]

#: fields that every config has and that do not change the function; which modules learn, the tensors say
_HARMLESS = frozenset({
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "runtime_config",
    "megatron_core", "fan_in_fan_out",
})  # fmt: skip
_HINTS = {
    "bias": "put the trained biases into the base, or train with tt.BitFit beside it",
    "target_parameters": "merge the adapter in peft, or attach tt.LoRA to the expert bank and train again",
    "trainable_token_indices": "merge the adapter in peft and load the merged base",
    "layer_replication": "replicate the layers in the base and save it",
}


class PeftFolder:
    """The format ``"peft"`` of ``tt.save`` and ``tt.load``."""

    @staticmethod
    def test(folder: Path) -> bool:
        """Whether ``folder`` holds a peft adapter, whole or damaged; two other libraries use the config's name too."""
        return (folder / CONFIG).is_file() and not others_config(folder)

    @staticmethod
    def load(
        root: nn.Module, folder: Path, *, name: str | None, trainable: bool, active: bool | None, check_base: bool = True
    ) -> str:
        """Attach the adapter in ``folder`` under ``name`` (None: ``"default"``).

        Raises:
            CheckpointMismatch: damaged files, missing or unused tensors. ShapeMismatch: another base, or another rank than
            the config's. NoMatch: modules that this model lacks. Unsupported: what trimtab has no exact form for.
        """
        _, adapters, values = PeftFolder.read(root, folder, trainable=trainable)
        return install(
            root, adapters, values, name=name or "default", trainable=trainable, active=active, source=str(folder)
        )

    @staticmethod
    def read(root: nn.Module, folder: Path, *, trainable: bool = False) -> tuple[str, list[Adapter], dict[str, Tensor]]:
        """Name, adapters with shapes only, and their tensors, of one and the same save; raises as ``load`` does."""
        files = [folder, folder / CONFIG, folder / TENSORS]
        return steady(files, lambda: PeftFolder._read(root, folder, trainable))

    @staticmethod
    def _read(root: nn.Module, folder: Path, trainable: bool) -> tuple[str, list[Adapter], dict[str, Tensor]]:
        config = read_config(folder)
        if config["peft_type"] == "LN_TUNING":
            return "default", *read_norms(root, folder, config)
        if config["peft_type"] in PROMPTS:
            return "default", *read_prompts(root, folder, config)
        return "default", *_Reader(root, folder, trainable).read()

    @staticmethod
    def inspect(folder: Path) -> dict[str, Any]:
        """Not possible: it has no manifest."""
        raise Unsupported(f"{folder} is peft's, which is read here and not inspected; trimtab convert makes an adapter of it")

    @staticmethod
    def places(folder: Path) -> list[dict[str, Any]]:
        """What low-rank factors tell of their places.

        Raises:
            Unsupported: another kind of tensor is there, whose layer the file does not tell.
        """
        return factor_places(folder, read_tensors(folder))

    @staticmethod
    def save(root: nn.Module, path: Path, name: str, *, base_name: str | None = None) -> Path:
        """Write the adapter ``name`` to the folder ``path``.

        Args:
            base_name: the base's folder or Hub id, for the config; None: the name that the model itself has.

        Raises:
            Unsupported: no form of it that peft reads computes the same.
        """
        return write(root, path, name, base_name)


class _Reader:
    def __init__(self, root: nn.Module, folder: Path, trainable: bool):
        self.root, self.folder = root, folder
        self.config = read_config(folder)
        kind = self.config["peft_type"]
        if kind not in TWINS:
            raise Unsupported(
                f"{folder} holds a peft adapter of type {kind}, which trimtab does not read{nearest(kind, TWINS)}; "
                "merge it in peft and save the merged base"
            )
        self.twin = TWINS[kind]
        raise_all(self._unread_fields(trainable))
        if isinstance(self.config.get("target_modules"), list):
            self.config["target_modules"] = frozenset(self.config["target_modules"])
        self.modules = {p: m for p, m in root.named_modules() if "trimtab" not in p.split(".")}
        self.anatomy = anatomy.of(root)
        self.rng = torch.Generator()
        self.problems: list[TrimtabError] = []
        self.missing: list[str] = []
        self.unused: list[str] = []
        self.values: dict[str, Tensor] = {}

    def _unread_fields(self, trainable: bool) -> list[TrimtabError]:
        """What the config says that cannot be honoured."""
        twin, problems = self.twin, []
        known = _HARMLESS | set(twin.fields) | set(twin.harmless) | set(twin.training) | set(twin.patterns.values())
        for key, value in self.config.items():
            if key in known or not value or (key == "bias" and value == "none"):
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
        tensors = read_tensors(self.folder)
        names = sorted(tensors)
        places, loose = self._by_place(tensors)
        unknown = [path for path in places if path not in self.modules]
        if unknown:
            more = f" and {len(unknown) - 3} more" * (len(unknown) > 3)
            raise NoMatch(
                f"{self.folder} acts on {', '.join(unknown[:3])}{more}, which this model does not have"
                f"{nearest(unknown[0], [p for p in self.modules if p])}"
            )
        sites = {path: site for path in self.modules if path in places and (site := self._site(path)) is not None}
        raise_all(self.problems)
        adapters = self._adapters(sites, places, loose)
        adapters += self._saved_modules(loose)
        self._base_copies(loose)
        self.missing += [f"{path}.*" for path in self.modules if path not in places and self._expected(path)]
        if self.missing or self.unused:
            used = [name for name in names if name not in self.unused]
            table = report(used, self.missing, self.unused)
            self.problems.append(CheckpointMismatch(f"{self.folder} and this model do not fit together:\n{table}"))
        if not adapters:
            self.problems.append(CheckpointMismatch(f"{self.folder} holds no tensor of an adapter; it was saved without them"))
        raise_all(self.problems)
        return adapters, self.values

    def _by_place(self, tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """``path -> name -> tensor``, and the tensors of no place."""
        places: dict[str, dict[str, Tensor]] = {}
        loose: dict[str, Tensor] = {}
        for key, value in tensors.items():
            plain = key.removesuffix(".weight") if key.endswith(".lora_magnitude_vector.weight") else key
            name = next((n for n in self.twin.names if plain.endswith(f".{n}")), None)
            if name is None:
                loose[key] = value
            else:
                places.setdefault(plain.removesuffix(f".{name}"), {})[name] = value
        return places, loose

    def _site(self, path: str, tensor: str = "weight", *, saved: bool = False) -> Site | None:
        """The site, or None with the problem noted."""
        module = self.modules[path]
        if module._parameters.get(tensor) is None:
            self.problems.append(
                Unsupported(f"{self.folder} acts on {path}, a {type(module).__name__} without a parameter {tensor!r}")
            )
            return None
        site = site_for(Place(path, module, role=self.anatomy.roles.get(path), block=self.anatomy.block_of(path)), tensor)
        if not saved and layer_of(site) not in self.twin.layers:
            self.problems.append(
                Unsupported(
                    f"{self.folder} acts on {path}, a {layer_of(site)}, on which trimtab has no exact form of peft's "
                    f"{self.twin.peft_type}; it has one on {', '.join(sorted(self.twin.layers))}; merge the adapter in peft instead"
                )
            )
            return None
        return site

    def _adapters(
        self, sites: dict[str, Site], places: dict[str, dict[str, Tensor]], loose: dict[str, Tensor]
    ) -> list[Adapter]:
        twin = self.twin
        common = twin.common(twin.at(self.config, ""), list(sites.values()), loose)
        plan: list[tuple[Site, MethodConfig, dict[str, Tensor]]] = []
        cohorts: dict[MethodConfig, Cohort] = {}
        for path, site in sites.items():
            try:
                fields = twin.at(self.config, path)
                stored = twin.unpack(places[path], fields, site, common)
                config = twin.read(fields, stored)
            except TrimtabError as error:
                self.problems.append(type(error)(f"{self.folder}, {path}: {error}"))
                continue
            site.cohort = cohorts.setdefault(config, Cohort())
            site.cohort.sites.append(site)
            plan.append((site, config, stored))
        raise_all(self.problems)
        adapters = []
        for site, config, stored in plan:
            adapters.append(shapes_only(config, site, self.rng))
            self._take(adapters[-1], stored)
        return adapters

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

    def _saved_modules(self, loose: dict[str, Tensor]) -> list[Adapter]:
        """``modules_to_save``: copies of whole modules, which are tt.Unfreeze here."""
        config = get("Unfreeze")()
        adapters = []
        for path, module in self.modules.items():
            if not saved_whole(self.config, path):
                continue
            for tensor, base in module._parameters.items():
                if base is None:
                    continue
                value = loose.pop(f"{path}.{tensor}", None)
                if value is None:
                    self.missing.append(f"{path}.{tensor}")
                    continue
                site = self._site(path, tensor, saved=True)
                if value.shape != base.shape:
                    self.problems.append(
                        ShapeMismatch(
                            f"{path}.{tensor} is {tuple(value.shape)} in {self.folder}, {tuple(base.shape)} in this model; "
                            "load the base it was trained on (for a classifier: with as many labels)"
                        )
                    )
                    continue
                adapters.append(shapes_only(config, site, self.rng))
                self.values[f"{path}.{site.slot}.value"] = site.matrix(value)
        return adapters

    def _base_copies(self, loose: dict[str, Tensor]) -> None:
        """Base tensors that peft stored beside the adapter (embeddings): fine if they are this model's, else a problem."""
        for key, value in loose.items():
            path, _, tensor = key.replace(".base_layer.", ".").rpartition(".")
            module = self.modules.get(path)
            base = None if module is None else {**module._parameters, **module._buffers}.get(tensor)
            if base is None:
                self.unused.append(key)
            elif base.is_meta:
                continue
            elif base.shape != value.shape or not torch.allclose(base.detach().to(value), value, rtol=1e-2, atol=1e-6):
                self.problems.append(
                    CheckpointMismatch(
                        f"{self.folder} also holds {key}, a tensor of the base {tuple(value.shape)} with other values than this "
                        f"model's {tuple(base.shape)}: it was resized or trained; put it into the base before loading the adapter"
                    )
                )

    def _expected(self, path: str) -> bool:
        """Whether the config says that the module at ``path`` has an adapter."""
        module = self.modules[path]
        if not path or self.config.get("target_modules") == "all-linear" or not targeted(self.config, path):
            return False
        if module._parameters.get("weight") is None:
            return False
        return layer_of(site_for(Place(path, module), "weight")) in self.twin.layers


FORMATS["peft"] = PeftFolder()
