"""A task moves between two small LLaMAs of other shapes and tokenizers by text that nobody wrote (Trans-LoRA, arXiv 2405.17258).

``python bench/transfer.py`` (half an hour on one core). The task is WordNet's: name the category (20 of them) of a noun from its
definition. Source and target are ``examples/tiny_lm``'s models at other widths, depths and vocabularies. Beside their usual text
they have read numbered lists of questions, word problems and definitions, without categories, of 6,000 of the training split's
rows: models this small do not pick up the form of a list from its beginning, as large ones do. The other 2,000 rows, with their
categories, are the task's real data. For each seed:

* ``source``: the source's LoRA, trained on the real data; ``target, real data``: the same on the target;
* ``transfer``: ``tt.transfer`` of the source's LoRA with 5 seeds, the discriminator, and as many made inputs as there are real
  ones; ``transfer, no filter``: the same without the discriminator;
* ``real inputs``: the source's answers to the real inputs, distilled: what perfect inputs would give.

What counts is the accuracy of the written answer on the test split, greedy, and of the target's gain over its bare form the share
that a transfer reaches. The rate is one a model, chosen for training on the real data, on the validation split. Everything resumes;
results go to ``bench/results/transfer.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import trimtab as tt
from examples import tiny_lm
from trimtab.core.table import Table
from trimtab.distillation.prompts import Prompts
from trimtab.distillation.side import Side
from trimtab.tasks.instructions.public import load_public
from trimtab.training.files import json_lines, write_text
from trimtab.training.models import load_decoder

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "src" / "trimtab" / "data" / "wordnet-supersense"
CACHE = ROOT / "bench" / ".cache" / "transfer"
RESULTS = ROOT / "bench" / "results" / "transfer.json"
RECIPES = {
    "source": tiny_lm.Recipe(width=160, layers=4, heads=5, vocabulary=2048, steps=800),
    "target": tiny_lm.Recipe(width=224, layers=5, heads=7, vocabulary=4096, steps=800, seed=1),
}
TASK, TEMPLATE = "noun definition", "{input}\nCategory:"
REAL, SEEDS, LISTS, TESTED = 2000, 5, 400, 1200
RATES = (1e-3, 2e-3, 4e-3)
#: these models lose count behind the first item, so that short continuations are enough; the temperature is below 1 for their sake
GENERATOR = {"calls": 128, "tokens": 32, "temperature": 0.8}
CELLS = ("source", "target, real data", "transfer", "transfer, no filter", "real inputs")
PLAIN = {"style": "plain", "prompt": "{prompt}", "answer": "{answer}"}


def place(name: str, seed: int) -> Path:
    """The folder of a cell's run."""
    return CACHE / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def split(name: str) -> list[dict[str, str]]:
    """Rows of a split: the definition, and the category without its prefix."""
    rows = (json.loads(line) for line in (DATA / f"{name}.jsonl").read_text("utf-8").splitlines())
    return [{"text": row["text"], "label": row["label"].removeprefix("noun.")} for row in rows]


def parts() -> tuple[list[dict[str, str]], list[str]]:
    """The task's real rows, and definitions for the lists that the bases read."""
    rows = split("train")
    random.Random(0).shuffle(rows)
    return rows[:REAL], [row["text"] for row in rows[REAL:]]


def lists() -> list[str]:
    """Numbered lists of ten, of four kinds; definitions as often as the rest together."""
    draw, found = random.Random(0), []
    kinds = {TASK: parts()[1]}
    for kind, name in (("word problem", "asdiv"), ("yes or no question", "boolq"), ("everyday goal", "piqa")):
        kinds[kind] = list(dict.fromkeys(row.values["question"].strip() for row in load_public(name)["train"]))
    for kind, texts in kinds.items():
        for _ in range(LISTS * (3 if kind == TASK else 1)):
            head = Prompts(kind).generator(draw.sample(texts, 9))
            found.append(f"{head} {' '.join(draw.choice(texts).split())}\n\n")
    return found


