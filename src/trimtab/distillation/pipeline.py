"""transfer: a task moves from one model with its adapter to another model, by text that nobody has written.

Stages of arXiv 2405.17258, Algorithm 1, each with a file in ``output`` behind which an interrupted transfer goes on::

    config.yaml             the resolved configuration
    negatives.jsonl         made inputs, by the source's bare model if no other generator is named, for the discriminator
    discriminator/          the run that trained it; its adapter serves every later transfer
    candidates.jsonl        made inputs with the discriminator's margin: accepted above 0
    synthetic.jsonl         accepted inputs, and the answers of the source with its adapter
    target/                 the run that trained the target's adapter on them
    result.json             counts and measures; its presence says that all is done

The target's tokenizer, family and size are its own: only text crosses. The real inputs are needed for the discriminator alone and
are not kept; of them the ``seeds`` alone stand in the configuration.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from trimtab.core.checkpoint import load
from trimtab.core.files import locked
from trimtab.distillation import endpoint
from trimtab.distillation.config import TransferConfig
from trimtab.distillation.measures import area_under_curve
from trimtab.distillation.side import Side
from trimtab.distillation.synthesis import Draws, draw
from trimtab.training import train
from trimtab.training.config import read_config, to_yaml
from trimtab.training.data import load_rows
from trimtab.training.errors import RunError
from trimtab.training.files import append_lines, json_lines, write_text
from trimtab.training.folder import telling_of_disk
from trimtab.training.models import load_decoder

__all__ = ["TransferResult", "transfer"]

CONFIG, RESULT = "config.yaml", "result.json"
NEGATIVES, CANDIDATES, SYNTHETIC = "negatives.jsonl", "candidates.jsonl", "synthetic.jsonl"
TASK, FILTER = "task", "discriminator"
CHUNK = 64  # answers between two writes
EMPTY_AUC = 0.1  # so near to a half the filter says nothing
PLAIN = {"style": "plain", "prompt": "{prompt}", "answer": "{answer}"}


@dataclass(frozen=True)
class TransferResult:
    """What a transfer gave.

    Attributes:
        adapter: folder of the target's adapter.
        made: inputs that were trained on.
        drawn: different inputs that the filter judged.
        acceptance: share of them that it let through.
        repeated: draws dropped as repetitions, of the last process.
        unanswered: accepted inputs without an answer of the source, left out.
        auc: area under the discriminator's curve on held-out inputs; None without a filter, or for one from elsewhere.
    """

    adapter: str
    made: int
    drawn: int
    acceptance: float
    repeated: int
    unanswered: int
    auc: float | None


def transfer(
    config: str | Path | Mapping[str, Any] | TransferConfig,
    *,
    overrides: Mapping[str, Any] | Iterable[str] = (),
    console: Console | None = None,
) -> TransferResult:
    """Train an adapter for ``target`` that does what ``source.adapter`` does, from a few seeds; resumes by itself.

    Raises:
        ConfigError: a key or value that cannot be used. RunError: ``output`` holds another transfer, or cannot be written.
        Busy: another process transfers into it. TooFewAccepted: the filter lets too little through.
    """
    resolved = read_config(config, lambda _: TransferConfig, overrides=overrides)
    console = console or Console(quiet=True)
    console.print(to_yaml(resolved), markup=False, highlight=False)
    output = Path(resolved.output)
    with telling_of_disk(output), locked(output, "transfers into"):
        _claim(output, resolved)
        if (output / RESULT).is_file():
            console.print(f"the transfer in {output} is complete")
            return TransferResult(**json.loads((output / RESULT).read_text("utf-8")))
        result = _Stages(resolved, output, console).run()
        write_text(output / RESULT, json.dumps(asdict(result), indent=2) + "\n")
    console.print(f"{result.made} made inputs, {result.acceptance:.1%} of {result.drawn} drawn; adapter in {result.adapter}")
    return result


def _claim(output: Path, config: TransferConfig) -> None:
    """Make the folder this transfer's, or check that it is."""
    stored = output / CONFIG
    if stored.is_file():
        earlier, ours = read_config(stored, lambda _: TransferConfig).model_dump(), config.model_dump()
        differing = [key for key in ours if key != "output" and ours[key] != earlier[key]]
        if differing:
            shown = ", ".join(f"{key} = {earlier[key]!r} there, {ours[key]!r} now" for key in differing)
            raise RunError(f"{output} holds another transfer ({shown}); choose another output")
        return
    if output.exists() and any(output.iterdir()):
        raise RunError(f"{output} exists and holds no transfer; choose another output, or empty it")
    output.mkdir(parents=True, exist_ok=True)
    write_text(stored, to_yaml(config))


