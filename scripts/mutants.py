"""How many faults the tests notice: a seeded sample of cosmic-ray's mutants, each tried on the tests that run its line.

    make mutants      # records which test runs which line, then tries the sample and prints the share that was killed
    python scripts/mutants.py run --packages core kernels --count 50 --seed 1

A mutant is the module's source with one operator, number, comparison or decorator exchanged. It is put in at import, in a forked
process that has torch loaded already; no file is written. The tests that execute the mutated line run until one fails: the mutant
is then *killed*. It *survives* if none fails, and is *not reached* if no test executes its line. Mutants of annotations, which
nothing evaluates, and those of ``EQUIVALENT`` (looked at by a human: nothing that can be observed changes) are left out.

The runner is our own because cosmic-ray writes each mutant into the working tree and starts one fresh test process for it: four
hundred times the import of torch, and all tests for every mutant.
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.util
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "trimtab"
CACHE = ROOT / "bench" / ".cache" / "mutants"
PACKAGES = ("core", "kernels", "schedules", "training")
EQUIVALENT = ROOT / "scripts" / "equivalent_mutants.json"
EXCHANGE = re.compile(r"core/Replace(?P<kind>Binary|Comparison|Unary)Operator_(?P<old>[A-Za-z]+)_(?P<new>[A-Za-z]+)")
ALIKE = (
    {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"},
    {"BitAnd", "BitOr"},
    {"LShift", "RShift"},
    {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"},
    {"Is", "IsNot"},
)
#: what a test file's collection may cost, and one mutant's tests
SECONDS, TESTS = 240, 150


@dataclass(frozen=True)
class Mutant:
    """One change: ``occurrence`` of the operator in ``path``, at ``line`` (from 1) to ``end``."""

    path: str
    operator: str
    occurrence: int
    line: int
    end: int
    before: str
    after: str


# -- making mutants


def unevaluated(source: str) -> set[tuple[int, int]]:
    """(line, column) of annotations and of what type checkers alone see, where a mutant changes nothing that runs."""
    found: set[tuple[int, int]] = set()
    for node in ast.walk(ast.parse(source)):
        spots = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            spots += node.body
        for spot in spots:
            if spot is not None:
                found.update((spot.lineno, column) for column in range(spot.col_offset, 1 + (spot.end_col_offset or 0)))
    return found


def kind(operator: str) -> str:
    """What an operator changes: ``binary``, ``comparison``, ``NumberReplacer``."""
    exchange = EXCHANGE.fullmatch(operator)
    return exchange["kind"].lower() if exchange else operator


def plausible(operator: str) -> bool:
    """Whether somebody could have written it so: ``+`` for ``-``, not ``<<`` for ``**``, which any test notices."""
    exchange = EXCHANGE.fullmatch(operator)
    if exchange is None or exchange["kind"] == "Unary":
        return True
    return any({exchange["old"], exchange["new"]} <= group for group in ALIKE)


def positions(path: Path) -> list[tuple[str, int, int, int]]:
    """(operator, occurrence, first line, last line) of all mutants of one file whose change can run."""
    import cosmic_ray.plugins as plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    source = path.read_text(encoding="utf-8")
    skip, nodes, found = unevaluated(source), list(ast_nodes(get_ast(source))), []
    for name in plugins.operator_names():
        cls = plugins.get_operator(name)
        if cls.arguments() or not plausible(name):
            continue
        operator = cls()
        spots = [spot for node in nodes for spot in operator.mutation_positions(node)]
        found += [(name, i, start[0], end[0]) for i, (start, end) in enumerate(spots) if tuple(start) not in skip]
    return found


def mutated(path: Path, operator: str, occurrence: int) -> str | None:
    """The file's source with one change; None where the operator cannot make it (cosmic-ray fails on dotted exceptions)."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    try:
        return mutate_code(path.read_text(encoding="utf-8"), get_operator(operator)(), occurrence)
    except AttributeError:
        return None


