"""A checkpoint folder of transformers: its config, its safetensors files by their headers, and its modules on the meta device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.compat.model_config import config_class, read_config
from trimtab.compat.quantised_files import codec_for
from trimtab.compat.safetensors_file import Header, read_header, read_tensor
from trimtab.compat.weight_names import Group, WeightNames
from trimtab.core.errors import CheckpointMismatch, TrimtabError, Unsupported
from trimtab.core.reading import check_finite, inside, listed, read_json
from trimtab.core.state import parameter_users

__all__ = ["INDEX", "Pretrained", "index_of", "read_files"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_files(folder: Path) -> list[Header]:
    """The headers of all weights' files of a checkpoint, checked against each other and against the index.

    Raises:
        CheckpointMismatch: there are none, one is damaged, or the index and the files do not agree.
    """
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return [read_header(folder / SINGLE)]
        found = listed(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise CheckpointMismatch(
            f"{folder} holds no safetensors checkpoint: there is no {SINGLE} and no {INDEX} (found: {found}); "
            "load it with transformers and save it again, which writes safetensors"
        )
    indexed = index_of(index)
    names = sorted(set(indexed.values()))
    lacking = [name for name in names if not inside(folder, name, index).is_file()]
    if lacking:
        raise CheckpointMismatch(
            f"{folder} is not whole: its index names {', '.join(lacking)}, which are not there; copy them again"
        )
    headers = [read_header(folder / name) for name in names]
    stored = {key: header.file.name for header in headers for key in header.entries}
    wrong = sorted(key for key in indexed.keys() | stored.keys() if indexed.get(key) != stored.get(key))
    if wrong:
        key = wrong[0]
        raise CheckpointMismatch(
            f"{index} and the files do not agree on {len(wrong)} tensors: {key} is in {indexed.get(key, 'none')} by the index, in "
            f"{stored.get(key, 'none')} in fact"
        )
    return headers


def index_of(file: Path) -> dict[str, str]:
    """A checkpoint's index: a tensor's name -> its file's.

    Raises:
        CheckpointMismatch: it is damaged.
    """
    content = read_json(file)
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointMismatch(f"{file} is damaged: it has no weight_map of tensors' names and files'")
    return found


class Pretrained:
    """The base of a merge on disk; fulfils ``artifacts.base.Base``.

    Args:
        folder: with ``config.json`` and safetensors.
        classes: of the models that adapters were saved from, as their manifests name them; unknown ones are None.
        places: entries of the adapters' places, by which the right class is told.

    Attributes:
        root: what the adapters' paths are relative to; parameters on the meta device.
        model: the transformers model: ``root`` or its child.
        prefix: of the model's names in ``root``, with its dot.
        class_name: of the model.
        files: headers of the weights' files.
        where: a tensor's name -> the file that has it.
        dtype: of the model's activations and dense weights.
        ties: names of the model's parameters that share a tensor, together.
        codec, parts: of a quantised checkpoint, its weights' names -> the names of their tensors in the files.
    """

    def __init__(self, folder: Path, classes: Sequence[str | None] = (), places: Sequence[Mapping[str, Any]] = ()):
        self.folder = folder
        self.config = read_config(folder)
        self.files = read_files(folder)
        self.where = {key: header for header in self.files for key in header.entries}
        self.labels: int | None = None
        named = str(self.config.get("dtype") or self.config.get("torch_dtype") or "float32").removeprefix("torch.")
        self.dtype = getattr(torch, named, None)
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            self.dtype = torch.float32
        self.root, self.model, self.prefix = self._modules([c for c in classes if c], places)
        self.class_name = type(self.model).__name__
        self.codec = codec_for(self.config, str(folder))
        self.parts = self.codec.parts(self.files) if self.codec else {}
        apart = {key for name, keys in self.parts.items() for key in keys if key != name}
        self.names = WeightNames(self.model, [key for key in [*self.where, *(self.parts.keys() - self.where)] if key not in apart])
        self.ties = [names for names in parameter_users(self.model).values() if len(names) > 1]
        self._last: tuple[Group, dict[str, Tensor]] | None = None

    # -- modules

    def _modules(self, classes: list[str], places: Sequence[Mapping[str, Any]]) -> tuple[nn.Module, nn.Module, str]:
        """Root, model and prefix: the first candidate that has most of the places."""
        best: tuple[int, nn.Module, nn.Module, str] | None = None
        for model, prefix in self._candidates(classes, places):
            root = model if not prefix else _under(prefix, model)
            have = {path for path, _ in root.named_modules()}
            lacking = sum(place["path"] not in have for place in places)
            if best is None or lacking < best[0]:
                best = lacking, root, model, f"{prefix}." if prefix else ""
            if not lacking:
                break
        assert best is not None  # _candidates raises instead of finding nothing
        return best[1:]

    def _candidates(self, classes: list[str], places: Sequence[Mapping[str, Any]]) -> Iterable[tuple[nn.Module, str]]:
        import transformers

        config = config_class(self.folder)
        named = [c for c in dict.fromkeys([*classes, *(config.architectures or [])]) if hasattr(transformers, c)]
        named = [c for c in named if getattr(getattr(transformers, c), "config_class", None) is type(config)]
        for name in named:
            cls = getattr(transformers, name)
            model = self._on_meta(cls, config)
            labels = _labels(model, places)
            if labels is not None:  # a head of another size than the checkpoint's
                config = config_class(self.folder, num_labels=labels)
                self.labels, model = labels, self._on_meta(cls, config)
            yield model, ""
        try:
            cls = transformers.AutoModel._model_mapping[type(config)]
        except KeyError:
            cls = None
        if isinstance(cls, type):
            model = self._on_meta(cls, config)
            yield model, model.base_model_prefix
            yield model, ""
        elif not named:
            raise Unsupported(
                f"{self.folder} is a model of the type {config.model_type!r}, of which transformers has no class without the "
                "checkpoint's own code; merge it in memory: tt.merge(model, name, permanent=True)"
            )

    def _on_meta(self, cls: type, config: Any) -> nn.Module:
        try:
            with torch.device("meta"):
                return cls(config).to(self.dtype).eval()
        except Exception as error:  # whatever a damaged configuration runs into, in any of transformers' classes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointMismatch(
                f"transformers cannot build the {cls.__name__} that {self.folder / 'config.json'} describes: {reason}"
            ) from error

    # -- values

    def parameter_names(self, path: str, tensor: str) -> list[str]:
        """The names, in the model, of the parameter at a path of ``root``: its own first, then those tied to it."""
        name = ".".join(filter(None, (path, tensor))).removeprefix(self.prefix)
        return [name, *(other for tied in self.ties if name in tied for other in tied if other != name)]

    def group(self, path: str, tensor: str) -> Group | None:
        """The tensors of the checkpoint that fill a parameter, or one tied to it; None if there are none."""
        return next((self.names.groups[n] for n in self.parameter_names(path, tensor) if n in self.names.groups), None)

    def values(self, group: Group) -> dict[str, Tensor]:
        """All parameters of a group; the last one is kept, since neighbours ask for it again."""
        if self._last is None or self._last[0] is not group:
            self._last = None
            if group.converter is not None and any(key in self.parts for key in group.keys):
                raise Unsupported(f"{group.params[0]} is made of quantised tensors, which cannot be stacked as they are")
            self._last = group, self.names.read(group, self.tensor)
        return self._last[1]

    def forget(self) -> None:
        """Let go of the values that were read last."""
        self._last = None

    def tensor(self, key: str) -> Tensor:
        """One tensor of the checkpoint; a quantised weight as its library's parameter.

        Raises:
            CheckpointMismatch: it holds NaN or infinite values, or the file changed meanwhile.
        """
        if key not in self.parts:
            return self._stored(key)
        lacking = [part for part in self.parts[key] if part not in self.where]
        if lacking:
            raise CheckpointMismatch(f"{self.folder} lacks {', '.join(lacking)}, which {key} is made of")
        try:
            return self.codec.read(key, self._stored)
        except TrimtabError:
            raise
        except Exception as error:  # whatever its library runs into on damaged parts
            raise CheckpointMismatch(f"{key} in {self.folder} cannot be made of its parts: {error}") from error

    def _stored(self, key: str) -> Tensor:
        value = read_tensor(self.where[key], key)
        if value.is_floating_point() and value.dtype.itemsize > 1:  # torch asks no 8-bit number whether it is finite
            check_finite({key: value}, str(self.where[key].file))
        return value

    def keys(self, group: Group) -> list[str]:
        """The names of all tensors of the files that hold a group: a quantised weight has several."""
        return [part for key in group.keys for part in self.parts.get(key, [key])]

    def stored_shape(self, group: Group) -> tuple[int, ...] | None:
        """The shape of a parameter in the files, where one dense tensor is one parameter."""
        key = group.keys[0]
        return None if group.converter is not None or key in self.parts else self.where[key].entries[key].shape

    def dense_shape(self, key: str) -> torch.Size:
        """The shape that a quantised weight has in the model."""
        return self.model.get_parameter(self.names.groups_by_key[key].params[0]).shape

    def value(self, path: str, tensor: str) -> Tensor | None:
        """See ``artifacts.base.Base``."""
        group = self.group(path, tensor)
        if group is None:
            return None
        values = self.values(group)
        return next(values[name] for name in self.parameter_names(path, tensor) if name in values)


def _under(prefix: str, model: nn.Module) -> nn.Module:
    """A module that holds the model under its base model's prefix, as one with a head of its own would."""
    root = nn.Module()
    root.add_module(prefix, model)
    root.config = getattr(model, "config", None)
    return root


def _labels(model: nn.Module, places: Sequence[Mapping[str, Any]]) -> int | None:
    """The number of labels of a head that an adapter replaces as a whole, where the model's is another one."""
    for place in places:
        if place.get("method", {}).get("name") != "Unfreeze" or place["tensor"] != "weight" or not hasattr(model, "num_labels"):
            continue
        try:
            module = model.get_submodule(place["path"])
        except AttributeError:
            continue
        if isinstance(module, nn.Linear) and module.out_features == model.num_labels != place["shape"][0]:
            return place["shape"][0]
    return None
