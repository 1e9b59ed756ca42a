"""What transformers' models tell of themselves: their output embedding, and the text model of one that takes more than text."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from trimtab.core.naming import leaf, words

__all__ = ["output_embeddings", "text_model"]


def output_embeddings(modules: Mapping[str, nn.Module]) -> set[str]:
    """Paths of the matrices that make logits of hidden states: those that a model, or one within it, names; tied ones."""
    found: set[int] = set()
    for module in modules.values():
        ask = getattr(module, "get_output_embeddings", None)
        try:
            found.add(id(ask()) if callable(ask) else 0)
        except (AttributeError, NotImplementedError):  # a class without a head, of which the question makes no sense
            continue
    tables = [m.weight for m in modules.values() if isinstance(m, nn.Embedding)]
    same, shapes = {id(t) for t in tables}, {tuple(t.shape) for t in tables}
    linear = {p: m._parameters.get("weight") for p, m in modules.items() if isinstance(m, nn.Linear)}
    tied = {p for p, w in linear.items() if id(w) in same}
    # FSMT names its input's table; what is shaped as a table and called output is one
    tied |= {p for p, w in linear.items() if w is not None and tuple(w.shape) in shapes and "output" in words(leaf(p))}
    return tied | {p for p, m in modules.items() if id(m) in found and not isinstance(m, nn.Embedding)}


def text_model(model: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    """Path of the language model of a model that reads images, sound or video besides and writes text; None for all others.

    An encoder-decoder is one model, and so is a pair of encoders that are trained against each other (CLIP): both parts count.
    """
    config = getattr(model, "config", None)
    inner = [n for n, v in vars(config).items() if hasattr(v, "to_dict")] if config is not None else []
    if not any(n != "text_config" for n in inner) or getattr(config, "is_encoder_decoder", False):
        return None
    if not output_embeddings(modules) and getattr(getattr(config, "text_config", None), "use_cache", None) is None:
        return None
    try:
        decoder = model.get_decoder()
    except (AttributeError, NotImplementedError, ValueError):  # not every class of transformers has one
        return None
    return next((p for p, m in modules.items() if m is decoder), None)
