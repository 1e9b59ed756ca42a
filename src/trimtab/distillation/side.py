"""One model of a transfer with its own tokenizer: text in, text out; nothing else leaves it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.activation import activate
from trimtab.core.errors import Unsupported
from trimtab.core.state import unwrap
from trimtab.tasks.instructions import encoding, generation
from trimtab.tasks.instructions.templates import TemplateConfig
from trimtab.training.data import Row

__all__ = ["Side"]

_PLAIN = TemplateConfig(style="plain", prompt="{prompt}", answer="{answer}")


class Side:
    """A causal model and its tokenizer; which adapter acts is said in every call (None: the bare model).

    Args:
        model: on its device, in its dtype; it is put into evaluation mode while it is used.
        tokenizer: transformers' tokenizer of that model.
        batch_size: texts a forward pass; they are sorted by length.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, batch_size: int = 32):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token is None:
                raise Unsupported(f"the tokenizer {type(tokenizer).__name__} has neither a padding nor an end token; set pad_token")
            tokenizer.pad_token = tokenizer.eos_token

    @torch.inference_mode()
    def continuations(self, prompt: str, *, count: int, tokens: int, seed: int, adapter: str | None = None,
                      temperature: float = 1.0, top_p: float = 1.0) -> list[str]:  # fmt: skip
        """``count`` sampled continuations of ``prompt``, a function of ``seed`` alone."""
        batch = self._batch(self._ids([prompt]) * count)
        with self._acting(adapter), torch.random.fork_rng():
            torch.manual_seed(seed)
            out = self.model.generate(
                **batch, max_new_tokens=tokens, do_sample=True, temperature=temperature, top_p=top_p, top_k=0,
                pad_token_id=self.tokenizer.pad_token_id, use_cache=True,
            )  # fmt: skip
        return self.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    def answers(self, prompts: Sequence[str], *, tokens: int, adapter: str | None = None, stop: str = "\n") -> list[str]:
        """The greedy answer to each prompt, up to ``stop``; white space before it belongs to it, behind it does not."""
        with self._acting(adapter):
            texts = generation.generate(
                self.model, self.tokenizer, self._ids(prompts), new_tokens=tokens, batch_size=self.batch_size,
                done=lambda text: stop in text.lstrip(),
            )  # fmt: skip
        return [_until(text, stop) for text in texts]

    @torch.inference_mode()
    def margins(self, prompts: Sequence[str], answers: tuple[str, str], *, adapter: str | None = None) -> list[float]:
        """``z(first) - z(second)``: difference of the logits, in float32, of the answers' first tokens behind each prompt."""
        found = [0.0] * len(prompts)
        pair = self.answer_tokens(prompts[0], answers) if prompts else (0, 0)
        rows = self._ids(prompts)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        with self._acting(adapter):
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                logits = self.model(**self._batch([rows[i] for i in chosen]), logits_to_keep=1).logits[:, -1].float()
                for i, gap in zip(chosen, (logits[:, pair[0]] - logits[:, pair[1]]).tolist(), strict=True):
                    found[i] = gap
        return found

    def answer_tokens(self, prompt: str, answers: tuple[str, str]) -> tuple[int, int]:
        """The ids of the first token of each answer as it is learnt behind ``prompt``.

        Raises:
            Unsupported: both begin with one token, or one is unknown to the tokenizer.
        """
        found = []
        for answer in answers:
            example = encoding.encode([(prompt, False), (answer, True)], self.tokenizer, max_length=10**9, special=True)
            found.append(next(token for token in example["labels"] if token != encoding.IGNORE))
            if found[-1] == self.tokenizer.unk_token_id:
                raise Unsupported(f"the tokenizer has no token for the answer {answer!r}; choose other answers")
        if found[0] == found[1]:
            raise Unsupported(f"the answers {answers[0]!r} and {answers[1]!r} begin with one token; choose others")
        return found[0], found[1]

    @contextmanager
    def _acting(self, adapter: str | None) -> Iterator[None]:
        """``adapter`` alone acts inside the block, in evaluation mode; both are put back."""
        state = unwrap(self.model).__dict__.get("_trimtab_state")
        before, was = (state.active if state else ()), self.model.training
        self.model.eval()
        if state is not None:
            activate(self.model, *([] if adapter is None else [adapter]))
        elif adapter is not None:
            raise Unsupported(f"the adapter {adapter!r} is to act on a model that has none; tt.load it first")
        try:
            yield
        finally:
            if state is not None:
                activate(self.model, *before)
            self.model.train(was)

    def names(self) -> list[str]:
        """The adapters on the model."""
        state = unwrap(self.model).__dict__.get("_trimtab_state")
        return list(state.groups) if state is not None else []

    def _ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """The tokens that training too would see before an answer."""
        rows = (Row({"prompt": prompt}, f"prompt {number}") for number, prompt in enumerate(prompts, 1))
        return [encoding.encode_prompt(row, _PLAIN, self.tokenizer) for row in rows]

    def _batch(self, rows: list[list[int]]) -> dict[str, Tensor]:
        ids, mask = generation.left_padded(rows, self.tokenizer.pad_token_id)
        device = next(self.model.parameters()).device
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _until(text: str, stop: str) -> str:
    end = text.find(stop, len(text) - len(text.lstrip()))
    return (text if end < 0 else text[:end]).rstrip()
