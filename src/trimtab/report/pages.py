"""One page a method or schedule, from the registries and the docstrings: formula and source from its file, when not to use it
and the arguments from its config. Nothing is written by hand, so nothing can go stale; ``trimtab methods NAME`` and
``trimtab schedules NAME`` print a page.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys

from trimtab.core import registry
from trimtab.core.contracts import Span
from trimtab.core.registry import MethodEntry
from trimtab.schedules.registry import ScheduleEntry

__all__ = ["page", "pages", "schedule_page"]


def _markdown(text: str) -> str:
    """A docstring's text as Markdown: rst's double backquotes become single ones, literal blocks become code blocks."""
    text = inspect.cleandoc(text).replace("``", "`")
    return re.sub(r"::\n\n((?:    .*\n?|\n)+)", lambda m: ":\n\n```\n" + inspect.cleandoc(m[1]).rstrip() + "\n```\n", text + "\n")


def _source(paper: str) -> str:
    """``paper`` with its arXiv id as a link."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


def _space(choices: object) -> str:
    """A search range in words."""
    if isinstance(choices, Span):
        return f"{choices.low:g} to {choices.high:g}" + (", logarithmic" if choices.log else "")
    return ", ".join(map(str, choices))


def _told(doc: str | None) -> tuple[str, dict[str, str]]:
    """What a class's docstring says before its arguments, and of each argument."""
    about, _, arguments = inspect.cleandoc(doc or "").partition("\nArgs:\n")
    found = {m[1]: " ".join(m[2].split()) for m in re.finditer(r"^    (\w+(?:, \w+)*): ((?:.|\n(?=     ))+)", arguments, re.M)}
    return about, {name: text.replace("``", "`").replace("|", "\\|") for names, text in found.items() for name in names.split(", ")}


def schedule_page(entry: ScheduleEntry) -> str:
    """The page of one schedule."""
    cls, module = entry.schedule, sys.modules[entry.schedule.__module__]
    about, meaning = _told(cls.__doc__)
    lines = [f"# {entry.name}", "", _markdown(about), f"Source: {_source(entry.paper)}", "", _markdown(module.__doc__ or "")]
    arguments = inspect.signature(cls).parameters.values()
    if arguments:
        lines += ["## Arguments", "", "| name | default | meaning |", "|---|---|---|"]
        lines += [f"| `{a.name}` | `{a.default!r}` | {meaning.get(a.name, '')} |" for a in arguments] + [""]
    owns = ", ".join(sorted(cls.owns)) or "nothing"
    lines += [f"Of what one schedule of a run at most may change, it changes: {owns}.", ""]
    return "\n".join(lines)


def page(entry: MethodEntry) -> str:
    """The page of one method."""
    config, module = entry.config, sys.modules[entry.adapter.__module__]
    about, meaning = _told(config.__doc__)
    lines = [f"# {entry.name}", "", _markdown(about), f"Source: {_source(entry.paper)}", "", _markdown(module.__doc__ or "")]
    fields = dataclasses.fields(config)
    if fields:
        lines += ["## Arguments", "", "| name | default | meaning | worth searching |", "|---|---|---|---|"]
        for field in fields:
            found = _space(config.search[field.name]) if field.name in config.search else ""
            lines.append(f"| `{field.name}` | `{field.default!r}` | {meaning.get(field.name, '')} | {found} |")
        lines.append("")
    lines += [f"Learning rates worth searching (Adam): {_space(config.learning_rate)}.", ""]
    return "\n".join(lines)


def _index(entries: list[MethodEntry]) -> str:
    """The table of all pages."""
    lines = [
        "# Methods", "",
        "From the methods' own files. `trimtab methods` also tries what each can do, and prints that table.", "",
        "| method | what it is | source |", "|---|---|---|",
    ]  # fmt: skip
    for entry in entries:
        summary = entry.summary.replace("``", "`").replace("|", "\\|")
        lines.append(f"| [{entry.name}]({entry.name}.md) | {summary} | {_source(entry.paper)} |")
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """File name -> text: ``README.md``, the index, and ``<method>.md`` for every method of the library."""
    entries = [entry for entry in registry.entries() if entry.adapter.__module__.startswith("trimtab.")]
    return {"README.md": _index(entries)} | {f"{entry.name}.md": page(entry) for entry in entries}
