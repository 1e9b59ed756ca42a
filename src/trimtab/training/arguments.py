"""A run's configuration as the arguments of transformers' Trainer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from trimtab.training import processes
from trimtab.training.config import TrainConfig
from trimtab.training.errors import ConfigError
from trimtab.training.metrics import Metric

__all__ = ["arguments"]

MOST_STEPS = 10**9
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def arguments(config: TrainConfig, folder: Path, metric: Metric, *, rows: int) -> TrainingArguments:
    """transformers' arguments for ``config``; checkpoints go to ``folder``.

    Evaluations and checkpoints are counted in steps even when they fall on ends of epochs: transformers' own
    once-an-epoch strategy would skip the evaluation when a run resumes exactly there.

    Raises:
        ConfigError: the precision needs hardware that is not there.
    """
    if config.precision == "fp16" and not torch.accelerator.is_available():
        raise ConfigError("precision fp16 needs an accelerator, and this machine has none; use bf16 or fp32")
    an_epoch = -(-rows // (config.batch_size * config.accumulation))
    total = config.max_steps or max(1, round(an_epoch * config.epochs))
    if total > MOST_STEPS:
        raise ConfigError(f"epochs or max_steps ask for {total:.3g} optimizer steps, and a run has at most {MOST_STEPS:,}")
    batch_size, accumulation = _share(config)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=total,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=SCHEDULES[config.schedule],
        warmup_steps=round(config.warmup * total),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        eval_strategy="steps",
        eval_steps=min(config.eval_every or an_epoch, total),
        save_strategy="steps",
        save_steps=min(config.save_every or an_epoch, total),
        save_total_limit=None,  # rotated below, after the new one is whole
        logging_steps=max(1, min(50, total // 10)),
        logging_nan_inf_filter=False,
        metric_for_best_model=metric.name,
        greater_is_better=metric.better == "higher",
        label_names=["labels"],
        remove_unused_columns=False,
        include_num_input_tokens_seen="no",
        disable_tqdm=True,
        report_to="none",
        seed=config.seed,
        full_determinism=config.deterministic,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=any("trainability" in each.owns for each in config.schedule_objects()),
        use_cpu=not torch.accelerator.is_available(),
    )


def _share(config: TrainConfig) -> tuple[int, int]:
    """Rows a forward pass and passes a step of one process, so that a step has the same rows whatever the number of processes."""
    count = processes.world()
    if config.accumulation % count == 0:
        return config.batch_size, config.accumulation // count
    if config.batch_size % count == 0:
        return config.batch_size // count, config.accumulation
    raise ConfigError(
        f"{count} processes cannot share the rows of a step evenly: neither batch_size = {config.batch_size} nor accumulation = "
        f"{config.accumulation} is a multiple of {count}; change one of them, or the number of processes"
    )
