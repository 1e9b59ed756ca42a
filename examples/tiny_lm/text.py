"""The text of the small model, its tokenizer, and its batches: all of it a function of a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["CHAT", "SPECIAL", "arithmetic", "batch", "documents", "make_tokenizer", "tokens"]

SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
HELD_OUT = 50  # one document in so many measures the loss
SUMS = 4_000  # lines of arithmetic, about a twelfth of all tokens
CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def documents(seed: int, more: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Training and held-out documents in a random order: public text without test questions, lines of arithmetic, and ``more``."""
    from trimtab.tasks.instructions.public import texts

    draw = random.Random(seed)
    found = [*texts(), *arithmetic(SUMS, draw), *more]
    draw.shuffle(found)
    cut = len(found) // HELD_OUT
    return found[cut:], found[:cut]


def arithmetic(count: int, draw: random.Random) -> list[str]:
    """Lines such as ``7 + 12 = 19. 30 - 4 = 26. ...``: word problems need them, and the sets have few."""
    lines = []
    for _ in range(count):
        facts = []
        for _ in range(6):
            a, b = draw.randint(0, 99), draw.randint(0, 99)
            c, d = draw.randint(0, 12), draw.randint(1, 12)
            facts.append(
                draw.choice([f"{a} + {b} = {a + b}", f"{a + b} - {b} = {a}", f"{c} * {d} = {c * d}", f"{c * d} / {d} = {c}"])
            )
        lines.append(". ".join(facts) + ".")
    return lines


def make_tokenizer(texts: list[str], vocabulary: int, context: int):
    """A byte-level BPE tokenizer of ``vocabulary`` pieces; every digit is a piece of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    bos = raw.token_to_id("<s>")
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=2 * context,
        additional_special_tokens=SPECIAL[3:], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = CHAT
    return tokenizer


def tokens(tokenizer, texts: list[str], context: int) -> Tensor:
    """All documents, each between ``<s>`` and ``</s>``, cut into rows: ``(rows, context)``; the rest is dropped."""
    stream: list[int] = []
    for ids in tokenizer(texts, verbose=False)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    rows = len(stream) // context
    return torch.tensor(stream[: rows * context], dtype=torch.int32).view(rows, context)


def batch(rows: Tensor, step: int, size: int, seed: int) -> Tensor:
    """The batch of one step, ``(size, context)``: permutations of all rows, one after the other."""
    picked = []
    for position in range(step * size, (step + 1) * size):
        epoch, index = divmod(position, len(rows))
        picked.append(_order(len(rows), seed, epoch)[index])
    return rows[torch.stack(picked)].long()


_ORDERS: dict[tuple[int, int, int], Tensor] = {}


def _order(count: int, seed: int, epoch: int) -> Tensor:
    key = (count, seed, epoch)
    if key not in _ORDERS:
        _ORDERS[key] = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return _ORDERS[key]
