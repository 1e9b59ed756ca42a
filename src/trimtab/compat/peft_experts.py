"""LoRA on banks of experts, in the four layouts that files have, onto parameters (experts, out, in) or (experts, in, out).

============================  =====================================  =======================  ======================
who                           names below the module of the experts  A                        B
============================  =====================================  =======================  ======================
peft, ``target_parameters``   ``base_layer. ... .lora_A.weight``     (experts r, in)          (out, r experts)
vLLM's stack of three axes    the same                               (experts, r, in)         (out, r, experts)
SGLang                        ``<parameter>.lora_A.weight``          (experts or 1, c r, in)  (experts or 1, out, r)
one by one                    ``<expert>.<matrix>.lora_A.weight``    (r, in)                  (out, r)
============================  =====================================  =======================  ======================

peft wraps a module once a targeted parameter, in the module's own order, the first innermost. One of 1 expert is shared by all.
Matrices that transformers joins (gate and up) each bring their own A: together they are a LoRA of the ranks' sum with B block by
block.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.compat.peft_files import CONFIG, report
from trimtab.compat.peft_names import Stored
from trimtab.compat.peft_twins import LORA
from trimtab.core.bank import shapes_only
from trimtab.core.contracts import MethodConfig
from trimtab.core.errors import CheckpointMismatch, ShapeMismatch, TrimtabError, Unsupported
from trimtab.core.kinds import site_for
from trimtab.core.registry import get
from trimtab.core.selection import Place
from trimtab.core.site import Site

if TYPE_CHECKING:
    from trimtab.compat.peft_read import Reader

__all__ = ["Experts", "targeted_parameters"]

_A, _B = "lora_A.weight", "lora_B.weight"
_ONE = re.compile(r"^(?P<owner>.*)\.(?P<expert>\d+)\.(?P<leaf>[^.]+)$")
Pair = dict[str, Tensor]


def targeted_parameters(config: dict[str, Any], path: str, names: list[str]) -> list[str]:
    """Which of a module's parameters peft's ``target_parameters`` mean, in the module's order."""
    wanted = config.get("target_parameters") or []
    return [name for name in names if any(f"{path}.{name}" == w or f"{path}.{name}".endswith(f".{w}") for w in wanted)]


