"""The configuration of a run: frozen, checked, the same for YAML, ``key=value`` on the command line and Python.

Each task has its own subclass of ``TrainConfig`` (``trimtab.tasks``); ``load_config`` chooses it by the key ``task``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trimtab.core import registry
from trimtab.core.errors import TrimtabError, nearest
from trimtab.core.fieldtypes import leaves
from trimtab.schedules.contract import Schedule
from trimtab.schedules.registry import check_owners, from_dict
from trimtab.training.errors import ConfigError
from trimtab.training.strict import assignments, check_characters, dump_yaml, parse_yaml, read_text

__all__ = ["DataConfig", "TrainConfig", "load_config", "parse_override", "read_config", "to_yaml"]


M = TypeVar("M", bound=BaseModel)
OVERRIDES = "epochs=3 or method.rank=16"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_no_truth_values(cls, values: Any) -> Any:
        """YAML reads ``yes`` and ``on`` as true, and pydantic would read true as 1."""
        for key, field in cls.model_fields.items() if isinstance(values, Mapping) else ():
            kinds, value = leaves(field.annotation), values.get(key)
            held = value if isinstance(value, list | tuple) else [value]
            if {int, float} & kinds and not {bool, Any} & kinds and any(isinstance(each, bool) for each in held):
                raise ValueError(f"{key} must be a number, found {value!r}")
        return values


class DataConfig(_Frozen):
    """Where rows come from and which columns count; a bare string is short for ``{source: ...}``.

    Attributes:
        source: a packaged data set (``wordnet-supersense``), a folder with train / validation / test files, a Hub id,
            or one file, which is then the training split.
        train, validation, test: files (.jsonl, .json, .csv, .parquet) that stand for a split of ``source``.
        text, text_pair, label: column names; ``text_pair`` for tasks on two texts.
        validation_fraction: share of the training rows held out, drawn by ``seed``, if there is no validation split.
        max_length: tokens a row is cut to.
    """

    source: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    max_length: int = Field(128, ge=2)

    @model_validator(mode="after")
    def _some_rows(self) -> DataConfig:
        if self.source is None and self.train is None:
            raise ValueError("give `source` (a packaged id, folder, file or Hub id) or `train` (a file)")
        return self


class TrainConfig(_Frozen):
    """What a run is: model, data, method, and how it learns. Units: steps are optimizer steps, warm-up is a share of them.

    Attributes:
        task: name of the task (``trimtab.tasks.names()``).
        model: ``all-minilm-l6-v2`` (the packaged model), a local folder, or a Hub id.
        data: see ``DataConfig``.
        method: ``{name: LoRA, rank: 8}``, a bare name, or null to train the head alone.
        schedules: what changes while training, in order: ``[{name: IST, updated: 0.25}, LoRAPlus]`` (``trimtab schedules``).
        targets, layers: where the method acts, as in ``tt.attach``; null is the method's own default.
        adapter: the adapter's name.
        output: folder for the result.
        epochs: passes over the training rows; may be fractional.
        batch_size: rows a forward pass; ``accumulation`` of them make one optimizer step.
        eval_batch_size: rows a forward pass while evaluating.
        learning_rate, head_learning_rate: of the adapter, and of the head (null: the same).
        schedule, warmup: shape of the learning rate over the run, and the share of steps that it rises.
        weight_decay: AdamW's, on matrices only.
        max_grad_norm: gradients are scaled down to this norm; 0 switches it off.
        step_in_backward: step each parameter inside backward and free its gradient at once; needs ``max_grad_norm`` 0,
            ``accumulation`` 1 and no fp16.
        label_smoothing: mass of the target spread over all classes.
        precision: of the forward pass (autocast); parameters stay fp32.
        eval_every, save_every: optimizer steps between evaluations and checkpoints; null is once an epoch.
        keep_checkpoints: how many of the newest checkpoints stay.
        keep_adapters: of how many of the newest checkpoints the adapter alone stays in ``steps/`` when the run is complete,
            for ``trimtab average``.
        metric: what decides which adapter is best: a metric of the task, which says whether higher or lower is better, or ``loss``.
        patience: stop after this many evaluations without a better ``metric``; null never stops early.
        bucket: batches of rows of similar length (faster), drawn at random from windows of 50 batches.
        max_steps: stop after this many optimizer steps (null: as ``epochs`` says).
        seed: of the head's and the adapter's start, of the order of rows, and of dropout.
        deterministic: use deterministic algorithms, so that a seed gives the same bits again on this machine.
        threads: CPU threads torch uses (null: its own choice).
    """

    task: str = "text-classification"
    model: str = "all-minilm-l6-v2"
    data: DataConfig
    method: dict[str, Any] | None = {"name": "LoRA"}
    schedules: list[dict[str, Any]] = []
    targets: str | list[str] | None = None
    layers: list[int] | None = None
    adapter: str = "default"
    output: str = "runs/latest"

    epochs: float = Field(3, gt=0)
    batch_size: int = Field(32, ge=1)
    accumulation: int = Field(1, ge=1)
    eval_batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    head_learning_rate: float | None = Field(None, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(0.06, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
    step_in_backward: bool = False
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    eval_every: int | None = Field(None, ge=1)
    save_every: int | None = Field(None, ge=1)
    keep_checkpoints: int = Field(1, ge=1)
    keep_adapters: int = Field(0, ge=0)
    metric: str = "accuracy"
    patience: int | None = Field(None, ge=1)
    bucket: bool = True
    max_steps: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0, lt=2**32)
    deterministic: bool = True
    threads: int | None = Field(None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            values = dict(values)
            if isinstance(values.get("data"), str):
                values["data"] = {"source": values["data"]}
            if isinstance(values.get("method"), str):
                values["method"] = {"name": values["method"]}
            if isinstance(values.get("layers"), int) and not isinstance(values["layers"], bool):
                values["layers"] = [values["layers"]]
            if isinstance(values.get("schedules"), list):
                values["schedules"] = [{"name": each} if isinstance(each, str) else each for each in values["schedules"]]
        return values

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: dict[str, Any] | None) -> dict[str, Any] | None:
        # built and thrown away: an unknown name, a mistyped hyperparameter or a bad value must not wait for the data
        if method is not None:
            registry.config_from_dict(method)
        return method

    @field_validator("schedules")
    @classmethod
    def _known_schedules(cls, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        try:
            check_owners([from_dict(each) for each in found])
        except TrimtabError as error:
            raise ValueError(str(error)) from error
        return found

    @model_validator(mode="after")
    def _whole_gradients(self) -> TrainConfig:
        if self.step_in_backward and (self.max_grad_norm or self.accumulation > 1 or self.precision == "fp16"):
            raise ValueError(
                "step_in_backward frees each gradient before the others are there: set max_grad_norm=0, accumulation=1 and a "
                f"precision without a gradient scaler (found {self.max_grad_norm}, {self.accumulation}, {self.precision})"
            )
        whole = [type(each).__name__ for each in self.schedule_objects() if each.whole_gradients]
        if self.step_in_backward and whole:
            raise ValueError(f"step_in_backward frees each gradient before the others are there, and {whole[0]} needs all of them")
        return self

    def method_config(self) -> Any:
        """The method's config object, or None where only the head learns."""
        return None if self.method is None else registry.config_from_dict(self.method)

    def schedule_objects(self) -> list[Schedule]:
        """The schedules, built anew at every call."""
        return [from_dict(each) for each in self.schedules]


