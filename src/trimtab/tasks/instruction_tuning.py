"""Instruction tuning of a decoder: the causal loss on answers alone, and test sets scored on what the model writes.

The protocol of LLM-Adapters (arXiv 2304.01933) is a configuration of it: ``data.train: math_10k.json`` or
``commonsense_170k.json``, their test files, ``evaluation.beams: 4``. Scores are given under the published reader of answers and
under a corrected one (``instructions.readers``); predictions are stored as JSON lines in ``predictions/`` of the run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from torch import nn

from trimtab.core.errors import nearest
from trimtab.tasks import Bundle, Task, task
from trimtab.tasks.instructions import encoding, generation, packing, scores, sources
from trimtab.tasks.instructions.readers import Reader, reader_for
from trimtab.tasks.instructions.templates import TemplateConfig, prompt_text, segments
from trimtab.training import processes
from trimtab.training.config import TrainConfig
from trimtab.training.data import Row
from trimtab.training.errors import ConfigError, DataError
from trimtab.training.files import json_lines, write_text
from trimtab.training.folder import PREDICTIONS
from trimtab.training.metrics import Metric
from trimtab.training.models import check_positions, checkpoint_activations, load_decoder
from trimtab.training.overlap import overlaps

__all__ = ["EvaluationConfig", "InstructionConfig", "InstructionTuning"]



class EvaluationConfig(BaseModel):
    """How test sets are scored; rows run ``eval_batch_size`` at a time.

    Attributes:
        mode: ``generate``: read the answer out of what the model writes; ``options``: take the label that it gives the highest
            probability, for sets with labels (another protocol: never compare the two).
        beams: width of the beam search; 1 is greedy. LLM-Adapters uses 4.
        new_tokens: at most so many are written; null is the published number, 256 for mathematics and 32 for labels.
        limit: rows of each test set, the first ones; null takes all.
        readers: set name -> number, letter, text, or labels such as yes/no, for sets that are not known by their name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["generate", "options"] = "generate"
    beams: int = Field(1, ge=1)
    new_tokens: int | None = Field(None, ge=1)
    limit: int | None = Field(None, ge=1)
    readers: dict[str, str] = {}


class InstructionConfig(TrainConfig):
    """Adds to ``TrainConfig``:

    Attributes:
        data: see ``instructions.sources.InstructionData``; a bare string is a set that is trained on and tested.
        template: see ``instructions.templates.TemplateConfig``.
        evaluation: see ``EvaluationConfig``.
        train_on_prompt: learn the prompt as well as the answer (the release's default; ours is the answer alone).
        packing: put several examples into one row of ``pack_length`` tokens (null: ``data.max_length``); ``batch_size`` then counts
            such rows. Without it, ``bucket`` puts rows of similar length together.
        base_dtype: of the frozen model's weights: ``fp32``, ``bf16``, ``fp16``, or ``auto``, as they are stored.
        checkpointing: compute activations again in backward instead of keeping them.
    """

    task: str = "instruction-tuning"
    data: sources.InstructionData
    template: TemplateConfig = TemplateConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    metric: str = "loss"
    batch_size: int = Field(16, ge=1)
    learning_rate: float = Field(3e-4, gt=0)
    train_on_prompt: bool = False
    packing: bool = False
    pack_length: int | None = Field(None, ge=2)
    base_dtype: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    checkpointing: bool = False


@dataclass
class InstructionBundle(Bundle):
    """Adds the tokenizer; test sets, whose rows are encoded when they are scored; and which of them are training rows too."""

    tokenizer: Any = None
    tests: dict[str, list[Row]] = field(default_factory=dict)
    seen: dict[str, list[bool]] = field(default_factory=dict)
    raw: list[Row] = field(default_factory=list)