class Experts:
    """The entries of a folder that act on parameters and not on modules.

    Attributes:
        paths: modules that it found them for.
    """

    def __init__(self, reader: Reader):
        self.reader, self.config = reader, reader.config
        self.paths: set[str] = set()
        #: (path, parameter) -> (scale of the update, the file's path, tail -> tensor)
        self.found: dict[tuple[str, str], tuple[str, Pair]] = {}
        #: (path, parameter) -> position in the joined matrix -> expert -> tail -> tensor
        self.single: dict[tuple[str, str], dict[int, dict[int, Pair]]] = {}
        self.theirs: dict[tuple[str, str], str] = {}

    def take(self, entries: list[Stored]) -> list[Stored]:
        """Entries whose path is a parameter's, or an expert's that this model keeps in a bank; returns the others."""
        rest = []
        for e in entries:
            if e.origin != "adapter" or e.tail not in (_A, _B) or self.reader.layout.one(e.path) is not None:
                rest.append(e)
            elif not (self._parameter(e) or self._expert(e)):
                rest.append(e)
        return rest

    def take_parameters(self, entries: list[Stored]) -> list[Stored]:
        """Entries at modules of which parameters are targeted, or that hold a bank; returns the others."""
        reader, mine = self.reader, {}
        for e in entries:
            path = reader.layout.found[e.path]
            module = reader.modules[path]
            names = [n for n, p in module._parameters.items() if p is not None]
            wanted = targeted_parameters(self.config, e.path, names)
            banks = [n for n in names if module._parameters[n].dim() == 3]
            if e.origin == "adapter" and e.tail in (_A, _B) and (wanted or e.depth or (banks and "weight" not in names)):
                mine.setdefault(path, (e.path, wanted, banks, []))[3].append(e)
        for path, (theirs, wanted, banks, found) in mine.items():
            self._wrapped(path, theirs, wanted or banks, found)
        taken = {e.key for _, _, _, found in mine.values() for e in found}
        return [e for e in entries if e.key not in taken]

    def _wrapped(self, path: str, theirs: str, names: list[str], found: list[Stored]) -> None:
        depths = sorted({e.depth for e in found})
        if depths != list(range(len(names))):
            self.reader.problems.append(
                CheckpointMismatch(
                    f"{self.reader.folder} adapts {len(depths)} parameters of {path}, and "
                    + (f"{CONFIG} names {', '.join(names)}" if self.config.get("target_parameters") else
                       f"the module has {', '.join(names) or 'none'}")
                    + "; add the target_parameters that it was trained with"
                )
            )  # fmt: skip
            return
        for e in found:
            key = path, names[len(names) - 1 - e.depth]
            self.theirs[key] = f"{theirs}.{key[1]}"
            self.found.setdefault(key, (theirs, {}))[1][e.tail] = e.value

    def _parameter(self, e: Stored) -> bool:
        """SGLang's: the parameter's own name in the path."""
        owner, _, name = e.path.rpartition(".")
        path = self.reader.layout.one(owner)
        value = None if path is None else self.reader.modules[path]._parameters.get(name)
        if value is None or e.value.dim() != 3:
            return False
        key = path, name
        self.theirs[key] = e.path
        self.found.setdefault(key, (e.path, {}))[1][e.tail] = e.value
        return True

    def _expert(self, e: Stored) -> bool:
        """One expert's matrix, by transformers' own table of what it stacks and joins."""
        match = _ONE.match(e.path)
        path = None if match is None else self.reader.layout.one(match["owner"])
        if path is None:
            return False
        from trimtab.compat.weight_names import stacked

        found = stacked(self.reader.root, f"{path}.{match['expert']}.{match['leaf']}.weight")
        found = found or stacked(self.reader.root, f"{e.path}.weight")
        if found is None:
            return False
        name, position, plain = found
        owner, _, tensor = name.rpartition(".")
        if owner not in self.reader.modules or self.reader.modules[owner]._parameters.get(tensor) is None:
            return False
        if not plain:
            self.reader.problems.append(
                Unsupported(
                    f"{self.reader.folder} adapts {e.path}, which transformers turns while it stacks; merge it in peft instead"
                )
            )
            return True
        key = owner, tensor
        self.theirs[key] = e.path
        self.single.setdefault(key, {}).setdefault(position, {}).setdefault(int(match["expert"]), {})[e.tail] = e.value
        return True

    def finish(self) -> None:
        """Make the adapters."""
        for key, (_, pair) in self.found.items():
            self._adapter(key, lambda site, pair=pair: _stacked(site, pair))
        for key, parts in self.single.items():
            self._adapter(key, lambda site, parts=parts: _joined(site, parts))
        layout, named = self.reader.layout, self.config.get("target_parameters") or []
        for path, module in self.reader.modules.items() if named else ():
            names = targeted_parameters(self.config, layout.file_path(path), list(module._parameters))
            self.reader.missing += [f"{path}.{name}.lora_*" for name in names if (path, name) not in self.theirs]
        known = [f".{theirs}" for theirs in self.theirs.values()] + [f".{path}.{name}" for path, name in self.theirs]
        self.reader.missing += [f"*.{name}.lora_*" for name in named if not any(k.endswith(f".{name}") for k in known)]

    def _adapter(self, key: tuple[str, str], factors: Any) -> None:
        reader, (path, name) = self.reader, key
        self.paths.add(path)
        place = reader.place(path)
        site = site_for(Place(path, place.module, tensor=name, role=place.role, block=place.block), name)
        try:
            if reader.twin is not LORA:
                raise Unsupported(f"a bank of experts under {reader.twin.peft_type}; trimtab reads LoRA there")
            a, b = factors(site)
            config = self._method(site, a, self.theirs[key])
        except TrimtabError as error:
            reader.problems.append(type(error)(f"{reader.folder}, {path}.{name}: {error}"))
            return
        reader.adapters.append(shapes_only(config, site, reader.rng))
        reader.values[f"{path}.{site.slot}.a"] = a.contiguous()
        reader.values[f"{path}.{site.slot}.b"] = b.contiguous()

    def _method(self, site: Site, a: Tensor, theirs: str) -> MethodConfig:
        """The LoRA with the scale that the config tells."""
        fields = self.reader.twin.at(self.config, theirs)
        if fields["use_dora"]:
            raise Unsupported("DoRA of a bank of experts")
        rank = a.shape[-2]
        if rank % fields["r"]:
            raise CheckpointMismatch(f"A has {rank} rows an expert, which is no multiple of the config's r={fields['r']}")
        plain = LORA.read(fields, {})
        if rank == fields["r"]:
            return plain
        return get("LoRA")(rank=rank, alpha=plain.scale * rank, dropout=fields["lora_dropout"])


