"""Reader of adapters for diffusion models: files of kohya, LyCORIS, diffusers and ComfyUI, for UNets, Flux and text encoders.

Names: ``diffusion_names.py``; what factors compute: ``diffusion_updates.py``. diffusers' own files have no alpha a place, and a
scale of 1 unless the notes in the file (``lora_adapter_metadata``) give rank and alpha.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trimtab.compat.diffusion_names import FACTOR_KINDS, Target, Targets, split_key, split_part
from trimtab.compat.diffusion_updates import Tensors, missing_of, parts_of, rows_of
from trimtab.compat.foreign import Filling, ForeignFormat, keys_of, only_file, read_tensors
from trimtab.compat.peft_files import CONFIG, PREFIX, pattern_key
from trimtab.compat.safetensors_file import read_header
from trimtab.core.checkpoint import FORMATS
from trimtab.core.contracts import Adapter
from trimtab.core.errors import CheckpointMismatch, NoMatch, TrimtabError, Unsupported, nearest
from trimtab.core.reading import check_fields, check_pattern, parse_json

__all__ = ["KohyaFile"]

FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
NOTES = "lora_adapter_metadata"


class KohyaFile(ForeignFormat):
    """The format ``"kohya"``, also of LyCORIS, diffusers and ComfyUI."""

    label = "kohya, LyCORIS, diffusers or ComfyUI"

    def test(self, path: Path) -> bool:
        """Whether ``path`` is such a file, or a folder with one."""
        file = None if (path / CONFIG).is_file() else only_file(path, FILES)
        if file is None:
            return False
        keys = keys_of(file)
        known = [found[1] for key in keys if (found := split_key(key)) is not None]
        return any(factor.startswith(FACTOR_KINDS) for factor in known) and not any(key.startswith(PREFIX) for key in keys)

    def read(
        self, root: nn.Module, path: Path, *, trainable: bool = False, part: str | None = None
    ) -> tuple[str, list[Adapter], Tensors]:
        """See ``ForeignFormat``; ``part`` chooses a model's tensors, such as ``"lora_unet"``, where a file has several."""
        file = only_file(path, FILES)
        stored = read_tensors(file)
        every = {name: module for name, module in root.named_modules() if "trimtab" not in name.split(".")}
        places: dict[tuple[str, str], dict[str, str]] = {}
        loose: list[str] = []
        for key in stored:
            found = split_key(key)
            if found is None:
                loose.append(key)
            else:
                places.setdefault(split_part(found[0], every), {})[found[1]] = key
        own = _chosen(file, {p for p, _ in places}, part)
        chosen = {name: keys for (p, name), keys in places.items() if p == own}
        loose = [key for key in loose if split_part(key, every)[0] in ("", own)]
        filling = Filling(root, file, [*(key for keys in chosen.values() for key in keys.values()), *loose])
        targets, scales = Targets(filling.modules), _Scales(file, own)
        for name, keys in chosen.items():
            found = targets.find(name)
            if not found:
                known = [*targets.flat, *targets.flat.values()]
                filling.problems.append(NoMatch(f"{file} acts on {name}, which this model does not have{nearest(name, known)}"))
            _fill(filling, name, found, {factor: stored[key] for factor, key in keys.items()}, keys, scales)
        return file.stem, *filling.finish()


def _chosen(file: Path, parts: set[str], part: str | None) -> str:
    """The model whose tensors are read.

    Raises:
        NoMatch: there is no such one. Unsupported: there are several, and none is chosen.
    """
    if part is not None and part not in parts:
        raise NoMatch(f"{file} has no part {part!r}{nearest(part, parts)}")
    if part is None and len(parts) > 1:
        named = ", ".join(p or "(without a name)" for p in sorted(parts))
        raise Unsupported(f"{file} holds tensors for {len(parts)} models: {named}; choose one: part=... (--part)")
    if not parts:
        raise CheckpointMismatch(f"{file} holds no tensor of an adapter")
    return next(iter(parts)) if part is None else part


def _fill(
    filling: Filling, name: str, targets: list[Target], tensors: dict[str, Tensor], keys: dict[str, str], scales: _Scales
) -> None:
    """The adapters of one place of the file, which may be several modules of the model."""
    for path, rows in targets:
        site = filling.site(path)
        if site is None:
            continue
        try:
            own = tensors if rows is None else rows_of(tensors, *rows, targets[-1][1][1])
            lacking = missing_of(own)
            filling.missing += [f"{site.path}.{factor}" for factor in lacking]
            if lacking:
                continue
            for made in parts_of(own, site, scales.at(name)):
                where = site if made.tensor == "weight" else filling.site(path, made.tensor)
                if where is not None:
                    filling.put(where, made.config, made.ours, [keys[factor] for factor in made.used])
        except TrimtabError as error:
            filling.problems.append(type(error)(f"{filling.source}, {name}: {error}"))


class _Scales:
    """The scales that the notes of diffusers' file say, by place; none where it has no notes.

    Raises:
        CheckpointMismatch: notes that are damaged.
    """

    def __init__(self, file: Path, part: str):
        self.config: dict[str, Any] | None = None
        raw = read_header(file).metadata.get(NOTES) if file.suffix == ".safetensors" else None
        if raw is None:
            return
        source = f"the notes ({NOTES}) of {file}"
        notes = parse_json(raw.encode(errors="surrogatepass"), source)
        if not isinstance(notes, dict):
            raise CheckpointMismatch(f"{source} are no JSON object")
        mine = {key.removeprefix(f"{part}."): value for key, value in notes.items() if not part or key.startswith(f"{part}.")}
        if "r" not in mine:
            return
        check_fields(
            mine,
            {"r": int, "lora_alpha": (int, float), "rank_pattern": dict, "alpha_pattern": dict, "use_rslora": bool},
            source,
        )
        tables = [mine.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
        numbers = [mine.get("lora_alpha", 8), *(value for table in tables for value in table.values())]
        if mine["r"] is None or mine["r"] < 1 or any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
            raise CheckpointMismatch(f"{source} say a rank or an alpha that is no number")
        for pattern in (key for table in tables for key in table):
            check_pattern(pattern, source)
        self.config = mine

    def at(self, name: str) -> float | None:
        """The scale in front of a LoRA at a place, if the notes say it."""
        if self.config is None:
            return None
        values = {}
        for key, default, patterns in (("r", 8, "rank_pattern"), ("lora_alpha", 8, "alpha_pattern")):
            table = self.config.get(patterns) or {}
            values[key] = table.get(pattern_key(table, name, r"(.*\.)?"), self.config.get(key, default))
        rank = max(values["r"], 1)
        return values["lora_alpha"] / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


FORMATS["kohya"] = KohyaFile()
