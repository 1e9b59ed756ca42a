"""Training the small model: deterministic, resumable, and kept in a folder that appears whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.tiny_lm import text
from trimtab.training.files import new_directory, write_text

__all__ = ["LARGE", "RECORD", "Recipe", "folder", "load"]

RECORD = "training.json"
KEEP_EVERY = 50  # steps between states that an interrupted training goes on from


@dataclass(frozen=True)
class Recipe:
    """A LLaMA and how it is trained.

    Attributes:
        width, layers, heads, vocabulary: of the model; its feed-forward width is 8/3 of ``width``, rounded to 32.
        context: tokens a row.
        steps, batch: optimizer steps, and rows a step.
        learning_rate: its peak; AdamW, 5 % warm-up, cosine decay to a tenth.
        seed: of everything that is drawn.
    """

    width: int = 192
    layers: int = 6
    heads: int = 6
    vocabulary: int = 4096
    context: int = 256
    steps: int = 1000
    batch: int = 8
    learning_rate: float = 3e-3
    seed: int = 0


LARGE = Recipe(width=512, layers=12, heads=8, vocabulary=8192, context=512, steps=4000, batch=64, learning_rate=1e-3)


def folder(recipe: Recipe = Recipe(), *, more: Sequence[str] = (), cache: Path | None = None, show: bool = False) -> Path:
    """The folder of the trained model and its tokenizer, which transformers loads; trains it if it is not there.

    Args:
        more: further documents to learn from, beside those that all recipes have.
        cache: where folders of models are; None is ``$TRIMTAB_CACHE``, or ``examples/.cache``.
        show: print the loss while training.

    Raises:
        DataError: the text cannot be had.
    """
    from filelock import FileLock

    root = cache or Path(os.environ.get("TRIMTAB_CACHE") or Path(__file__).parent.parent / ".cache")
    values = json.dumps([dataclasses.asdict(recipe), *more] if more else dataclasses.asdict(recipe), sort_keys=True)
    mark = "" if recipe == Recipe() and not more else f"-{hashlib.sha256(values.encode()).hexdigest()[:10]}"
    path = root / f"tiny_lm{mark}"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{path.name}.lock"):  # several test processes may ask at once; one of them trains
        if not path.is_dir() or json.loads((path / RECORD).read_text("utf-8"))["recipe"] != dataclasses.asdict(recipe):
            _train(recipe, path, more, show=show)
    return path


def load(recipe: Recipe = Recipe(), **options: Any) -> tuple[Any, Any]:
    """The trained model, in evaluation mode, and its tokenizer; ``options`` as for ``folder``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = folder(recipe, **options)
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def _precision() -> str:
    """bf16 where the machine multiplies in it: twice as fast. The weights stay in fp32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if torch.accelerator.is_available() or capabilities.get("avx512_bf16") else "fp32"


def _model(recipe: Recipe, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=recipe.width, num_hidden_layers=recipe.layers,
                num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads,
                intermediate_size=math.ceil(recipe.width * 8 / 3 / 32) * 32, max_position_embeddings=2 * recipe.context,
                tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )  # fmt: skip


def _rate(recipe: Recipe, step: int) -> float:
    warm = max(1, recipe.steps // 20)
    if step < warm:
        return recipe.learning_rate * (step + 1) / warm
    along = (step - warm) / max(1, recipe.steps - warm)
    return recipe.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * along)))


def _loss(model: Any, rows: Tensor, precision: str) -> Tensor:
    """Mean negative log-likelihood, nats a token, of rows ``(n, context)``."""
    rows = rows.to(model.device)
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model(input_ids=rows, labels=rows, use_cache=False).loss


def _train(recipe: Recipe, path: Path, more: Sequence[str], *, show: bool) -> None:
    import transformers

    precision = _precision()
    train, held = text.documents(recipe.seed, more)
    tokenizer = text.make_tokenizer(train, recipe.vocabulary, recipe.context)
    rows, held_rows = (text.tokens(tokenizer, texts, recipe.context) for texts in (train, held))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = _model(recipe, tokenizer).to(device)
    state = path.with_name(f".{path.name}.state")
    seconds = _fit(model, rows, recipe, precision, state, show=show)
    model.eval()
    with torch.no_grad():
        losses = [_loss(model, chunk.long(), "fp32").item() * len(chunk) for chunk in held_rows.split(recipe.batch)]
    loss = sum(losses) / len(held_rows)
    a_byte = held_rows.numel() / max(1, sum(len(document.encode()) for document in held))  # tokens
    record = {
        "recipe": dataclasses.asdict(recipe), "precision": precision, "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": recipe.steps * recipe.batch * recipe.context, "text_tokens": rows.numel(),
        "held_out_loss": loss, "held_out_bits_per_byte": loss * a_byte / math.log(2), "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    with new_directory(path) as stage:
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        write_text(stage / RECORD, json.dumps(record, indent=1) + "\n")
    state.unlink(missing_ok=True)


def _fit(model: Any, rows: Tensor, recipe: Recipe, precision: str, state: Path, *, show: bool) -> float:
    """Train in place, from the last kept state if there is one; the seconds that it took."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    start, spent = 0, 0.0
    kept = torch.load(state, weights_only=True) if state.is_file() else {}
    if kept.get("recipe") == dataclasses.asdict(recipe):
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        start, spent = kept["step"], kept["seconds"]
    began = time.perf_counter()
    model.train()
    for step in range(start, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(recipe, step)
        loss = _loss(model, text.batch(rows, step, recipe.batch, recipe.seed), precision)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = spent + time.perf_counter() - began
        if show and (step % 25 == 0 or step == recipe.steps - 1):
            print(f"step {step + 1} of {recipe.steps}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
        if (step + 1) % KEEP_EVERY == 0:
            kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "seconds": seconds}
            stage = state.with_suffix(".part")
            torch.save({**kept, "recipe": dataclasses.asdict(recipe)}, stage)
            os.replace(stage, state)
    return spent + time.perf_counter() - began
