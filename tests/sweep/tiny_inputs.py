"""Inputs for a model that is known by its config and the signature of its forward alone: candidates, the fullest first."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

__all__ = ["candidates"]

BATCH, LENGTH = 2, 12
Inputs = dict[str, Tensor]
_BOTH = re.compile(r"clip|siglip|flava|bridge|vilt|altclip|groupvit|owl|align|blip|x_clip|git|grounding|kosmos|layoutlmv3|chinese")


def _random(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _config(config: PretrainedConfig, *names: str) -> PretrainedConfig:
    """The first of the configs within ``config`` that there is, or ``config`` itself."""
    return next((found for name in names if (found := getattr(config, name, None)) is not None), config)


def _number(config: PretrainedConfig, *names: str, default: int | None = None) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list | tuple) and value and isinstance(value[0], int):
            return value[0]
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return default


def _ids(config: PretrainedConfig, length: int, seed: int = 1) -> Tensor:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = _number(text, "vocab_size") or _number(config, "vocab_size", default=100)
    return torch.randint(5, min(size, 95), (BATCH, length), generator=torch.Generator().manual_seed(seed))


def _image(config: PretrainedConfig) -> Tensor:
    vision = _config(config, "vision_config", "backbone_config", "encoder_config")
    channels = _number(vision, "num_channels", "in_channels", "in_chans", default=3)
    size = _number(vision, "image_size", "img_size", "input_size") or _number(config, "image_size", default=64)
    return _random(BATCH, channels, min(size, 256), min(size, 256))


def candidates(model: nn.Module, config: PretrainedConfig) -> Iterator[Inputs]:
    """Inputs that ``model`` may take, by what its forward names; whether it does is for the caller to try."""
    names = inspect.signature(model.forward).parameters
    decoder = {"decoder_input_ids": _ids(config, 6, 3)} if "decoder_input_ids" in names else {}
    if "input_ids" in names:
        yield from _texts(model, config, names, decoder)
    for sound in _sounds(config, names):
        yield {**sound, **decoder}
        yield sound
    if "pixel_values" in names:
        yield from _images(config, decoder)
    if "pixel_values_videos" in names:
        frames = _number(config, "num_frames", "frames_per_clip", default=2)
        yield {"pixel_values_videos": _image(config)[:, None].repeat(1, frames, 1, 1, 1)}
    if "past_values" in names:
        yield from _series(config)


def _texts(model: nn.Module, config: PretrainedConfig, names: Mapping[str, Any], decoder: Inputs) -> Iterator[Inputs]:
    text = {"input_ids": _ids(config, LENGTH)}
    if "attention_mask" in names:
        text["attention_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if "bbox" in names:
        corner = torch.randint(0, 10, (BATCH, LENGTH, 1), generator=torch.Generator().manual_seed(4))
        text["bbox"] = corner.repeat(1, 1, 4)
    if "pixel_values" in names:
        if getattr(model, "main_input_name", "input_ids") != "input_ids" or _BOTH.search(config.model_type):
            yield {**text, "pixel_values": _image(config), **decoder}
            yield {**text, "pixel_values": _image(config)[:, None], **decoder}
        yield from _images_in_text(model, config, text, names)
    if "visual_feats" in names:
        width = _number(config, "visual_feat_dim", default=2048)
        yield {**text, "visual_feats": _random(BATCH, 4, width), "visual_pos": _random(BATCH, 4, 4).sigmoid()}
    if "qformer_input_ids" in names or config.model_type == "blip-2":
        count, token = _number(config, "num_query_tokens", default=32), _number(config, "image_token_index", default=101)
        ids = torch.cat([torch.full((BATCH, count), token), text["input_ids"]], 1)
        both = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": _image(config)}
        if "qformer_input_ids" in names:
            both["qformer_input_ids"] = _ids(_config(config, "qformer_config"), 6)
        yield {**both, **decoder}
        yield both
    if "input_features" in names or "input_values" in names:
        for sound in _sounds(config, names):
            yield {**text, **sound}
    yield {**text, **decoder}
    yield text


def _images_in_text(model: nn.Module, config: PretrainedConfig, text: Inputs, names: Mapping[str, Any]) -> Iterator[Inputs]:
    """Text with as many image tokens as the model makes of an image."""
    token = _number(config, "image_token_id", "image_token_index")
    if token is None:
        return

    def with_tokens(count: int) -> Inputs:
        ids = text["input_ids"]
        ids = torch.cat([ids[:, :3], torch.full((BATCH, count), token), ids[:, 3:]], 1)
        more = {"attention_mask": torch.ones_like(ids)} if "attention_mask" in names else {}
        more |= {name: (ids == token).long() for name in ("mm_token_type_ids", "token_type_ids") if name in names}
        return {"input_ids": ids, **more}

    if "image_grid_thw" in names or "image_grid_hw" in names:
        flat, grid, shape = _patches(_config(config, "vision_config"))
        yield {**with_tokens(4), "pixel_values": flat, "image_grid_thw": grid}
        yield {**with_tokens(4), "pixel_values": flat.reshape(shape), "image_grid_thw": grid}
    image = _image(config)
    for values in _featured(model, image, names):
        yield {**with_tokens(values.pop("count")), **values}
    length = _number(config, "image_seq_length", "image_seq_len", "mm_tokens_per_image")
    if length and length < 600:
        yield {**with_tokens(length), "pixel_values": image}
        yield {**with_tokens(length), "pixel_values": image[:, None]}


def _patches(vision: PretrainedConfig) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Patches of an image a row, flat; their grid; and the shape that they have apart."""
    patch, merge = _number(vision, "patch_size", default=14), _number(vision, "spatial_merge_size", default=2)
    frames = _number(vision, "temporal_patch_size", default=1)
    channels = _number(vision, "in_channels", "in_chans", "num_channels", default=3)
    flat = _random(BATCH * 4 * merge * merge, channels * frames * patch * patch)
    return flat, torch.tensor([[1, 2 * merge, 2 * merge]] * BATCH), (-1, channels, patch, patch)