def accuracy(folder: Path, adapter: str | None, rows: list[dict[str, str]]) -> float:
    """Share of ``rows`` whose category is written, word for word."""
    side = Side(*load_decoder(str(folder), "fp32"))
    if adapter is not None:
        tt.load(side.model, adapter, name="a", trainable=False)
    prompts = [TEMPLATE.format(input=row["text"]) for row in rows]
    answers = side.answers(prompts, tokens=8, adapter=None if adapter is None else "a")
    return statistics.fmean(answer.strip() == row["label"] for answer, row in zip(answers, rows, strict=True))


class Bench:
    """Its runs; each is looked up in the results first."""

    def __init__(self, args: argparse.Namespace):
        self.threads = args.threads
        self.stored = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
        self.real = parts()[0]
        self.test = random.Random(0).sample(split("test"), TESTED)
        more = lists()
        self.bases = {name: tiny_lm.folder(recipe, more=more, show=True) for name, recipe in RECIPES.items()}
        CACHE.mkdir(parents=True, exist_ok=True)
        self.file = CACHE / "real.jsonl"
        write_text(self.file, json_lines(self.examples([row["text"] for row in self.real], [row["label"] for row in self.real])))
        write_text(CACHE / "inputs.jsonl", json_lines({"text": row["text"]} for row in self.real))

    @staticmethod
    def examples(texts: list[str], labels: list[str]) -> list[dict[str, str]]:
        return [{"prompt": TEMPLATE.format(input=text), "answer": f" {label}"} for text, label in zip(texts, labels, strict=True)]

    def training(self, rate: float) -> dict[str, Any]:
        """How every adapter is trained."""
        method = {"method": {"name": "LoRA", "rank": 16}, "targets": "linear", "learning_rate": rate}
        return {**method, "epochs": 8, "batch_size": 16, "threads": self.threads}

    def train(self, side: str, file: Path, output: Path, seed: int, rate: float) -> str:
        """Folder of an adapter on ``side``, trained on a file of prompts and answers."""
        run = {"task": "instruction-tuning", "template": PLAIN, "model": str(self.bases[side]), "seed": seed}
        data = {"data": {"train": str(file), "answer": "answer"}, "output": str(output)}
        return str(Path(tt.train(run | data | self.training(rate)).output) / "adapter")

    def rate(self, side: str) -> float:
        """The learning rate with the best validation accuracy of an adapter on ``side``, seed 0."""
        return max(self.stored["rates"][side], key=lambda pair: pair[1])[0]

    def search(self) -> None:
        """One run a rate and model."""
        for side, base in self.bases.items():
            found = self.stored.setdefault("rates", {}).setdefault(side, [])
            for rate in RATES[len(found) :]:
                adapter = self.train(side, self.file, CACHE / f"rate-{side}-{rate:g}", 0, rate)
                found.append([rate, accuracy(base, adapter, split("validation"))])
                print(side, found[-1], flush=True)
                self.save()

    def transfer(self, seed: int, output: Path, discriminator: dict[str, Any] | None) -> dict[str, Any]:
        """One transfer's counts and its adapter."""
        draw = random.Random(seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="this transfer has no filter")
            result = tt.transfer({
                "task": TASK, "template": TEMPLATE, "target": str(self.bases["target"]), "count": REAL, "seed": seed,
                "source": {"model": str(self.bases["source"]), "adapter": str(place("source", seed) / "adapter")},
                "seeds": [row["text"] for row in draw.sample(self.real, SEEDS)], "discriminator": discriminator,
                "generator": GENERATOR, "answer_tokens": 8, "train": self.training(self.rate("target")),
                "output": str(output),
            })  # fmt: skip
        return {key: getattr(result, key) for key in ("adapter", "made", "drawn", "acceptance", "unanswered", "auc")}

    def cell(self, name: str, seed: int) -> dict[str, Any]:
        """Train one cell; what it made, and its adapter."""
        filtered = {"data": str(CACHE / "inputs.jsonl"), "train": self.training(self.rate("source")) | {"epochs": 2}}
        if name == "source":
            return {"adapter": self.train("source", self.file, place("source", seed), seed, self.rate("source"))}
        if name == "target, real data":
            return {"adapter": self.train("target", self.file, place("target", seed), seed, self.rate("target"))}
        if name != "real inputs":
            return self.transfer(seed, place(name, seed), filtered if name == "transfer" else None)
        side = Side(*load_decoder(str(self.bases["source"]), "fp32"))
        tt.load(side.model, place("source", seed) / "adapter", name="a", trainable=False)
        texts = [row["text"] for row in self.real]
        answers = side.answers([TEMPLATE.format(input=text) for text in texts], tokens=8, adapter="a")
        file = CACHE / f"real-inputs-{seed}.jsonl"
        write_text(file, json_lines(self.examples(texts, [answer.strip() for answer in answers])))
        return {"adapter": self.train("target", file, place("real-inputs-run", seed), seed, self.rate("target"))}

    def made(self, seed: int, name: str) -> dict[str, Any]:
        """What a transfer's inputs look like: the categories they were given, and three of them."""
        lines = (place(name, seed) / "synthetic.jsonl").read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        counts = Counter(row["answer"].strip() for row in rows)
        return {"categories": dict(counts.most_common()), "first": rows[:3]}

    def save(self) -> None:
        write_text(RESULTS, json.dumps(self.stored, indent=1) + "\n")

    def run(self, seeds: int) -> None:
        """All cells that are missing."""
        self.stored["versions"] = {"torch": torch.__version__, "trimtab": tt.__version__}
        self.stored["bases"] = {name: json.loads((path / "training.json").read_text("utf-8")) for name, path in self.bases.items()}
        for name, path in self.bases.items():
            if f"bare {name}" not in self.stored:
                self.stored[f"bare {name}"] = accuracy(path, None, self.test)
        self.search()
        cells = self.stored.setdefault("cells", {})
        for seed in range(seeds):
            for name in CELLS:
                if any(row["seed"] == seed for row in cells.get(name, [])):
                    continue
                found = self.cell(name, seed)
                adapter = found.pop("adapter")
                base = self.bases["source" if name == "source" else "target"]
                row = {"seed": seed, "test": accuracy(base, adapter, self.test), **found}
                if name.startswith("transfer"):
                    row |= self.made(seed, name)
                cells.setdefault(name, []).append(row)
                print(name, {key: value for key, value in row.items() if key not in ("categories", "first")}, flush=True)
                self.save()


