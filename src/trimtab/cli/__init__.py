"""The command line. One file a command: ``trimtab/cli/<name>.py`` holds the function ``command``, its docstring the help; an
underscore in the file's name is a hyphen in the command's.

A new command is a new file; nothing else changes. A folder is a group: ``cli/audit/contamination.py`` is ``trimtab audit
contamination``, and the folder's docstring the group's help. Files import what is heavy inside ``command``, so that ``trimtab
--help`` stays fast. Errors of trimtab are printed as their sentence, with exit code 2; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import warnings
from collections.abc import Iterator, Sequence

__all__ = ["commands", "main"]


def commands() -> dict[str, str]:
    """Name of every command, ``group command`` for those of a group, and the module that holds it.

    Modules that start with an underscore are no commands.
    """
    return dict(_below(__path__, __name__, ""))


def _below(path: Sequence[str], package: str, group: str) -> Iterator[tuple[str, str]]:
    for found in pkgutil.iter_modules(path):
        module = f"{package}.{found.name}"
        if found.name.startswith("_"):
            continue
        if found.ispkg:
            yield from _below(importlib.import_module(module).__path__, module, f"{group}{found.name} ")
        else:
            yield f"{group}{found.name}".replace("_", "-"), module


def _app():
    import typer

    app = typer.Typer(
        name="trimtab", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
        help="Tune a small part of a large frozen model.",
    )  # fmt: skip

    @app.callback()
    def _options(debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error.")) -> None:
        """Options of every command."""

    groups = {"": app}
    for name, module in commands().items():
        group, _, last = name.rpartition(" ")
        if group not in groups:
            groups[group] = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
            app.add_typer(groups[group], name=group, help=importlib.import_module(module.rpartition(".")[0]).__doc__)
        groups[group].command(last)(importlib.import_module(module).command)
    return app


def _note(message: Warning | str, category: type[Warning], file: str, line: int, text: str | None = None) -> str:
    """A warning of trimtab's as a line; those of others as Python shows them."""
    if "trimtab" in file and issubclass(category, UserWarning):
        return f"trimtab: note: {message}\n"
    return f"{file}:{line}: {category.__name__}: {message}\n"


def _of_system(error: OSError) -> str:
    """What the system said of a file, as a sentence."""
    about = f"{error.filename}: " if error.filename is not None else ""
    return f"{about}{error.strerror or error}; check the path, its rights, and the room on the disk"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 for an error that has a sentence, or what the shell expects of an interrupt.

    Args:
        arguments: without the program's name; None reads them from the command line.
    """
    from trimtab.cli._noise import hush
    from trimtab.core.errors import TrimtabError

    hush()
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    # the option may stand anywhere, also behind the command's own arguments
    given = [argument for argument in given if argument != "--debug"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    shown, warnings.formatwarning = warnings.formatwarning, _note
    try:
        _app()(given)
    except (TrimtabError, OSError) as error:
        if debug:
            raise
        print(f"trimtab: {error if isinstance(error, TrimtabError) else _of_system(error)}", file=sys.stderr)
        return 2
    except SystemExit as finished:  # how typer ends, with the exit code of usage errors and interrupts
        return finished.code if isinstance(finished.code, int) else 0
    finally:
        warnings.formatwarning = shown
    return 0
