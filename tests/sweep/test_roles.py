"""The table of roles over every model type that can be built tiny (roles.txt), and roles against what the models do."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

pytest.importorskip("transformers")
from sweep.role_trial import violations
from sweep.roles import read, section
from sweep.tiny_models import Built, build, model_types

#: a few of every kind, for the default suite
FEW = ["afmoe", "bert", "cvt", "deberta", "deepseek_v3", "funnel", "gemma4_audio", "kimi_k25", "lfm2_moe", "rwkv", "xlnet"]
#: Zaya mixes the means of its queries and keys into both
MIXED = {"zaya": r"self_attn\.qkv_proj\.[qk]_proj is attn\.[qk] and becomes part of the [qk]"}
HINT = "look through what changed, and write it with: PYTHONPATH=tests:src python tests/sweep/roles.py"


def told_apart(name: str, expected: list[str] | None, found: list[str]) -> list[str]:
    """A sentence for each line that differs."""
    if expected is None:
        return [f"{name}: not in the table; {HINT} {name}"]
    lost, new = set(expected) - set(found), set(found) - set(expected)
    gone = [f"{name}: {line!r} is gone" for line in sorted(lost)]
    return gone + [f"{name}: {line!r} is new; {HINT} {name}" for line in sorted(new)]


def entries() -> Iterator[tuple[str, str, str, str]]:
    """``(model type, module, matrix, role)`` of the whole table."""
    for name, lines in read().items():
        for line in lines[2:]:
            home, _, rest = line.partition(": ")
            for entry in rest.split(", "):
                matrix, role = entry.split()[:2]
                yield name, home, matrix, role


@pytest.mark.parametrize("name", FEW)
def test_roles_are_those_of_the_table(name: str) -> None:
    built = build(name)
    assert isinstance(built, Built)
    assert not told_apart(name, read().get(name), section(built))
    seen, wrong = violations(built)
    assert not wrong
    assert seen > 0 or name in ("xlnet", "rwkv")  # bare matrices; no softmax


def test_the_table_holds_what_names_say() -> None:
    """Rules that any reader of the table would apply."""
    wrong = []
    for name, home, matrix, role in entries():
        below = home.split(".")
        if re.search(r"rout(er|ing)", f"{home}.{matrix}") and role.startswith(("mlp.", "attn.")):
            wrong.append(f"{name} {home} {matrix}: a router is {role}")
        if re.fullmatch(r"(q|k|v|o)_proj", matrix) and role not in (f"attn.{matrix[0]}", "head"):
            wrong.append(f"{name} {home} {matrix} is {role}")
        if re.fullmatch(r"(q|kv)_[ab]_proj.*", matrix) and not role.startswith("attn.") and role != "indexer":
            wrong.append(f"{name} {home} {matrix} is {role}")
        attends = re.search(r"attn|attention", below[-1]) and "norm" not in below[-1] and below[0] != "head"
        if attends and not role.startswith("attn.") and "bottleneck" not in below:
            wrong.append(f"{name} {home} {matrix}: in an attention, and {role}")
        if matrix in ("lm_head", "embed_out", "vocab_projector") and role != "head":
            wrong.append(f"{name} {home} {matrix} is {role}")
        if matrix in ("conv.in_proj", "conv.out_proj") or (below[-1] in ("conv", "short_conv") and role.startswith("attn.")):
            wrong.append(f"{name} {home} {matrix}: a convolution is {role}")
    assert not wrong, "\n".join(wrong)
    assert len(read()) >= 460


@pytest.mark.slow
def test_every_model_type_has_the_roles_of_the_table_and_they_are_what_it_does() -> None:
    expected, problems, attending = read(), [], 0
    for name in model_types():
        built = build(name)
        if not isinstance(built, Built):
            continue
        problems += told_apart(name, expected.get(name), section(built))
        seen, wrong = violations(built)
        attending += seen > 0
        problems += [f"{name}: {line}" for line in wrong if name not in MIXED or not re.search(MIXED[name], line)]
    assert not problems, "\n".join(problems)
    assert attending >= 400
