"""Names in files of adapters for diffusion models: what a tensor's name says, and which module of a model that is.

=============  ==========================================================================  ================================
written by     example                                                                     module's name
=============  ==========================================================================  ================================
kohya          ``lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight``             flat: ``_`` for ``.``
LyCORIS        ``lycoris_down_blocks_0_resnets_0_conv1.lokr_w1``                             flat
diffusers      ``unet.down_blocks.0.attentions.0.proj_in.lora_A.weight``                     as it is, or without the part
diffusers <1   ``down_blocks.0.[...].attn1.processor.to_q_lora.down.weight``                 ``...attn1.to_q``
diffusers <1   ``text_encoder.[...].q_proj.lora_linear_layer.down.weight``                   as it is
ComfyUI        ``diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight``                the original code's
XLabs          ``double_blocks.0.processor.qkv_lora1.down.weight``                           ``double_blocks.0.img_attn.qkv``
=============  ==========================================================================  ================================

The original code's names of the Stable Diffusion UNets and of Flux are found under diffusers' names; Flux' fused projections are
several modules there, each with its own rows. Facts: kohya-ss/sd-scripts networks/lora.py and lora_flux.py, diffusers
loaders/lora_conversion_utils.py and utils/state_dict_utils.py, comfyanonymous/ComfyUI comfy/lora.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

__all__ = ["FACTOR_KINDS", "Target", "Targets", "split_key", "split_part"]

#: a module's path, and which of its rows in the file's tensors: (first, one behind the last); None for all
Target = tuple[str, tuple[int, int] | None]

_LOW_RANK = re.compile(
    r"(?P<name>.+?)(?:\.lora_(?P<peft>[AB])(?:\.[^.]+)?|[._]lora\.(?P<old>down|up)|\.lora_linear_layer\.(?P<text>down|up))"
    r"\.weight"
)
_XLABS = re.compile(r"(?P<name>.+)\.processor\.(?P<slot>qkv|proj)_lora(?P<side>[12]?)\.(?P<old>down|up)\.weight")
_MAGNITUDE = re.compile(r"(?P<name>.+?)\.lora_magnitude_vector(?:\.[^.]+)*")
_PLAIN = re.compile(
    r"(?P<name>.+?)\.(?P<factor>lora_(?:down|up|mid)\.weight|hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?|"
    r"alpha|dora_scale|scalar|diff|diff_b|w_norm|b_norm)"
)
#: first letters of a factor -> its kind of update
FACTOR_KINDS = ("lora_", "hada_", "lokr_", "diff", "w_norm", "b_norm")
_FLAT_PART = re.compile(r"(lora_unet|lora_te\d?|lora_transformer|lora_prior_unet|lora_prior_te|lora_dit|lora|lycoris)_(.+)")
_DOTTED_PART = re.compile(
    r"(unet|transformer(?:_\d)?|text_encoder(?:_\d)?|prior|decoder|(?:model\.)?diffusion_model|text_encoders\.\w+)\.(.+)"
)


def split_key(key: str) -> tuple[str, str] | None:
    """The module's name and the factor, as kohya and LyCORIS call it; None if the name is of no known kind."""
    if match := _XLABS.fullmatch(key):
        attention = {"1": "img_attn.", "2": "txt_attn.", "": ""}[match["side"]]
        return f"{match['name']}.{attention}{match['slot']}", f"lora_{match['old']}.weight"
    if match := _LOW_RANK.fullmatch(key):
        down = "down" in (match["old"], match["text"]) or match["peft"] == "A"
        return match["name"].replace(".processor.", "."), "lora_down.weight" if down else "lora_up.weight"
    if match := _MAGNITUDE.fullmatch(key):
        return match["name"], "lora_magnitude"
    match = _PLAIN.fullmatch(key)
    return (match["name"], match["factor"]) if match else None


