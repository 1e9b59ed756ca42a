"""transformers' Trainer with what adapters need: small atomic checkpoints, an own order of rows, no step on NaN.

A checkpoint is ``checkpoint-<step>/``: the adapter (no base weights), optimizer, scheduler, gradient scaler, the states
of all schedules and random generators and the trainer's state, whose step is the position in the data, because the order of
rows is a function of seed and epoch. The folder appears in one rename, so that a kill at any moment leaves whole checkpoints only.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from trimtab import tasks
from trimtab.core.activation import named_parameters
from trimtab.core.attach import detach
from trimtab.core.checkpoint import save
from trimtab.core.errors import TrimtabError
from trimtab.schedules.restoration import load
from trimtab.schedules.run import Run
from trimtab.tasks import Bundle
from trimtab.training import curve, processes
from trimtab.training.backward_step import BackwardOptimizer
from trimtab.training.config import TrainConfig
from trimtab.training.errors import ConfigError, RunError
from trimtab.training.files import new_directory, write_text
from trimtab.training.folder import ADAPTER, STEPS
from trimtab.training.metrics import IGNORED, Metric
from trimtab.training.sampler import EpochSampler
from trimtab.training.schedules import Moments, load_state, probes, save_state

__all__ = ["AdapterTrainer", "kept_steps", "last_checkpoint"]

RECORD = "record.json"  # what was measured when an adapter that is kept after the run was saved


def _without_labels(example: dict[str, Any]) -> dict[str, Any]:
    """A copy that adds nothing to the loss nor to the number of its terms."""
    labels = example["labels"]
    return {**example, "labels": [IGNORED] * len(labels) if isinstance(labels, list) else labels * 0 + IGNORED}


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint below ``folder``, or None."""
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def _numbered(folder: Path, prefix: str) -> dict[int, Path]:
    """Optimizer step -> folder, for the folders ``<prefix>-<step>`` in ``folder``; others are not ours."""
    found = {path: path.name.removeprefix(f"{prefix}-") for path in folder.glob(f"{prefix}-*")} if folder.is_dir() else {}
    return {int(step): path for path, step in found.items() if step.isdecimal()}


def kept_steps(folder: Path) -> dict[int, Path]:
    """Optimizer step -> folder, for the adapters that ``keep_adapters`` left in ``folder``."""
    return _numbered(folder, "step")