@task("instruction-tuning")
class InstructionTuning(Task):
    """See the module."""

    config = InstructionConfig
    metrics = (Metric("token_accuracy", "higher"), Metric("perplexity", "lower"))

    def prepare(self, config: InstructionConfig) -> InstructionBundle:
        """Raises ``DataError`` for rows that cannot be used, ``ConfigError`` where model and packing do not go together."""
        rows = sources.load(config.data, config.template, seed=config.seed)
        for name in sorted(set(config.evaluation.readers) - set(rows.tests)):
            raise ConfigError(f"evaluation.readers names {name!r}, which is no test set{nearest(name, rows.tests)}")
        _check_tests(config, rows.tests)
        bundle = _bundle(config)
        cut = 0
        for split in ("train", "validation"):
            bundle.splits[split], lost = _encode(config, bundle, getattr(rows, split))
            cut += lost
        longest = max(len(each["input_ids"]) for split in ("train", "validation") for each in bundle.splits[split])
        check_positions(bundle.model, longest, "data.max_length")
        _check_room(config, bundle, rows.tests)
        if config.packing:
            packing.check_apart(bundle.model, bundle.splits["train"], bundle.collate)
            bundle.splits["train"] = packing.pack(bundle.splits["train"], config.pack_length or config.data.max_length)
        bundle.tests, bundle.seen = rows.tests, _seen(config, rows.train + rows.validation, rows.tests)
        bundle.info = {"cut_answers": cut}
        return bundle

    def restore(self, config: InstructionConfig, info: dict[str, Any], inputs: str | list[Any]) -> InstructionBundle:
        """``inputs``: ``test`` (all test sets), one's name, ``train`` or ``validation``, a file or public set, or prompts."""
        if not isinstance(inputs, str):
            bundle = _bundle(config)
            bundle.raw = [_raw(config, text, number) for number, text in enumerate(inputs, 1)]
            return bundle
        rows = sources.load(config.data, config.template, seed=config.seed)
        bundle = _bundle(config)
        if inputs in ("train", "validation"):
            bundle.splits[inputs], _ = _encode(config, bundle, getattr(rows, inputs))
        elif inputs == "test" or inputs in rows.tests:
            bundle.tests = rows.tests if inputs == "test" else {inputs: rows.tests[inputs]}
        elif Path(inputs).exists() or inputs in sources.public.NAMES:
            bundle.tests = sources.load_tests([inputs], config.data, config.template)
        else:
            known = ["train", "validation", "test", *rows.tests]
            raise DataError(f"the data has no split or test set {inputs!r}{nearest(inputs, known)}; or give a file or prompts")
        if not bundle.tests and not bundle.splits:
            raise DataError("the data of this run has no test set; give a file, or name test sets under data.test")
        _check_tests(config, bundle.tests)
        _check_room(config, bundle, bundle.tests)
        bundle.seen = _seen(config, rows.train + rows.validation, bundle.tests)
        return bundle

    def evaluate(
        self, config: InstructionConfig, bundle: InstructionBundle, *, console: Console
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Loss on a split; scores of test sets, each metric under ``<set>/``; the texts that follow raw prompts."""
        if bundle.splits:
            return super().evaluate(config, bundle, console=console)
        if bundle.raw:
            texts = _write(config, bundle, bundle.raw, config.evaluation.new_tokens or 256, None)
            return {}, [{"output": text} for text in texts]
        found = {name: _score(config, bundle, name) for name in bundle.tests}
        console.print(str(scores.scores_table({name: metrics for name, (metrics, _) in found.items()})))
        flat = {f"{name}/{key}": value for name, (metrics, _) in found.items() for key, value in metrics.items()}
        return flat, [{"set": name, **entry} for name, (_, entries) in found.items() for entry in entries]

    def finish(
        self, config: InstructionConfig, bundle: InstructionBundle, folder: Path, *, console: Console
    ) -> dict[str, dict[str, float]]:
        """Score every test set; a set whose predictions an interrupted process left behind is not generated again."""
        found = {}
        for name, rows in bundle.tests.items():
            file = folder / PREDICTIONS / f"{name}.jsonl"
            kept = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else None
            found[name], entries = _score(config, bundle, name, texts=None if kept is None else [e["output"] for e in kept])
            if kept is None and processes.is_main():
                lines = ({"where": row.where, **entry} for row, entry in zip(rows, entries, strict=False))
                file.parent.mkdir(exist_ok=True)
                write_text(file, json_lines(lines))
        if found:
            console.print(str(scores.scores_table(found, title="test sets, +- one standard error")))
        for name, metrics in found.items():
            if metrics["seen"]:
                clean = f"the others give {metrics['clean']:.1%}" if "clean" in metrics else "there are no others"
                console.print(
                    f"{metrics['seen']:.1%} of the questions of {name} are among the training rows: its accuracy says little; "
                    f"{clean} (trimtab audit contamination shows which)"
                )
        return found

    def decode(self, info: dict[str, Any], outputs: Any) -> list[dict[str, Any]]:
        """Row sums (n, 3) to loss a token, number of tokens, and how many of them the model would say."""
        rows = outputs.tolist()
        return [{"loss": loss / max(1.0, count), "tokens": int(count), "right": int(hits)} for loss, count, hits in rows]


def _bundle(config: InstructionConfig) -> InstructionBundle:
    """Model and tokenizer, without rows."""
    model, tokenizer = load_decoder(config.model, config.base_dtype)
    model.config.use_cache = False  # generation asks for its cache itself
    if config.checkpointing:
        checkpoint_activations(model)
    smoothing: Callable[[], float] = lambda: config.label_smoothing * model.training  # noqa: E731

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return encoding.causal_loss(outputs, labels, num_items_in_batch, label_smoothing=smoothing())

    return InstructionBundle(
        model=model,
        head=None,
        splits={},
        length=lambda example: len(example["input_ids"]),
        collate=encoding.collator(tokenizer, model),
        loss=loss,
        metrics=_metrics,
        reduce=encoding.row_sums,
        tokenizer=tokenizer,
    )


def _metrics(prediction: Any) -> dict[str, float]:
    """From row sums ``(n, 3)``; the loss is that of all tokens together, so it does not depend on batches."""
    losses, counts, hits = np.asarray(prediction.predictions, dtype=np.float64).sum(0)
    return {"loss": float(losses / counts), "perplexity": float(np.exp(losses / counts)), "token_accuracy": float(hits / counts)}


def _encode(config: InstructionConfig, bundle: InstructionBundle, rows: list[Row]) -> tuple[list[dict[str, Any]], int]:
    return encoding.encode_rows(
        rows, config.template, bundle.tokenizer, max_length=config.data.max_length, on_prompt=config.train_on_prompt,
        drop=config.data.overlong == "drop",
    )  # fmt: skip


def _raw(config: InstructionConfig, text: str, number: int) -> Row:
    """A bare prompt stands for the one column of the template."""
    columns = config.template.columns()[0]
    if len(columns) != 1 or config.template.messages is not None:
        raise DataError(f"a bare prompt fits a template of one column; this one reads {', '.join(columns)}: give a file instead")
    return Row({columns[0]: text}, f"input {number}")


def _reader(config: InstructionConfig, name: str) -> Reader:
    return reader_for(name, config.evaluation.readers.get(name))


def _check_tests(config: InstructionConfig, tests: dict[str, list[Row]]) -> None:
    """Every set must have a reader, and every right answer must parse, before anything is trained."""
    for name, rows in tests.items():
        reader = _reader(config, name)
        if config.evaluation.mode == "options" and reader.kind != "label":
            raise ConfigError(f"evaluation.mode options chooses among labels, and {name} is read as a {reader.kind}; use generate")
        for row in rows[: config.evaluation.limit]:
            reader.answer(row.values[config.data.answer], row.where)


def _check_room(config: InstructionConfig, bundle: InstructionBundle, tests: dict[str, list[Row]]) -> None:
    """The model must be able to write an answer behind the longest question, before anything is trained."""
    for name, rows in tests.items():
        if config.evaluation.mode == "options":
            continue
        new_tokens = config.evaluation.new_tokens or _reader(config, name).new_tokens
        shown = rows[: config.evaluation.limit]
        longest = max(len(encoding.encode_prompt(row, config.template, bundle.tokenizer)) for row in shown)
        setting = f"evaluation.new_tokens, or shorten the questions of {name}"
        check_positions(bundle.model, longest + new_tokens, setting, new_tokens=new_tokens)


def _seen(config: InstructionConfig, train: list[Row], tests: dict[str, list[Row]]) -> dict[str, list[bool]]:
    """Whether each test question is, word for word, among the training rows."""
    columns = config.template.columns()[0]

    def pairs(rows: list[Row]) -> list[tuple[str, str]]:
        return [(row.where, " ".join(str(row.values[column]) for column in columns)) for row in rows]

    flat = [row for rows in tests.values() for row in rows]
    found = iter(overlaps(pairs(train), pairs(flat), n=None))
    return {name: [next(found).kind == "exact" for _ in rows] for name, rows in tests.items()}


def _score(
    config: InstructionConfig, bundle: InstructionBundle, name: str, *, texts: list[str] | None = None
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics and predictions of one test set, generated unless ``texts`` are given."""
    rows, reader = bundle.tests[name][: config.evaluation.limit], _reader(config, name)
    if texts is None and config.evaluation.mode == "options":
        texts = processes.spread(rows, lambda share: _choose(config, bundle, share, reader))
    elif texts is None:
        done = reader.done if reader.kind == "label" else None
        new_tokens = config.evaluation.new_tokens or reader.new_tokens
        texts = processes.spread(rows, lambda share: _write(config, bundle, share, new_tokens, done))
    answers = [reader.answer(row.values[config.data.answer], row.where) for row in rows]
    return scores.score(reader, texts, answers, seen=bundle.seen[name][: len(rows)])


def _write(
    config: InstructionConfig, bundle: InstructionBundle, rows: list[Row], new_tokens: int, done: Callable[[str], bool] | None
) -> list[str]:
    prompts = [encoding.encode_prompt(row, config.template, bundle.tokenizer) for row in rows]
    model = _on_device(bundle.model)
    return generation.generate(
        model, bundle.tokenizer, prompts, new_tokens=new_tokens, batch_size=config.eval_batch_size,
        beams=config.evaluation.beams, done=done,
    )  # fmt: skip


def _choose(config: InstructionConfig, bundle: InstructionBundle, rows: list[Row], reader: Reader) -> list[str]:
    """The label of each row that its answer's text is likeliest with; only labels that the prompt offers."""
    choices, labels = [], []
    for row in rows:
        shown = prompt_text(segments(row, config.template, bundle.tokenizer, answer=False)).lower()
        offered = [label for label in reader.labels if label.lower() in shown]
        labels.append(offered or list(reader.labels))
        examples = []
        for label in labels[-1]:
            written = str(row.values.get("output") or "")
            right = str(row.values[config.data.answer])
            lead = written[: -len(right)] if written.endswith(right) else ""
            changed = Row({**row.values, "output": lead + label, config.data.answer: label}, row.where)
            parts = segments(changed, config.template, bundle.tokenizer)
            special = config.template.style != "chat"
            examples.append(encoding.encode(parts, bundle.tokenizer, max_length=10**9, special=special))
        choices.append(examples)
    best = generation.best_option(_on_device(bundle.model), bundle.tokenizer, choices, batch_size=config.eval_batch_size)
    return [offered[i] for offered, i in zip(labels, best, strict=True)]


def _on_device(model: nn.Module) -> nn.Module:
    return model.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else model
