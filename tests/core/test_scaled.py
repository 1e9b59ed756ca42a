"""Adapters that rest: suppressed responses, by their definition; frozen adapters, which keep nothing of their input."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import trimtab as tt
from trimtab.core.account import saved_bytes
from trimtab.core.activation import scaled

sys.path.insert(0, str(Path(__file__).parent.parent / "contract"))
from contract_cases import BY_NAME, Case, cases, weight_cases

KINDS = ("linear", "conv2d", "embedding", "packed part", "fused part", "bank")  # one for each mechanism
EVERYWHERE = ("LoRA", "IA3", "OFT", "Unfreeze")
#: each method once where it acts first, some at every kind
CASES = list({
    (each.adapter, each.kind.name if type(each.config).__name__ in EVERYWHERE else ""): p
    for p in reversed(cases()) if (each := p.values[0]).kind.name in KINDS
}.values())  # fmt: skip


def places(model: nn.Module) -> list[str]:
    return list(model._trimtab_state.hosts)


@pytest.mark.parametrize("case", CASES)
def test_a_scaled_response_is_base_plus_factor_times_change(case: Case):
    """At one place, where the model behind it does not matter: the module's own output."""
    model = case.model(torch.float64)
    case.attach(model)
    model.eval()
    path = places(model)[0]
    x, found = case.inputs(torch.float64), []
    hook = model.get_submodule(path).register_forward_hook(lambda module, args, y: found.append(y[0] if type(y) is tuple else y))
    with torch.no_grad():
        model(x)
        with tt.disabled(model):
            model(x)
        with scaled(model, {path: 0.3}):
            model(x)
        with scaled(model, {path: 1.0}):
            model(x)
        before = model(x)
        hook.remove()
        with scaled(model, {each: 0.0 for each in places(model)}):
            nothing = model(x)
        assert torch.equal(model(x), before)  # all is as it was
        with tt.disabled(model):
            torch.testing.assert_close(nothing, model(x))
    full, base, third, one, _ = found
    torch.testing.assert_close(one, full)
    if case.kind.name not in ("packed part", "bank"):  # there a module holds several places, between which it is not linear
        torch.testing.assert_close(third, base + 0.3 * (full - base))


def test_rows_may_have_factors_of_their_own():
    case = Case(tt.DoRA(rank=2), BY_NAME["linear"], ("up", "down"))
    model, x = case.model(torch.float64), case.inputs(torch.float64)
    case.attach(model)
    model.eval()
    factors = torch.tensor([1.0, 0.25, 0.0])
    with scaled(model, {"up": factors, "down": factors.flip(0)}):
        together = model(x)
    for row in range(3):
        with scaled(model, {"up": float(factors[row]), "down": float(factors[2 - row])}):
            torch.testing.assert_close(together[row], model(x)[row])
    with scaled(model, {"up": torch.ones(4)}), pytest.raises(tt.Unsupported, match="no multiple"):
        model(x)
    with pytest.raises(tt.NoMatch, match="'u'; nearest: up"), scaled(model, {"u": 0.5}):
        pass


def test_activation_and_token_adapters_are_scaled_too():
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Twice(tt.MethodConfig):
        """y' = y (1 + g)."""

    @tt.method(Twice, paper="a test")
    class TwiceAdapter(tt.ActivationAdapter):
        def __init__(self, config, site, *, rng):
            super().__init__(config, site)
            self.g = self.ones(1)

        def forward(self, x, y):
            return y * (1 + self.g)

    model = nn.Sequential(nn.Linear(4, 3))
    tt.attach(model, Twice(), targets=["0"])
    x = torch.randn(2, 4)
    with tt.disabled(model):
        base = model(x)
    with scaled(model, {"0": 0.25}):
        torch.testing.assert_close(model(x), 1.25 * base)


def test_factors_recompile_nothing():
    torch._dynamo.reset()
    case = Case(tt.LoRA(rank=2), BY_NAME["linear"], ("up", "down"))
    model, x, counter = case.model(), case.inputs(), CompileCounter()
    case.attach(model)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiled(x)
    for factors in ({"up": 0.25}, {"down": 0.25}, {"up": 0.5, "down": 0.125}, {}):
        with scaled(model, factors):
            torch.testing.assert_close(compiled(x), model(x))
        compiled(x)
    assert counter.frame_count == 2  # with factors and without


@pytest.mark.parametrize("case", [p for p in weight_cases() if p.values[0].kind.name == "linear"])
def test_a_frozen_adapter_keeps_nothing_of_its_input(case: Case):
    """The gradient passes through as if it learnt; what is kept beyond the base's own does not grow with the input."""
    found = {}
    for rows in (4, 64):
        model = case.model()
        case.attach(model)
        learns = tt.parameters(model)
        x = case.inputs()[:1].repeat(rows, 1, 1).requires_grad_(True)
        with tt.disabled(model), saved_bytes(model, beside=(x,)) as saved:
            model(x)
        base, passed = saved.total, {}
        for state in (True, False):
            for p in learns:
                p.requires_grad_(state)
            torch.manual_seed(0)
            with saved_bytes(model, beside=(x,)) as saved:
                y = model(x)
            (passed[state],) = torch.autograd.grad(y.square().sum(), x)
        torch.testing.assert_close(passed[False], passed[True])
        found[rows] = saved.total - base
    assert found[64] <= found[4]
