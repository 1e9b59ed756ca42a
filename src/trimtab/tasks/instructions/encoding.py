"""From text to tokens and labels, and from examples to batches.

A label is the token itself where it is learnt, and -100 elsewhere; models and losses shift by one, as everywhere in transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.tasks.instructions.templates import Segment, TemplateConfig, prompt_text, segments
from trimtab.training.data import Row
from trimtab.training.errors import DataError
from trimtab.training.metrics import IGNORED as IGNORE

__all__ = ["IGNORE", "causal_loss", "collator", "encode", "encode_prompt", "encode_rows", "row_sums"]

Example = dict[str, Any]


def encode(found: list[Segment], tokenizer: Any, *, max_length: int, special: bool, on_prompt: bool = False) -> Example:
    """Tokens and labels of one row, at most ``max_length``, cut on the right.

    The tokens of the prompt are exactly those that generation will see: where tokenising prompt and answer together would join
    them, they are tokenised apart. The end token is appended, and learnt, if there is room.

    Args:
        special: whether the tokenizer adds its own tokens (not for chat templates, which write them).
        on_prompt: learn the prompt as well.
    """
    ids: list[int] = []
    learnt: list[bool] = []
    text, start = "", 0
    for part, learns in found:
        text, start = text + part, len(ids)
        whole = _tokens(tokenizer, text, special)
        if whole[:start] != ids:  # a piece reaches across the border
            whole = ids + tokenizer(part, add_special_tokens=False)["input_ids"]
        learnt += [learns or on_prompt] * (len(whole) - start)
        ids = whole
    # chat templates write the token that ends a turn themselves
    if found[-1][1] and not set(ids[start:]) & set(tokenizer.all_special_ids):
        ids, learnt = [*ids, tokenizer.eos_token_id], [*learnt, True]
    ids, learnt = ids[:max_length], learnt[:max_length]
    labels = [token if yes else IGNORE for token, yes in zip(ids, learnt, strict=True)]
    labels[0] = IGNORE  # nothing stands before the first token
    return {"input_ids": ids, "labels": labels}


def _tokens(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Without the end token that some tokenizers append to everything: the answer is still to come."""
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids[:-1] if special and ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_prompt(row: Row, template: TemplateConfig, tokenizer: Any) -> list[int]:
    """The tokens that generation starts from."""
    text = prompt_text(segments(row, template, tokenizer, answer=False))
    return _tokens(tokenizer, text, template.style != "chat")


def encode_rows(
    rows: list[Row], template: TemplateConfig, tokenizer: Any, *, max_length: int, on_prompt: bool, drop: bool
) -> tuple[list[Example], int]:
    """All rows, and how many of them lost the end of their answer to ``max_length``.

    Args:
        drop: leave out rows of whose answer nothing would be left, instead of refusing them.

    Raises:
        DataError: rows whose prompt alone fills ``max_length``, and ``drop`` is not set; or nothing is left.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end token, so the model could not learn where an answer ends; set its eos_token")
    found, lost, cut = [], [], 0
    for row in rows:
        parts = segments(row, template, tokenizer)
        example = encode(parts, tokenizer, max_length=max_length, special=template.style != "chat", on_prompt=on_prompt)
        learns = any(label != IGNORE for label in example["labels"])
        if not learns:
            lost.append(row)
            continue
        cut += len(example["input_ids"]) == max_length and example["input_ids"][-1] not in tokenizer.all_special_ids
        found.append(example)
    if lost and not drop:
        raise DataError(
            f"{len(lost)} of {len(rows)} rows have a prompt of at least {max_length} tokens, so that nothing of the answer would "
            f"be learnt (first: {lost[0].where}); raise data.max_length, or leave them out with data.overlong=drop"
        )
    if not found:
        raise DataError(f"all {len(rows)} rows are longer than data.max_length = {max_length} tokens; raise it")
    return found, cut


def collator(tokenizer: Any, model: nn.Module) -> Callable[[list[Example]], dict[str, Any]]:
    """Examples to ``input_ids, labels (n, T)`` and, for plain rows, ``attention_mask (n, T)``; padded on the right.

    Packed examples carry ``position_ids`` that start anew with each of their parts; transformers builds the block-diagonal mask
    from them. Where the model can, it computes logits from the first learnt token of the batch on alone.
    """
    names = inspect.signature(model.forward).parameters
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def padded(examples: list[Example], key: str, width: int, fill: int) -> Tensor:
        return torch.tensor([example[key] + [fill] * (width - len(example[key])) for example in examples])  # (n, T)

    def collate(examples: list[Example]) -> dict[str, Any]:
        width = max(len(example["input_ids"]) for example in examples)
        batch = {"input_ids": padded(examples, "input_ids", width, pad)}
        if "position_ids" in examples[0]:
            # padding is one more part: it attends to itself alone
            rows = [e["position_ids"] + list(range(width - len(e["position_ids"]))) for e in examples]
            batch["position_ids"] = torch.tensor(rows)  # (n, T)
            if "use_cache" in names:
                batch["use_cache"] = False  # with a cache, transformers does not look for parts
        else:
            ones = [{"mask": [1] * len(example["input_ids"])} for example in examples]
            batch["attention_mask"] = padded(ones, "mask", width, 0)
        if "labels" in examples[0]:
            labels = batch["labels"] = padded(examples, "labels", width, IGNORE)
            if "logits_to_keep" in names and bool((labels != IGNORE).any()):
                first = int((labels != IGNORE).any(0).nonzero()[0])
                batch["logits_to_keep"] = width - first + 1  # the token before the first label predicts it
        return batch

    return collate


def _targets(logits: Tensor, labels: Tensor) -> Tensor:
    """What each of the last K positions should predict: ``(n, K, V)`` and ``(n, T)`` to ``(n, K)``."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)[:, labels.shape[1] - logits.shape[1] :]


def causal_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None, *, label_smoothing: float = 0.0
) -> Tensor:
    """Sum of the negative log-likelihoods of all labels, divided by their number in the whole step (or in this batch).

    Args:
        outputs: with ``logits`` of shape (n, K, V), for the last K of T positions.
        labels: (n, T).
    """
    logits = outputs["logits"]
    targets = _targets(logits, labels)
    chosen = targets != IGNORE
    count = chosen.sum() if num_items_in_batch is None else num_items_in_batch
    # the logits that count, alone, in float32: the other copies of (n, K, V) are the largest tensors of a step
    total = F.cross_entropy(logits[chosen].float(), targets[chosen], reduction="sum", label_smoothing=label_smoothing)
    return total / count


@torch.no_grad()
def row_sums(outputs: Any, labels: Tensor) -> Tensor:
    """What metrics need of each row, in float64: summed loss, number of labels, and how many the model would say; ``(n, 3)``."""
    logits = outputs["logits"]
    targets = _targets(logits, labels)
    chosen = targets != IGNORE
    rows = chosen.nonzero()[:, 0]
    found = logits[chosen].float()  # (labels, V)
    right = targets[chosen]
    losses = F.cross_entropy(found, right, reduction="none")
    columns = torch.stack([losses, torch.ones_like(losses), (found.argmax(-1) == right).float()], 1).double()
    return torch.zeros(len(labels), 3, dtype=torch.float64, device=labels.device).index_add_(0, rows, columns)
