"""Reader of adapter-hub's ``adapters`` folders: LoRA and (IA)^3, also of GPT-2's fused projections, and series bottlenecks.

``adapter_config.json`` holds ``config`` (the method) and ``name``; ``adapter.safetensors`` or ``pytorch_adapter.bin`` holds
``<module path>.loras.<name>.lora_A`` (r, in) and ``lora_B`` (out, r). Scale ``alpha / r``; versions before 1.1.0 of ``adapters``
trained without it, and their loader corrects that, as this one does. In a fused layer the factors of q, k and v stand one below
the other. A bottleneck is ``<path>.adapters.<name>.adapter_down.0.{weight,bias}`` and ``adapter_up.{weight,bias}``; where it reads
what it is added to, as Houlsby's does, it is ``tt.SeriesAdapter``; Pfeiffer's reads a norm of it and has no counterpart here.
A prediction head in the same folder is read too (``adapterhub_head.py``).
Facts: adapter-hub/adapters src/adapters/{loading,utils}.py, methods/{lora,modeling}.py, configuration/adapter_config.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.compat.adapterhub_head import read_head
from trimtab.compat.foreign import Filling, ForeignFormat, read_tensors
from trimtab.core.checkpoint import FORMATS
from trimtab.core.contracts import Adapter
from trimtab.core.errors import CheckpointMismatch, ShapeMismatch, Unsupported
from trimtab.core.reading import check_fields, read_json
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
        if not (path / CONFIG).is_file():
            return False
        try:
            config = read_json(path / CONFIG)
        except CheckpointMismatch:  # peft's reader, whose config has the same name, says what is wrong
            return False
        return isinstance(config, dict) and "peft_type" not in config and isinstance(config.get("config"), dict)

    def read(
        self, root: nn.Module, path: Path, *, trainable: bool = False, head: bool = True
    ) -> tuple[str, list[Adapter], dict[str, Tensor]]:
        """See ``ForeignFormat``; ``head=False`` leaves out a prediction head that stands beside the adapter."""
        about = read_json(path / CONFIG)
        config, name = _method(about, path), str(about.get("name", "default"))
        file = next((path / f for f in FILES if (path / f).is_file()), None)
        if file is None:
            inside = ", ".join(sorted(p.name for p in path.iterdir()))
            raise CheckpointMismatch(f"{path} is no whole adapter: it lacks {' and '.join(FILES)} (found: {inside})")
        stored = read_tensors(file)
        filling = Filling(root, file, stored)
        kind, factor = ("loras", "lora_[AB]") if "r" in config else ("adapters", "adapter_(?:down\\.0|up)\\.(?:weight|bias)")
        key_of = re.compile(rf"(?P<path>.+)\.{kind}\.{re.escape(name)}\.(?P<factor>{factor})")
        places: dict[str, dict[str, str]] = {}
        for key in stored:
            match = key_of.fullmatch(key)
            if match:
                places.setdefault(_own_path(match["path"], root), {})[match["factor"]] = key
        for place, keys in places.items():
            site = filling.site(place) if kind == "loras" else filling.output(_sublayer(place, filling))
            if site is not None:
                factors = {factor: stored[key] for factor, key in keys.items()}
                put = _bottleneck if kind == "adapters" else _gain if config["composition_mode"] == "scale" else _lora
                put(filling, site, config, factors, keys)
        if head:
            read_head(filling, path)
        return name, *filling.finish()


def _method(about: dict[str, Any], path: Path) -> dict[str, Any]:
    """The method's settings.

    Raises:
        Unsupported: another architecture, or a gate. CheckpointMismatch: a setting without which its function is not known.
    """
    config = dict(about["config"])
    check_fields(config, {"architecture": str, "non_linearity": str}, str(path / CONFIG))
    kind = config.get("architecture") or "bottleneck"
    if kind == "bottleneck":
        return _series(config, about, path)
    if kind != "lora":
        raise Unsupported(f"{path} holds an adapter of the architecture {kind}, and trimtab reads lora, (IA)^3 and bottlenecks")
    if config.get("use_gating"):
        raise Unsupported(f"{path} says use_gating: its update depends on the input, and no weight is the same")
    check_fields(config, {"r": int, "alpha": (int, float), "attn_matrices": list, "composition_mode": str}, str(path / CONFIG))
    lacking = [key for key in ("r", "alpha") if config.get(key) is None]
    if lacking:
        raise CheckpointMismatch(f"{path / CONFIG} does not say {' and '.join(lacking)}, without which the function is not known")
    config.setdefault("composition_mode", "add")
    version = str(about.get("version", ""))
    numbers = re.fullmatch(r"adapters\.(\d+)\.(\d+).*", version)
    if numbers and (int(numbers[1]), int(numbers[2])) < (1, 1):
        config["alpha"] = config["r"]
    return config


#: what their bottleneck may not do besides -> its value where it does not
_PLAIN = {
    "original_ln_before": False, "is_parallel": False, "ln_before": False, "ln_after": False, "phm_layer": False,
    "use_gating": False, "inv_adapter": None, "cross_adapter": False,
}  # fmt: skip
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "swish": "silu", "silu": "silu", "tanh": "tanh"}
_OLD_ACTIVATIONS = {"gelu": "gelu_tanh", "gelu_orig": "gelu"}  # of files without a version


def _series(config: dict[str, Any], about: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings of a bottleneck that is ``y + s Up f(Down y)``.

    Raises:
        Unsupported: it computes something else.
    """
    other = [f"{key}={config[key]!r}" for key, plain in _PLAIN.items() if config.get(key, plain) not in (plain, None)]
    if config.get("residual_before_ln", True) == "post_add":
        other.append("residual_before_ln='post_add'")
    if isinstance(config.get("scaling", 1.0), bool) or not isinstance(config.get("scaling", 1.0), int | float):
        other.append(f"scaling={config['scaling']!r}")
    name = str(config.get("non_linearity")).lower()
    act = (_OLD_ACTIVATIONS if "version" not in about else {}).get(name) or _ACTIVATIONS.get(name)
    if act is None:
        other.append(f"non_linearity={config.get('non_linearity')!r}")
    if other:
        raise Unsupported(
            f"{path} holds a bottleneck with {', '.join(other)}, which no method here computes; the series bottleneck on a "
            "sublayer's own output (double_seq_bn) can be read"
        )
    return {"act": act, "scale": float(config.get("scaling", 1.0))}


