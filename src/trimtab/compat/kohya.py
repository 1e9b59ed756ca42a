"""Reader of kohya's and LyCORIS' files: LoRA (with a middle factor too), DoRA, LoHa and LoKr of diffusion models.

A tensor is named ``<part>_<module path with _ for .>.<factor>``; ``part`` is the model (``lora_unet``, ``lora_te1``, ...). Scale
``alpha / rank``, alpha being a tensor of its own. SDXL files name the UNet's blocks as the original code does (``input_blocks``);
they are found under diffusers' names. Facts: kohya-ss/sd-scripts networks/lora.py; KohakuBlueleaf/LyCORIS lycoris/modules.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from trimtab.compat.foreign import Filling, ForeignFormat, keys_of, only_file, read_tensors
from trimtab.compat.safetensors_file import read_header
from trimtab.core.checkpoint import FORMATS
from trimtab.core.contracts import Adapter, MethodConfig
from trimtab.core.errors import NoMatch, TrimtabError, Unsupported, nearest
from trimtab.core.registry import get
from trimtab.core.site import Site
from trimtab.kernels.divisors import factorization

__all__ = ["KohyaFile"]

Tensors = dict[str, Tensor]
_PART = re.compile(r"(lora_unet|lora_te\d?|lora_transformer|lora_prior_unet|lora_prior_te|lora_dit|lora|lycoris)_(.+)")
#: names that tell a file of this kind
_MARKS = (".lora_down.weight", ".hada_w1_a", ".lokr_w1", ".lokr_w1_a")
_RESNET = {
    "in_layers_0": "norm1", "in_layers_2": "conv1", "out_layers_0": "norm2", "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj", "skip_connection": "conv_shortcut",
}  # fmt: skip
_OUTSIDE = {
    "time_embed_0": "time_embedding_linear_1", "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1", "label_emb_0_2": "add_embedding_linear_2",
    "input_blocks_0_0": "conv_in", "out_0": "conv_norm_out", "out_2": "conv_out",
}  # fmt: skip
_A_BLOCK = 3  # entries of the original code's list that make one of diffusers' blocks: two layers and a resampling


class KohyaFile(ForeignFormat):
    """The format ``"kohya"``, also of LyCORIS."""

    label = "kohya or LyCORIS"

    def test(self, path: Path) -> bool:
        """Whether ``path`` is such a file, or a folder with one."""
        file = only_file(path)
        return file is not None and any(
            "." not in key.removesuffix(mark) for key in keys_of(file) for mark in _MARKS if key.endswith(mark)
        )

    def read(
        self, root: nn.Module, path: Path, *, trainable: bool = False, part: str | None = None
    ) -> tuple[str, list[Adapter], Tensors]:
        """See ``ForeignFormat``; ``part`` chooses a model's tensors, such as ``"lora_unet"``, where a file has several."""
        file = only_file(path)
        stored = read_tensors(file)
        places: dict[tuple[str, str], Tensors] = {}
        for key, value in stored.items():
            name, _, factor = key.partition(".")
            match = _PART.fullmatch(name)
            places.setdefault(match.groups() if match else ("", name), {})[factor] = value
        parts = {p for p, _ in places}
        if part is not None and part not in parts:
            raise NoMatch(f"{file} has no part {part!r}{nearest(part, parts)}")
        chosen = {rest: tensors for (p, rest), tensors in places.items() if part in (None, p)}
        if part is None and len(parts) > 1:
            raise Unsupported(
                f"{file} holds tensors for {len(parts)} models: {', '.join(sorted(parts))}; choose one: part=... (--part)"
            )
        own = part or next(iter(parts))
        keys = {rest: {f: f"{own}_{rest}.{f}" if own else f"{rest}.{f}" for f in tensors} for rest, tensors in chosen.items()}
        filling = Filling(root, file, [key for names in keys.values() for key in names.values()])
        flat = _flat_names(filling.modules)
        root_scale = _root_scale(file)
        for rest, tensors in chosen.items():
            target = _module_path(rest, flat)
            if target is None:
                filling.problems.append(NoMatch(f"{file} acts on {rest}, which this model does not have{nearest(rest, flat)}"))
                continue
            site = filling.site(target)
            if site is None:
                continue
            try:
                config, ours, used = _place(tensors, site, root_scale, filling)
            except TrimtabError as error:
                filling.problems.append(type(error)(f"{file}, {rest}: {error}"))
                continue
            if config is not None:
                filling.put(site, config, ours, [keys[rest][factor] for factor in used])
        return file.stem, *filling.finish()


