"""The names of a peft file's tensors: what wrappers and versions have put into them, and which module of this model is meant.

A name is ``<path>.<tail>``. Wrappers that torch and accelerate put around modules leave their own words in the path, peft's adapter
name may stand in the tail, and the path is that of the model as it was when the file was written: as a bare backbone, or before
transformers moved a layout. What a path means here is found in this order: as it stands; through transformers' own table of
renamings; below the base model's prefix, or without it; with one common prefix more or less, if exactly one fits all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trimtab.compat.peft_files import PREFIX
from trimtab.core.errors import CheckpointMismatch, NoMatch, nearest

__all__ = ["DELTA", "Layout", "Stored", "split"]

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
#: the rows that peft's trainable tokens hold
DELTA = "trainable_tokens_delta"
_COPIES = ("modules_to_save", "ln_tuning_layers")
_LEVEL = re.compile(r"(\.base_layer)+$")


@dataclass
class Stored:
    """One tensor of the file.

    Attributes:
        key: its name there.
        path: of the module in the model that it was written from.
        tail: the adapter's own name of it (``lora_A.weight``), or the parameter's.
        value: the tensor.
        depth: how many wrappers of parameters stand between the module and this one.
        origin: ``"adapter"``; ``"saved"``, a parameter that was trained whole; ``"base"``, a copy of the base's; ``"shared"``, of
            all places.
    """

    key: str
    path: str
    tail: str
    value: Tensor
    depth: int = 0
    origin: str = "adapter"


def split(tensors: Mapping[str, Tensor], tails: Collection[str], folder: Path) -> list[Stored]:
    """The tensors of a file by module and tail.

    Args:
        tails: names that the adapter's own tensors end in, such as ``lora_A.weight``.

    Raises:
        CheckpointMismatch: it holds the tensors of several adapters.
    """
    firsts = sorted({tail.partition(".")[0] for tail in tails} | {DELTA, "trainable_tokens_original"}, key=len, reverse=True)
    named = re.compile(rf"(.*\.(?:{'|'.join(map(re.escape, firsts))}))\.(?!(?:weight|bias)$)([^.]+)((?:\.weight|\.bias)?)$")
    found, adapters = [], set()
    for key, value in tensors.items():
        plain = ".".join(word for word in key.split(".") if word not in _WRAPPERS)
        plain = plain.removeprefix("module.") if plain.startswith("module.base_model.") else plain
        plain = plain.removeprefix(PREFIX)
        plain, name = _without_adapter(plain, named)
        adapters.add(name)
        if plain.endswith(".lora_magnitude_vector.weight"):
            plain = plain.removesuffix(".weight")
        tail = max((t for t in tails if plain.endswith(f".{t}") or plain == t), key=len, default=None)
        if plain.startswith("base_model."):  # of no module: what all places share
            found.append(Stored(key, "base_model", plain.removeprefix("base_model."), value, origin="shared"))
        else:
            found.append(_adapter_tensor(key, plain, tail, value) if tail is not None else _other(key, plain, value))
    if len(adapters - {None}) > 1:
        names = ", ".join(sorted(filter(None, adapters)))
        raise CheckpointMismatch(f"{folder} holds the tensors of several adapters ({names}); save them one a folder")
    seen: dict[tuple, str] = {}
    for entry in found:
        mark = entry.path, entry.tail, entry.depth, entry.origin
        if seen.setdefault(mark, entry.key) != entry.key:
            raise CheckpointMismatch(f"{folder} holds {seen[mark]} and {entry.key}, which are one tensor by two names")
    return found


def _without_adapter(plain: str, named: re.Pattern[str]) -> tuple[str, str | None]:
    """The name without the adapter's, and the adapter's."""
    match = named.match(plain)
    if match is not None:
        return match[1] + match[3], match[2]
    words = plain.split(".")
    for copy in _COPIES:
        at = words.index(copy) if copy in words else -1
        if at >= 0 and (copy == "modules_to_save" or len(words) > at + 2):
            return ".".join([*words[: at + 1], *words[at + 2 :]]), words[at + 1]
    return plain, None


def _adapter_tensor(key: str, plain: str, tail: str, value: Tensor) -> Stored:
    path = plain.removesuffix(tail).removesuffix(".")
    level = _LEVEL.search(path)
    depth = 0 if level is None else level[0].count("base_layer")
    return Stored(key, path[: level.start()] if level else path, tail, value, depth)


def _other(key: str, plain: str, value: Tensor) -> Stored:
    """A parameter of the model, or the rows of tokens."""
    path, _, tail = plain.rpartition(".")
    if tail in (DELTA, "trainable_tokens_original"):
        path = path.removesuffix(".token_adapter")
        return Stored(key, path, tail, value, origin="adapter" if tail == DELTA else "base")
    origin = "saved"
    for word in ("base_layer", "original_module", "token_adapter"):
        if f".{word}" in path:
            path, origin = path.replace(f".{word}", ""), "base"
    for copy in _COPIES:
        path = path.replace(f".{copy}", "")
    return Stored(key, path, tail, value, origin=origin)


@dataclass
class Layout:
    """From the paths of a file to those of this model.

    Attributes:
        modules: the model's, by path.
        found: the file's path -> the model's, for all that were asked for.
    """

    root: nn.Module
    modules: Mapping[str, nn.Module]
    found: dict[str, str] = field(default_factory=dict)

    def one(self, path: str) -> str | None:
        """The module that one path means; a common prefix is not tried."""
        if path in self.modules:
            return path
        return next((to for way in self._ways([]) if (to := way(path)) in self.modules), None)

    def resolve(self, paths: Iterable[str], source: str) -> None:
        """Fill ``found``.

        Raises:
            NoMatch: a path that means no module here.
            CheckpointMismatch: two that mean the same one.
        """
        paths = list(dict.fromkeys(paths))
        left = [path for path in paths if path not in self.modules]
        self.found.update({path: path for path in paths if path in self.modules})
        for way in self._ways(left):
            hits = {path: to for path in left if (to := way(path)) in self.modules}
            self.found.update(hits)
            left = [path for path in left if path not in hits]
        if left:
            more = f" and {len(left) - 3} more" * (len(left) > 3)
            known = [p for p in self.modules if p]
            raise NoMatch(f"{source} acts on {', '.join(left[:3])}{more}, which this model does not have{nearest(left[0], known)}")
        seen: dict[str, str] = {}
        for path in paths:
            if seen.setdefault(self.found[path], path) != path:
                both = f"{seen[self.found[path]]} and {path}"
                raise CheckpointMismatch(f"{source}: {both} both mean {self.found[path]} in this model")

    def _ways(self, left: list[str]) -> Iterable[Callable[[str], str]]:
        yield lambda path: path.removeprefix("module.")
        moved = _moved(self.root)
        yield moved
        yield lambda path: moved(path.removeprefix("module."))
        prefix = getattr(self.root, "base_model_prefix", "")
        if prefix:
            yield lambda path: f"{prefix}.{path}"
            yield lambda path: path.removeprefix(f"{prefix}.")
            yield lambda path: moved(f"{prefix}.{path}")
        left = [path for path in left if path not in self.found]
        shifts = self._shifts(left)
        if len(shifts) == 1:
            yield shifts[0]

    def _shifts(self, left: list[str]) -> list[Callable[[str], str]]:
        """Prefixes more, or less, with which all of ``left`` are modules."""
        if not left:
            return []
        first = left[0]
        more = {p.removesuffix(first) for p in self.modules if p.endswith(f".{first}")}
        words = first.split(".")
        less = {".".join(words[:i]) + "." for i in range(1, len(words)) if ".".join(words[i:]) in self.modules}
        ways = [lambda path, p=p: p + path for p in sorted(more)]
        ways += [lambda path, p=p: path.removeprefix(p) if path.startswith(p) else "?" for p in sorted(less)]
        return [way for way in ways if all(way(path) in self.modules for path in left)]

    def file_path(self, path: str) -> str:
        """What the file would call the module at ``path``: the inverse, by the longest prefix that is known to have changed."""
        best = ("", "")
        for old, new in self.changes():
            if (path == new or path.startswith(f"{new}.") or not new) and len(new) >= len(best[1]):
                best = old, new
        old, new = best
        rest = path.removeprefix(new).removeprefix(".")
        return ".".join(filter(None, (old, rest)))

    def changes(self) -> set[tuple[str, str]]:
        """(prefix in the file, prefix here) of all paths that differ."""
        pairs = set()
        for old, new in self.found.items():
            if old == new:
                continue
            a, b = old.split("."), new.split(".")
            while a and b and a[-1] == b[-1]:
                a.pop(), b.pop()
            pairs.add((".".join(a), ".".join(b)))
        return pairs


def _moved(root: nn.Module) -> Callable[[str], str]:
    """transformers' own renaming of older names of this model's modules."""
    from trimtab.compat.weight_names import renamed_path

    rename: Any = renamed_path(root)
    return rename