def _featured(model: nn.Module, image: Tensor, names: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """``pixel_values`` and what goes with them, and the ``count`` of features that the model's own tower makes of an image."""
    features = getattr(model, "get_image_features", None) or getattr(getattr(model, "model", None), "get_image_features", None)
    if features is None:
        return
    sizes = {"image_sizes": torch.tensor([list(image.shape[-2:])] * BATCH)} if "image_sizes" in names else {}
    for pixels in (image, image[:, None]):
        for more in ({}, sizes):
            try:
                with torch.no_grad():
                    found = features(pixel_values=pixels, **more)
            except TimeoutError:
                raise
            except Exception:  # this shape is not the one that the tower takes; the next is tried
                continue
            found = getattr(found, "pooler_output", found)
            if isinstance(found, list | tuple):
                found = torch.cat([x.reshape(-1, x.shape[-1]) for x in found])
            if found is not None:
                yield {"count": found.reshape(-1, found.shape[-1]).shape[0] // BATCH, "pixel_values": pixels, **more}


def _sounds(config: PretrainedConfig, names: Mapping[str, Any]) -> Iterator[Inputs]:
    audio = _config(config, "audio_config", "audio_encoder_config", "encoder_config", "speech_encoder_config")
    if "input_values" in names:
        yield {"input_values": _random(BATCH, 2000)}
        yield {"input_values": _random(BATCH, 1, 1920)}
        yield {"input_values": _random(BATCH, _number(audio, "max_length", default=64), _number(audio, "num_mel_bins", default=16))}
    if "input_features" in names:
        entries = ("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim", "input_size")
        bins = _number(audio, *entries, default=16)
        yield {"input_features": _random(BATCH, bins, 2 * _number(audio, "max_source_positions", default=64))}
        frames = _random(BATCH, 64, bins)
        if "attention_mask" in names:
            yield {"input_features": frames, "attention_mask": torch.ones(BATCH, 64, dtype=torch.long)}
        yield {"input_features": frames}
        if "input_features_mask" in names:
            yield {"input_features": frames, "input_features_mask": torch.ones(BATCH, 64, dtype=torch.bool)}
        yield {"input_features": _random(BATCH, 64, 80)}
    if "audio_values" in names:
        yield {"audio_values": _random(BATCH, 1, 32, 32)}


def _images(config: PretrainedConfig, decoder: Inputs) -> Iterator[Inputs]:
    image = _image(config)
    yield {"pixel_values": image, **decoder}
    yield {"pixel_values": image}
    yield {"pixel_values": image[:, None].repeat(1, _number(config, "num_frames", default=2), 1, 1, 1)}
    for size in (224, 64):
        yield {"pixel_values": _random(BATCH, 3, size, size, seed=1)}


def _series(config: PretrainedConfig) -> Iterator[Inputs]:
    length = _number(config, "context_length", default=32)
    yield {"past_values": _random(BATCH, length, _number(config, "num_input_channels", default=1))}
    yield {"past_values": _random(BATCH, length)}
    past = length + max(getattr(config, "lags_sequence", [0]) or [0])
    future, features = _number(config, "prediction_length", default=8) or 8, _number(config, "num_time_features", default=0)
    yield {
        "past_values": _random(BATCH, past).sigmoid() + 0.5,
        "past_time_features": _random(BATCH, past, features),
        "past_observed_mask": torch.ones(BATCH, past),
        "future_values": _random(BATCH, future, seed=3).sigmoid() + 0.5,
        "future_time_features": _random(BATCH, future, features, seed=3),
    }
