"""The table of the sweep: a file of rows a model type, and the counts of them all, in docs/sweep.md.

``python -m sweep.table`` (in tests/) reads the rows that ``test_sweep.py`` wrote, and fails below the least counts.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from sweep import known

ROOT = Path(__file__).resolve().parents[2]
ROWS = Path(os.environ.get("TRIMTAB_SWEEP", ROOT / ".sweep"))
PAGE = ROOT / "docs" / "sweep.md"
CHECKS = ("start", "gradient", "steps", "moved", "merge", "saved")
METHODS = ("LoRA", "ParallelAdapter", "PrefixTuning", "PromptTuning")
#: model types that train two steps with the default LoRA
LEAST = 440


def write(model_type: str, rows: dict[str, Any]) -> None:
    """Keep what was found of one model type."""
    ROWS.mkdir(parents=True, exist_ok=True)
    (ROWS / f"{model_type}.json").write_text(json.dumps({"model type": model_type, **rows}, indent=1) + "\n", "utf-8")


def read() -> list[dict[str, Any]]:
    """All rows, by model type."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(ROWS.glob("*.json"))]


def counts(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Method -> check -> models that passed it."""
    built = [row for row in rows if "class" in row]
    return {
        method: {check: sum(row[method].get(check, "").startswith("ok") for row in built) for check in CHECKS} for method in METHODS
    }


def page(rows: list[dict[str, Any]]) -> str:
    """The text of docs/sweep.md."""
    built = [row for row in rows if "class" in row]
    peft = sum(row["peft"].startswith("ok") for row in built)
    lines = [
        "# The sweep over transformers' architectures",
        "",
        f"Made by `make sweep`: {len(built)} of {len(rows)} model types were built tiny, with inputs that they run on. Passed:",
        "",
        "| method | " + " | ".join(CHECKS) + " |",
        "|---|" + "---|" * len(CHECKS),
    ]
    for method, found in counts(rows).items():
        lines.append(f"| {method} | " + " | ".join(str(found[check]) for check in CHECKS) + " |")
    lines += [
        "",
        f"peft's LoRA on all linear layers trains two steps on {peft} of them.",
        "",
        "*start*: attached, and at the base where that is promised. *gradient*, *steps*: a first and a second optimizer step, at "
        "which exactly the declared parameters have gradients. *moved*: parameters that have moved change the output. *merge*: the "
        "merged model gives the same, and the base comes back to the bit; or there is no weight form, and it is said. *saved*: a "
        "saved and loaded adapter gives the same.",
        "",
        "## What was refused, and why",
        "",
        "| model type | method | check | reason |",
        "|---|---|---|---|",
    ]
    for row in built:
        for method in METHODS:
            for check, verdict in row[method].items():
                if not verdict.startswith("ok"):
                    reason = verdict.replace("|", "\\|")
                    lines.append(f"| {row['model type']} | {method} | {check} | {reason} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page; 1 if something is wrong, or too little was passed."""
    rows = read()
    PAGE.write_text(page(rows), "utf-8")
    built = [row for row in rows if "class" in row]
    faults = [fault for row in built for fault in known.faults(row["model type"], row)]
    trained = counts(rows)["LoRA"]["steps"]
    print("\n".join([*faults, f"{len(built)} built, {trained} train two steps with the default LoRA; see {PAGE}"]))
    return int(bool(faults) or trained < LEAST)


if __name__ == "__main__":
    sys.exit(main())
