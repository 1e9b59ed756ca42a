"""Reader of adapter-hub's ``adapters`` folders: LoRA and (IA)^3, also of GPT-2's fused projections.

``adapter_config.json`` holds ``config`` (the method) and ``name``; ``adapter.safetensors`` or ``pytorch_adapter.bin`` holds
``<module path>.loras.<name>.lora_A`` (r, in) and ``lora_B`` (out, r). Scale ``alpha / r``; versions before 1.1.0 of ``adapters``
trained without it, and their loader corrects that, as this one does. In a fused layer the factors of q, k and v stand one below
the other. Facts: adapter-hub/adapters src/adapters/{loading,utils}.py, methods/lora.py, configuration/adapter_config.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.compat.foreign import Filling, ForeignFormat, read_tensors
from trimtab.core.checkpoint import FORMATS
from trimtab.core.contracts import Adapter
from trimtab.core.errors import CheckpointMismatch, Unsupported
from trimtab.core.registry import get
from trimtab.core.site import Site

__all__ = ["AdapterHubFolder"]

CONFIG = "adapter_config.json"
FILES = ("adapter.safetensors", "pytorch_adapter.bin")
_FUSED = ("q", "k", "v")


class AdapterHubFolder(ForeignFormat):
    """The format ``"adapters"``."""

    label = "adapters (adapter-hub)"

    def test(self, path: Path) -> bool:
        """Whether ``path`` is such a folder."""
        try:
            config = json.loads((path / CONFIG).read_text("utf-8"))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError):
            return False
        return isinstance(config, dict) and "peft_type" not in config and isinstance(config.get("config"), dict)

    def read(self, root: nn.Module, path: Path, *, trainable: bool = False) -> tuple[str, list[Adapter], dict[str, Tensor]]:
        """See ``ForeignFormat``."""
        about = json.loads((path / CONFIG).read_text("utf-8"))
        config, name = _method(about, path), str(about.get("name", "default"))
        file = next((path / f for f in FILES if (path / f).is_file()), None)
        if file is None:
            inside = ", ".join(sorted(p.name for p in path.iterdir()))
            raise CheckpointMismatch(f"{path} is no whole adapter: it lacks {' and '.join(FILES)} (found: {inside})")
        stored = read_tensors(file)
        filling = Filling(root, file, stored)
        key_of = re.compile(rf"(?P<path>.+)\.loras\.{re.escape(name)}\.(?P<factor>lora_[AB])")
        places: dict[str, dict[str, str]] = {}
        for key in stored:
            match = key_of.fullmatch(key)
            if match:
                places.setdefault(_own_path(match["path"], root), {})[match["factor"]] = key
        for place, keys in places.items():
            site = filling.site(place)
            if site is not None:
                factors = {factor: stored[key] for factor, key in keys.items()}
                (_gain if config["composition_mode"] == "scale" else _lora)(filling, site, config, factors, keys)
        return name, *filling.finish()


def _method(about: dict[str, Any], path: Path) -> dict[str, Any]:
    """The method's settings.

    Raises:
        Unsupported: no LoRA or (IA)^3, or with a gate. CheckpointMismatch: a setting without which its function is not known.
    """
    config = dict(about["config"])
    kind = config.get("architecture") or "bottleneck"
    if kind != "lora":
        raise Unsupported(
            f"{path} holds an adapter of the architecture {kind}, which trimtab does not read; it reads lora and (IA)^3"
        )
    if config.get("use_gating"):
        raise Unsupported(f"{path} says use_gating: its update depends on the input, and no weight is the same")
    lacking = [key for key in ("r", "alpha") if not isinstance(config.get(key), int | float)]
    if lacking:
        raise CheckpointMismatch(f"{path / CONFIG} does not say {' and '.join(lacking)}, without which the function is not known")
    config.setdefault("composition_mode", "add")
    version = str(about.get("version", ""))
    numbers = re.fullmatch(r"adapters\.(\d+)\.(\d+).*", version)
    if numbers and (int(numbers[1]), int(numbers[2])) < (1, 1):
        config["alpha"] = config["r"]
    return config


def _own_path(path: str, root: nn.Module) -> str:
    """A module path of theirs in ``root``: with or without the base model's prefix."""
    prefix = getattr(root, "base_model_prefix", "")
    names = [path, f"{prefix}.{path}", path.removeprefix(f"{prefix}.")]
    modules = dict(root.named_modules())
    return next((name for name in names if name in modules), path)


def _lora(filling: Filling, site: Site, config: dict[str, Any], factors: dict[str, Tensor], keys: dict[str, str]) -> None:
    lacking = [name for name in ("lora_A", "lora_B") if name not in factors]
    filling.missing += [f"{site.path}.{name}" for name in lacking]
    if lacking:
        return
    a, b, rank = factors["lora_A"], factors["lora_B"], int(config["r"])
    groups = a.shape[0] // rank
    if groups > 1 or b.shape[0] < site.shape[0]:  # q, k, v in one layer: a pair of factors each, B at its rows
        b = _spread(b, config, site.shape[0], groups)
    filling.put(site, get("LoRA")(rank=a.shape[0], alpha=float(config["alpha"]) * groups), {"a": a, "b": b}, keys.values())


def _spread(b: Tensor, config: dict[str, Any], out: int, groups: int) -> Tensor:
    """The groups' factors (groups out / 3, r) as one block matrix (out, groups r): q, k and v at their own rows."""
    third, rank = out // len(_FUSED), b.shape[1]
    whole = b.new_zeros(out, groups * rank)
    enabled = [i for i, name in enumerate(_FUSED) if name in config.get("attn_matrices", ())]
    for group, i in enumerate(enabled[:groups]):
        whole[i * third : (i + 1) * third, group * rank : (group + 1) * rank] = b[group * third : (group + 1) * third]
    return whole


def _gain(filling: Filling, site: Site, config: dict[str, Any], factors: dict[str, Tensor], keys: dict[str, str]) -> None:
    """A vector that multiplies the outputs, bias included."""
    if "lora_B" not in factors:
        filling.missing.append(f"{site.path}.lora_B")
        return
    gain = factors["lora_B"].flatten()
    if len(gain) < site.shape[0]:
        third = site.shape[0] // len(_FUSED)
        enabled = [i for i, name in enumerate(_FUSED) if name in config.get("attn_matrices", ())]
        whole = torch.ones(len(_FUSED), third)
        whole[enabled] = gain.reshape(len(enabled), third)
        gain = whole.flatten()
    filling.put(site, get("IA3")(side="output"), {"l": gain * float(config["alpha"])}, keys.values())


FORMATS["adapters"] = AdapterHubFolder()
