"""Texts as inputs of a model on which it is calibrated: without padding, since padding would count as data."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from trimtab.core.errors import Unsupported
from trimtab.training.config import DataConfig
from trimtab.training.data import load_rows, load_splits
from trimtab.training.models import load_pretrained

__all__ = ["text_batches"]

_BATCH_TOKENS = 4096


def text_batches(
    model: str | Path, data: str, *, column: str = "text", samples: int = 128, length: int = 2048, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Inputs of ``model`` from ``samples`` texts of ``data``, drawn by ``seed``; texts of one length share a batch.

    Args:
        model: a folder, a packaged model, or a Hub id: its tokenizer is used.
        data: a file (.jsonl, .csv, .parquet), a folder, a packaged data set, or a Hub id, whose training split is used.
        column: that holds the texts.
        length: tokens a text is cut to; at most what the model has positions for.

    Raises:
        DataError: no such data or column. Unsupported: samples or length that are not positive.
    """
    from transformers import AutoConfig, AutoTokenizer

    if samples < 1 or length < 1:
        raise Unsupported(f"calibration takes at least one text of at least one token, found samples={samples}, length={length}")
    rows = load_rows(Path(data), [column]) if Path(data).is_file() else load_splits(DataConfig(source=data), [column])["train"]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    config = load_pretrained(AutoConfig.from_pretrained, str(model))
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, str(model))
    most = min(length, getattr(config, "max_position_embeddings", None) or length, tokenizer.model_max_length)
    encoded = tokenizer([str(rows[i].values[column]) for i in order], truncation=True, max_length=most)["input_ids"]
    by_length: dict[int, list[list[int]]] = {}
    for ids in encoded:
        by_length.setdefault(len(ids), []).append(ids)
    by_length.pop(0, None)
    batches = []
    for size in sorted(by_length):
        for part in torch.tensor(by_length[size]).split(max(1, _BATCH_TOKENS // size)):
            batches.append({"input_ids": part} | ({"labels": part} if config.is_encoder_decoder else {}))
    return batches
