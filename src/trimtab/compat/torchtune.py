"""Reader of torchtune's own adapter files: LoRA and DoRA of its decoders, named and ordered as torchtune has them.

``layers.<i>.attn.q_proj.lora_a.weight`` (r, in) and ``lora_b`` (out, r), ``magnitude`` (out,) of DoRA. torchtune's rotary embedding
turns neighbouring channels, transformers' turns the two halves of a head: for most families it orders the rows of q and k
otherwise, and the reader here puts them in transformers' order. The file does not hold alpha; it comes from
``adapter_config.json`` beside it, or from ``alpha=``. Facts: pytorch/torchtune torchtune/models/convert_weights.py,
torchtune/models/*/_convert_weights.py, torchtune/modules/peft.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trimtab.compat.foreign import Filling, ForeignFormat, keys_of, only_file, read_tensors
from trimtab.core.checkpoint import FORMATS
from trimtab.core.contracts import Adapter
from trimtab.core.errors import CheckpointMismatch, NoMatch, ShapeMismatch, Unsupported
from trimtab.core.reading import read_json
from trimtab.core.registry import get

__all__ = ["TorchtuneFile"]

_ROLES = {
    "attn.q_proj": "attn.q", "attn.k_proj": "attn.k", "attn.v_proj": "attn.v", "attn.output_proj": "attn.o",
    "mlp.w1": "mlp.gate", "mlp.w2": "mlp.down", "mlp.w3": "mlp.up",
}  # fmt: skip
_KEY = re.compile(r"(?:layers\.(?P<block>\d+)\.)?(?P<module>.+?)\.(?P<factor>lora_a\.weight|lora_b\.weight|magnitude)")
#: how transformers' model types order the rows of q and k against torchtune's: True, by halves of a head where torchtune has pairs
_PAIRS = {"llama": True, "mistral": True, "gemma": True, "gemma2": True, "qwen2": False, "qwen3": False, "phi3": False}


class TorchtuneFile(ForeignFormat):
    """The format ``"torchtune"``."""

    label = "torchtune"

    def test(self, path: Path) -> bool:
        """Whether ``path`` is such a file, or a folder with one."""
        if any((path / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
            return False  # torchtune also writes peft's form
        file = _file(path)
        return file is not None and any(key.endswith(".lora_a.weight") for key in keys_of(file))

    def read(
        self, root: nn.Module, path: Path, *, trainable: bool = False, alpha: float | None = None, permute: bool | None = None
    ) -> tuple[str, list[Adapter], dict[str, Tensor]]:
        """See ``ForeignFormat``.

        Args:
            alpha: numerator of the scale ``alpha / rank``; None: from ``adapter_config.json`` beside the file.
            permute: whether rows of q and k change from pairs to halves; None: by the model's type.
        """
        file = _file(path)
        stored = read_tensors(file)
        alpha = _alpha(file) if alpha is None else float(alpha)
        filling = Filling(root, file, stored)
        places: dict[tuple[int | None, str], dict[str, str]] = {}
        for key in stored:
            match = _KEY.fullmatch(key)
            if match:
                block = None if match["block"] is None else int(match["block"])
                places.setdefault((block, match["module"]), {})[match["factor"]] = key
        if permute is None and any(module in ("attn.q_proj", "attn.k_proj") for _, module in places):
            permute = _order(root)
        for (block, module), keys in places.items():
            factors = {factor: stored[key] for factor, key in keys.items()}
            _fill(filling, block, module, factors, keys, alpha=alpha, pairs=bool(permute))
        return file.stem, *filling.finish()


def _file(path: Path) -> Path | None:
    """torchtune's own file: ``adapter_model.pt``, or ``adapter_<epoch>.pt`` of earlier releases; whole models may lie beside."""
    named = sorted(p.name for p in path.glob("adapter_*.pt")) if path.is_dir() else []
    return only_file(path, ["adapter_model.pt", *(named if len(named) == 1 else [])])


Factors = dict[str, Tensor]


def _fill(
    filling: Filling, block: int | None, module: str, factors: Factors, keys: dict[str, str], *, alpha: float, pairs: bool
) -> None:
    """One place."""
    name = module if block is None else f"layers.{block}.{module}"
    found = _find(filling, block, module)
    if found is None:
        filling.problems.append(NoMatch(f"{filling.source} acts on {name}, and no module of this model has that part"))
        return
    lacking = [factor for factor in ("lora_a.weight", "lora_b.weight") if factor not in factors]
    filling.missing += [f"{name}.{factor}" for factor in lacking]
    path, part, rows = found
    site = None if lacking else filling.site(path, part=part, rows=rows)
    if site is None:
        return
    a, b, m = (factors.get(factor) for factor in ("lora_a.weight", "lora_b.weight", "magnitude"))
    if pairs and module in ("attn.q_proj", "attn.k_proj"):
        size = filling.anatomy.facts[block]["head_size"]
        if not size or b.shape[0] % size or size % 2:
            filling.problems.append(ShapeMismatch(f"{name} has {b.shape[0]} rows, which are no heads of {size} channels"))
            return
        b = by_halves(b, size)
        m = None if m is None else by_halves(m[:, None], size)[:, 0]
    config = get("LoRA" if m is None else "DoRA")(rank=a.shape[0], alpha=alpha)
    filling.put(site, config, {"a": a, "b": b} | ({} if m is None else {"m": m}), keys.values())


def by_halves(rows: Tensor, size: int) -> Tensor:
    """Rows of heads of ``size`` from pairs (x0 y0 x1 y1 ...) to halves (x0 x1 ... y0 y1 ...): (heads size, r) -> the same."""
    heads = rows.shape[0] // size
    return rows.reshape(heads, size // 2, 2, -1).transpose(1, 2).reshape(rows.shape)


def _find(filling: Filling, block: int | None, module: str) -> tuple[str, str | None, Any] | None:
    """Path, part and rows of the place that torchtune calls ``module`` in ``block``."""
    if block is None:
        roles = {"output": "head", "tok_embeddings": "embedding"}
        found = [path for path, role in filling.anatomy.roles.items() if role == roles.get(module, "?")]
        return (found[0], None, None) if len(found) == 1 else None
    role = _ROLES.get(module)
    here = [path for path in filling.anatomy.roles if filling.anatomy.block_of(path) == block]
    whole = [path for path in here if filling.anatomy.roles[path] == role]
    if len(whole) == 1:
        return whole[0], None, None
    part = (role or "").removeprefix("attn.")
    fused = [(path, filling.anatomy.parts[path][part]) for path in here if part in filling.anatomy.parts.get(path, {})]
    return (fused[0][0], part, fused[0][1]) if len(fused) == 1 else None


def _alpha(file: Path) -> float:
    config = file.with_name("adapter_config.json")
    if not config.exists():
        raise CheckpointMismatch(f"{file} does not hold alpha, nor is {config.name} beside it; say it: alpha=... (--alpha)")
    about = read_json(config)
    alpha = about.get("lora_alpha") if isinstance(about, dict) else None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise CheckpointMismatch(f"{config} does not say lora_alpha as a number (found {alpha!r}); say it: alpha=... (--alpha)")
    return float(alpha)


def _order(root: nn.Module) -> bool:
    kind = getattr(getattr(root, "config", None), "model_type", None)
    if kind not in _PAIRS:
        raise Unsupported(
            f"how the rows of q and k of a {kind or type(root).__name__} stand against torchtune's is not known; "
            "say permute=True (pairs there, halves here) or permute=False (--permute, --no-permute)"
        )
    return _PAIRS[kind]


FORMATS["torchtune"] = TorchtuneFile()
