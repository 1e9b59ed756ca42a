"""Writer of diffusers' form: ``pytorch_lora_weights.safetensors``, which ``load_lora_weights`` and ``load_lora_adapter`` read.

A tensor is ``<part>.<module path>.lora_A.weight`` (r, in) or ``lora_B.weight`` (out, r); ``part`` is the component of the
pipeline. diffusers takes the scale as 1 where a file says no alpha, so ``alpha / r`` is multiplied into B. Several ranks in one
file have been read with wrong scales by some of its versions; all places are therefore filled up with zeros to the largest rank.
Its reader is ``kohya.py``. Facts: diffusers loaders/peft.py, loaders/lora_base.py, utils/peft_utils.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab.compat.foreign import ForeignFormat
from trimtab.compat.peft_table import kernel, layer_of, pointwise
from trimtab.compat.peft_twins import LORA
from trimtab.core.checkpoint import FORMATS
from trimtab.core.contracts import Adapter, Reparameterization
from trimtab.core.errors import NotMergeable, TrimtabError, Unsupported, raise_all
from trimtab.core.files import sync
from trimtab.core.recognition import MANIFEST
from trimtab.core.site import gathered
from trimtab.core.state import adapter_group, state_of

__all__ = ["DiffusersFile"]

FILE = "pytorch_lora_weights.safetensors"
#: starts of class names -> the component of a pipeline that such a model is
_COMPONENTS = {"UNet": "unet", "CLIPText": "text_encoder", "T5Encoder": "text_encoder", "Prior": "prior"}


class DiffusersFile(ForeignFormat):
    """The format ``"diffusers"`` of ``tt.save`` and ``tt.convert``."""

    label = "diffusers"

    def test(self, path: Path) -> bool:
        """Never: the reader of kohya's files knows these names too."""
        return False

    def save(self, root: nn.Module, path: Path, name: str, *, component: str | None = None) -> Path:
        """Write the adapter ``name`` of ``root`` into the folder ``path``.

        Args:
            component: the part of the pipeline that the model is: ``unet``, ``transformer``, ``text_encoder``, ...; None: by the
                model's class.

        Raises:
            Unsupported: an update without an exact low-rank form, or a model of which nobody knows which component it is.
            NotMergeable: the folder holds an adapter of another format.
        """
        part = component or _component(root)
        adapters = adapter_group(state_of(root), name).adapters
        if any((path / other).exists() for other in (MANIFEST, "adapter_config.json")):
            raise NotMergeable(f"{path} holds an adapter of another format; choose another folder for diffusers' file")
        doras = [a for a in adapters if type(a.config).__name__ == "DoRA"]
        if doras and len(doras) < len(adapters):
            raise Unsupported(f"the adapter {name!r} mixes DoRA with other methods, and diffusers has one kind a file")
        tensors = _tensors(adapters, name, part)
        path.mkdir(parents=True, exist_ok=True)
        draft = path / f".{FILE}.{os.getpid()}.part"
        save_file(tensors, draft, metadata={"format": "pt"})
        sync(draft)
        os.replace(draft, path / FILE)
        return path


def _component(root: nn.Module) -> str:
    kind = type(root).__name__
    found = next((part for start, part in _COMPONENTS.items() if kind.startswith(start)), None)
    if found is None and "Transformer" in kind:
        found = "transformer"
    if found is None:
        raise Unsupported(
            f"which component of a pipeline a {kind} is, its class does not tell; say it: component='unet', 'transformer', "
            "'text_encoder' (--component)"
        )
    return found


def _tensors(adapters: list[Adapter], name: str, part: str) -> dict[str, Tensor]:
    """All tensors by diffusers' names.

    Raises:
        Unsupported: places without exact factors, all together.
    """
    problems: list[TrimtabError] = []
    places: dict[str, tuple[Adapter, list[Tensor], list[Tensor]]] = {}
    for adapter in adapters:
        site, factors = adapter.site, None
        dora = type(adapter.config).__name__ == "DoRA"
        if dora:
            factors = adapter.config.scale * adapter.b, adapter.a
        elif isinstance(adapter, Reparameterization):
            factors = adapter.factors()
        if factors is None or layer_of(site) not in LORA.layers or site.kind == "embedding" or (dora and site.rows is not None):
            problems.append(
                Unsupported(
                    f"{site.name} of the adapter {name!r} ({adapter.config} on {layer_of(site)}) has no exact form as a LoRA of "
                    "diffusers; save it in trimtab's own format"
                )
            )
            continue
        b, a = (gathered(value.detach()) for value in factors)
        if site.rows is not None:
            b = site.put(b.new_zeros(site.matrix(site.parameter()).shape[-2], b.shape[1]), b)
        _, bs, as_ = places.setdefault(site.path, (adapter, [], []))
        bs.append(b)
        as_.append(a)
    raise_all(problems)
    rank = max(sum(a.shape[0] for a in as_) for _, _, as_ in places.values())
    tensors = {}
    for path, (adapter, bs, as_) in places.items():
        b, a = torch.cat(bs, dim=1).float(), torch.cat(as_).float()
        b = torch.cat([b, b.new_zeros(b.shape[0], rank - b.shape[1])], dim=1)
        a = torch.cat([a, a.new_zeros(rank - a.shape[0], a.shape[1])])
        tensors[f"{part}.{path}.lora_A.weight"] = a.reshape(kernel(adapter.site, tuple(a.shape)))
        tensors[f"{part}.{path}.lora_B.weight"] = b.reshape(pointwise(adapter.site, tuple(b.shape)))
        if type(adapter.config).__name__ == "DoRA":
            m = gathered(adapter.m.detach()).float()
            whole = (1, len(m), *(1 for _ in adapter.site.module.kernel_size)) if adapter.site.kind == "conv" else m.shape
            tensors[f"{part}.{path}.lora_magnitude_vector"] = m.reshape(whole)
    return {key: value.to("cpu").contiguous().clone() for key, value in tensors.items()}


FORMATS["diffusers"] = DiffusersFile()
