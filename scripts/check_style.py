"""Lengths that ruff does not know: a file has at most 400 lines, a function at most 60 without its docstring.

Run by `make lint`; prints one line for each offender and exits with 1 if there is one.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

FILE_LINES, FUNCTION_LINES = 400, 60
ROOT = Path(__file__).resolve().parent.parent


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from `def` to its end, its docstring not counted."""
    total = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node, clean=False) is not None:
        total -= node.body[0].end_lineno - node.body[0].lineno + 1
    return total


def offenders(path: Path) -> list[str]:
    """One sentence for each length that `path` exceeds."""
    text = path.read_text(encoding="utf-8")
    name, lines = path.relative_to(ROOT), text.count("\n")
    found = [f"{name}: {lines} lines, {FILE_LINES} are allowed"] if lines > FILE_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and function_lines(node) > FUNCTION_LINES:
            found.append(f"{name}:{node.lineno}: {node.name} has {function_lines(node)} lines, {FUNCTION_LINES} are allowed")
    return found


def main() -> int:
    """Check src, tests, bench, scripts and examples."""
    folders = ("src", "tests", "bench", "scripts", "examples")
    found = [line for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) for line in offenders(path)]
    print("\n".join(found) if found else "lengths: fine")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
