"""TRL's DPOTrainer on a model with a trimtab adapter; the trainer is used as it is.

    python examples/trl_dpo.py                       # the small LLaMA of examples/tiny_lm, solutions of PIQA
    python examples/trl_dpo.py --model FOLDER --data pairs.jsonl --steps 200 --output runs/dpo

A row of ``--data`` is ``{"prompt": text, "chosen": text, "rejected": text}``. TRL loads the reference model anew from the model's
own folder: the base without the adapter, which is what the adapter starts at. Needs ``pip install trl``.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import trimtab as tt


def pairs() -> list[dict[str, str]]:
    """The training rows of PIQA: the right solution of a goal is chosen, the other one rejected."""
    from trimtab.tasks.instructions.public import load_public

    found = []
    for row in load_public("piqa")["train"]:
        solutions = re.findall(r"^Solution\d: (.*)$", row.values["instruction"], re.MULTILINE)
        right = int(row.values["answer"][-1]) - 1
        found.append({"prompt": row.values["question"], "chosen": f" {solutions[right]}", "rejected": f" {solutions[1 - right]}"})
    return found


def run(model: Path, rows: list[dict[str, str]], output: Path, *, steps: int, rate: float = 1e-3) -> Any:
    """Tune LoRA with TRL and save the adapter to ``output``; returns the trainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    base, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    tt.attach(base, tt.LoRA(rank=8), name="dpo", rng=torch.Generator().manual_seed(0))
    settings = DPOConfig(
        output_dir=str(output / "trl"), max_steps=steps, per_device_train_batch_size=8, learning_rate=rate, logging_steps=1,
        save_strategy="no", report_to="none", bf16=False, gradient_checkpointing=False, max_length=256, disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(model=base, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    tt.save(base, output / "adapter", name="dpo")
    return trainer


def main() -> None:
    """See the module."""
    import json

    from examples import tiny_lm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder of transformers; the small LLaMA if left out")
    parser.add_argument("--data", type=Path, help="a .jsonl file; PIQA's training rows if left out")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("runs/trl_dpo"))
    given = parser.parse_args()
    rows = pairs() if given.data is None else [json.loads(line) for line in given.data.read_text("utf-8").splitlines()]
    run(given.model or tiny_lm.folder(show=True), rows, given.output, steps=given.steps)
    print(f"the adapter is in {given.output / 'adapter'}")


if __name__ == "__main__":
    main()
