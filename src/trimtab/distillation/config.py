"""The configuration of a transfer: frozen, checked, the same for YAML, ``key=value`` and Python."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trimtab.distillation.prompts import Prompts

__all__ = ["DiscriminatorConfig", "GeneratorConfig", "SourceConfig", "TransferConfig"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceConfig(_Frozen):
    """The model that knows the task.

    Attributes:
        model: a model folder or a Hub id.
        adapter: folder of its adapter for the task.
    """

    model: str
    adapter: str


class DiscriminatorConfig(_Frozen):
    """The filter of made inputs, an adapter on the source's model.

    Attributes:
        adapter: folder of one that an earlier transfer trained (``<output>/discriminator/adapter``).
        data: otherwise: a .jsonl of real inputs to train it on; only the trained adapter is kept of them.
        column: the column of ``data`` that holds the input.
        answers: what it says to a real and to a made input; their first tokens must differ.
        held_out: share of the real and made inputs that measure it.
        train: settings of the training, as in ``trimtab train``: method, epochs, learning_rate...
    """

    adapter: str | None = None
    data: str | None = None
    column: str = "text"
    answers: tuple[str, str] = (" yes", " no")
    held_out: float = Field(0.2, gt=0, lt=1)
    train: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one(self) -> DiscriminatorConfig:
        if (self.adapter is None) == (self.data is None):
            raise ValueError("give either `adapter`, a trained discriminator, or `data`, real inputs to train one on")
        return self


class GeneratorConfig(_Frozen):
    """Who writes the inputs; nothing given: the target's bare model.

    Attributes:
        model: another local model, or the endpoint's name for one.
        endpoint: address of an OpenAI-compatible server, up to ``/v1``; its ``completions`` are asked.
        key_variable: environment variable with the endpoint's key.
        calls: continuations that are written at a time.
        tokens: length of one.
        temperature, top_p: of the sampling.
        wanted: items that the prompt speaks of, the seeds included.
        shown: seeds that a prompt shows, drawn anew every time; null shows all.
    """

    model: str | None = None
    endpoint: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    calls: int = Field(8, ge=1)
    tokens: int = Field(256, ge=1)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    wanted: int = Field(10, ge=2)
    shown: int | None = Field(None, ge=1)


class TransferConfig(_Frozen):
    """What a transfer is.

    Attributes:
        task: its name in a few words, as generator and discriminator read it.
        template: what a model reads to answer an input, with the field ``{input}``.
        source: see ``SourceConfig``.
        target: model folder or Hub id that is to learn the task.
        seeds: real inputs, a few, that may be kept and shown to the generator.
        count: made inputs to train on.
        discriminator: see ``DiscriminatorConfig``; null transfers without a filter.
        generator: see ``GeneratorConfig``.
        answer_tokens: length of an answer; it ends at a line break.
        overlap: share of the words, in order, that makes an input a repetition of an earlier one.
        cap: give up after ``cap * count`` draws.
        train: settings of the target's training, as in ``trimtab train``: method, epochs, learning_rate...
        batch_size: rows a forward pass outside training.
        base_dtype: of the models' weights: ``fp32``, ``bf16``, ``fp16``, or ``auto``, as they are stored.
        output: folder for everything.
        seed: of the sampling, the orders and the trainings.
    """

    task: str
    template: str = "{input}\n"
    source: SourceConfig
    target: str
    seeds: list[str] = Field(min_length=1)
    count: int = Field(250, ge=1)
    discriminator: DiscriminatorConfig | None
    generator: GeneratorConfig = GeneratorConfig()
    answer_tokens: int = Field(64, ge=1)
    overlap: float = Field(0.7, gt=0, le=1)
    cap: int = Field(50, ge=1)
    train: dict[str, Any] = {}
    batch_size: int = Field(32, ge=1)
    base_dtype: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    output: str = "runs/transfer"
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _room(self) -> TransferConfig:
        self.prompts().generator(self.seeds[: self.generator.shown])
        return self

    def prompts(self) -> Prompts:
        """The task's wording."""
        more = {} if self.discriminator is None else {"answers": self.discriminator.answers}
        return Prompts(name=self.task, template=self.template, wanted=self.generator.wanted, **more)
