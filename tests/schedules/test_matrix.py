"""Every schedule with every method: it trains, is saved and resumes to the bit, or says why it cannot."""

from __future__ import annotations

import copy
import functools
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_blocks import Net, adamw, batch, loss, scheduled, steps
from torch import nn

import trimtab as tt
from trimtab import schedules
from trimtab.core import registry
from trimtab.core.errors import TrimtabError
from trimtab.schedules import restoration

STEPS, STOP = 6, 3
PLACES = ["q_proj", "fc1"]
LOW_RANK = {"LoRA", "RsLoRA", "DoRA", "PiSSA", "OLoRA", "LoRAGA", "AdaLoRA"}
#: schedule -> the methods that it works with; those that are not here work with all
ONLY = {"LoRAPlus": LOW_RANK, "ReLoRA": {"LoRA", "RsLoRA"}, "BudgetSchedule": {"AdaLoRA"}, "BilevelCompetition": {"SNELLA"},
        "GaLore": {"Unfreeze"}, "LightPEFT": LOW_RANK}  # fmt: skip


def ours(entries: list) -> list:
    """Of the library, not of other test files."""
    return [e for e in entries if (getattr(e, "schedule", None) or e.adapter).__module__.startswith("trimtab.")]


@functools.cache
def attached(name: str, variant: int) -> nn.Module | None:
    """The tiny model with a method; None if the method does not fit it."""
    entry = registry.entry(name)
    config = entry.config(**(entry.tests[variant] if entry.tests else {}))
    torch.manual_seed(0)
    model, rng = Net(2), torch.Generator().manual_seed(1)
    more: dict[str, Any] = {} if entry.adapter.tensors is not None else {"targets": PLACES}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tt.attach(model, config, rng=rng, layers=[0, 1], loss=lambda m: loss(m, batch(0)), **more)
    except TrimtabError:
        return None
    with torch.no_grad():
        for p in tt.parameters(model):
            p.add_(0.05 * torch.randn(p.shape, generator=rng))
    try:
        loss(model, batch(0)).backward()
    except TrimtabError:
        return None
    model.zero_grad()
    return model


def layers_share(model: nn.Module) -> bool:
    """Whether a parameter learns in several layers (Compacter), so that no layer can rest alone."""
    found = [{id(p) for p in layer.parameters() if p.requires_grad} for layer in model.blocks]
    return bool(found[0] & found[1])


def cells() -> list:
    found = []
    for s in ours(schedules.entries()):
        for i, given in enumerate(s.tests):
            for m in ours(registry.entries()):
                for j in range(max(1, len(m.tests))):
                    marks = pytest.mark.slow if i or j else ()
                    found.append(pytest.param(s, given, m.name, j, marks=marks, id=f"{s.name}{i}-{m.name}{j}"))
    return found


@pytest.mark.parametrize(("entry", "given", "method", "variant"), cells())
def test_trains_and_resumes_or_says_why_not(entry, given, method, variant, tmp_path: Path):
    pristine = attached(method, variant)
    if pristine is None:
        pytest.skip(f"{method} does not fit the tiny model")
    model = copy.deepcopy(pristine)
    refused = method not in ONLY.get(entry.name, {method}) or (method == "SNELLA" and variant == 1 and entry.name in ONLY)
    if refused or ("trainability" in entry.schedule.owns and layers_share(model)):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(tt.Unsupported, match=rf"{entry.name} (needs|merges|gives|projects|lets)"):
            scheduled(model, adamw(model), entry.schedule(**given), steps=STEPS)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        return
    whole, again = run(model, [entry.schedule(**given)], [entry.schedule(**given)], ["default"], tmp_path)
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)
    start = pristine.state_dict()
    same = lambda key: key in start and whole[key].shape == start[key].shape and torch.equal(whole[key], start[key])  # noqa: E731
    assert not all(same(key) for key in whole)


def run(model: nn.Module, first: list, second: list, names: list[str], folder: Path) -> tuple[dict, dict]:
    """Train to the end, and once more from what was stored at ``STOP``: both states at the end."""
    optimizer = adamw(model)
    with scheduled(model, optimizer, *first, steps=STEPS) as s:
        steps(model, optimizer, s, range(STOP))
        for name in names:
            tt.save(model, folder / name, name=name)
        stored = io.BytesIO()
        torch.save({"schedules": s.state_dict(), "optimizer": optimizer.state_dict()}, stored)
        steps(model, optimizer, s, range(STOP, STEPS))
    torch.manual_seed(0)
    fresh = Net(2)
    for name in names:
        restoration.load(fresh, folder / name, trainable=True, active=True, check_base=False)
    stored.seek(0)
    state = torch.load(stored, weights_only=True)
    optimizer = adamw(fresh)
    with scheduled(fresh, optimizer, *second, steps=STEPS, state=state["schedules"]) as s:
        optimizer.load_state_dict(state["optimizer"])
        steps(fresh, optimizer, s, range(STOP, STEPS))
    return model.state_dict(), fresh.state_dict()


@pytest.mark.parametrize("lists", [
    [("IST", {"updated": 1, "suppressed": 1, "candidates": 2, "interval": 2}), ("CheckpointAveraging", {"every": 1, "last": 3})],
    [("LISA", {"sampled": 1, "every": 2}), ("LoRAPlus", {})],
    [("BudgetSchedule", {"target": 1, "final": 2}), ("LoRAPlus", {"ratio": 2.0}), ("CheckpointAveraging", {"every": 1})],
    [("IST", {"updated": 1, "uniform": True, "state": "drop"}), ("BudgetSchedule", {"target": 1})],
], ids=lambda v: "+".join(name for name, _ in v))  # fmt: skip
def test_schedules_together_resume_too(lists, tmp_path: Path):
    model = copy.deepcopy(attached("AdaLoRA", 0))
    tt.attach(model, tt.Unfreeze(), targets=["head"], name="head")
    make = lambda: [schedules.from_dict({"name": name, **given}) for name, given in lists]  # noqa: E731
    whole, again = run(model, make(), make(), ["default", "head"], tmp_path)
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)
