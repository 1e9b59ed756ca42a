"""Method pages: complete for every registered method, and derived from it alone."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from trimtab import schedules
from trimtab.core import registry
from trimtab.report.pages import page, pages, schedule_page

OURS = [entry for entry in registry.entries() if entry.adapter.__module__.startswith("trimtab.")]


@pytest.mark.parametrize("entry", OURS, ids=lambda entry: entry.name)
def test_a_page_tells_everything(entry):
    text = page(entry)
    assert entry.summary.replace("``", "`") in text
    flat = " ".join((entry.config.__doc__ or "").split())
    assert any(f"Not {word} " in flat for word in ("for", "where", "without", "with", "to", "on", "in", "when", "if")), (
        f"the docstring of {entry.name} does not say when not to use it"
    )
    for field in dataclasses.fields(entry.config):
        (row,) = (line for line in text.splitlines() if line.startswith(f"| `{field.name}` |"))
        assert len(row.split(" | ")[2].strip()) > 10, f"{entry.name}.{field.name} has no description"


def test_the_index_names_every_method_and_links_its_page():
    found = pages()
    assert set(found) == {"README.md", *(f"{entry.name}.md" for entry in OURS)}
    assert all(f"[{entry.name}]({entry.name}.md)" in found["README.md"] for entry in OURS)


def test_a_page_shows_the_arguments_of_its_source():
    text = page(registry.entry("LoRA"))
    assert "[arXiv:2106.09685](https://arxiv.org/abs/2106.09685)" in text and "| `rank` | `8` |" in text
    assert "2, 4, 8, 16, 32, 64" in text and "::" not in text


@pytest.mark.parametrize("entry", schedules.entries(), ids=lambda entry: entry.name)
def test_a_schedule_s_page_tells_everything(entry):
    if not entry.schedule.__module__.startswith("trimtab."):
        pytest.skip("a schedule of another test file")
    text = schedule_page(entry)
    assert entry.summary.replace("``", "`") in text and "arxiv.org/abs/" in text
    assert "Not " in " ".join((entry.schedule.__doc__ or "").split()), f"{entry.name} does not say when not to use it"
    for name in inspect.signature(entry.schedule).parameters:
        (row,) = (line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        assert len(row.split(" | ")[2].strip()) > 10, f"{entry.name}.{name} has no description"