def split_part(name: str, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """Which model of several a module's name is of, ``""`` where the name does not say it, and the name within that model."""
    if name in modules:
        return "", name
    match = _DOTTED_PART.fullmatch(name) or _FLAT_PART.fullmatch(name)
    return match.groups() if match else ("", name)


# -- Stable Diffusion

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


def _unet_name(rest: str) -> str:
    """A flattened name of the original UNet's code as diffusers' code has it; other names as they are."""
    if rest in _OUTSIDE:
        return _OUTSIDE[rest]
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


# -- Flux: the original code's names, flattened -> diffusers' modules; several where they share one matrix, from the first row on

_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",), "img_mlp_2": ("ff.net.2",), "img_mod_lin": ("norm1.linear",),
    "txt_mlp_0": ("ff_context.net.0.proj",), "txt_mlp_2": ("ff_context.net.2",), "txt_mod_lin": ("norm1_context.linear",),
}  # fmt: skip
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear2": ("proj_out",), "modulation_lin": ("norm.linear",),
    "qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "proj": ("proj_out",),  # XLabs' names
}  # fmt: skip
_FLUX = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer_linear": "proj_out",
    **{f"{old}_{end}": f"time_text_embed.{new}.linear_{i}" for old, new in
       (("time_in", "timestep_embedder"), ("vector_in", "text_embedder"), ("guidance_in", "guidance_embedder"))
       for i, end in ((1, "in_layer"), (2, "out_layer"))},
}  # fmt: skip


def _flux_paths(rest: str) -> tuple[str, ...]:
    """Paths in diffusers' Flux that a flattened name of the original code means; none for other names."""
    if rest in _FLUX:
        return (_FLUX[rest],)
    match = re.fullmatch(r"(double|single)_blocks_(\d+)_(.+)", rest)
    if match is None:
        return ()
    table, blocks = (_DOUBLE, "transformer_blocks") if match[1] == "double" else (_SINGLE, "single_transformer_blocks")
    return tuple(f"{blocks}.{match[2]}.{path}" for path in table.get(match[3], ()))


# -- finding modules

#: ends of names in old files of diffusers -> today's
_RENAMED = {"to_out": "to_out_0", "to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj"}


class Targets:
    """The modules of a model by the names that files have for them.

    Args:
        modules: path -> module.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        self.modules = modules
        self.flat = {path.replace(".", "_"): path for path in modules if self._has_weight(path)}

    def find(self, name: str) -> list[Target]:
        """The modules that a name means, with the rows that each has; none if the model lacks them."""
        if self._has_weight(name):
            return [(name, None)]
        rest = name.replace(".", "_")
        paths = _flux_paths(rest)
        if paths and all(self._has_weight(path) for path in paths):
            return self._rows(paths)
        for word in self._words(rest):
            if word in self.flat:
                return [(self.flat[word], None)]
            ends = [path for other, path in self.flat.items() if other.endswith(f"_{word}")]
            if len(ends) == 1:
                return [(ends[0], None)]
        return []

    def _has_weight(self, path: str) -> bool:
        module = self.modules.get(path)
        return module is not None and module._parameters.get("weight") is not None

    @staticmethod
    def _words(rest: str) -> Iterable[str]:
        """A flattened name, and others that the same module has had."""
        words = [rest, _unet_name(rest), rest.removeprefix("text_model_"), rest.removeprefix("transformer_text_model_")]
        for old, new in _RENAMED.items():
            words += [f"{word.removesuffix(old)}{new}" for word in words[:4] if word.endswith(f"_{old}")]
        words += [f"{word.removesuffix('to_out')}out_proj" for word in words[:4] if word.endswith("_to_out")]
        return dict.fromkeys(words)

    def _rows(self, paths: tuple[str, ...]) -> list[Target]:
        if len(paths) == 1:
            return [(paths[0], None)]
        found: list[Target] = []
        start = 0
        for path in paths:
            rows = self.modules[path]._parameters["weight"].shape[0]
            found.append((path, (start, start + rows)))
            start += rows
        return found
