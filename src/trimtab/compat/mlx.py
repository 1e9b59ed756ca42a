"""Reader of MLX-LM's adapter folders: LoRA on linear layers and embeddings, and DoRA on linear layers.

``adapter_config.json`` holds ``lora_parameters`` (``rank``, ``scale``) and ``fine_tune_type``; ``adapters.safetensors`` holds,
below a module's path, ``lora_a`` (in, r) and ``lora_b`` (r, out), and ``m`` (out,) of DoRA. ``W' = W + scale (lora_a lora_b)^T``;
an embedding's table (tokens, width) is ``W + scale lora_a lora_b``. Early releases (2024) multiplied ``scale`` by ``alpha / rank``,
later ones have no alpha: a config with an alpha that is not the rank leaves the scale open. Banks of experts are refused, since
transformers stores them as other matrices. Facts: ml-explore/mlx-lm mlx_lm/tuner/{lora,dora,utils}.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trimtab.compat.foreign import Filling, ForeignFormat, read_tensors
from trimtab.core.checkpoint import FORMATS
from trimtab.core.contracts import Adapter
from trimtab.core.errors import CheckpointMismatch, ShapeMismatch, TrimtabError, Unsupported
from trimtab.core.reading import check_fields, listed, read_json
from trimtab.core.registry import get
from trimtab.core.site import Site

__all__ = ["MlxFolder"]

CONFIG, FILE = "adapter_config.json", "adapters.safetensors"
_FACTORS = ("lora_a", "lora_b", "m")
_NUMBER = (int, float)


class MlxFolder(ForeignFormat):
    """The format ``"mlx"``."""

    label = "MLX-LM"

    def test(self, path: Path) -> bool:
        """Whether ``path`` is such a folder."""
        if not (path / CONFIG).is_file():
            return False
        try:
            config = read_json(path / CONFIG)
        except CheckpointMismatch:  # peft's reader, whose config has the same name, says what is wrong
            return False
        mine = isinstance(config, dict) and "peft_type" not in config
        return mine and (isinstance(config.get("lora_parameters"), dict) or (path / FILE).is_file())

    def read(
        self, root: nn.Module, path: Path, *, trainable: bool = False, scale: float | None = None
    ) -> tuple[str, list[Adapter], dict[str, Tensor]]:
        """See ``ForeignFormat``; ``scale`` in front of the product, for a config that leaves it open."""
        config, file = read_json(path / CONFIG), path / FILE
        kind = config.get("fine_tune_type", "lora")
        if kind not in ("lora", "dora"):
            raise Unsupported(f"{path} holds an MLX fine-tuning of the kind {kind!r}; lora and dora are read")
        if not file.is_file():
            found = listed(p.name for p in path.iterdir())
            raise CheckpointMismatch(f"{path} is no whole adapter: it lacks {FILE} (found: {found})")
        scale = _scale(config.get("lora_parameters"), path / CONFIG) if scale is None else float(scale)
        stored = read_tensors(file)
        filling = Filling(root, file, stored)
        places: dict[str, dict[str, str]] = {}
        for key in stored:
            name, _, factor = key.rpartition(".")
            if factor in _FACTORS and name:
                places.setdefault(name, {})[factor] = key
        for name, keys in places.items():
            site = filling.site(_own_path(name, root, filling))
            if site is None:
                continue
            factors = {factor: stored[key] for factor, key in keys.items()}
            lacking = [f"{name}.{factor}" for factor in ("lora_a", "lora_b", *["m"] * (kind == "dora")) if factor not in factors]
            filling.missing += lacking
            if lacking or ("m" in factors and kind != "dora"):
                continue
            try:
                _put(filling, site, factors, scale, list(keys.values()))
            except TrimtabError as error:
                filling.problems.append(type(error)(f"{file}, {name}: {error}"))
        return "adapters", *filling.finish()


def _scale(parameters: Any, config: Path) -> float:
    """The scale that a config says.

    Raises:
        CheckpointMismatch: it says none, or one that depends on the release.
    """
    said = parameters if isinstance(parameters, dict) else {}
    check_fields(said, {"scale": _NUMBER, "alpha": _NUMBER, "rank": int}, str(config))
    if said.get("scale") is None:
        raise CheckpointMismatch(f"{config} does not say lora_parameters.scale; say it: scale=... (--scale)")
    if said.get("alpha") is not None and said["alpha"] != said.get("rank"):
        raise CheckpointMismatch(
            f"{config} says scale={said['scale']}, alpha={said['alpha']} and rank={said.get('rank')}: early releases of MLX-LM "
            "trained with scale * alpha / rank, later ones with scale alone, and which one wrote it cannot be known; "
            "say the product: scale=... (--scale)"
        )
    return float(said["scale"])


def _own_path(name: str, root: nn.Module, filling: Filling) -> str:
    """A module path of theirs in ``root``: with or without the base model's prefix."""
    prefix = getattr(root, "base_model_prefix", "")
    names = [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."), name.removeprefix("language_model.")]
    return next((each for each in names if each in filling.modules), name)


def _put(filling: Filling, site: Site, factors: dict[str, Tensor], scale: float, keys: list[str]) -> None:
    """The adapter at one place."""
    a, b, m = factors["lora_a"], factors["lora_b"], factors.get("m")
    if a.dim() == 3 or b.dim() == 3:
        raise Unsupported("a bank of experts, which transformers stores as other matrices than MLX; merge it there")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ShapeMismatch(f"lora_a is {tuple(a.shape)} and lora_b {tuple(b.shape)}, which are no factors (in, r) and (r, out)")
    rank = a.shape[1]
    if site.kind == "embedding" and m is not None:
        raise Unsupported("a DoRA of an embedding, whose rows are tokens in MLX; merge it there")
    ours = {"a": a.t().contiguous(), "b": b.t().contiguous()} | ({} if m is None else {"m": m})
    filling.put(site, get("LoRA" if m is None else "DoRA")(rank=rank, alpha=scale * rank), ours, keys)


FORMATS["mlx"] = MlxFolder()