def _root_scale(file: Path) -> bool:
    """Whether the file's notes say that the scale is alpha / sqrt(rank)."""
    if file.suffix != ".safetensors":
        return False
    try:
        notes = json.loads(read_header(file).metadata.get("ss_network_args", "{}"))
    except json.JSONDecodeError:
        return False
    return isinstance(notes, dict) and str(notes.get("rs_lora", "")).lower() == "true"


def _flat_names(modules: dict[str, nn.Module]) -> dict[str, str]:
    """``path`` with underscores -> ``path``, of modules that have a weight."""
    return {path.replace(".", "_"): path for path, module in modules.items() if module._parameters.get("weight") is not None}


def _module_path(rest: str, flat: dict[str, str]) -> str | None:
    """The module that a flattened name means: the one of that name, or the only one that ends in it."""
    for name in dict.fromkeys((rest, _diffusers_name(rest), rest.removeprefix("text_model_"))):
        if name in flat:
            return flat[name]
        ends = [path for other, path in flat.items() if other.endswith(f"_{name}")]
        if len(ends) == 1:
            return ends[0]
    return None


def _diffusers_name(rest: str) -> str:
    """A flattened name of the original UNet's code as diffusers' code has it; other names as they are."""
    for old, new in _OUTSIDE.items():
        if rest == old:
            return new
    match = re.fullmatch(r"(input_blocks|output_blocks)_(\d+)_(\d+)_(.+)|middle_block_(\d+)_(.+)", rest)
    if match is None:
        return rest
    side, index, slot, inner, middle, middle_inner = match.groups()
    if middle is not None:
        kind, number = ("attentions", 0) if middle == "1" else ("resnets", int(middle) // 2)
        return f"mid_block_{kind}_{number}_{_inner(kind, middle_inner)}"
    at = int(index) - (side == "input_blocks")
    block, layer = divmod(at, _A_BLOCK)
    where = "down_blocks" if side == "input_blocks" else "up_blocks"
    if inner in ("op", "conv") and (side == "input_blocks") == (inner == "op"):
        return f"{where}_{block}_{'downsamplers' if inner == 'op' else 'upsamplers'}_0_conv"
    kind = "resnets" if slot == "0" else "attentions"
    return f"{where}_{block}_{kind}_{layer}_{_inner(kind, inner)}"


def _inner(kind: str, inner: str) -> str:
    return _RESNET.get(inner, inner) if kind == "resnets" else inner


# -- the kinds of update at one place: (config, our tensors, the factors that were used)

Found = tuple[MethodConfig | None, Tensors, list[str]]


def _place(tensors: Tensors, site: Site, root_scale: bool, filling: Filling) -> Found:
    """What the factors of one place are; nothing, if they are no update that is known or some of them lack."""
    if any(key.startswith("lora_") for key in tensors):
        make, needed = _lora, ["lora_down.weight", "lora_up.weight"]
    elif any(key.startswith("hada_") for key in tensors):
        make, needed = _loha, ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]
    elif any(key.startswith("lokr_") for key in tensors):
        make = _lokr
        needed = [k for w in ("lokr_w1", "lokr_w2") for k in ([w] if w in tensors else [f"{w}_a", f"{w}_b"])]
    else:
        return None, {}, []
    lacking = [name for name in needed if name not in tensors]
    filling.missing += [f"{site.path}.{name}" for name in lacking]
    return (None, {}, []) if lacking else make(tensors, site, root_scale)


def _alpha(tensors: Tensors, rank: int, root_scale: bool) -> float:
    """The numerator over ``rank`` that gives the file's scale; no alpha, or 0, is a scale of 1."""
    alpha = float(tensors["alpha"]) if "alpha" in tensors else 0.0
    if alpha == 0:
        return float(rank)
    return alpha * math.sqrt(rank) if root_scale else alpha