def _pair(pair: Pair) -> tuple[Tensor, Tensor]:
    if set(pair) != {_A, _B}:
        table = report(sorted(pair), sorted({_A, _B} - set(pair)), [])
        raise CheckpointMismatch(f"a pair of factors is not whole:\n{table}")
    return pair[_A], pair[_B]


def _stacked(site: Site, pair: Pair) -> tuple[Tensor, Tensor]:
    """(experts, r, in) and (experts, out, r), or without experts for one matrix, from peft's, vLLM's or SGLang's tensors."""
    a, b = _pair(pair)
    if len(site.shape) == 2:
        _check(site, a, b)
        return a, b
    experts, out, fan_in = site.shape
    if a.dim() == 2 and b.dim() == 2:
        if a.shape[0] % experts or b.shape[1] % experts:
            raise ShapeMismatch(f"A {tuple(a.shape)} and B {tuple(b.shape)} do not divide into {experts} experts")
        a = a.reshape(experts, -1, a.shape[1])
        b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
    elif a.dim() == 3 and b.dim() == 3 and b.shape[0] == out and b.shape[2] in (experts, 1) and b.shape[1] != out:
        b = b.permute(2, 0, 1)
    if a.dim() != 3 or b.dim() != 3:
        raise ShapeMismatch(f"A {tuple(a.shape)} and B {tuple(b.shape)} are no factors of {tuple(site.shape)}")
    a, b = (v.expand(experts, *v.shape[1:]) if v.shape[0] == 1 else v for v in (a, b))
    if b.shape[2] != a.shape[1] and a.shape[1] % max(b.shape[2], 1) == 0 and out % (parts := a.shape[1] // b.shape[2]) == 0:
        b = _blocks(list(b.split(out // parts, dim=1)))  # one A a joined matrix, one below the other
    _check(site, a, b)
    return a, b


def _joined(site: Site, parts: dict[int, dict[int, Pair]]) -> tuple[Tensor, Tensor]:
    """The same from the factors of single experts."""
    experts = site.shape[0]
    rows, columns = [], []
    for position in range(max(parts) + 1):
        lacking = [i for i in range(experts) if i not in parts.get(position, {})]
        if lacking:
            raise CheckpointMismatch(
                f"the file lacks factors of the expert {lacking[0]}" + f" and {len(lacking) - 1} more" * (len(lacking) > 1)
                + ", and this model keeps all in one tensor"
            )  # fmt: skip
        pairs = [_pair(parts[position][i]) for i in range(experts)]
        rows.append(torch.stack([a for a, _ in pairs]))
        columns.append(torch.stack([b for _, b in pairs]))
    a, b = torch.cat(rows, dim=1), _blocks(columns)
    _check(site, a, b)
    return a, b


def _blocks(parts: list[Tensor]) -> Tensor:
    """(experts, out_i, r) of several matrices -> (experts, sum of out_i, sum of r), each in its own block."""
    return torch.stack([torch.block_diag(*each) for each in zip(*parts, strict=True)])


def _check(site: Site, a: Tensor, b: Tensor) -> None:
    *experts, out, fan_in = site.shape
    if tuple(a.shape) != (*experts, a.shape[-2], fan_in) or tuple(b.shape) != (*experts, out, a.shape[-2]):
        raise ShapeMismatch(
            f"A {tuple(a.shape)} and B {tuple(b.shape)} are no factors of {tuple(site.shape)}; load the base it was trained on"
        )