def parse_override(text: str) -> tuple[str, Any]:
    """``"method.rank=16"`` to ``("method.rank", 16)``; the value is read as YAML.

    Raises:
        ConfigError: there is no ``=``, or the value is no YAML.
    """
    ((key, value),) = assignments([text], OVERRIDES).items()
    return key, value


def load_config(
    config: str | Path | Mapping[str, Any] | TrainConfig, *, overrides: Mapping[str, Any] | Iterable[str] = ()
) -> TrainConfig:
    """The checked configuration of its task.

    Args:
        config: a YAML file, a mapping, or a configuration that is checked already.
        overrides: ``{"method.rank": 16}`` or ``["method.rank=16"]``; dots reach into sections.

    Raises:
        ConfigError: no such file, no mapping in it, an unknown key (with the nearest names), or a bad value; all
            problems at once.
    """
    from trimtab import tasks

    def of_task(values: dict[str, Any]) -> type[TrainConfig]:
        return tasks.get(values.get("task", TrainConfig.model_fields["task"].default)).config

    return read_config(config, of_task, overrides=overrides)


def read_config(
    config: str | Path | Mapping[str, Any] | BaseModel,
    cls: Callable[[dict[str, Any]], type[M]],
    *,
    overrides: Mapping[str, Any] | Iterable[str] = (),
) -> M:
    """A checked configuration of any kind: ``load_config`` for the class that ``cls`` chooses by the raw values."""
    given = overrides if isinstance(overrides, Mapping) else assignments(overrides, OVERRIDES)
    values, where = _read(config)
    # a whole section before what reaches into it, in whatever order they came: neither is lost
    for key in sorted(given, key=lambda key: key.count(".")):
        _assign(values, key, given[key])
    check_characters(values, where, ConfigError)
    return _validate(cls(values), values, where)