def _lora(tensors: Tensors, site: Site, root_scale: bool) -> Found:
    down, up, middle = tensors["lora_down.weight"], tensors["lora_up.weight"], tensors.get("lora_mid.weight")
    rank = up.shape[1]
    if middle is not None:  # (r, r, k...) between (r, in) and (out, r)
        down = torch.einsum("mn...,ni->mi...", middle, down.flatten(1))
    used = [k for k in ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale") if k in tensors]
    ours = {"a": down.flatten(1), "b": up.flatten(1)}
    alpha = _alpha(tensors, rank, root_scale)
    if "dora_scale" not in tensors:
        return get("LoRA")(rank=rank, alpha=alpha), ours, used
    return get("DoRA")(rank=rank, alpha=alpha), ours | {"m": _row_norms(tensors["dora_scale"], site)}, used


def _row_norms(scale: Tensor, site: Site) -> Tensor:
    """The magnitudes of a decomposed weight, (out,).

    Raises:
        Unsupported: they are of the inputs, as LyCORIS has them by an option.
    """
    out = site.shape[0]
    if scale.shape[0] != out or scale.numel() != out:
        raise Unsupported(
            f"dora_scale of shape {tuple(scale.shape)} scales inputs, and DoRA scales the {out} outputs; merge it where it was made"
        )
    return scale.flatten()


def _refuse_dora(tensors: Tensors, kind: str) -> None:
    if "dora_scale" in tensors:
        raise Unsupported(f"a {kind} whose rows are rescaled (dora_scale) has no form here; merge it where it was made")


def _loha(tensors: Tensors, site: Site, root_scale: bool) -> Found:
    from trimtab.compat.peft_twins import tucker

    _refuse_dora(tensors, "LoHa")
    used = [k for k in tensors if k.startswith("hada_") or k == "alpha"]
    stored = dict(tensors)
    for i in "12":
        if f"hada_t{i}" in stored:
            tucker(stored, f"hada_t{i}", f"hada_w{i}_a", f"hada_w{i}_b")
    rank = stored["hada_w1_b"].shape[0]
    ours = {f"w{i}{x}": stored[f"hada_w{i}_{x}"].flatten(1) for i in "12" for x in "ab"}
    return get("LoHa")(rank=rank, alpha=_alpha(tensors, rank, root_scale)), ours, used


def _lokr(tensors: Tensors, site: Site, root_scale: bool) -> Found:
    from trimtab.compat.peft_twins import tucker

    _refuse_dora(tensors, "LoKr")
    used = [k for k in tensors if k.startswith("lokr_") or k == "alpha"]
    stored = dict(tensors)
    if "lokr_t2" in stored:
        tucker(stored, "lokr_t2", "lokr_w2_a", "lokr_w2_b")
    thin1, thin2 = "lokr_w1" not in stored, "lokr_w2" not in stored
    out1, in1 = (stored["lokr_w1_a"].shape[0], stored["lokr_w1_b"].shape[1]) if thin1 else stored["lokr_w1"].shape
    out2 = (stored["lokr_w2_a"] if thin2 else stored["lokr_w2"]).shape[0]
    rank = stored["lokr_w2_a"].shape[1] if thin2 else stored["lokr_w1_a"].shape[1] if thin1 else max(out2, site.shape[1] // in1)
    # two full factors have a scale of 1, whatever alpha says
    alpha = _alpha(tensors, rank, root_scale) if thin1 or thin2 else float(rank)
    config = get("LoKr")(rank=rank, alpha=alpha, factor=_factor(site, out1, in1), decompose_both=thin1)
    ours = {k.removeprefix("lokr_").replace("_", ""): v.flatten(1) for k, v in stored.items() if k.startswith("lokr_w")}
    return config, ours, used


def _factor(site: Site, out1: int, in1: int) -> int:
    """The size for which our LoKr cuts the layer into a first factor of (out1, in1).

    Raises:
        Unsupported: there is none.
    """
    channels = site.parameter().shape[1] if site.kind in ("conv", "grouped") else site.shape[1]
    for factor in (-1, out1, in1, max(out1, in1)):
        if factorization(site.shape[0], factor)[0] == out1 and factorization(channels, factor)[0] == in1:
            return factor
    raise Unsupported(f"a Kronecker product whose first factor is {out1} x {in1} is none that LoKr makes of {site.shape}")


FORMATS["kohya"] = KohyaFile()
