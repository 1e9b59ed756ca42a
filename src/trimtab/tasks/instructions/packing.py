"""Several short examples in one row, each of which attends to itself alone (block-diagonal attention).

The parts of a row are told by positions that start anew; transformers makes the mask from them, whatever the attention is computed
with. Which examples share a row is fixed for the whole run: best fit, longest first.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trimtab.training.errors import ConfigError

__all__ = ["check_apart", "pack"]

PROBE = 12  # tokens of each of the two parts that are tried


def pack(examples: list[dict[str, Any]], length: int) -> list[dict[str, Any]]:
    """Rows of at most ``length`` tokens that hold all ``examples``.

    Args:
        examples: ``input_ids`` and ``labels`` each.

    Returns:
        Rows with ``input_ids``, ``labels``, and ``position_ids`` that start at 0 in each part.

    Raises:
        ConfigError: an example is longer than ``length``.
    """
    sizes = [len(example["input_ids"]) for example in examples]
    if max(sizes) > length:
        raise ConfigError(f"a row of {max(sizes)} tokens does not fit into packs of {length}; raise pack_length")
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for index in sorted(range(len(examples)), key=lambda i: (-sizes[i], i)):
        at = bisect.bisect_left(free, (sizes[index], -1))
        left, number = free.pop(at) if at < len(free) else (length, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(index)
        bisect.insort(free, (left - sizes[index], number))
    return [_joined([examples[i] for i in chosen]) for chosen in bins]


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "input_ids": [token for part in parts for token in part["input_ids"]],
        "labels": [label for part in parts for label in part["labels"]],
        "position_ids": [position for part in parts for position in range(len(part["input_ids"]))],
    }


@torch.no_grad()
def check_apart(model: nn.Module, examples: list[dict[str, Any]], collate: Callable[..., dict[str, Any]]) -> None:
    """Try it: two examples in one row must give the logits that each gives alone.

    Args:
        collate: as in training; without labels, so that all logits are there.

    Raises:
        ConfigError: they do not; the model attends across the border, or takes no positions.
    """
    parts = [{key: example[key][:PROBE] for key in ("input_ids", "labels")} for example in (examples[0], examples[-1])]
    rows = [{"input_ids": part["input_ids"]} for part in (*parts, _joined(parts))]
    rows[-1]["position_ids"] = _joined(parts)["position_ids"]
    was_training = model.training
    model.eval()
    try:
        *alone, together = (model(**collate([row])).logits[0].float() for row in rows)  # (T, V) each
    except TypeError:
        name = type(model).__name__
        raise ConfigError(f"packing needs a model that takes position_ids, and {name} does not; set packing=false") from None
    finally:
        model.train(was_training)
    expected = torch.cat(alone)
    if not torch.allclose(together, expected, atol=1e-2 * float(expected.abs().max()), rtol=1e-2):
        raise ConfigError(
            f"{type(model).__name__} lets packed examples see each other: its logits for two of them in one row differ by "
            f"{float((together - expected).abs().max()):.3g} from those of each alone; set packing=false"
        )
