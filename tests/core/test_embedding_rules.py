"""What nn.Embedding does beside looking up: no gradient at its padding index, rows of bounded norm, gradients by frequency.

Every method gives there what its dense table gives, by hand, in value and in every gradient.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.core import registry
from trimtab.core.contracts import Reparameterization

D = torch.float64
IDS = torch.tensor([[0, 3, 3, 7], [5, 0, 11, 3]])
RULES = {
    "padding": {"padding_idx": 0},
    "padding from the end": {"padding_idx": -1},
    "norm": {"max_norm": 0.7},
    "norm and padding": {"max_norm": 0.7, "norm_type": 1.0, "padding_idx": 3},
    "frequency": {"scale_grad_by_freq": True},
    "frequency and padding": {"scale_grad_by_freq": True, "padding_idx": 3},
    "sparse": {"sparse": True},
    "sparse and padding": {"sparse": True, "padding_idx": 0},
}


def configs() -> list:
    found = []
    for entry in registry.entries():
        if issubclass(entry.adapter, Reparameterization) and entry.adapter.__module__.startswith("trimtab."):
            for variant in entry.tests or ({},):
                label = ",".join(f"{k}={v}" for k, v in variant.items())
                found.append(pytest.param(entry.config(**variant), id=f"{entry.name}({label})"))
    return found


def model_with(rule: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 8, **RULES[rule]), nn.Linear(8, 3)).to(D)
    if "norm" in rule:
        with torch.no_grad():
            model[0].weight.mul_(0.2)  # the base's rows are within the bound: some of the adapted ones are not
    return model


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("config", configs())
def test_an_adapted_embedding_keeps_its_rules(config, rule) -> None:
    model = model_with(rule)
    more = {"loss": lambda m: m(IDS).pow(2).sum()} if type(config).adapter_class.wants(config) else {}
    try:
        tt.attach(model, config, targets=["0"], rng=torch.Generator().manual_seed(1), **more)
    except tt.TrimtabError as error:
        pytest.skip(str(error))
    rng = torch.Generator().manual_seed(2)
    parameters = [p for p in tt.parameters(model) if p.requires_grad]
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=rng, dtype=D) * 0.3)
    adapter = model._trimtab_state.groups["default"].adapters[0]
    table = adapter.weight(model[0]._parameters["weight"].detach().t().clone()).t().clone()
    rules = {key: value for key, value in RULES[rule].items() if key != "sparse"}
    expected = model[1](F.embedding(IDS, table, **rules))
    y = model(IDS)
    torch.testing.assert_close(y, expected)
    mine = torch.autograd.grad(y.pow(2).sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected.pow(2).sum(), parameters, allow_unused=True)
    for a, b in zip(mine, theirs, strict=True):
        a, b = (torch.zeros(()) if g is None else g.to_dense() for g in (a, b))
        torch.testing.assert_close(a, b)


def test_two_adapters_in_a_row_and_rows_of_a_batch_keep_the_padding() -> None:
    def gradients(run) -> list:
        model = model_with("padding")
        for seed, name in enumerate(("a", "b")):
            tt.attach(model, tt.LoRA(rank=2), targets=["0"], name=name, rng=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                for p in tt.parameters(model, name):
                    p.add_(0.1)
        run(model)
        return [p.grad for p in tt.parameters(model)]

    def tables(model: nn.Module, *names: str) -> torch.Tensor:
        W = model[0]._parameters["weight"].detach().t()
        for name in names:
            W = model[0]._modules["trimtab"].adapters(name)[0].weight(W)
        return W.t()

    def by_hand(model: nn.Module) -> None:
        model[1](F.embedding(IDS, tables(model, "a", "b"), padding_idx=0)).pow(2).sum().backward()

    def row_by_row(model: nn.Module) -> None:
        rows = [F.embedding(IDS[i], tables(model, name), padding_idx=0) for i, name in enumerate("ab")]
        model[1](torch.stack(rows)).pow(2).sum().backward()

    def routed(model: nn.Module) -> None:
        with tt.routed(model, ["a", "b"]):
            model(IDS).pow(2).sum().backward()

    for mine, theirs in ((lambda m: m(IDS).pow(2).sum().backward(), by_hand), (routed, row_by_row)):
        for a, b in zip(gradients(mine), gradients(theirs), strict=True):
            torch.testing.assert_close(a, b)