def _read(config: str | Path | Mapping[str, Any] | BaseModel) -> tuple[dict[str, Any], str]:
    if isinstance(config, BaseModel):
        return config.model_dump(), "the configuration"
    if isinstance(config, Mapping):
        return dict(config), "the configuration"
    path = Path(config)
    if not path.is_file():
        raise ConfigError(f"there is no configuration file {path}; give a YAML file such as examples/supersense.yaml")
    values = parse_yaml(read_text(path, ConfigError), str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `key: value` lines; found {type(values).__name__}")
    return values, str(path)


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.b`` in nested mappings; a shorthand string on the way (``data``, ``method``) becomes its mapping."""
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        if isinstance(inner, str) and section in ("data", "method"):
            inner = {"source" if section == "data" else "name": inner}
        elif inner is None and section == "method":
            inner = {"name": "LoRA"}
        values[section] = dict(inner) if isinstance(inner, Mapping) else {}
        values = values[section]
    values[last] = value


def _validate(cls: type[M], values: dict[str, Any], where: str) -> M:
    try:
        return cls.model_validate(values)
    except TrimtabError as error:  # the sentence of what the values describe: the method, a transfer's prompts
        part = ", method" if issubclass(cls, TrainConfig) else ""
        raise ConfigError(f"{where}{part}: {error}") from error
    except ValidationError as error:
        problems = [_sentence(cls, problem) for problem in error.errors()]
    raise ConfigError(f"{where}: " + "; ".join(problems))


def _sentence(cls: type[BaseModel], problem: Mapping[str, Any]) -> str:
    """A problem that pydantic found, as a clause that names the key, the value and what to do."""
    place = [str(part) for part in problem["loc"]]
    key = ".".join(place)
    if problem["type"] == "extra_forbidden":
        section = cls if len(place) == 1 else cls.model_fields[place[0]].annotation
        return f"there is no key {key!r}{nearest(place[-1], getattr(section, 'model_fields', ()))}"
    if problem["type"] == "missing":
        return f"the key {key!r} is missing"
    message, subject = problem["msg"].removeprefix("Value error, "), key or "the configuration"
    if problem["type"] == "value_error":  # a sentence of ours, which says what was found where that helps
        return f"{subject}: {message}" + ("" if "found" in message else f"; found {problem['input']!r}")
    return f"{subject}: {message[0].lower()}{message[1:]}; found {problem['input']!r}"


def to_yaml(config: BaseModel) -> str:
    """The whole resolved configuration, defaults included, as YAML that ``load_config`` reads back."""
    return dump_yaml(config.model_dump())
