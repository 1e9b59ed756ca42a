"""From a row to text: the prompt that the model reads and the answer that it learns.

A template gives *segments*, ``(text, learnt)``, whose texts joined are what the model sees. Training and generation use the same
segments: the prompt is all that stands before the first learnt one.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from trimtab.core.errors import nearest
from trimtab.training.data import Row
from trimtab.training.errors import DataError

__all__ = ["Segment", "TemplateConfig", "prompt_text", "segments"]

Segment = tuple[str, bool]

_PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
    "appropriately completes the request."
)


class TemplateConfig(BaseModel):
    """How a row becomes text.

    Attributes:
        style: ``alpaca`` (the frame that LLM-Adapters uses), ``plain`` (``prompt`` followed by ``answer``), or ``chat`` (the
            tokenizer's own chat template).
        prompt: format string over the row's columns, such as ``"Q: {question}\\nA:"``; the columns that it names must be there.
            The frame of ``alpaca`` also shows the column ``input``, if it holds something.
        answer: format string of what is learnt.
        system: a system message, for ``chat``.
        messages: the column with whole conversations, for ``chat``: a list of ``{role, content}``; all that the assistant
            says is learnt, and ``prompt`` and ``answer`` are not used.
        legacy_whitespace: the blanks of the LLM-Adapters release, which indents by 16 and differs between training and
            evaluation; to evaluate adapters that were trained with it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    style: Literal["alpaca", "plain", "chat"] = "alpaca"
    prompt: str = "{instruction}"
    answer: str = "{output}"
    system: str | None = None
    messages: str | None = None
    legacy_whitespace: bool = False

    @model_validator(mode="after")
    def _fits_style(self) -> TemplateConfig:
        wrong = {"system": "chat", "messages": "chat", "legacy_whitespace": "alpaca"}
        for key, style in wrong.items():
            if getattr(self, key) and self.style != style:
                raise ValueError(f"{key} belongs to the style {style}, found the style {self.style}")
        return self

    def columns(self) -> tuple[list[str], list[str]]:
        """Columns that a row must have: for the prompt, and for the answer."""
        if self.messages is not None:
            return [self.messages], []
        return _fields(self.prompt), _fields(self.answer)


def _fields(template: str) -> list[str]:
    return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name))


def segments(row: Row, config: TemplateConfig, tokenizer: Any, *, answer: bool = True) -> list[Segment]:
    """The text of one row.

    Args:
        answer: whether the answer is there; without it the last segment is the prompt, as evaluation needs it.

    Raises:
        DataError: a value is no text, a conversation does not fit, or the tokenizer has no chat template.
    """
    values = row.values
    if config.style == "chat":
        return _chat(_messages(row, config, answer=answer), tokenizer, row.where, answer=answer)
    if config.style == "plain":
        prompt = _filled(config.prompt, values, row.where)
    else:
        prompt = _alpaca(values, config, row.where, training=answer)
    found = [(prompt, False)]
    return [*found, (_filled(config.answer, values, row.where), True)] if answer else found


def prompt_text(found: list[Segment]) -> str:
    """All that stands before the first learnt segment."""
    text = ""
    for part, learnt in found:
        if learnt:
            break
        text += part
    return text


def _filled(template: str, values: Mapping[str, Any], where: str) -> str:
    try:
        return template.format_map(values)
    except KeyError as error:
        name = str(error.args[0])
        raise DataError(f"{where} has no column {name!r}, which the template {template!r} names{nearest(name, values)}") from error


def _alpaca(values: Mapping[str, Any], config: TemplateConfig, where: str, *, training: bool) -> str:
    extra = values.get("input") or ""
    parts = [("Instruction", _filled(config.prompt, values, where)), *([("Input", extra)] if extra else [])]
    preamble = _WITH_INPUT if extra else _PREAMBLE
    if not config.legacy_whitespace:
        body = "".join(f"### {name}:\n{text}\n\n" for name, text in parts)
        return f"{preamble}\n\n{body}### Response:\n"
    indent = " " * 16
    gap = indent if training else ""  # training indents its blank lines, evaluation does not
    body = "".join(f"{indent}### {name}:\n{indent}{text}\n{gap}\n" for name, text in parts)
    return f"{preamble}{' ' if extra or not training else '  '}\n\n{body}{indent}### Response:\n{indent}"


def _messages(row: Row, config: TemplateConfig, *, answer: bool) -> list[dict[str, str]]:
    if config.messages is None:
        found = [{"role": "system", "content": config.system}] if config.system else []
        found.append({"role": "user", "content": _filled(config.prompt, row.values, row.where)})
        return [*found, {"role": "assistant", "content": _filled(config.answer, row.values, row.where)}] if answer else found
    found = row.values[config.messages]
    well = isinstance(found, list) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in found)
    if not well or not any(m["role"] == "assistant" for m in found):
        raise DataError(
            f"{row.where}: the column {config.messages!r} must be a list of {{role, content}} with at least one message of the "
            f"assistant; found {str(found)[:80]!r}"
        )
    if not answer:
        last = max(i for i, message in enumerate(found) if message["role"] == "assistant")
        found = found[:last]
    return found


def _chat(messages: list[dict[str, str]], tokenizer: Any, where: str, *, answer: bool) -> list[Segment]:
    """What the assistant says is learnt, with the tokens that end its turn; found as growing prefixes of the rendered text."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError("the template's style is chat, and this tokenizer has no chat template; use alpaca or plain")

    def rendered(count: int, *, ask: bool) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=ask)

    if not answer:
        return [(rendered(len(messages), ask=True), False)]
    found: list[Segment] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, told = rendered(i, ask=True), rendered(i + 1, ask=False)
        if not asked.startswith(done) or not told.startswith(asked):
            raise DataError(
                f"{where}: this tokenizer's chat template rewrites earlier turns, so what the assistant says cannot be told from "
                "the rest; use the style plain"
            )
        found += [(asked[len(done) :], False), (told[len(asked) :], True)]
        done = told
    rest = rendered(len(messages), ask=False)[len(done) :]
    return [*found, (rest, False)] if rest else found