def mutant_of(path: Path, operator: str, occurrence: int, line: int, end: int) -> Mutant | None:
    """The mutant at one position, with the first line that it changes; None if it changes nothing."""
    old, new = path.read_text(encoding="utf-8"), mutated(path, operator, occurrence)
    if new is None or new == old:
        return None
    try:
        compile(new, str(path), "exec")
    except SyntaxError:  # a star that was no product
        return None
    before, after = next((a, b) for a, b in zip_longest(old.splitlines(), new.splitlines(), fillvalue="") if a != b)
    return Mutant(str(path.relative_to(SOURCE)), operator, occurrence, line, end, before.strip(), after.strip())


def sample(packages: list[str], count: int, seed: int) -> list[Mutant]:
    """``count`` mutants, files drawn by their size and their mutants evenly, without those known to be equivalent."""
    known, rng = equivalent(), random.Random(seed)
    files = sorted(path for package in packages for path in (SOURCE / package).rglob("*.py"))
    sizes = [path.stat().st_size for path in files]
    found: dict[Path, list] = {}
    drawn: dict[tuple, Mutant | None] = {}
    while sum(mutant is not None for mutant in drawn.values()) < count:
        path = rng.choices(files, sizes)[0]
        if path not in found:
            found[path] = positions(path)
        # kinds first: cosmic-ray has a dozen exchanges for every binary operator, which would be most of an even draw
        kinds = sorted({kind(position[0]) for position in found[path]})
        if not kinds:
            continue
        wanted = rng.choice(kinds)
        spot = (path, *rng.choice([position for position in found[path] if kind(position[0]) == wanted]))
        if spot not in drawn:
            mutant = mutant_of(*spot)
            drawn[spot] = None if mutant is None or (mutant.path, mutant.before, mutant.after) in known else mutant
    return [mutant for mutant in drawn.values() if mutant is not None]


def equivalent() -> set[tuple[str, str, str]]:
    """(path, line before, line after) of the mutants that a human found to change nothing observable."""
    return {tuple(entry[:3]) for entry in json.loads(EQUIVALENT.read_text())} if EQUIVALENT.exists() else set()


# -- which test runs which line


def record() -> None:
    """Run the default suite once under coverage, with the running test as its context, and note how long each test takes."""
    CACHE.mkdir(parents=True, exist_ok=True)
    settings = CACHE / "coveragerc"
    settings.write_text(f"[run]\nsource = {SOURCE}\ndata_file = {CACHE / 'coverage'}\n[json]\nshow_contexts = true\n")
    for old in CACHE.glob("coverage*"):
        if old.name != "coveragerc":
            old.unlink()
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--cov", "--cov-config", str(settings), "--cov-context=test"]
    command += ["--cov-report=", f"--junitxml={CACHE / 'times.xml'}", str(ROOT / "tests")]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)


class Coverage:
    """Line of a file -> the tests that run it."""

    def __init__(self) -> None:
        from coverage.numbits import numbits_to_nums

        base = sqlite3.connect(CACHE / "coverage")
        files = {i: str(Path(p).relative_to(SOURCE)) for i, p in base.execute("select id, path from file")}
        names = {i: c.partition("|")[0] for i, c in base.execute("select id, context from context")}
        self.found: dict[tuple[str, int], set[str]] = defaultdict(set)
        for file, context, bits in base.execute("select file_id, context_id, numbits from line_bits"):
            if names[context]:
                for line in numbits_to_nums(bits):
                    self.found[files[file], line].add(names[context])

    def of(self, mutant: Mutant) -> list[str]:
        """Tests that run the mutated statement (one of its lines stands for it); for what runs at import, all of the file's."""
        for line in range(mutant.line, max(mutant.line - 12, 0), -1):
            if self.found.get((mutant.path, line)):
                return sorted(self.found[mutant.path, line])
        return sorted({test for (path, _), tests in self.found.items() if path == mutant.path for test in tests})


