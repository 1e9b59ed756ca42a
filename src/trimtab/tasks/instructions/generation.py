"""Answers that a model writes, and answers that it would rather write among given ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.tasks.instructions.encoding import collator, row_sums

__all__ = ["best_option", "generate", "left_padded"]


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    new_tokens: int,
    batch_size: int,
    beams: int = 1,
    cache: bool = True,
    done: Callable[[str], bool] | None = None,
) -> list[str]:
    """The texts that follow ``prompts``, greedily or by beam search; never sampled.

    Prompts of similar length run together, padded on the left under an attention mask, so that a text does not depend on what it
    shares its batch with.

    Args:
        prompts: token ids.
        new_tokens: at most so many are written.
        beams: width of the beam search; 1 is greedy.
        cache: keep keys and values; without, every token recomputes the whole text.
        done: whether a text may stop here, besides at its end token.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    settings = GenerationConfig(
        max_new_tokens=new_tokens, num_beams=beams, do_sample=False, use_cache=cache, pad_token_id=pad,
        eos_token_id=_ends(tokenizer), bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, mask = left_padded([prompts[i] for i in chosen], pad)
            stops = StoppingCriteriaList([_Done(tokenizer, ids.shape[1], done)] if done is not None else [])
            with torch.inference_mode():
                written = model.generate(
                    input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings, stopping_criteria=stops
                )
            new = tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(chosen, new, strict=True):
                texts[i] = text
    finally:
        model.train(was_training)
    return texts


def left_padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, both ``(n, T)``."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _ends(tokenizer: Any) -> list[int]:
    """The end token, and the one that ends the assistant's turn where the chat template has another."""
    ends = [tokenizer.eos_token_id]
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids = tokenizer(tokenizer.apply_chat_template(turn, tokenize=False), add_special_tokens=False)["input_ids"]
        special = [token for token in ids[-2:] if token in tokenizer.all_special_ids]  # some write a line break behind it
        ends += [token for token in special if token not in ends]
    return ends


class _Done:
    """A stopping criterion, ``(n, tokens)`` ids to ``(n,)`` booleans, on the text written so far."""

    def __init__(self, tokenizer: Any, prompt: int, done: Callable[[str], bool]):
        self.tokenizer, self.prompt, self.done = tokenizer, prompt, done

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt :], skip_special_tokens=True)
        return torch.tensor([self.done(text) for text in texts], device=input_ids.device)


@torch.inference_mode()
def best_option(model: nn.Module, tokenizer: Any, choices: Sequence[list[dict[str, Any]]], *, batch_size: int) -> list[int]:
    """For each row the index of the choice to whose labels the model gives the highest probability.

    Args:
        choices: for each row its encoded examples, one a choice.
    """
    flat = [example for row in choices for example in row]
    order = sorted(range(len(flat)), key=lambda i: len(flat[i]["input_ids"]))
    scores = [0.0] * len(flat)
    collate, device = collator(tokenizer, model), next(model.parameters()).device
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in collate([flat[i] for i in chosen]).items()}
        labels = batch.pop("labels")
        for i, loss in zip(chosen, row_sums(model(**batch), labels)[:, 0].tolist(), strict=True):
            scores[i] = -loss
    model.train(was_training)
    best, at = [], 0
    for row in choices:
        best.append(max(range(len(row)), key=lambda i: scores[at + i]))
        at += len(row)
    return best
