"""Configs of transformers' model types, made tiny: widths, depths and vocabularies by the names of their entries.

A config is shrunk in one of several modes, tried in this order until a model is built and runs: ``const`` (known entries get known
sizes), ``sections`` (that, and rotary sections that fit), ``ratio`` (widths divided alike), ``layers`` (depth alone), ``as is``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

__all__ = ["MODES", "configs"]

MODES = ("const", "sections", "ratio", "layers", "as is")

WIDTH, INNER, VOCABULARY = 32, 48, 128
# the first pattern that an entry's name matches in full decides
_SIZES: tuple[tuple[str, int], ...] = (
    (r"mamba_num_heads|mamba_n_heads|mamba_head_dim|mamba_d_head|context_size", 8),
    (r"upsample_groups|feature_size|condition_dim", WIDTH),
    (r"index_kpool", 2),
    (
        r"hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|hidden_dim|decoder_hidden_size|encoder_hidden_dim|model_dim|emb_dim"
        r"|embedding_dim|n_state|width|out_hidden_size|text_hidden_size|projector_hidden_size|output_hidden_size|audio_hidden_size"
        r"|vision_hidden_size|encoder_hidden_size|word_embed_proj_dim|backbone_hidden_size|fusion_hidden_size|pooler_output_size"
        r"|lru_width|projection_size|text_embed_dim|vision_embed_dim|qformer_hidden_size|cross_attention_hidden_size|d_embed"
        r"|hidden_size_global|attention_hidden_size|text_embed_hidden_size|speech_decoder_dim|mamba_d_ssm|modality_embed_dim|n_embed"
        r"|image_embedding_size|decoder_embed_dim|output_dim|vision_output_dim|audio_embed_dim|prompt_hidden_size",
        WIDTH,
    ),
    (r"projection_dim|proj_dim|shared_dim", 16),
    (
        r"n_layer|n_layers|encoder_layers|decoder_layers|depth|layers|num_encoder_layers|num_decoder_layers|.*num_hidden_layers"
        r"|vision_layers|text_layers|.*_depth|num_blocks|.*num_layers|.*_n_layers|num_residual_layers",
        2,
    ),
    (r"n_head|n_heads|encoder_attention_heads|decoder_attention_heads|attention_heads|.*num_attention_heads|nhead", 4),
    (r".*_n_heads|num_heads|.*_num_heads|n_attention_heads", 4),
    (r"num_kv_heads|n_kv_heads|.*num_key_value_heads|n_head_kv", 2),
    (r".*head_dim|d_kv|kv_channels|d_head|dim_head|.*head_size", 8),
    (r".*intermediate_size|mlp_dim|.*ffn_dim|d_ff|n_inner|dim_feedforward|ffn_hidden_size|d_inner|block_ff_dim", INNER),
    (r"linear_units|.*intermediate_dim", INNER),
    (r".*vocab_size|vocab_size_per_layer_input|num_embeddings_text", VOCABULARY),
    (r"max_position_embeddings|n_positions|max_source_positions|max_target_positions|max_seq_len|max_seq_length", 64),
    (r"n_ctx|max_sequence_length|seq_length", 64),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|ffn_num_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|top_k_experts|num_experts_per_token|moe_top_k|experts_per_token", 2),
    (r"n_group|topk_group|num_expert_groups|n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|moe_layer_start_index", 1),
    (r"kv_lora_rank|q_lora_rank", 16),
    (r"sliding_window|window_size|local_attention|attention_window|block_size|chunk_size|attention_chunk_size", 8),
    (r"image_size|img_size|crop_size|pretrain_image_size|vision_image_size", 32),
    (r"patch_size|encoder_stride|vision_patch_size|hidden_size_per_layer_input|num_queries|q_size|mamba_chunk_size", 8),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads|time_step_rank|mamba_dt_rank|rotary_dim|index_topk", 4),
    (r"state_size|ssm_state_size|mamba_d_state|d_state", 8),
    (r"mamba_n_groups|n_groups", 1),
    (r"num_mel_bins", 16),
    (r"num_frames", 2),
    (r"codebook_size", 32),
    (r"num_kv_shared_layers|num_nextn_predict_layers", 0),
)  # fmt: skip
_RULES = tuple((re.compile(pattern), size, "hidden_layers" in pattern) for pattern, size in _SIZES)
_TOKEN = re.compile(r".*(token_id|token_index|_token_ids?|_index)$")
_NO_TOKEN = re.compile(r".*(vision_feature|layer_index).*|head_in_index")
_HEADS = ("num_attention_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads", "num_key_value_heads")
_DEPTH = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
#: lists with an entry a layer that name kinds of layers
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types", "no_rope_layers", "sliding_windows")
_KEPT = (*_KINDS, "block_types", "layer_block_types", "hybrid_override_pattern", "moe_layers", "mlp_only_layers", "layer_ids",
         "full_attn_idxs")  # fmt: skip
_NAMES = ("model_type", "architectures", "dtype", "id2label", "label2id")
#: entries that are None and must be a number here
_FILL = {"num_experts_per_tok": 2, "n_routed_experts": 4, "head_dim": 8, "n_group": 1, "topk_group": 1, "vocab_size": VOCABULARY}
_BACKBONE = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}


def _rule(name: str) -> tuple[int, bool] | None:
    """The size of an entry, and whether it counts layers."""
    return next(((size, depth) for pattern, size, depth in _RULES if pattern.fullmatch(name)), None)


class _Shrink:
    """One config, entry by entry; configs within it likewise."""

    def __init__(self, mode: str):
        self.mode, self.token = mode, 100

    def __call__(self, given: dict[str, Any]) -> dict[str, Any]:
        d = dict(given)
        self._fill(d)
        _cut_lists(d)
        if self.mode == "const":
            _hybrids(d)
        _no_timm(d)
        new = {k: self._entry(k, v, d) for k, v in d.items() if k not in _KEPT and k != "transformers_version"}
        _kinds_of_layers(d, new)
        return new

    def _fill(self, d: dict[str, Any]) -> None:
        if "stage_names" in d:
            for name in ("out_features", "out_indices", "stage_names"):
                d.pop(name, None)
        if "attention_types" in d:
            d["attention_types"] = [[["global", "local"], 1]]
        if d.get("layer_types", 0) is None and "conv_L_cache" in d:
            d["layer_types"] = ["conv", "full_attention"]
        for name, value in _FILL.items():
            if d.get(name, 0) is None and (name != "head_dim" or self.mode == "const"):
                d[name] = value
        if d.get("num_key_value_heads", 0) is None and isinstance(d.get("num_attention_heads"), int):
            d["num_key_value_heads"] = d["num_attention_heads"]

    def _entry(self, name: str, value: Any, d: dict[str, Any]) -> Any:
        if name in _NAMES or isinstance(value, bool) or value is None:
            return value
        if self.mode == "const":
            if name == "mrope_section":
                return [2, 1, 1]
            if name in ("rope_parameters", "rope_scaling") and isinstance(value, dict) and "mrope_section" in value:
                partial = (value.get("partial_rotary_factor") or 1) < 1
                return {**value, "mrope_section": [1, 1, 0] if partial else [2, 1, 1]}
            if name == "window_size" and "spatial_merge_size" in d and isinstance(value, int) and "depths" not in d:
                return 32
        if isinstance(value, dict):
            return value if _is_rope(name, value) else self(value)
        if isinstance(value, int):
            return self._number(name, value, d)
        return self._list(name, list(value)) if isinstance(value, list | tuple) else value

    def _number(self, name: str, value: int, d: dict[str, Any]) -> int:
        if self.mode == "const" and "depths" in d and "window_size" in d and name in ("image_size", "window_size"):
            return 64 if name == "image_size" else min(value, 2)
        if _TOKEN.fullmatch(name) and value >= 0 and not _NO_TOKEN.fullmatch(name):
            return self._token(name, value)
        rule = _rule(name)
        if rule is None:
            return value
        size, depth = rule
        if self.mode == "layers":
            return _layers_only(name, value, size, depth)
        if self.mode == "ratio":
            return _by_ratio(name, value, size)
        if value <= 0 and size != 0:
            return value
        if name.endswith("key_value_heads") and (value == 1 or d.get("num_attention_heads") == value):
            return 1 if value == 1 else 4
        small = size in (1, 2, 4) or name in ("image_size", "patch_size", "window_size")
        return min(value, size) if small else size

    def _token(self, name: str, value: int) -> int:
        """Ids of special tokens within the small vocabulary; those of images apart from all others."""
        if value < 100 and not name.startswith(("image", "video", "audio")):
            return value
        self.token += 1
        return min(self.token, VOCABULARY - 1)

    def _list(self, name: str, value: list) -> list:
        if self.mode == "layers":
            return [min(x, 1) for x in value] if name == "depths" else value
        if name in ("depths", "blocks_per_stage"):
            return [min(x, 1) if isinstance(x, int) else x for x in value]
        widths = ("hidden_sizes", "embed_dims", "embed_dim", "neck_hidden_sizes", "channels", "dims")
        if name in widths and all(isinstance(x, int) for x in value):
            if self.mode == "ratio":
                return [max(x // 16, 4) if x >= 64 else x for x in value]
            return [16 * (i + 1) for i in range(len(value))]
        if name in ("num_heads", "num_attention_heads") and self.mode == "const":
            return [min(x, 2) for x in value if isinstance(x, int)]
        same = {"image_size": 32, "conv_dim": 16}.get(name)
        if name == "tdnn_dim":
            return [16] * (len(value) - 1) + [24]
        return value if same is None else [same] * len(value)


def _layers_only(name: str, value: int, size: int, depth: bool) -> int:
    if depth:
        return min(value, 2) if value else value
    if name in ("image_size", "img_size", "num_frames"):
        return min(value, 64)
    return VOCABULARY if size == VOCABULARY else value


def _by_ratio(name: str, value: int, size: int) -> int:
    if size in (WIDTH, INNER, 16):
        return max(value // 16, 8) if value >= 128 else value
    if name in _HEADS:
        return value
    if size == 8 and "dim" in name:
        return max(value // 16, 4)
    return min(value, size) if value > 0 else value


def _is_rope(name: str, value: dict) -> bool:
    plain = bool(value) and all(isinstance(x, int | float | str | None) for x in value.values())
    return name in ("rope_parameters", "rope_scaling", "layer_rope_theta") or (plain and "rope" in name)


def _cut_lists(d: dict[str, Any]) -> None:
    """Entries with a value a layer: as many as two layers need."""
    depth = next((d[k] for k in _DEPTH if isinstance(d.get(k), int)), 0)
    for name, value in list(d.items()):
        if isinstance(value, dict) and value and name != "id2label" and all(str(x).isdigit() for x in value):
            d[name] = {"1": next(iter(value.values()))}
        if depth > 4 and isinstance(value, list | tuple) and len(value) == depth and name not in _KINDS:
            d[name] = list(value)[:2]


def _hybrids(d: dict[str, Any]) -> None:
    """Two layers that show both kinds of a model with several."""
    if "attn_layer_indices" in d:
        d["attn_layer_indices"] = [1]
    if "mamba_n_heads" in d:
        if "layer_types" in d and (d["layer_types"] is None or len(set(d["layer_types"])) == 1):
            d["layer_types"] = ["mamba", "attention"]
        if d.get("layers_block_type", 0) is None:
            d["layers_block_type"] = ["mamba", "attention"]
    if "codebook_dim" in d:
        d["codebook_dim"] = 32
    if d.get("n_shared_experts", 0) is None:
        d["n_shared_experts"] = 1
    for kind in ("attn", "expert"):
        if f"{kind}_layer_period" in d:
            d.update({f"{kind}_layer_period": 2, f"{kind}_layer_offset": 1})


def _no_timm(d: dict[str, Any]) -> None:
    """A small ResNet in the place of a backbone of timm."""
    backbone = d.get("backbone_config")
    if "use_timm_backbone" in d or (isinstance(backbone, dict) and backbone.get("model_type") == "timm_backbone"):
        several = d.get("num_feature_levels", 0) > 1 or "rt_detr" in str(d.get("model_type"))
        stages = ["stage2", "stage3", "stage4"] if several else ["stage4"]
        d.update(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_kwargs=None)
        d["backbone_config"] = {**_BACKBONE, "out_features": stages}


def _kinds_of_layers(d: dict[str, Any], new: dict[str, Any]) -> None:
    """Lists of kinds of layers, cut so that each kind still occurs (up to four of them); all of one length."""
    for name in _KINDS:
        value = d.get(name)
        if not isinstance(value, list | tuple) or not value:
            continue
        kinds = list(dict.fromkeys(value))
        depth = new.get("num_hidden_layers") or new.get("num_layers") or 2
        depth = max(depth, len(kinds)) if len(kinds) <= 4 else depth
        cut = list(value[:depth])
        if len(set(cut)) < len(kinds) <= depth:
            cut = (kinds + cut)[:depth]
        new[name] = cut
        new.update({key: depth for key in ("num_hidden_layers", "num_layers") if key in new})
    depth = new.get("num_hidden_layers") or 0
    for name in _KINDS:
        if name in new and len(new[name]) < depth:
            new[name] = list(new[name]) + [new[name][-1]] * (depth - len(new[name]))


def _sections(d: dict[str, Any]) -> None:
    """Sections of rotary tables that add up to half a head of 8."""
    for name, value in list(d.items()):
        if name in ("rope_parameters", "rope_scaling") and (value is None or isinstance(value, dict)):
            value = dict(value or {"rope_type": "default", "rope_theta": 10000.0})
            part = value.get("partial_rotary_factor") or d.get("partial_rotary_factor") or 1
            d[name] = {**value, "mrope_section": [2, 1, 1] if part == 1 else [1, 1, 0] if part == 0.5 else [1, 0, 0]}
        elif isinstance(value, dict):
            _sections(value)


def configs(model_type: str) -> Iterator[tuple[str, PretrainedConfig | Exception]]:
    """``(mode, config)`` for each mode, or the error that building it raised."""
    cls = CONFIG_MAPPING[model_type]
    for mode in MODES:
        try:
            config = cls()
            if mode != "as is":
                values = _Shrink("const" if mode == "sections" else mode)(config.to_dict())
                if mode == "sections":
                    _sections(values)
                config = cls.from_dict(values)
        except Exception as error:  # what a config class may raise is not known; it is told as a reason
            yield mode, error
        else:
            yield mode, config
