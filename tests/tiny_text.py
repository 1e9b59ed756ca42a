"""A tiny BERT with a tiny vocabulary, and rows that it can learn: the material of the tests of training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = ["red", "green", "blue", "round", "square", "flat", "cat", "dog", "fish", "tree", "house", "road"]
LABELS = ["animal", "colour", "shape"]
_OF = {"animal": ["cat", "dog", "fish"], "colour": ["red", "green", "blue"], "shape": ["round", "square", "flat"]}


def write_model(folder: Path, *, dropout: float = 0.1) -> Path:
    """Save a random 2-layer BERT of width 32 and its tokenizer; returns the folder."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)})
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = BertConfig(
            vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=32, initializer_range=0.2, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder)
    return folder


def rows(count: int, *, seed: int) -> list[dict[str, str]]:
    """Rows whose label is the kind of one of their words."""
    draw = random.Random(seed)
    found = []
    for i in range(count):
        label = LABELS[i % len(LABELS)]
        filler = draw.choices(["tree", "house", "road"], k=draw.randint(1, 3))
        words = [*filler, draw.choice(_OF[label])]
        draw.shuffle(words)
        found.append({"text": " ".join(words), "label": label})
    return found


def write_jsonl(path: Path, entries: list[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def write_data(folder: Path, *, train: int = 42, validation: int = 12, test: int = 12) -> Path:
    """A data folder with the three splits; returns it."""
    for i, (split, count) in enumerate((("train", train), ("validation", validation), ("test", test))):
        write_jsonl(folder / f"{split}.jsonl", rows(count, seed=i))
    return folder


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """A configuration on the tiny model and data below ``folder``, which are written if need be."""
    if not (folder / "model").exists():
        write_model(folder / "model")
    if not (folder / "data").exists():
        write_data(folder / "data")
    return {
        "model": str(folder / "model"),
        "data": str(folder / "data"),
        "method": {"name": "LoRA", "rank": 4},
        "pooling": "mean",
        "batch_size": 8,
        "epochs": 2,
        "threads": 1,
        "output": str(folder / "run"),
        **changes,
    }