def show(stored: dict[str, Any]) -> None:
    """Mean test accuracy over seeds, and the share of direct training's gain, with standard errors."""
    title = f"category of a noun from its definition; {REAL} rows, {TESTED} test rows"
    table = Table(("on the target", "seeds", "test %", "± s.e.", "share of the gain", "± s.e.", "accepted %", "AUC"), title=title)
    error = lambda values: statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan  # noqa: E731
    mean: Callable[[list[dict[str, Any]], str], Any] = lambda rows, key: (  # noqa: E731
        round(statistics.fmean(row[key] for row in rows), 3) if rows[0].get(key) is not None else ""
    )
    bare = stored["bare target"]
    table.add("bare", "", round(100 * bare, 1), "", "", "", "", "")
    direct = {row["seed"]: row["test"] for row in stored["cells"]["target, real data"]}
    for name, rows in stored["cells"].items():
        tests = [100 * row["test"] for row in rows]
        shares = [(row["test"] - bare) / (direct[row["seed"]] - bare) for row in rows if row["seed"] in direct]
        gain = ("", "") if name == "source" else (round(statistics.fmean(shares), 3), round(error(shares), 3))
        accuracies = (round(statistics.fmean(tests), 1), round(error(tests), 2))
        shown = (mean(rows, "acceptance"), mean(rows, "auc"))
        table.add(f"({name})" if name == "source" else name, len(rows), *accuracies, *gain, *shown)
    print(table)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--show", action="store_true", help="print what is there, run nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.show:
        Bench(args).run(args.seeds)
    show(json.loads(RESULTS.read_text("utf-8")))


if __name__ == "__main__":
    main()
