"""What a peft folder holds beside its adapter's own tensors: whole parameters, copies of the base, rows of tokens.

Each is used as the file has it. A parameter that was trained (``modules_to_save``, ``bias``, norms) becomes a copy that learns
beside the base. A copy of the base (embeddings) is that of this model, to the bit, and then nothing is to do; or it is another
one, and acts in the base's place. peft finds ``modules_to_save`` by the end of the path, so that ``norm`` is
``input_layernorm``, too: what the file lacks of what peft's rule would ask for is missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.compat.peft_files import CONFIG, NORMS, saved_by
from trimtab.compat.peft_names import DELTA, Stored
from trimtab.core.bank import shapes_only
from trimtab.core.contracts import MethodConfig
from trimtab.core.errors import CheckpointMismatch, ShapeMismatch, TrimtabError, Unsupported
from trimtab.core.kinds import site_for
from trimtab.core.registry import get
from trimtab.core.site import Cohort, is_quantised
from trimtab.core.state import parameter_users

if TYPE_CHECKING:
    from trimtab.compat.peft_read import Reader

__all__ = ["Whole"]


class Whole:
    """The entries of a folder that are no adapter's tensors.

    Args:
        reader: gets adapters, values and problems.
        entries: whose paths its layout has resolved.
    """

    def __init__(self, reader: Reader, entries: list[Stored]):
        self.reader, self.config, self.entries = reader, reader.config, entries
        self.users = parameter_users(reader.root) if entries else {}
        self.seen: set[tuple[str, str]] = set()
        self.rows: set[str] = set()
        #: (tied tensor, tokens) -> their rows, and what their adapters share
        self.tied: dict[tuple, tuple[Tensor, Cohort]] = {}
        self.below: list = []

    def finish(self) -> None:
        """Use all of them, and note what is missing."""
        for entry in self.entries:
            path = self.reader.layout.found[entry.path]
            if entry.tail == DELTA:
                self._rows(entry, path)
            elif entry.tail != "trainable_tokens_original":
                self._whole(entry, path)
        self.reader.adapters[:0] = self.below  # a copy of the base acts below what adapts it
        self._missing()
        self._refuse_apart()

    def _refuse_apart(self) -> None:
        """Ends of a tie that peft trains as one tensor, and that would learn apart here."""
        if not (self.reader.trainable and self.config.get("ensure_weight_tying")):
            return
        ends: dict[int, list[str]] = {}
        for adapter in self.reader.adapters:
            if adapter.site.tensor and not adapter.whole_ties:
                ends.setdefault(id(adapter.site.parameter()), []).append(adapter.site.path)
        for paths in ends.values():
            if len(set(paths)) > 1:
                self.reader.problems.append(
                    Unsupported(
                        f"{self.reader.folder / CONFIG} says ensure_weight_tying, and {' and '.join(sorted(set(paths)))} would "
                        "learn apart here; load it with trainable=False, or train one of them with tt.TokenRows"
                    )
                )

    def _whole(self, entry: Stored, path: str) -> None:
        """A parameter of the model."""
        reader, module = self.reader, self.reader.modules[path]
        base = module._parameters.get(entry.tail)
        self.seen.add((path, entry.tail))
        if base is None:
            self._buffer(entry, path, module._buffers.get(entry.tail))
            return
        site = site_for(reader.place(path), entry.tail)
        if tuple(entry.value.shape) != self._shape(site, base):
            reader.problems.append(self._misfit(entry, path, self._shape(site, base)))
            return
        saved = entry.origin == "saved" and (saved_by(self.config, entry.path) or entry.tail == "bias" or self._norms)
        if not saved and not base.is_meta and not is_quantised(base) and torch.equal(entry.value.to(base), base.detach()):
            return
        ends = [(path, entry.tail)]
        if not saved:  # peft loads it into the base, which all ends share
            ends += [end for end in self._ends(base) if end not in ends]
        adapted = f"{path}.{site.slot}." if any(a.site.path == path and a.site.slot == site.slot for a in reader.adapters) else ""
        for where, tensor in ends:
            self._put(where, tensor, self._method(entry.tail, beneath=bool(adapted) or where != path), entry.value)

    @property
    def _norms(self) -> bool:
        return self.config["peft_type"] == NORMS

    def _method(self, tail: str, *, beneath: bool) -> MethodConfig:
        """How a whole parameter learns here."""
        if self._norms:
            return get("NormTuning")()
        biases = self.config.get("bias") or "none"
        if tail == "bias" and biases != "none":
            return get("BitFit")()
        return get("Unfreeze")(beneath=True) if beneath else get("Unfreeze")()

    def _put(self, path: str, tensor: str, method: MethodConfig, value: Tensor) -> None:
        reader = self.reader
        site = site_for(reader.place(path), tensor)
        site.layer = type(method).adapter_class.layer(method)
        stored = site.matrix(value)
        key = f"{path}.{site.slot}.value"
        if key in reader.values:
            if not torch.equal(reader.values[key], stored):
                reader.problems.append(CheckpointMismatch(f"{reader.folder} has two values for {path}.{tensor}"))
            return
        adapter = shapes_only(method, site, reader.rng)
        (self.below if site.layer else reader.adapters).append(adapter)
        reader.values[key] = stored

    def _ends(self, base: Tensor) -> list[tuple[str, str]]:
        """(path, parameter) of all that share a tensor."""
        return [(name.rpartition(".")[0], name.rpartition(".")[2]) for name in self.users.get(id(base), ())]

    def _shape(self, site: Any, base: Tensor) -> tuple[int, ...]:
        """The dense shape of a parameter as a file has it."""
        if not is_quantised(base):
            return tuple(base.shape)
        return tuple(reversed(site.shape)) if getattr(site, "transposed", False) else tuple(site.shape)

    def _misfit(self, entry: Stored, path: str, wanted: tuple[int, ...]) -> TrimtabError:
        module = self.reader.modules[path]
        there = f"{entry.key} is {tuple(entry.value.shape)} in {self.reader.folder}, {wanted} in this model"
        rows = len(entry.value) if entry.value.dim() else 0
        if isinstance(module, nn.Embedding) or self.reader.anatomy.roles.get(path) == "head" and entry.origin == "base":
            return ShapeMismatch(
                f"{there}: the vocabulary was resized before training; call model.resize_token_embeddings({rows}) and load it again"
            )
        return ShapeMismatch(f"{there}; load the base it was trained on (for a classifier: with as many labels)")

    def _buffer(self, entry: Stored, path: str, buffer: Tensor | None) -> None:
        """A buffer of the base, which an adapter cannot hold."""
        if buffer is None:
            self.reader.unused.append(entry.key)
            return
        equal = not buffer.is_meta and buffer.shape == entry.value.shape and torch.equal(entry.value.to(buffer), buffer)
        if not equal:
            self.reader.problems.append(
                Unsupported(
                    f"{self.reader.folder} also holds {entry.key}, a buffer of the model (running statistics, say) with other "
                    "values than this model's, which no adapter replaces; copy it into the base before loading the adapter"
                )
            )

    # -- rows of tokens

    def _rows(self, entry: Stored, path: str) -> None:
        reader = self.reader
        indices = self._indices(entry.path)
        if indices is None or len(indices) != len(entry.value):
            reader.problems.append(
                CheckpointMismatch(
                    f"{reader.folder} holds {len(entry.value)} rows of tokens for {path}, and {CONFIG} names "
                    f"{'none' if indices is None else len(indices)}"
                )
            )
            return
        base = reader.modules[path]._parameters.get("weight")
        if base is None:
            reader.problems.append(Unsupported(f"{reader.folder}: {path} is no table with a row a token"))
            return
        self.rows.add(path)
        ends = [(path, "weight"), *(end for end in self._ends(base) if end != (path, "weight"))]
        own = self._delta_paths()
        value, cohort = self.tied.setdefault((id(base), tuple(indices)), (entry.value, Cohort()))
        if not torch.equal(value, entry.value):  # both ends are in the file, and learnt apart
            value, cohort = entry.value, Cohort()
        for where, tensor in [end for end in ends if end[0] == path or end[0] not in own]:
            try:
                method = get("TokenRows")(tuple(indices))
                site = site_for(reader.place(where), tensor)
                site.layer, site.cohort = type(method).adapter_class.layer(method), cohort
                type(method).adapter_class.check(method, site)
            except TrimtabError as error:
                reader.problems.append(type(error)(f"{reader.folder}, {where}: {error}"))
                continue
            if entry.value.shape[1] != (width := site.shape[0 if site.kind == "embedding" else 1]):
                reader.problems.append(
                    ShapeMismatch(f"{entry.key} has rows of {entry.value.shape[1]}, and {where}'s are {width} wide")
                )
                continue
            reader.adapters.append(shapes_only(method, site, reader.rng))
            reader.values[f"{where}.{site.slot}.value"] = value

    def _delta_paths(self) -> set[str]:
        return {self.reader.layout.found[e.path] for e in self.entries if e.tail == DELTA}

    def _indices(self, path: str) -> list[int] | None:
        """The tokens that the config names for the module that the file calls ``path``."""
        named = self.config.get("trainable_token_indices") or self.config.get("token_indices")
        if not isinstance(named, dict):
            return named
        return next((ids for key, ids in named.items() if path == key or path.endswith(key)), None)

    # -- what should be there

    def _missing(self) -> None:
        reader = self.reader
        for path, module in reader.modules.items():
            theirs = reader.layout.file_path(path)
            if not path or not (saved_by(self.config, theirs) or self._norms and self._tuned(theirs, path)):
                continue
            reader.missing += [
                f"{path}.{tensor}" for tensor, base in module._parameters.items()
                if base is not None and (path, tensor) not in self.seen
            ]  # fmt: skip
        reader.missing += [
            f"{name}.bias" for name, module in reader.modules.items()
            if module._parameters.get("bias") is not None and (name, "bias") not in self.seen and self._biased(name)
        ]  # fmt: skip
        if self._named_rows() and not self.rows:
            reader.missing.append(f"*.token_adapter.{DELTA}")

    def _biased(self, path: str) -> bool:
        """Whether the config says that the bias at ``path`` was trained."""
        which = self.config.get("bias") or "none"
        return which == "all" or which.endswith("_only") and any(a.site.path == path for a in self.reader.adapters)

    def _named_rows(self) -> bool:
        return bool(self.config.get("trainable_token_indices") or self.config.get("token_indices"))

    def _tuned(self, theirs: str, path: str) -> bool:
        """Whether the config of norms says that the module is one, or the file has a part of it."""
        from trimtab.compat.peft_files import targeted

        return targeted(self.config, theirs) or any(where == path for where, _ in self.seen)
