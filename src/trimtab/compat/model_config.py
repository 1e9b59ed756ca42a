"""A model folder's ``config.json``: read within bounds, and by transformers without any code that the folder brings along."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimtab.core.errors import CheckpointMismatch, TrimtabError, Unsupported, raise_all
from trimtab.core.reading import check_fields, read_json

__all__ = ["config_class", "read_config"]

#: layers, blocks, experts: the largest models have some hundreds
MOST_MODULES = 10_000
_COUNTS = re.compile(
    r"(^|_)n_?(layer|block|expert|head)s?$|num_.*(layers|blocks|experts|heads|groups)|(^|_)(layers|depths?|blocks)$"
)


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder.

    Raises:
        CheckpointMismatch: there is none, it is damaged, or it asks for far more layers or experts than any model has.
    """
    file = folder / "config.json"
    if not file.exists():
        raise CheckpointMismatch(f"{folder} is no model folder: it has no config.json")
    config = read_json(file, finite=False)
    if not isinstance(config, dict):
        raise CheckpointMismatch(f"{file} is damaged: it is no JSON object")
    check_fields(config, {"model_type": str, "architectures": list, "auto_map": dict}, str(file))
    if not all(isinstance(name, str) for name in config.get("architectures") or ()):
        raise CheckpointMismatch(f"{file} says architectures={config['architectures']!r}, where names of classes are needed")
    raise_all(_too_many(config, file))
    return config


@contextmanager
def _plain(folder: Path, config: dict[str, Any]) -> Iterator[Path]:
    """The folder, or a copy of it where its ``config.json`` starts with a byte-order mark, which transformers takes for damage."""
    with open(folder / "config.json", "rb") as stream:
        marked = stream.read(2) in (b"\xef\xbb", b"\xff\xfe", b"\xfe\xff")
    if not marked:
        yield folder
        return
    with tempfile.TemporaryDirectory() as copy:
        (Path(copy) / "config.json").write_text(json.dumps(config), "utf-8")
        yield Path(copy)


def _too_many(config: Mapping[str, Any], file: Path, prefix: str = "") -> list[TrimtabError]:
    """Counts of modules that would never be built to an end, and numbers that fit in no tensor."""
    problems: list[TrimtabError] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            problems += _too_many(value, file, f"{prefix}{key}.")
        for number in value if isinstance(value, list) else [value]:
            if type(number) is not int:
                continue
            most = MOST_MODULES if _COUNTS.search(key) else 1 << 100
            if not abs(number) <= most:
                what = f"{prefix}{key}={number}"
                problems.append(CheckpointMismatch(f"{file} says {what}; no model has more than {most:,}: it is damaged"))
    return problems


def config_class(folder: Path, **changes: Any) -> Any:
    """``AutoConfig`` of a model folder, without running the folder's own code, and without asking whether to.

    Raises:
        CheckpointMismatch: transformers cannot read the configuration. Unsupported: it needs code of its own.
    """
    import transformers

    about = read_config(folder)
    try:
        with _plain(folder, about) as readable:
            return transformers.AutoConfig.from_pretrained(readable, trust_remote_code=False, **changes)
    except Exception as error:  # whatever a damaged configuration runs into, in any of transformers' classes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "auto_map" in about and "trust_remote_code" in str(error):
            raise Unsupported(
                f"{folder} is a model that needs code of its own (auto_map in its config.json), which is never run here; load it "
                "yourself with trust_remote_code=True, and work with the model in memory"
            ) from None
        raise CheckpointMismatch(f"transformers cannot read {folder / 'config.json'}: {reason}") from error
