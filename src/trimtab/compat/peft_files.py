"""The two files of a peft adapter folder, and the rules by which peft's configs name modules."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.compat.tensor_files import SUFFIXES
from trimtab.compat.tensor_files import read_tensors as read_stored
from trimtab.core.errors import CheckpointMismatch, Unsupported
from trimtab.core.files import sweep
from trimtab.core.folders import DRAFT, renewed, tensors_in, waiting, writing
from trimtab.core.reading import check_fields, check_pattern, listed, read_json

__all__ = [
    "CONFIG",
    "METADATA",
    "NORMS",
    "NORM_COPY",
    "PREFIX",
    "TENSORS",
    "factor_places",
    "others_config",
    "pattern_key",
    "read_config",
    "read_tensors",
    "report",
    "saved_by",
    "targeted",
    "write_folder",
]

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
#: in the tensors' file, the sample of the base that trimtab took
METADATA = "trimtab_base"
#: the types of the fields that peft's configs share, or that decide a function; what they say is another question
FIELDS = {
    **dict.fromkeys(("r", "decompose_factor", "n_frequency", "num_virtual_tokens", "oft_block_size", "boft_block_size"), int),
    **dict.fromkeys(
        ("lora_alpha", "alpha", "lora_dropout", "module_dropout", "rank_dropout", "scaling", "d_initial"), (int, float)
    ),
    **dict.fromkeys(
        ("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode", "decompose_both", "lora_bias", "save_projection"), bool
    ),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), dict),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), (list, str)),
    **dict.fromkeys(("modules_to_save", "feedforward_modules"), list),
    **dict.fromkeys(("bias", "task_type", "peft_type", "base_model_name_or_path", "revision"), str),
    **dict.fromkeys(("target_parameters", "token_indices"), list),
    "trainable_token_indices": (list, dict), "ensure_weight_tying": bool, "layers_to_transform": (list, int),
    "init_lora_weights": (bool, str), "init_weights": (bool, str),
}  # fmt: skip
#: the peft type of which only norms learn, and, below a norm's path, the name of the copy that it trains
NORMS = "LN_TUNING"
NORM_COPY = "ln_tuning_layers"


def read_config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json``.

    Raises:
        CheckpointMismatch: it is no JSON object, or names no peft type.
    """
    file = folder / CONFIG
    config = read_json(file)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise CheckpointMismatch(f"{file} is not a peft config: it names no peft_type")
    check_fields(config, FIELDS, str(file))
    for key, kind in (("rank_pattern", list if config["peft_type"] == "ADALORA" else int), ("alpha_pattern", (int, float))):
        table = config.get(key) or {}
        check_fields(table, dict.fromkeys(table, kind), f"{key} in {file}")
        for pattern in table:
            check_pattern(pattern, str(file))
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "feedforward_modules"):
        names = config.get(key)
        if isinstance(names, str):
            check_pattern(names, str(file))
        if isinstance(names, list) and not all(isinstance(name, str) for name in names):
            raise CheckpointMismatch(f"{file} says {key}={names!r}, where names are needed")
        for pattern in names if isinstance(names, list) and key in ("modules_to_save", "layers_pattern") else ():
            check_pattern(pattern, str(file))
    rows = config.get("trainable_token_indices")
    if isinstance(rows, dict):
        check_fields(rows, dict.fromkeys(rows, list), f"trainable_token_indices in {file}")
    return config


def others_config(folder: Path) -> bool:
    """Whether the config in ``folder`` is adapter-hub's, or stands beside torchtune's own file alone."""
    if any(folder.glob("adapter_*.pt")) and not any((folder / name).is_file() for name in (TENSORS, PICKLE)):
        return True
    try:
        config = read_json(folder / CONFIG)
    except CheckpointMismatch:  # the reader of peft's folders says what is wrong
        return False
    hub_or_mlx = isinstance(config, dict) and any(isinstance(config.get(key), dict) for key in ("config", "lora_parameters"))
    return hub_or_mlx and "peft_type" not in config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors, fp16 and bf16 ones as float32 (as peft loads them), without peft's and compile's prefixes.

    Raises:
        CheckpointMismatch: there is no such file, or it is damaged.
    """
    file = folder / TENSORS
    if not file.is_file():
        file = folder / PICKLE
    if not file.is_file():
        inside = listed(p.name for p in folder.iterdir())
        raise CheckpointMismatch(f"{folder} is no whole peft adapter: it lacks {TENSORS} (found: {inside})")
    _refuse_others(folder, file)
    return {key.replace("_orig_mod.", "").removeprefix(PREFIX): value for key, value in read_stored(file).items()}


#: files of tensors beside an adapter that say nothing of what it computes: a trainer's own state, and the base itself
_STATE = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|random_states|training_args|adapter_model|model-\d+-of-|pytorch_model-\d+-of-).*"
)


def _refuse_others(folder: Path, file: Path) -> None:
    """Whatever else was trained and stands beside the adapter would be left out without a word.

    Raises:
        Unsupported: there is such a file, as LLaVA's ``non_lora_trainables.bin`` or a value head.
    """
    beside = [p for p in folder.iterdir() if p.suffix in SUFFIXES and p != file]
    others = sorted(p.name for p in beside if not _STATE.fullmatch(p.name))
    if others:
        raise Unsupported(
            f"{folder} holds {', '.join(others)} beside the adapter, which may have been trained with it (a projector, a value "
            "head) and which peft's form does not know; put what it holds into the base, and move it elsewhere"
        )


#: names of a layer's two factors -> kind of the layer; shapes (r, in) and (out, r)
_FACTORS = {
    ("lora_A.weight", "lora_B.weight"): "linear",
    ("lora_A", "lora_B"): "linear",
    ("lora_embedding_A", "lora_embedding_B"): "embedding",
}


def factor_places(folder: Path, tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Entries as a manifest's for the layers that low-rank factors name: path, kind and shape (out, in).

    Raises:
        Unsupported: a tensor that belongs to no pair of matrices, such as a kernel or a saved module.
    """
    places = []
    left = set(tensors)
    for (first, second), kind in _FACTORS.items():
        for key in sorted(k for k in tensors if k.endswith(f".{first}")):
            path = key.removesuffix(f".{first}")
            a, b = tensors[key], tensors.get(f"{path}.{second}")
            if b is not None and a.dim() == b.dim() == 2:
                places.append({"path": path, "tensor": "weight", "kind": kind, "shape": [b.shape[0], a.shape[1]]})
                left -= {k for k in left if k.startswith(f"{path}.") and k.removeprefix(f"{path}.").startswith("lora_")}
    if left:
        more = f" and {len(left) - 1} more" * (len(left) > 1)
        raise Unsupported(f"{folder} holds {min(left)}{more}, which does not tell its layer; say which base it is for: base=...")
    return places


