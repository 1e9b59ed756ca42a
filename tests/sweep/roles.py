"""The table of roles: what the anatomy calls the matrices of every model type that can be built tiny, for a person to look through.

``PYTHONPATH=tests:src python tests/sweep/roles.py [TYPE ...]`` writes ``roles.txt`` anew, or the sections of the named types alone.
A section has a line for each module that holds matrices, numbers written as ``*``: ``path: matrix role, matrix role``; ``xN`` where
not every such module has it; bare matrices in brackets.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

from torch import nn

from sweep.tiny_models import Built, build, model_types
from trimtab.core import anatomy
from trimtab.core.anatomy import Anatomy
from trimtab.core.structure import is_matrix

__all__ = ["FILE", "read", "section"]

FILE = Path(__file__).with_name("roles.txt")
HEADER = (
    "# What the anatomy calls each matrix of transformers' tiny models: written by tests/sweep/roles.py, looked through by hand.\n"
)


def pattern(path: str) -> str:
    """A path with ``*`` for its numbers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def section(built: Built) -> list[str]:
    """The lines of one model type."""
    found = anatomy.of(built.model)
    towers = ", ".join(f"{pattern(t.path)} x{len(t.blocks)} ({_widths(found, t.blocks)})" for t in found.towers)
    main = "" if found.main is None else f"; by default {found.main or 'the whole'} without {', '.join(found.aside)}"
    lines: dict[str, Counter[str]] = {}
    homes: Counter[str] = Counter()
    for path, module in found.modules.items():
        entries = [f"[{name}] {role}" for name, role in found.banks.get(path, {}).items()]
        home = pattern(path)
        homes[home] += 1
        for entry in entries:
            lines.setdefault(home, Counter())[entry] += 1
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            lines.setdefault(home, Counter())[f"[in_proj_weight] {found.roles.get(path, 'none')}"] += 1
        if is_matrix(module):
            parent, _, name = path.rpartition(".")
            role = found.roles.get(path, "none")
            lines.setdefault(pattern(parent), Counter())[f"{pattern(name)} {role}"] += 1
    told = [f"{home or '(root)'}: " + ", ".join(_entry(e, n, homes[home]) for e, n in c.items()) for home, c in lines.items()]
    return [f"## {built.model_type} {built.class_name}", f"towers: {towers or 'none'}{main}", *told]


def _entry(entry: str, count: int, homes: int) -> str:
    return entry if count == homes else f"{entry} x{count}"


def _widths(found: Anatomy, blocks: tuple[int, ...]) -> str:
    return "/".join(dict.fromkeys(str(found.facts[i]["width"]) for i in blocks))


def read() -> dict[str, list[str]]:
    """Model type -> its section, as the file has it."""
    sections: dict[str, list[str]] = {}
    for line in FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            name = line.split()[1]
            sections[name] = []
        if line and not line.startswith("# "):
            sections[name].append(line)
    return sections


def write(types: list[str]) -> None:
    """The file, with new sections for ``types`` (none named: all)."""
    sections = read() if types and FILE.exists() else {}
    for name in types or model_types():
        built = build(name)
        if isinstance(built, Built):
            sections[name] = section(built)
            print(name, len(sections[name]), flush=True)
    ordered = [name for name in model_types() if name in sections]
    FILE.write_text(HEADER + "".join("\n" + "\n".join(sections[name]) + "\n" for name in ordered), encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1:])