def chosen(tests: list[str], rng: random.Random) -> list[str]:
    """At most ``TESTS`` of them, from as many different test functions as there are."""
    functions: dict[str, list[str]] = defaultdict(list)
    for test in tests:
        functions[test.partition("[")[0]].append(test)
    for group in functions.values():
        rng.shuffle(group)
    picked: list[str] = []
    while len(picked) < TESTS and any(functions.values()):
        for name in rng.sample(sorted(functions), len(functions)):
            if functions[name]:
                picked.append(functions[name].pop())
    return picked[:TESTS]


# -- trying one


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from given source, and leaves all others alone."""

    def __init__(self, module: str, path: Path, source: str):
        self.module, self.path, self.source = module, path, source

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name != self.module:
            return None
        package = self.path.name == "__init__.py"
        return importlib.util.spec_from_file_location(
            name, self.path, loader=self, submodule_search_locations=[str(self.path.parent)] if package else None
        )

    def create_module(self, spec: object) -> None:
        return None

    def exec_module(self, module: object) -> None:
        exec(compile(self.source, str(self.path), "exec"), module.__dict__)


def attempt(mutant: Mutant, tests: list[str], log: Path) -> int:
    """pytest's exit code with the mutant in place, in a forked process; -1 past the time limit."""
    path = SOURCE / mutant.path
    source = mutated(path, mutant.operator, mutant.occurrence)
    child = os.fork()
    if child == 0:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        name = ".".join(("trimtab", *Path(mutant.path).with_suffix("").parts)).removesuffix(".__init__")
        sys.meta_path.insert(0, _Finder(name, path, source))
        code = 3
        try:
            import pytest

            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *tests]))
        finally:
            os._exit(code)
    limit = time.monotonic() + SECONDS
    while time.monotonic() < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


def run(packages: list[str], count: int, seed: int, part: int, parts: int) -> int:
    """Try the sample (every ``parts``-th of it, from ``part`` on); one JSON line a mutant; then the share that was killed."""
    import torch
    import transformers  # noqa: F401  (loaded once, before the forks)

    torch.set_num_threads(1)
    os.chdir(ROOT)
    coverage = Coverage()
    results = CACHE / f"results-{seed}.jsonl"
    done = {}
    if results.exists():
        entries = [json.loads(line) for line in results.read_text().splitlines()]
        done = {(e["path"], e["before"], e["after"], e["occurrence"]): e["outcome"] for e in entries}
    for mutant in sample(packages, count, seed)[part::parts]:
        key = (mutant.path, mutant.before, mutant.after, mutant.occurrence)
        if key in done:
            continue
        tests = chosen(coverage.of(mutant), random.Random(seed))
        start = time.monotonic()
        # a time limit, a crash and a failed collection are noticed, too
        code = attempt(mutant, tests, CACHE / f"log-{part}.txt") if tests else None
        outcome = {None: "not reached", 0: "survived"}.get(code, "killed")
        with results.open("a") as file:
            entry = asdict(mutant) | {"outcome": outcome, "tests": len(tests), "seconds": round(time.monotonic() - start, 1)}
            file.write(json.dumps(entry) + "\n")
        print(f"{outcome:12} {mutant.path}:{mutant.line}  {mutant.before}  ->  {mutant.after}", flush=True)
    return report(results)


def report(results: Path) -> int:
    """Print the figures of a file of results; 1 if less than 85 % were killed."""
    entries = [json.loads(line) for line in results.read_text().splitlines()]
    entries = [e for e in entries if (e["path"], e["before"], e["after"]) not in equivalent()]
    count = Counter(entry["outcome"] for entry in entries)
    share = count["killed"] / max(len(entries), 1)
    print(f"{len(entries)} mutants: " + ", ".join(f"{n} {what}" for what, n in count.most_common()) + f"; killed {share:.1%}")
    return 0 if share >= 0.85 else 1


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("verb", choices=("record", "run", "report"))
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES))
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    given = parser.parse_args()
    if given.verb == "record":
        record()
        return 0
    if given.verb == "report":
        return report(CACHE / f"results-{given.seed}.jsonl")
    return run(given.packages, given.count, given.seed, given.part, given.parts)


if __name__ == "__main__":
    sys.exit(main())