def write_folder(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], *, base: dict[str, Any] | None = None
) -> Path:
    """Write both files so that no interruption mixes old and new ones, whoever reads them.

    For an equal config the tensors' file alone is replaced; otherwise a new folder takes the old one's place in one step. What
    else is in the folder stays there. Two writers come one after the other.

    Args:
        base: a sample of the base's weights, which goes into the metadata of the tensors' file.

    Raises:
        WriteError: a full disk, a read-only folder.
    """
    folder = folder.resolve()
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    more = {} if base is None else {METADATA: json.dumps(base, sort_keys=True)}
    tensors = {key: value.detach().to("cpu").contiguous().clone() for key, value in tensors.items()}
    with writing(folder), waiting(folder, "saves"):
        sweep(folder)
        sweep(folder / DRAFT)
        if (folder / CONFIG).is_file() and (folder / CONFIG).read_bytes() == text.encode() and (folder / TENSORS).is_file():
            with tensors_in(folder, tensors, **more) as draft:
                os.replace(draft, folder / TENSORS)
            return folder
        with renewed(folder, (CONFIG, TENSORS, PICKLE)) as stage:
            with tensors_in(stage, tensors, **more) as draft:
                os.replace(draft, stage / TENSORS)
            (stage / CONFIG).write_text(text, "utf-8")
    return folder


def _named(names: str | Collection[str] | None, path: str) -> bool:
    """Whether peft's list of names or regular expression means ``path``: it is one of them, or ends in ``.name``."""
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    words = path.split(".")
    return any(".".join(words[i:]) in names for i in range(len(words)))


def targeted(config: dict[str, Any], path: str) -> bool:
    """Whether peft would put a layer at ``path``, whatever is there; many names are found fastest in a set."""
    names = config.get("target_modules")
    if _named(config.get("exclude_modules"), path) or saved_by(config, path) or not _named(names, path):
        return False
    layers = config.get("layers_to_transform")
    if isinstance(names, str) or path in names or layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    # the first numbered segment below a pattern; a path without one is not taken
    first = r".*?\." if not config.get("layers_pattern") else r"(?:^|.*?\.)"
    match = next((m for p in patterns if (m := re.match(rf"{first}{p}\.(?P<index>\d+)\.", path))), None)
    return match is not None and int(match["index"]) in ([layers] if isinstance(layers, int) else layers)


def saved_by(config: dict[str, Any], path: str) -> bool:
    """Whether ``path`` is, or is below, a module that peft takes for one of ``modules_to_save``: by the end of its path."""
    names = config.get("modules_to_save") or ()
    words = path.split(".")
    return any(".".join(words[: i + 1]).endswith(name) for i in range(len(words)) for name in names)


def pattern_key(patterns: Iterable[str], path: str, prefix: str) -> str:
    """The first of ``patterns`` that means ``path``, else ``path`` itself, as peft looks ranks and alphas up."""
    return next((key for key in patterns if _compiled(prefix, key).match(path)), path)


@lru_cache(maxsize=1 << 16)  # a folder may have a pattern a place, more than the cache of ``re`` holds
def _compiled(prefix: str, key: str) -> re.Pattern[str]:
    return re.compile(rf"{prefix}({key})$")


def report(used: Sequence[str], missing: Sequence[str], unused: Sequence[str], *, rows: int = 6) -> str:
    """A table of three columns, ``rows`` entries each."""
    columns = []
    for title, names in (("used", used), ("missing", missing), ("unused", unused)):
        lines = [f"{title} ({len(names)})", *sorted(names)[:rows]]
        columns.append(lines + [f"... and {len(names) - rows} more"] * (len(names) > rows))
    widths = [max(map(len, lines)) for lines in columns]
    lines = zip_longest(*columns, fillvalue="")
    return "\n".join("  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