class _Stages:
    def __init__(self, config: TransferConfig, output: Path, console: Console):
        self.config, self.output, self.console = config, output, console
        self.prompts = config.prompts()
        self.auc: float | None = None
        self.source: Side | None = None

    def run(self) -> TransferResult:
        """All stages; those whose files are there cost no more than reading them."""
        filter_folder = self._discriminator()
        draws = self._inputs(filter_folder)
        rows = self._answers(draws.accepted)
        self.source = None  # its memory goes to the target
        file = self.output / "train.jsonl"
        answered = [row for row in rows if row["answer"].strip()]
        if not answered:
            raise RunError(f"the source answered none of {len(rows)} made inputs; does {self.config.source.adapter} know the task?")
        write_text(file, json_lines({"prompt": self.prompts.task(row["input"]), "answer": row["answer"]} for row in answered))
        self.console.print(f"training {self.config.target} on {len(answered)} made examples")
        settings = {"data": {"train": str(file)}, "model": self.config.target, "output": str(self.output / "target")}
        run = self._train(settings, self.config.train)
        return TransferResult(
            adapter=str(Path(run.output) / "adapter"), made=len(answered), drawn=draws.drawn, acceptance=draws.acceptance,
            repeated=draws.repeated, unanswered=len(rows) - len(answered), auc=self.auc,
        )  # fmt: skip

    # -- the filter

    def _discriminator(self) -> Path | None:
        """Folder of the discriminator's adapter; trains it if it is to be trained."""
        config = self.config.discriminator
        if config is None:
            warnings.warn("this transfer has no filter; in the paper that costs half of the gain", stacklevel=4)
            return None
        if config.adapter is not None:
            return Path(config.adapter)
        folder, measured = self.output / FILTER, self.output / "discriminator.json"
        if not measured.is_file():
            parts = self._real_and_made()
            files = {name: self.output / f"discriminator-{name}.jsonl" for name in ("train", "validation")}
            for name, file in files.items():
                write_text(file, json_lines(parts[name]))
            self.console.print(f"training the discriminator on {len(parts['train'])} inputs, half of them made")
            settings = {"data": {name: str(file) for name, file in files.items()}, "model": self.config.source.model}
            self._train(settings | {"output": str(folder)}, config.train)
            self._loaded_source()
            load(self.source.model, folder / "adapter", name=FILTER, trainable=False)
            write_text(measured, json.dumps({"auc": self._measure(parts["validation"])}) + "\n")
            for file in files.values():
                file.unlink()  # real inputs: nothing of them is kept
        self.auc = json.loads(measured.read_text("utf-8"))["auc"]
        if abs(self.auc - 0.5) <= EMPTY_AUC:
            warnings.warn(
                f"the discriminator tells real from made inputs with an AUC of {self.auc:.2f} on held-out ones: the filter carries "
                "no information; give it more data, or more epochs",
                stacklevel=4,
            )
        return folder / "adapter"

    def _real_and_made(self) -> dict[str, list[dict[str, str]]]:
        """Questions with their answers, in two parts; as many made inputs as real ones."""
        config, yes_no = self.config.discriminator, self.prompts.answers
        real = [str(row.values[config.column]) for row in load_rows(Path(config.data), [config.column])]
        self.console.print(f"writing {len(real)} inputs for the discriminator to tell from the real ones")
        made = self._draw(self._writer(self._loaded_source), None, target=len(real), file=NEGATIVES).accepted
        parts: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
        for texts, answer in ((real, yes_no[0]), (made, yes_no[1])):
            shuffled = random.Random(self.config.seed).sample(texts, len(texts))
            cut = max(1, round(config.held_out * len(texts)))
            for name, chosen in (("validation", shuffled[:cut]), ("train", shuffled[cut:])):
                parts[name] += [{"prompt": self.prompts.question(text), "answer": answer} for text in chosen]
        return parts

    def _measure(self, rows: Sequence[Mapping[str, str]]) -> float:
        margins = torch.tensor(self.source.margins([row["prompt"] for row in rows], self.prompts.answers, adapter=FILTER))
        real = torch.tensor([row["answer"] == self.prompts.answers[0] for row in rows])
        return area_under_curve(margins[real], margins[~real])

    # -- inputs and answers

    def _inputs(self, filter_folder: Path | None) -> Draws:
        """Made inputs that the filter lets through."""
        write, score = self._writer(lambda: self._side(self.config.target)), None
        if filter_folder is not None:
            side = self._loaded_source(filter_folder)
            score = lambda texts: side.margins(  # noqa: E731
                [self.prompts.question(text) for text in texts], self.prompts.answers, adapter=FILTER
            )
        return self._draw(write, score, target=self.config.count, file=CANDIDATES)

    def _writer(self, default: Callable[[], Side]) -> Callable[[str, int], list[str]]:
        """``(prompt, call)`` to continuations: of the endpoint or the model that the configuration names, else of ``default``."""
        generator = self.config.generator
        if generator.endpoint is not None:
            return self._asked
        side = default() if generator.model is None else self._side(generator.model)
        return lambda prompt, call: self._sampled(side, prompt, call)

    def _draw(self, write: Any, score: Any, *, target: int, file: str) -> Draws:
        config, shown = self.config, self.config.generator.shown

        def generate(seeds: Sequence[str], call: int) -> list[str]:
            prompt = self.prompts.generator(seeds)
            return [item for text in write(prompt, call) for item in self.prompts.parse(text, seeds=len(seeds))]

        with self.console.status(f"{file}: 0 of {target}") as status:
            return draw(
                generate, score, config.seeds, target=target, file=self.output / file, seed=config.seed, shown=shown,
                cap=config.cap, overlap=config.overlap, progress=lambda n: status.update(f"{file}: {n} of {target}"),
            )  # fmt: skip

    def _sampled(self, side: Side, prompt: str, call: int) -> list[str]:
        g = self.config.generator
        return side.continuations(
            prompt, count=g.calls, tokens=g.tokens, seed=self._call_seed(call), temperature=g.temperature, top_p=g.top_p
        )

    def _asked(self, prompt: str, call: int) -> list[str]:
        g = self.config.generator
        return endpoint.continuations(
            g.endpoint, prompt, model=g.model, count=g.calls, tokens=g.tokens, seed=self._call_seed(call),
            temperature=g.temperature, top_p=g.top_p, key_variable=g.key_variable,
        )  # fmt: skip

    def _call_seed(self, call: int) -> int:
        return self.config.seed * 1_000_003 + call

    def _answers(self, inputs: Sequence[str]) -> list[dict[str, str]]:
        """The source's answers, appended a chunk at a time."""
        file = self.output / SYNTHETIC
        rows = _whole_lines(file)[: len(inputs)]
        if any(row["input"] != text for row, text in zip(rows, inputs, strict=False)):
            raise RunError(f"{file} has answers to other inputs than {CANDIDATES}; empty {self.output} and start anew")
        if len(rows) == len(inputs):
            return rows
        side = self._loaded_source()
        write_text(file, json_lines(rows))
        with file.open("a", encoding="utf-8") as stream, self.console.status("answers") as status:
            for start in range(len(rows), len(inputs), CHUNK):
                chunk = inputs[start : start + CHUNK]
                prompts = [self.prompts.task(text) for text in chunk]
                answers = side.answers(prompts, tokens=self.config.answer_tokens, adapter=TASK)
                new = [{"input": text, "answer": answer} for text, answer in zip(chunk, answers, strict=True)]
                append_lines(stream, new)
                rows += new
                status.update(f"answers: {len(rows)} of {len(inputs)}")
        return rows

    # -- models

    def _side(self, model: str) -> Side:
        loaded, tokenizer = load_decoder(model, self.config.base_dtype)
        if torch.accelerator.is_available():
            loaded = loaded.to(torch.accelerator.current_accelerator())
        return Side(loaded, tokenizer, batch_size=self.config.batch_size)

    def _loaded_source(self, filter_folder: Path | None = None) -> Side:
        """The source with its task's adapter, and with the filter's once it is asked for: one copy of the weights for both."""
        if self.source is None:
            self.source = self._side(self.config.source.model)
            load(self.source.model, self.config.source.adapter, name=TASK, trainable=False)
        if filter_folder is not None and FILTER not in self.source.names():
            load(self.source.model, filter_folder, name=FILTER, trainable=False)
        return self.source

    def _train(self, settings: dict[str, Any], chosen: Mapping[str, Any]) -> Any:
        """One run of instruction tuning; ``chosen`` are the user's settings, which win."""
        config = {"task": "instruction-tuning", "template": PLAIN, "seed": self.config.seed, "base_dtype": self.config.base_dtype}
        data = settings["data"] | {"answer": "answer"} | dict(chosen.get("data", {}))
        return train(config | dict(chosen) | settings | {"data": data}, console=self.console)


def _whole_lines(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a last line that was cut off is none."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
