"""Text classification: one label a text (or pair of texts); cross-entropy, accuracy and macro F1."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.compat.head_file import is_headed, read_head
from trimtab.core.errors import CheckpointMismatch
from trimtab.tasks import Bundle, Task, task
from trimtab.training.config import TrainConfig
from trimtab.training.data import Row, load_rows, load_splits
from trimtab.training.errors import DataError, RunError
from trimtab.training.labels import check_known, label_names, label_of
from trimtab.training.metrics import Metric, classification
from trimtab.training.models import check_positions, load_pretrained
from trimtab.training.strict import check_characters

__all__ = ["PooledClassifier", "TextClassification", "TextClassificationConfig", "merged_labels", "merged_model"]


class TextClassificationConfig(TrainConfig):
    """Adds to ``TrainConfig``:

    Attributes:
        pooling: ``mean`` of the tokens' last hidden states under a linear head, their first (``cls``) under one, or
            the model's ``own`` classification head as transformers builds it.
        head_dropout: dropout before the head; for ``mean`` and ``cls``.
        dropout: dropout inside the frozen model while training; null keeps the model's own.
    """

    pooling: Literal["mean", "cls", "own"] = "own"
    head_dropout: float = Field(0.1, ge=0, lt=1)
    dropout: float | None = Field(None, ge=0, lt=1)


class PooledClassifier(nn.Module):
    """An encoder, pooled over its tokens, under a linear ``classifier``.

    The encoder stands under its own prefix (``bert`` for BERT), so paths of adapters are those of transformers' classes.

    Args:
        encoder: a transformers encoder that returns ``last_hidden_state`` of shape ``(n, tokens, width)``.
        classes: number of labels.
        pooling: ``mean`` over the tokens that are no padding, or ``cls``, the first token.
        dropout: probability before the classifier.
    """

    def __init__(self, encoder: nn.Module, classes: int, *, pooling: str, dropout: float):
        super().__init__()
        self.prefix, self.pooling = encoder.base_model_prefix, pooling
        self.config = encoder.config
        self.add_module(self.prefix, encoder)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(encoder.config.hidden_size, classes)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    @classmethod
    def from_merged(cls, folder: str | Path, *, pooling: str | None = None) -> PooledClassifier:
        """The classifier that ``tt.merge_checkpoint`` wrote to ``folder``, in evaluation mode; ``config.id2label`` has its labels.

        Args:
            pooling: only for a folder that does not say it.

        Raises:
            CheckpointMismatch: the folder holds no such classifier, is damaged, or says another pooling or none.
        """
        from transformers import AutoModel

        entry, tensors = read_head(Path(folder))
        said = entry.get("pooling") or pooling
        whole = sorted(tensors) == ["classifier.bias", "classifier.weight"] and entry.get("class") == cls.__name__
        if not whole or said not in ("mean", "cls") or (pooling or said) != said:
            raise CheckpointMismatch(
                f"{folder} holds the head of a {entry.get('class')} ({', '.join(sorted(tensors))}) with pooling "
                f"{entry.get('pooling')!r}, not that of a {cls.__name__} with pooling {pooling or 'mean or cls'}; where it says "
                "none, say pooling=..."
            )
        encoder = load_pretrained(AutoModel.from_pretrained, str(folder))
        encoder.pooler = None
        labels = entry.get("labels") or [f"LABEL_{i}" for i in range(tensors["classifier.weight"].shape[0])]
        encoder.config.id2label = dict(enumerate(labels))
        encoder.config.label2id = {label: i for i, label in enumerate(labels)}
        model = cls(encoder, len(labels), pooling=said, dropout=0.0)
        model.load_state_dict(tensors, strict=False)
        return model.eval()

    @property
    def saved_notes(self) -> dict[str, Any]:
        """What an adapter of this model remembers of it."""
        return {"pooling": self.pooling}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        """Token ids and mask, both ``(n, tokens)``, to ``{"logits": (n, classes)}``."""
        encoder = getattr(self, self.prefix)
        hidden = encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        if self.pooling == "cls":
            pooled = hidden[:, 0]  # (n, width)
        else:
            weights = attention_mask[..., None].to(hidden.dtype)  # (n, tokens, 1)
            pooled = (hidden * weights).sum(1) / weights.sum(1)  # (n, width)
        pooled = self.dropout(pooled)
        # a base in bf16 keeps its head in fp32; a linear probe puts an Identity in the head's place
        head = next(self.classifier.parameters(), pooled)
        return {"logits": self.classifier(pooled.to(head.dtype))}


@task("text-classification")
class TextClassification(Task):
    """See the module."""

    config = TextClassificationConfig
    metrics = (Metric("accuracy", "higher"), Metric("macro_f1", "higher"))

    def prepare(self, config: TextClassificationConfig) -> Bundle:
        """Raises ``DataError`` for rows that cannot be used; see ``Task.prepare``."""
        splits = load_splits(config.data, _columns(config), seed=config.seed)
        labels = label_names(splits["train"], config.data.label)
        if len(labels) < 2:
            raise DataError(f"the training rows have the one label {labels[0]!r}; classification needs at least two")
        for split, rows in splits.items():
            check_known(rows, labels, split, config.data.label)
        _tell_seen(splits, config)
        return _bundle(config, {"labels": labels}, splits)

    def restore(self, config: TextClassificationConfig, info: dict[str, Any], inputs: str | list[Any]) -> Bundle:
        """``inputs``: a split's name, a data file with labels, or a list of texts or (text, text) pairs; see ``Task.restore``.

        ``info`` has ``merged`` where the model is one that a run was merged into: it then has its head and its labels itself.
        """
        if info.get("merged"):
            info = {"merged": True, "labels": merged_labels(config.model, info.get("labels"))}
        if not isinstance(inputs, str):
            return _bundle(config, info, {"predict": _raw_rows(config, inputs)})
        if Path(inputs).suffix:
            rows, split = load_rows(Path(inputs), _columns(config)), "predict"
        else:
            splits, split = load_splits(config.data, _columns(config), seed=config.seed), inputs
            if split not in splits:
                raise DataError(f"the data has no split {split!r}; found {', '.join(splits)}, or give a file or texts")
            rows = splits[split]
        check_known(rows, info["labels"], split, config.data.label)
        return _bundle(config, info, {split: rows})

    def decode(self, info: dict[str, Any], outputs: Any) -> list[dict[str, Any]]:
        """``outputs`` (n, classes) to ``[{"label": ..., "probability": ...}]``."""
        probabilities = torch.as_tensor(outputs).float().softmax(-1)
        best = probabilities.max(-1)
        return [
            {"label": info["labels"][i], "probability": p}
            for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def _columns(config: TextClassificationConfig) -> list[str]:
    return [c for c in (config.data.text, config.data.text_pair, config.data.label) if c is not None]


def _raw_rows(config: TextClassificationConfig, inputs: list[Any]) -> list[Row]:
    """Rows without labels from texts, or from pairs of texts where the task is on pairs."""
    columns = _columns(config)[:-1]
    rows = []
    for number, entry in enumerate(inputs, 1):
        values = (entry,) if isinstance(entry, str) else tuple(entry)
        if len(values) != len(columns):
            raise DataError(f"input {number} has {len(values)} texts; this task reads {len(columns)}: {', '.join(columns)}")
        rows.append(Row(dict(zip(columns, values, strict=True)), f"input {number}"))
    return rows


def _tell_seen(splits: dict[str, list[Row]], config: TextClassificationConfig) -> None:
    """Warn of validation and test rows whose texts are, word for word, among the training rows."""
    columns = _columns(config)[:-1]

    def text(row: Row) -> tuple[str, ...]:
        return tuple(str(row.values[column]).strip() for column in columns)

    trained = set(map(text, splits["train"]))
    for split in splits:
        seen = [row for row in splits[split] if split != "train" and text(row) in trained]
        if seen:
            warnings.warn(
                f"{len(seen)} of {len(splits[split])} {split} rows are, word for word, among the training rows (first: "
                f"{seen[0].where}): what they give says little",
                stacklevel=3,
            )


def _bundle(config: TextClassificationConfig, info: dict[str, Any], splits: dict[str, list[Row]]) -> Bundle:
    from transformers import AutoTokenizer, DataCollatorWithPadding

    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, config.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # decoders pad with their end token; the mask hides it
    if info.get("merged"):
        model = merged_model(config.model, config.pooling)
        longest = min(config.data.max_length, getattr(model.config, "max_position_embeddings", config.data.max_length))
        config = config.model_copy(update={"data": config.data.model_copy(update={"max_length": longest})})
    else:
        model = _model(config, info["labels"], tokenizer)
    encoded = {split: _encode(tokenizer, rows, config, info["labels"]) for split, rows in splits.items()}
    check_positions(model, max(len(each["input_ids"]) for rows in encoded.values() for each in rows), "data.max_length")

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs["logits"].float()  # (n, classes)
        total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=config.label_smoothing * model.training)
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return Bundle(
        model=model,
        head=getattr(model, "classifier", None) or getattr(model, "score", None),
        splits=encoded,
        length=lambda example: len(example["input_ids"]),
        collate=DataCollatorWithPadding(tokenizer),
        loss=loss,
        metrics=classification,
        info=info,
    )


def _model(config: TextClassificationConfig, labels: list[str], tokenizer: Any) -> nn.Module:
    from transformers import AutoModel, AutoModelForSequenceClassification

    torch.manual_seed(config.seed)  # the head's start
    dropout = {} if config.dropout is None else _dropouts(config)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    if config.pooling == "own":
        model = load_pretrained(AutoModelForSequenceClassification.from_pretrained, config.model, **names, **dropout)
        model.config.pad_token_id = tokenizer.pad_token_id  # decoders read the last token that is no padding
        return model
    encoder = load_pretrained(AutoModel.from_pretrained, config.model, **names, **dropout)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # it would be computed and thrown away, and an adapter on it would get no gradient
    return PooledClassifier(encoder, len(labels), pooling=config.pooling, dropout=config.head_dropout)


def merged_labels(folder: str, expected: list[str] | None = None) -> list[str]:
    """Names of the classes of a merged classifier, in the order of its head.

    Args:
        expected: those of the run that it came from, in any order.

    Raises:
        RunError: the folder does not name its classes, or names others.
    """
    from transformers import AutoConfig

    if is_headed(Path(folder)):
        names = read_head(Path(folder))[0].get("labels")
    else:
        stored = load_pretrained(AutoConfig.from_pretrained, folder).id2label
        names = [stored[i] for i in range(len(stored))]
        names = None if names == [f"LABEL_{i}" for i in range(len(names))] else names
    if names is None and expected is None:
        raise RunError(f"{folder} does not name its classes; give the run that it was merged from (--like RUN)")
    if names is not None and expected is not None and sorted(names) != sorted(expected):
        raise RunError(f"{folder} has the classes {sorted(names)}, and the run {sorted(expected)}: it was not merged from that run")
    return list(names or expected)


def merged_model(folder: str, pooling: str) -> nn.Module:
    """A classifier that a run was merged into, with its head.

    Raises:
        RunError: the folder holds no trained head, or that of another kind of classifier than the run's.
    """
    from transformers import AutoModelForSequenceClassification

    if is_headed(Path(folder)):
        return PooledClassifier.from_merged(folder, pooling=None if pooling == "own" else pooling)
    if pooling != "own":
        raise RunError(f"{folder} holds no head that reads the {pooling} of the tokens, as the run's does; merge the run again")
    load = AutoModelForSequenceClassification.from_pretrained
    model, found = load_pretrained(load, folder, output_loading_info=True)
    if found["missing_keys"]:
        raise RunError(f"{folder} is no merged classifier: it has no values for {', '.join(sorted(found['missing_keys'])[:3])}")
    return model


def _dropouts(config: TextClassificationConfig) -> dict[str, float]:
    """Every dropout probability that the model's config has, whatever the architecture calls it."""
    from transformers import AutoConfig

    values = load_pretrained(AutoConfig.from_pretrained, config.model).to_dict()
    marks = ("dropout", "dropout_prob", "pdrop")
    return {key: config.dropout for key, v in values.items() if key.endswith(marks) and isinstance(v, int | float)}


def _encode(tokenizer: Any, rows: list[Row], config: TextClassificationConfig, labels: list[str]) -> list[dict[str, Any]]:
    number = {label: i for i, label in enumerate(labels)}
    data = config.data
    for row in rows:
        for column in filter(None, (data.text, data.text_pair)):
            if not isinstance(row.values.get(column, ""), str):
                raise DataError(f"{row.where}: the column {column!r} must be text; found {row.values[column]!r}")
            check_characters(row.values.get(column), row.where)
    texts = [row.values[data.text] for row in rows]
    pairs = [row.values[data.text_pair] for row in rows] if data.text_pair is not None else None
    encoded = tokenizer(texts, pairs, truncation=True, max_length=data.max_length)
    examples = [{key: encoded[key][i] for key in encoded} for i in range(len(rows))]
    for example, row in zip(examples, rows, strict=True):
        if data.label in row.values:
            example["labels"] = number[label_of(row, data.label, number)]
    return examples
