"""Tiny models of transformers' architectures, built from their configs alone, with inputs that they were seen to run on.

``build("llama")`` gives ``Built(model, inputs, ...)``, or ``NotBuilt`` with the reasons. The same call gives the same model:
weights are drawn from a fixed seed, and every parameter is moved a little, so that nothing that starts at zero hides a fault.
"""

from __future__ import annotations

import contextlib
import copy
import signal
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
import transformers.models.auto.modeling_auto as auto
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from sweep.tiny_configs import configs
from sweep.tiny_inputs import candidates

__all__ = ["Built", "NotBuilt", "build", "classes", "main_output", "model_types", "run", "tensors"]

#: tasks whose class is preferred, the first that a model type has
_TASKS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "CTC",
          "IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION", "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION",
          "VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION", "TIME_SERIES_PREDICTION", "")  # fmt: skip
_STATE = ("past_key_values", "cache_params", "state", "buckets_states", "mems")
_MAIN = ("logits", "last_hidden_state", "prediction_logits", "logits_per_image", "reconstruction", "predicted_depth", "pred_boxes",
         "encoder_last_hidden_state", "loss")  # fmt: skip
LARGEST = 18_000_000
BUILD_SECONDS, RUN_SECONDS = 20, 8


@dataclass(frozen=True)
class Built:
    """A tiny model that runs.

    Attributes:
        model_type: the config's name for it.
        model: in eval mode, float32.
        inputs: keyword arguments of its forward, two rows.
        class_name: the model's class.
        mode: how its config was shrunk (``tiny_configs.MODES``).
        deterministic: whether two runs gave the same bits.
    """

    model_type: str
    model: nn.Module = field(repr=False)
    inputs: dict[str, Tensor] = field(repr=False)
    class_name: str
    mode: str
    deterministic: bool

    def copy(self) -> nn.Module:
        """A model of its own with the same weights."""
        return copy.deepcopy(self.model)


@dataclass(frozen=True)
class NotBuilt:
    """Why no tiny model was found: a sentence for each try, ``class (mode): error``."""

    model_type: str
    reasons: tuple[str, ...]

    @property
    def reason(self) -> str:
        """The last one: the farthest that a try came."""
        return self.reasons[-1] if self.reasons else "no class of transformers has this config"


def model_types() -> list[str]:
    """All model types that have a class, in transformers' order."""
    return [name for name in CONFIG_MAPPING_NAMES if any(_named(task, name) for task in _TASKS)]


def _named(task: str, model_type: str) -> str | None:
    table = getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES") if task else auto.MODEL_MAPPING_NAMES
    value = table.get(model_type)
    return value if value is None or isinstance(value, str) else value[0]


def classes(model_type: str) -> list[str]:
    """Names of the classes to try, that of the type's own task first."""
    config = CONFIG_MAPPING[model_type]
    try:
        config = config()
    except Exception:  # a config without defaults: its class tells less, and `configs` tells the reason
        pass
    first: tuple[str, ...] = ()
    if getattr(config, "is_encoder_decoder", False):
        first = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
    elif hasattr(config, "text_config") and hasattr(config, "vision_config") and not _generates(model_type):
        first = ("",)
    elif _named("MASKED_LM", model_type):
        first = ("MASKED_LM",)
    elif _named("IMAGE_TEXT_TO_TEXT", model_type):
        first = ("IMAGE_TEXT_TO_TEXT",)
    return list(dict.fromkeys(name for task in (*first, *_TASKS) if (name := _named(task, model_type))))


def _generates(model_type: str) -> bool:
    return any(_named(task, model_type) for task in ("IMAGE_TEXT_TO_TEXT", "CAUSAL_LM"))


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    """TimeoutError after ``seconds``; in the main thread."""

    def late(number: int, frame: types.FrameType | None) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tensors(output: Any) -> list[Tensor]:
    """All float tensors of an output, caches and states left out; complex ones as pairs."""
    if isinstance(output, Tensor):
        real = torch.view_as_real(output) if output.is_complex() else output
        return [real] if real.is_floating_point() and real.numel() else []
    if isinstance(output, Mapping):
        return [t for name, value in output.items() if name not in _STATE for t in tensors(value)]
    return [t for value in output for t in tensors(value)] if isinstance(output, list | tuple) else []


def main_output(output: Any) -> list[Tensor]:
    """What a user would put a loss on: logits (and boxes), else the last hidden state, else the first float tensor."""
    if not isinstance(output, Mapping):
        return tensors(output)[:1]
    for name in _MAIN:
        value = output.get(name)
        if isinstance(value, Tensor) and value.is_floating_point():
            boxes = output.get("pred_boxes") if name == "logits" else None
            return [value, boxes] if isinstance(boxes, Tensor) else [value]
    return tensors(output)[:1]


def run(model: nn.Module, inputs: Mapping[str, Tensor], seed: int = 0) -> Any:
    """The model's output; noise that it draws comes from ``seed``."""
    torch.manual_seed(seed)
    return model(**inputs)


def _make(name: str, config: transformers.PretrainedConfig) -> nn.Module:
    cls = getattr(transformers, name)
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters")
    torch.manual_seed(0)
    model = cls(copy.deepcopy(config)).float().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(torch.randn(p.shape, generator=generator) * 0.02)
    return model


def _fit(model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether two runs agree to the bit; ValueError if the model gives nothing finite."""
    with _limit(RUN_SECONDS), torch.no_grad():
        one, two = tensors(run(model, inputs)), tensors(run(model, inputs))
    if not one or not torch.isfinite(one[0]).all():
        raise ValueError("not finite" if one else "no float output")
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def build(model_type: str, class_name: str | None = None) -> Built | NotBuilt:
    """A tiny model of ``model_type`` with inputs that it runs on, or the reasons why there is none.

    Args:
        model_type: as in a config (``"llama"``).
        class_name: a class of transformers; None: up to three that the type has, by ``classes``.
    """
    reasons: list[str] = []
    for name in [class_name] if class_name else classes(model_type)[:3]:
        for mode, config in configs(model_type):
            where = f"{name} ({mode})"
            try:
                if isinstance(config, Exception):
                    raise config
                with _limit(BUILD_SECONDS):
                    model = _make(name, config)
                given = list(candidates(model, config))
            except Exception as error:
                reasons.append(f"{where}: {type(error).__name__}: {str(error)[-140:]}")
                continue
            for inputs in given:
                try:
                    same = _fit(model, inputs)
                except Exception as error:
                    reasons.append(f"{where}, {sorted(inputs)}: {type(error).__name__}: {str(error)[-140:]}")
                else:
                    return Built(model_type, model, inputs, name, mode, same)
    return NotBuilt(model_type, tuple(reasons))
