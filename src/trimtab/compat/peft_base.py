"""Whether a peft folder is put on the base that it was made for.

A folder of peft's own holds nothing of its base's values but a name. If that name is a checkpoint on this machine, a sample of its
weights is compared with the model's; otherwise nothing can be compared, and that is said. Folders that trimtab wrote carry a sample
in the metadata of their tensors' file, where other readers do not look.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.compat.peft_files import METADATA, TENSORS, read_config
from trimtab.compat.safetensors_file import read_header
from trimtab.core import fingerprint
from trimtab.core.contracts import Adapter

__all__ = ["check_base", "sample_of"]

#: tensors of a checkpoint that are read for the comparison
_FEW = 8


def sample_of(folder: Path) -> dict[str, Any] | None:
    """The sample of its base that a folder carries, if trimtab wrote it."""
    file = folder / TENSORS
    text = read_header(file).metadata.get(METADATA) if file.is_file() else None
    return None if text is None else json.loads(text)


def check_base(root: nn.Module, folder: Path, adapters: Sequence[Adapter]) -> None:
    """Compare what is known of the folder's base with ``root``'s weights.

    Raises:
        CheckpointMismatch: they are another base's.
    """
    sample = sample_of(folder)
    if sample is not None:
        fingerprint.compare(root, sample, str(folder))
        return
    named = read_config(folder).get("base_model_name_or_path")
    local = _local(named)
    if local is not None:
        fingerprint.compare(root, _taken(root, local, adapters), f"{folder} (base: {local})")
        return
    own = getattr(getattr(root, "config", None), "_name_or_path", None)
    if not named or named != own:
        only = f", only its name, {named!r}" if named else ""
        warnings.warn(
            f"{folder} tells nothing of its base's values{only}: that this model is the one it was trained on was not checked",
            stacklevel=4,
        )


def _local(named: str | None) -> Path | None:
    """The checkpoint on this machine that a config's name means: a folder, or what the hub's cache has of it."""
    if not named:
        return None
    if (Path(named) / "config.json").is_file():
        folder = Path(named)
    else:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(named, "config.json")
        except HFValidationError:  # a path that is not there
            return None
        if not isinstance(found, str):
            return None
        folder = Path(found).parent
    whole = any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    return folder if whole else None


def _taken(root: nn.Module, folder: Path, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """A sample of the checkpoint at the adapters' places."""
    from trimtab.compat.pretrained import Pretrained

    sites = list({(a.site.path, a.site.tensor): a for a in adapters if a.site.tensor}.values())
    few = sites if len(sites) <= _FEW else [sites[i * (len(sites) - 1) // (_FEW - 1)] for i in range(_FEW)]
    places = [{"path": a.site.path, "tensor": a.site.tensor, "shape": list(a.site.shape)} for a in few]
    base = Pretrained(folder, [type(root).__name__], places)
    taken = fingerprint.take(base.root, few, value=lambda site: base.value(site.path, site.tensor))
    return taken | {"class": base.class_name}