def _sublayer(path: str, filling: Filling) -> str:
    """The module whose output a bottleneck at ``path`` of theirs reads: the last matrix of the attention or the feed-forward."""
    if f"{path}.dense" in filling.modules:
        return f"{path}.dense"
    block, _, slot = path.rpartition(".")
    role = {"attention_adapters": "attn.o", "output_adapters": "mlp.down"}.get(slot)
    found = [p for p, r in filling.anatomy.roles.items() if r == role and p.startswith(f"{block}.")]
    return found[0] if len(found) == 1 else path


def _bottleneck(filling: Filling, site: Site, config: dict[str, Any], factors: dict[str, Tensor], keys: dict[str, str]) -> None:
    names = {
        "down": "adapter_down.0.weight",
        "down_bias": "adapter_down.0.bias",
        "up": "adapter_up.weight",
        "up_bias": "adapter_up.bias",
    }
    lacking = [name for name in names.values() if name not in factors]
    filling.missing += [f"{site.path}.{name}" for name in lacking]
    if lacking:
        return
    ours = {key: factors[name] for key, name in names.items()}
    width = ours["down"].shape[0]
    series = get("SeriesAdapter")(bottleneck=width, act=config["act"], scale=config["scale"], position="after")
    filling.put(site, series, ours, keys.values())


def _own_path(path: str, root: nn.Module) -> str:
    """A module path of theirs in ``root``: with or without the base model's prefix."""
    prefix = getattr(root, "base_model_prefix", "")
    names = [path, f"{prefix}.{path}", path.removeprefix(f"{prefix}.")]
    modules = dict(root.named_modules())
    # their own modules (attention_adapters) are not there; what holds them is
    return next((name for name in names if name in modules or name.rpartition(".")[0] in modules), path)


def _lora(filling: Filling, site: Site, config: dict[str, Any], factors: dict[str, Tensor], keys: dict[str, str]) -> None:
    lacking = [name for name in ("lora_A", "lora_B") if name not in factors]
    filling.missing += [f"{site.path}.{name}" for name in lacking]
    if lacking:
        return
    a, b, rank = factors["lora_A"], factors["lora_B"], int(config["r"])
    if a.dim() != 2 or b.dim() != 2 or not rank or a.shape[0] % rank or not a.shape[0] or b.shape[1] != rank:
        filling.problems.append(
            ShapeMismatch(
                f"{filling.source} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} for {site.path}, which are no factors "
                f"of the rank {rank} that {CONFIG} says"
            )
        )
        return
    groups = a.shape[0] // rank
    if groups > 1 or b.shape[0] < site.shape[0]:  # q, k, v in one layer: a pair of factors each, B at its rows
        enabled = _enabled(config)
        if len(enabled) != groups or b.shape[0] != groups * (site.shape[0] // len(_FUSED)):
            filling.problems.append(
                ShapeMismatch(
                    f"{filling.source} has factors for {groups} of q, k and v at {site.path}, lora_B of {tuple(b.shape)}; {CONFIG} "
                    f"says {[_FUSED[i] for i in enabled]}, and the layer has {site.shape[0]} rows"
                )
            )
            return
        b = _spread(b, enabled, site.shape[0], groups)
    filling.put(site, get("LoRA")(rank=a.shape[0], alpha=float(config["alpha"]) * groups), {"a": a, "b": b}, keys.values())


def _enabled(config: dict[str, Any]) -> list[int]:
    """Which of q, k and v have factors, by their numbers."""
    return [i for i, name in enumerate(_FUSED) if name in (config.get("attn_matrices") or ())]


def _spread(b: Tensor, enabled: list[int], out: int, groups: int) -> Tensor:
    """The groups' factors (groups out / 3, r) as one block matrix (out, groups r): q, k and v at their own rows."""
    third, rank = out // len(_FUSED), b.shape[1]
    whole = b.new_zeros(out, groups * rank)
    for group, i in enumerate(enabled):
        whole[i * third : (i + 1) * third, group * rank : (group + 1) * rank] = b[group * third : (group + 1) * third]
    return whole


def _gain(filling: Filling, site: Site, config: dict[str, Any], factors: dict[str, Tensor], keys: dict[str, str]) -> None:
    """A vector that multiplies the outputs, bias included."""
    if "lora_B" not in factors:
        filling.missing.append(f"{site.path}.lora_B")
        return
    gain = factors["lora_B"].flatten()
    if len(gain) < site.shape[0]:
        third, enabled = site.shape[0] // len(_FUSED), _enabled(config)
        if len(gain) != len(enabled) * third:
            said = f"{CONFIG} says {[_FUSED[i] for i in enabled]} of {third} rows each"
            filling.problems.append(ShapeMismatch(f"{filling.source} has {len(gain)} gains for {site.path}, and {said}"))
            return
        whole = torch.ones(len(_FUSED), third)
        whole[enabled] = gain.reshape(len(enabled), third)
        gain = whole.flatten()
    filling.put(site, get("IA3")(side="output"), {"l": gain * float(config["alpha"])}, keys.values())


FORMATS["adapters"] = AdapterHubFolder()
