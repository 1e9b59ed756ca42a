"""What the readers of other libraries' files share: opening them, finding their modules, and the report of what does not fit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.compat.peft_files import report
from trimtab.compat.tensor_files import keys_of, only_file, read_tensors
from trimtab.core import anatomy
from trimtab.core.bank import shapes_only
from trimtab.core.checkpoint import install
from trimtab.core.contracts import Adapter, MethodConfig
from trimtab.core.errors import CheckpointMismatch, NoMatch, ShapeMismatch, TrimtabError, Unsupported, nearest, raise_all
from trimtab.core.kinds import site_for
from trimtab.core.places import module_site
from trimtab.core.selection import Place
from trimtab.core.site import Rows, Site

__all__ = ["Filling", "ForeignFormat", "keys_of", "only_file", "read_tensors"]

class Filling:
    """Adapters that are being made from a foreign file, and what has become of its tensors.

    Args:
        root: the model; values of its parameters are not needed.
        source: the file, for messages.
        keys: names of all its tensors.
    """

    def __init__(self, root: nn.Module, source: Path, keys: Iterable[str]):
        self.root, self.source, self.keys = root, source, list(keys)
        self.modules = {path: module for path, module in root.named_modules() if path and "trimtab" not in path.split(".")}
        self.anatomy = anatomy.of(root)
        self.adapters: list[Adapter] = []
        self.values: dict[str, Tensor] = {}
        self.used: set[str] = set()
        self.missing: list[str] = []
        self.problems: list[TrimtabError] = []
        self._rng = torch.Generator()

    def site(self, path: str, tensor: str = "weight", *, part: str | None = None, rows: Rows | None = None) -> Site | None:
        """The site at ``path``, or None with the problem noted."""
        module = self._module(path)
        if module is None:
            return None
        if module._parameters.get(tensor) is None:
            self.problems.append(Unsupported(f"{self.source} acts on {path}, a {type(module).__name__} without a {tensor}"))
            return None
        role = self.anatomy.roles.get(path)
        return site_for(Place(path, module, part=part, rows=rows, role=role, block=self.anatomy.block_of(path)), tensor)

    def _module(self, path: str) -> nn.Module | None:
        if path not in self.modules:
            self.problems.append(
                NoMatch(f"{self.source} acts on {path}, which this model does not have{nearest(path, self.modules)}")
            )
        return self.modules.get(path)

    def output(self, path: str) -> Site | None:
        """The site of the module at ``path`` for an adapter on its output, or None with the problem noted."""
        module = self._module(path)
        if module is None:
            return None
        place = Place(path, module, role=self.anatomy.roles.get(path), block=self.anatomy.block_of(path))
        try:
            return module_site(place, None)
        except TrimtabError as error:
            self.problems.append(error)
            return None

    def put(self, site: Site, config: MethodConfig, tensors: dict[str, Tensor], keys: Iterable[str]) -> None:
        """An adapter at ``site`` with these tensors, in any shape of as many numbers; ``keys`` of the file are then used."""
        try:
            type(config).adapter_class.check(config, site)
            adapter = shapes_only(config, site, self._rng, {key: tuple(value.shape) for key, value in tensors.items()})
        except TrimtabError as error:
            self.problems.append(error)
            return
        wanted = {key: tuple(value.shape) for key, value in adapter.state_dict().items()}
        for key, shape in wanted.items():
            value = tensors.get(key)
            if value is None or value.numel() != torch.Size(shape).numel() or value.squeeze().dim() > 2:
                found = "none" if value is None else tuple(value.shape)
                self.problems.append(
                    ShapeMismatch(
                        f"{self.source} has {_shapes(tensors)} for {site.name}; {config} needs {key} of {shape}, found {found}"
                    )
                )
                return
            self.values[f"{site.path}.{site.slot}.{key}"] = value.reshape(shape)
        self.adapters.append(adapter)
        self.used |= set(keys)

    def finish(self) -> tuple[list[Adapter], dict[str, Tensor]]:
        """The adapters in model order, and their tensors.

        Raises:
            CheckpointMismatch: with a table of three columns if a tensor is missing or unused. Others: the problems noted.
        """
        raise_all(self.problems)
        unused = [key for key in self.keys if key not in self.used]
        if self.missing or unused or not self.adapters:
            table = report(sorted(self.used), self.missing, unused)
            raise CheckpointMismatch(f"{self.source} and this model do not fit together:\n{table}")
        order = {path: i for i, path in enumerate(self.modules)}
        return sorted(self.adapters, key=lambda adapter: order[adapter.site.path]), self.values


def _shapes(tensors: dict[str, Tensor]) -> str:
    """Names and shapes, for messages."""
    return ", ".join(f"{key} {tuple(value.shape)}" for key, value in tensors.items())


class ForeignFormat:
    """A format that is read and not written; a subclass has ``test`` and ``read`` (see ``compat/formats.py``)."""

    label = ""

    def read(self, root: nn.Module, path: Path, *, trainable: bool = False, **options: Any) -> tuple[str, list[Adapter], dict]:
        """Name, adapters with shapes only, and their tensors."""
        raise NotImplementedError

    def load(
        self, root: nn.Module, path: Path, *, name: str | None, trainable: bool, active: bool | None, check_base: bool = True,
        **options: Any,
    ) -> str:  # fmt: skip
        """Attach what ``path`` holds; such a file tells nothing of its base's values."""
        own, adapters, values = self.read(root, path, trainable=trainable, **options)
        return install(root, adapters, values, name=name or own, trainable=trainable, active=active, source=str(path))

    def inspect(self, path: Path) -> dict[str, Any]:
        """Not possible: it has no manifest."""
        raise Unsupported(f"{path} is of {self.label}, read here and not inspected; trimtab convert makes an adapter of it")

    def save(self, root: nn.Module, path: Path, name: str) -> Path:
        """Not possible."""
        raise Unsupported(f"trimtab reads files of {self.label} and does not write them; write trimtab's or peft's format")

    def places(self, path: Path) -> list[dict[str, Any]]:
        """Not known without the base."""
        raise Unsupported(f"{path} is a file of {self.label}, which does not tell its layers; say which base it is for: base=...")