class AdapterTrainer(Trainer):
    """Trains the adapter ``config.adapter`` on ``bundle.model``.

    Args:
        config: the run's configuration.
        bundle: from the task; the adapter is attached already.
        args: from ``trimtab.training.arguments``.
        callbacks: transformers callbacks besides this class's own.

    Raises:
        RunError: from ``train``, when the loss or a gradient is not finite; the last checkpoint stays as it is.
    """

    def __init__(self, config: TrainConfig, bundle: Bundle, args: TrainingArguments, *, callbacks: list[TrainerCallback]):
        self.run, self.bundle = config, bundle
        self._stage: str | None = None
        rows = bundle.splits.get("train")
        self.fill = len(rows) if rows and processes.world() > 1 else None
        self.stepper: BackwardOptimizer | None = None
        super().__init__(
            model=bundle.model,
            args=args,
            data_collator=bundle.collate,
            train_dataset=rows if self.fill is None else [*rows, _without_labels(min(rows, key=bundle.length))],
            eval_dataset=bundle.splits.get("validation"),
            compute_loss_func=bundle.loss,
            compute_metrics=self._measure,
            callbacks=callbacks,
        )
        # the loss function divides by the number of rows of the whole accumulated batch; models must not do it again
        self.model_accepts_loss_kwargs = False
        from transformers.trainer_callback import PrinterCallback

        self.remove_callback(PrinterCallback)
        self.schedule = Run(
            self.model, config.schedule_objects(), steps=args.max_steps, probes=probes(bundle, args.device, config.seed),
            seed=config.seed, idle_steps=int(args.warmup_steps > 0),  # the rate rises from zero
        )  # fmt: skip
        self._started = False
        self._evaluated: list[tuple[float, int]] = []  # loss and number of labels of every batch of an evaluation
        self._resumed: dict[str, Any] | None = None
        self._losses: list[torch.Tensor] = []
        self.add_callback(Moments(self.schedule))

    def start_schedules(self) -> None:
        """Start the schedules of a new run, so that what they need of it is told before anything is written.

        Raises:
            ConfigError: what a schedule lacks.
        """
        try:
            self.schedule.start(self._resumed)
        except BaseException as error:
            self.schedule.close()
            if isinstance(error, ValueError | RuntimeError) and not isinstance(error, TrimtabError):
                raise ConfigError(f"schedules: {error}") from error
            raise
        self._started = True

    # -- what learns, and in which order

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the adapter alone: matrices with weight decay, the rest without, the head at its own rate.

        Parameters are ordered by name, so that a checkpoint's optimizer state fits a model built anew. The schedules start here.
        """
        if self.optimizer is None:
            if not self._started:
                self.start_schedules()
            head = set() if self.bundle.head is None else {id(p) for p in self.bundle.head.parameters()}
            rates = {True: self.run.head_learning_rate or self.run.learning_rate, False: self.run.learning_rate}
            groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
            named = {id(value): (key, value) for key, value in named_parameters(self.model, name=self.run.adapter)}
            for _, value in sorted(named.values(), key=lambda pair: pair[0]):
                groups.setdefault((id(value) in head, value.ndim >= 2), []).append(value)
            options = [
                {"params": values, "lr": rates[in_head], "weight_decay": self.run.weight_decay if matrix else 0.0}
                for (in_head, matrix), values in sorted(groups.items(), key=lambda item: item[0])
            ]
            options = self.schedule.grouped(options)
            adamw = functools.partial(torch.optim.AdamW, fused=True)
            self.stepper = BackwardOptimizer(options, adamw) if self.run.step_in_backward else None
            self.optimizer = self.stepper or adamw(options)
            self.schedule.bind(self.optimizer, regroup=False)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        config, lengths = self.run, [self.bundle.length(example) for example in self.bundle.splits["train"]]
        return EpochSampler(
            lengths, batch_size=config.batch_size * config.accumulation, seed=config.seed, bucket=config.bucket, fill=self.fill
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> list[int]:
        """By length: metrics do not depend on the order, and little is padded."""
        return sorted(range(len(eval_dataset)), key=lambda i: self.bundle.length(eval_dataset[i]))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; no hook stays on the parameters afterwards, and nothing of the schedules on the model."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.schedule.close()
            if self.stepper is not None:
                self.stepper.close()

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The labels of a whole step as the task counts them, so that training and every evaluation divide by the same number."""
        found = [self.bundle.items(batch["labels"]) for batch in batch_samples if "labels" in batch]
        if not found:
            return None
        total = torch.tensor(sum(found), device=device)
        return self.accelerator.gather(total).sum() if processes.world() > 1 else total

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """As transformers', but what a task's metrics need of the logits is kept alone: all of them would fill the memory."""
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        if labels is None:
            return loss, logits, labels
        items = self.bundle.items(labels)
        self._evaluated += [(float(loss), items)] if items else []
        if self.bundle.reduce is None:
            return loss, logits, labels
        kept = self.bundle.reduce({"logits": logits}, labels)  # (n, ...)
        return loss, kept, labels[:, 0]

    def _measure(self, prediction: Any) -> dict[str, float]:
        """The task's metrics, and the loss over all labels: the mean of the batches' means would weigh labels unequally."""
        found = dict(self.bundle.metrics(prediction))
        if "loss" not in found and processes.world() > 1:  # some rows are there twice
            outputs, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
            found["loss"] = float(self.bundle.mean_loss({"logits": outputs}, labels))
        elif "loss" not in found and self._evaluated:
            found["loss"] = sum(loss * n for loss, n in self._evaluated) / sum(n for _, n in self._evaluated)
        if self.args.metric_for_best_model not in found:
            raise RunError(
                f"the evaluation gave no {self.args.metric_for_best_model!r}, by which the best adapter is chosen; found "
                f"{', '.join(sorted(found))}: correct the task's metrics, or choose another metric"
            )
        return found

    # -- never step on what is not finite

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """As transformers', and stops before the optimizer sees a loss that is NaN or infinite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            self._stop(f"the loss became {loss.item()}")
        if self.stepper is not None and self.stepper.refused:
            self._stop("a gradient became NaN or infinite")
        self._losses.append(loss.detach())
        return loss

    def _gradients_ready(self) -> None:
        """All micro-batches are through: unscale, and let the schedules see the gradients before they are clipped."""
        self.schedule.loss, self._losses = torch.stack(self._losses).sum(), []
        if self.stepper is None:
            self.accelerator.unscale_gradients()
        self.schedule.scaler = self.accelerator.scaler
        self.schedule.gradients_ready()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if not self.args.max_grad_norm > 0:
            self._gradients_ready()
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self._gradients_ready()
        norm = super()._clip_grad_norm(model)
        # with fp16, the gradient scaler skips such a step and lowers its scale: that is its normal way of working
        if self.run.precision != "fp16" and not bool(torch.isfinite(torch.as_tensor(norm))):
            self._stop(f"the norm of the gradient became {float(norm)}")
        return norm

    def _stop(self, what: str) -> None:
        saved = last_checkpoint(Path(self.args.output_dir))
        kept = f"the last good checkpoint is kept: {saved}" if saved else "no checkpoint had been written yet"
        raise RunError(
            f"{what} at step {self.state.global_step + 1} of {self.state.max_steps}, and training stopped; {kept}. "
            f"Lower learning_rate (now {self.run.learning_rate:g}), or check the data and the precision"
        )

    # -- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return self._stage or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        bad = [n for n, p in named_parameters(self.model, name=self.run.adapter) if not bool(torch.isfinite(p).all())]
        if bad:
            self._stop(f"{len(bad)} adapter tensors, first {bad[0]}, hold values that are not finite")
        folder = Path(self.args.output_dir)
        final = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with processes.shared_directory(final) as stage:
            self._stage = str(stage)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._stage = None
            processes.barrier()  # each process has its random generators
            if self.args.should_save:
                inner = stage / final.name
                save_state(self.schedule, inner)
                self.state.best_model_checkpoint = None  # transformers noted the stage; ours is kept apart
                self.state.save_to_json(str(inner / TRAINER_STATE_NAME))
                for file in inner.iterdir():
                    os.replace(file, stage / file.name)
                inner.rmdir()
        if not self.args.should_save:
            return
        checkpoints = _numbered(folder, PREFIX_CHECKPOINT_DIR)
        for stale in sorted(checkpoints)[: -self.run.keep_checkpoints]:
            shutil.rmtree(checkpoints[stale])
        if self.run.keep_adapters:
            self._keep(final / ADAPTER)
        for step, best in _numbered(folder, "best").items():
            if step != self.state.best_global_step:
                shutil.rmtree(best)

    def _keep(self, adapter: Path) -> None:
        """Copy the checkpoint's adapter to ``steps/step-<n>``, with the metrics known by now; drop those beyond the newest."""
        folder = Path(self.args.output_dir).parent / STEPS
        kept = kept_steps(folder)
        step = self.state.global_step
        after = max((other for other in kept if other < step), default=0)
        with new_directory(folder / f"step-{step}") as stage:
            shutil.copytree(adapter, stage, dirs_exist_ok=True)
            better = {each.key: each.better for each in tasks.get(self.run.task).metrics if isinstance(each, Metric)}
            chosen = {"metric": f"eval_{self.args.metric_for_best_model}", "better": better}
            record = curve.record_of(self.state.log_history, after, step) | chosen
            write_text(stage / RECORD, json.dumps(record, indent=1) + "\n")
        for old in sorted(kept_steps(folder))[: -self.run.keep_adapters]:
            shutil.rmtree(kept[old])

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            save(self.model, Path(output_dir or self.args.output_dir) / ADAPTER, name=self.run.adapter)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._resumed = load_state(Path(resume_from_checkpoint))
        if self._resumed is not None:
            self.schedule.rebuild(self._resumed)
        self.reload(Path(resume_from_checkpoint) / ADAPTER)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As transformers'; while training, of what the schedules would deliver."""
        self._evaluated = []
        with self.schedule.weights():
            return super().evaluate(*args, **kwargs)

    def reload(self, folder: Path) -> None:
        """Replace the adapter's values by those saved in ``folder``; call it before the optimizer exists, or after the end."""
        with contextlib.suppress(LookupError):
            detach(self.model, self.run.adapter)
        # a schedule may have written into the base that the checkpoint's sample was taken from
        same_base = not any("weights" in each.owns for each in self.schedule.schedules)
        load(self.model, folder, name=self.run.adapter, trainable=True, check_base=same_base, originals="host")

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = self._deliverable() and super()._determine_best_metric(metrics, trial)
        if is_best:
            self.state.best_global_step = self.state.global_step
        if is_best and self.args.should_save:
            # superseded ones go only with the next checkpoint, so that a run resumed before it still finds its own
            with new_directory(self.best_folder()) as stage, self.schedule.weights():
                save(self.model, stage, name=self.run.adapter)
        return is_best

    def _deliverable(self) -> bool:
        """Whether the model as it is now could be what the run delivers."""
        return all(each.deliverable for each in self.schedule.schedules)

    def best_folder(self) -> Path:
        """Where the adapter with the best validation metric so far is."""
        return Path(self.args.output_dir) / f"best-{self.state.best_global_step}"
