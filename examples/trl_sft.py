"""TRL's SFTTrainer on a model with a trimtab adapter; the trainer is used as it is.

    python examples/trl_sft.py                       # the small LLaMA of examples/tiny_lm, word problems as chats
    python examples/trl_sft.py --model FOLDER --data chats.jsonl --steps 200 --output runs/sft

A row of ``--data`` is ``{"prompt": [{role, content}, ...], "completion": [{role, content}]}``. Needs ``pip install trl``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import trimtab as tt


def chats() -> list[dict[str, Any]]:
    """The training rows of ASDiv, each a question and its answer."""
    from trimtab.tasks.instructions.public import load_public

    return [chat(row.values["instruction"], row.values["output"]) for row in load_public("asdiv")["train"]]


def chat(asked: str, told: str) -> dict[str, Any]:
    """One question and its answer as TRL takes them; the answer alone is learnt."""
    return {"prompt": [{"role": "user", "content": asked}], "completion": [{"role": "assistant", "content": told}]}


def run(model: Path, rows: list[dict[str, Any]], output: Path, *, steps: int, rate: float = 3e-3) -> Any:
    """Tune LoRA with TRL and save the adapter to ``output``; returns the trainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    base, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    tt.attach(base, tt.LoRA(rank=8), name="sft", rng=torch.Generator().manual_seed(0))
    settings = SFTConfig(
        output_dir=str(output / "trl"), max_steps=steps, per_device_train_batch_size=8, learning_rate=rate, logging_steps=1,
        save_strategy="no", report_to="none", bf16=False, gradient_checkpointing=False, max_length=256, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(model=base, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    tt.save(base, output / "adapter", name="sft")
    return trainer


def main() -> None:
    """See the module."""
    import json

    from examples import tiny_lm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder of transformers; the small LLaMA if left out")
    parser.add_argument("--data", type=Path, help="a .jsonl file; ASDiv's training rows if left out")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("runs/trl_sft"))
    given = parser.parse_args()
    rows = chats() if given.data is None else [json.loads(line) for line in given.data.read_text("utf-8").splitlines()]
    run(given.model or tiny_lm.folder(show=True), rows, given.output, steps=given.steps)
    print(f"the adapter is in {given.output / 'adapter'}")


if __name__ == "__main__":
    main()
