"""train: from a configuration to a folder that holds the adapter, the resolved configuration, the curve and the result.

Under ``torchrun`` or ``accelerate launch`` the processes share the rows of every step, so that one and several processes give the
same adapter up to rounding; the first one writes.

The folder, all of it written atomically::

    config.yaml      the resolved configuration
    task.json        what a fresh process needs besides (labels)
    adapter/         the adapter with the best validation metric, head included
    predictions/     of tasks that generate: what was written for each row of each test set
    result.json      metrics, sizes, times; its presence says that the run is complete
    curve.json, curve.png
    checkpoints/     while it runs; removed when it is complete
    steps/           with keep_adapters: the adapters of the newest checkpoints
    .previous/       while it runs: the run that it overwrites
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from trimtab import tasks
from trimtab.core import registry
from trimtab.core.activation import parameters
from trimtab.core.attach import attach
from trimtab.tasks import Bundle
from trimtab.training import callbacks, curve, processes
from trimtab.training.config import TrainConfig, load_config, to_yaml
from trimtab.training.errors import ConfigError
from trimtab.training.files import write_text
from trimtab.training.folder import (
    ADAPTER,
    CHECKPOINTS,
    CONFIG,
    INFO,
    RESULT,
    check_folder,
    claimed,
    clear_up,
    forget,
    set_aside,
    tidy,
)
from trimtab.training.metrics import Metric
from trimtab.training.models import check_finite

__all__ = ["RunResult", "attach_adapter", "train"]

GRADIENT_ROWS = 512  # training rows whose gradients start a method that asks for them (SPT's paper: 16 batches of 32)


@dataclass
class RunResult:
    """What a run gave.

    Attributes:
        output: the run's folder.
        metrics: ``{split: {metric: value}}`` of the best adapter, for every split but the training one.
        trainable, total: numbers of parameters: of the adapter with its head, and of the base with its head.
        adapter_bytes: size of the saved adapter on disk.
        steps, best_step: optimizer steps made, and the step of the best adapter.
        seconds: time of training alone, evaluations included; of the last process, if the run was resumed.
        curve: see ``trimtab.training.curve.curve_of``.
        versions: of Python, torch, transformers, trimtab.
        model: the trained model with the adapter attached; None if the run was complete already.
    """

    output: str
    metrics: dict[str, dict[str, float]]
    trainable: int
    total: int
    adapter_bytes: int
    steps: int
    best_step: int
    seconds: float
    versions: dict[str, str]
    curve: list[dict[str, float]] = field(default_factory=list)
    model: nn.Module | None = field(default=None, repr=False)

    def to_json(self) -> str:
        """Everything but the model and the curve, which has its own file."""
        values = asdict(self.__class__(**{**self.__dict__, "model": None}))
        return json.dumps({k: v for k, v in values.items() if k not in ("model", "curve", "output")}, indent=2) + "\n"


def train(
    config: str | Path | Mapping[str, Any] | TrainConfig,
    *,
    overrides: Mapping[str, Any] | Iterable[str] = (),
    overwrite: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Train one adapter as ``config`` says; resumes by itself where an earlier process was interrupted.

    Args:
        config: a YAML file, a mapping, or a checked configuration.
        overrides: ``{"method.rank": 16}`` or ``["method.rank=16"]``.
        overwrite: start anew where ``output`` holds a run already.
        console: where the configuration, the progress and the curve are printed; None prints nothing.

    Returns:
        The result; that of the earlier process if the same run is complete already.

    Raises:
        ConfigError, DataError: before anything is written. NoMatch, ShapeMismatch: the method does not fit the model.
        RunError: ``output`` holds another run, the base holds NaN, or the loss became NaN (checkpoints are kept).
    """
    resolved = load_config(config, overrides=overrides)
    console = console if console is not None and processes.is_main() else Console(quiet=True)
    console.print(to_yaml(resolved), markup=False, highlight=False)
    output = Path(resolved.output)
    task = tasks.get(resolved.task)
    metric = task.metric(resolved.metric)
    _check_threads(resolved.threads)
    check_folder(output, resolved, overwrite=overwrite)
    with claimed(output) if processes.is_main() and not _is_complete(output, overwrite) else nullcontext():
        return _train(resolved, metric, overwrite=overwrite, console=console)


def _is_complete(output: Path, overwrite: bool) -> bool:
    return (output / RESULT).is_file() and not overwrite


def _train(resolved: TrainConfig, metric: Metric, *, overwrite: bool, console: Console) -> RunResult:
    """Train in a folder that is this process's alone."""
    output, task = Path(resolved.output), tasks.get(resolved.task)
    if processes.is_main():
        check_folder(output, resolved, overwrite=overwrite)  # again: another process may have been there a moment ago
    if _is_complete(output, overwrite):
        console.print(f"the run in {output} is complete; overwrite it to train again")
        return _read_result(output)
    with _process_settings(resolved):
        bundle = task.prepare(resolved)
        check_finite(bundle.model, resolved.model)
        total = sum(p.numel() for p in bundle.model.parameters())
        attach_adapter(bundle, resolved)
        return _run(resolved, bundle, metric, total, overwrite=overwrite, console=console)


def attach_adapter(bundle: Bundle, config: TrainConfig) -> None:
    """Attach the method and, under the same name, the fresh head, which learns whole and is saved with it."""
    rng = torch.Generator().manual_seed(config.seed)
    method = config.method_config()
    head = next((path for path, module in bundle.model.named_modules() if module is bundle.head), None)
    if method is None and head is None:
        raise ConfigError("the method is null and this task has no head to train; give a method, such as LoRA")
    if method is not None:
        loss = _sample_losses(bundle, config) if method.adapter_class.wants(method) else None
        where = {"targets": config.targets, "layers": config.layers}
        # the task's own head, if it has one, comes right below
        attach(bundle.model, method, **where, head=False, name=config.adapter, rng=rng, loss=loss)
    if head is not None:
        attach(bundle.model, registry.get("Unfreeze")(), targets=[head], name=config.adapter, rng=rng)


def _sample_losses(bundle: Bundle, config: TrainConfig) -> Callable[[nn.Module], Iterator[Tensor]]:
    """Losses on the first batches of training rows, for methods that start from their gradients."""

    def losses(model: nn.Module) -> Iterator[Tensor]:
        rows = bundle.splits["train"][:GRADIENT_ROWS]
        for start in range(0, len(rows), config.batch_size):
            batch = bundle.collate(rows[start : start + config.batch_size])
            labels = batch.pop("labels")
            yield bundle.mean_loss(model(**batch), labels)

    return losses


@contextmanager
def _process_settings(config: TrainConfig) -> Iterator[None]:
    """Seeds, determinism and threads for the run; what other code of this process relies on is put back afterwards."""
    from transformers import enable_full_determinism, set_seed

    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.deterministic:
            enable_full_determinism(config.seed)
        else:
            set_seed(config.seed)
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def _check_threads(threads: int | None) -> None:
    """Refuse more threads than this machine could ever start: torch would end the process."""
    most = max(64, 8 * (os.cpu_count() or 1))
    if threads is not None and threads > most:
        raise ConfigError(
            f"threads = {threads} is more than this machine, with {os.cpu_count()} processors, can use; "
            f"take at most {most}, or null for torch's own choice"
        )


def _run(config: TrainConfig, bundle: Bundle, metric: Metric, total: int, *, overwrite: bool, console: Console) -> RunResult:
    from trimtab.training.arguments import arguments
    from trimtab.training.trainer import AdapterTrainer, last_checkpoint

    output = Path(config.output)
    folder = output / CHECKPOINTS
    watchers = [callbacks.LogWithCheckpoint(), callbacks.ProgressBar(console, metric)]
    if config.patience is not None:
        watchers.append(callbacks.Patience(config.patience, metric))
    try:
        args = arguments(config, folder, metric, rows=len(bundle.splits["train"]))
        trainer = AdapterTrainer(config, bundle, args, callbacks=watchers)
        if overwrite or last_checkpoint(folder) is None:
            trainer.start_schedules()  # a run that goes on starts them on what it reloads
    except (Exception, KeyboardInterrupt):
        tidy(output)  # transformers' Trainer has made its folder
        raise
    # everything that can be checked has been; from here on the folder is this run's
    if processes.is_main() and overwrite and output.exists():
        set_aside(output)
    with _leaving_no_half_run(output):
        if processes.is_main():
            output.mkdir(parents=True, exist_ok=True)
            write_text(output / INFO, json.dumps(bundle.info, indent=2, ensure_ascii=False) + "\n")
            write_text(output / CONFIG, to_yaml(config))
        processes.barrier()
        resume = last_checkpoint(folder)
        if resume:
            console.print(f"resuming from {resume}")
        started = time.perf_counter()
        if not _complete(trainer, config, metric, resume):
            try:
                trainer.train(resume_from_checkpoint=resume)
            finally:
                watchers[1].progress.stop()
        seconds = time.perf_counter() - started
        return _finish(config, bundle, metric, trainer, total=total, seconds=seconds, console=console)


@contextmanager
def _leaving_no_half_run(output: Path) -> Iterator[None]:
    """After any error, ours or not, nothing is left of a run that came to no checkpoint."""
    try:
        yield
    except (Exception, KeyboardInterrupt):
        if processes.is_main():
            forget(output)
        raise


def _complete(trainer: Any, config: TrainConfig, metric: Metric, resume: str | None) -> bool:
    """Whether the checkpoint is the last one of the run: transformers would take further steps from it."""
    from transformers import TrainerState

    if resume is None:
        return False
    state = TrainerState.load_from_json(str(Path(resume) / "trainer_state.json"))
    if state.global_step < trainer.args.max_steps and not callbacks.exhausted(state, config.patience, metric):
        return False
    trainer.state = state
    return True


def _finish(
    config: TrainConfig, bundle: Bundle, metric: Metric, trainer: Any, *, total: int, seconds: float, console: Console
) -> RunResult:
    from trimtab.core.checkpoint import save

    output = Path(config.output)
    processes.barrier()  # the best adapter is written
    if trainer.state.best_global_step:
        trainer.reload(trainer.best_folder())
    entries = curve.curve_of(trainer.state.log_history)  # before the evaluations below add to it
    metrics = {split: _bare(trainer.evaluate(rows)) for split, rows in bundle.splits.items() if split != "train"}
    metrics |= tasks.get(config.task).finish(config, bundle, output, console=console)
    if processes.is_main():
        save(bundle.model, output / ADAPTER, name=config.adapter)
    processes.barrier()
    best_step = trainer.state.best_global_step or trainer.state.global_step
    result = RunResult(
        output=str(output),
        metrics=metrics,
        trainable=sum(p.numel() for p in parameters(bundle.model, name=config.adapter)),
        total=total,
        adapter_bytes=sum(file.stat().st_size for file in (output / ADAPTER).iterdir()),
        steps=trainer.state.global_step,
        best_step=best_step,
        seconds=seconds,
        versions=_versions(),
        curve=entries,
        model=bundle.model,
    )
    if processes.is_main():
        write_text(output / "curve.json", json.dumps(entries, indent=1) + "\n")
        curve.write_png(entries, config.metric, output / "curve.png")
        write_text(output / RESULT, result.to_json())
        clear_up(output)
    processes.barrier()
    console.print(curve.as_table(entries, metric))
    console.print(f"best at step {best_step}; " + "; ".join(f"{split}: {_shown(values)}" for split, values in metrics.items()))
    learnt = f"{result.trainable:,} of {total:,} parameters learnt"
    console.print(f"{learnt}; adapter of {result.adapter_bytes:,} bytes in {output / ADAPTER}")
    return result


def _bare(metrics: Mapping[str, float]) -> dict[str, float]:
    """Without transformers' prefix and timings."""
    noise = ("runtime", "per_second", "epoch", "_time")
    return {key.removeprefix("eval_"): value for key, value in metrics.items() if not key.endswith(noise)}


def _shown(values: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value:.4f}" for key, value in values.items())


def _read_result(output: Path) -> RunResult:
    values = json.loads((output / RESULT).read_text("utf-8"))
    return RunResult(output=str(output), curve=json.loads((output / "curve.json").read_text("utf-8")), **values)


def _versions() -> dict[str, str]:
    import transformers

    import trimtab

    return {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "trimtab": trimtab.__version__,
    }  # fmt: skip
