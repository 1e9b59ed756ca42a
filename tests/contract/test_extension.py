"""A method defined in a test file is a full citizen: it trains, merges, saves, routes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.core import registry
from trimtab.core.host import Host
from trimtab.core.mounting import adapted_class


@dataclass(frozen=True)
class Gain(tt.MethodConfig):
    """W' = diag(1 + g) W."""

    start: float = 0.0


@tt.method(Gain, paper="a test")
class GainAdapter(tt.Reparameterization):
    def __init__(self, config: Gain, site: tt.Site, *, rng: torch.Generator):
        super().__init__(config, site)
        self.g = self.parameter(torch.full((site.out_features, 1), config.start))

    def weight(self, W: torch.Tensor) -> torch.Tensor:
        return W * (1 + self.g)


@dataclass(frozen=True)
class Shift(tt.MethodConfig):
    """y' = y + s."""


@tt.method(Shift, paper="a test")
class ShiftAdapter(tt.ActivationAdapter):
    def __init__(self, config: Shift, site: tt.Site, *, rng: torch.Generator):
        super().__init__(config, site)
        self.s = self.zeros(site.out_features)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + self.s.to(y.dtype)


@dataclass(frozen=True)
class Skip(tt.MethodConfig):
    """y' = y + M x + s: beside a module, affine, by plain torch operations."""


@tt.method(Skip, paper="a test")
class SkipAdapter(tt.ActivationAdapter):
    targets = "mlp"

    def __init__(self, config: Skip, site: tt.Site, *, rng: torch.Generator):
        super().__init__(config, site)
        self.m = self.zeros(site.out_features, site.in_features)
        self.s = self.zeros(site.out_features)

    @classmethod
    def merges(cls, config: Skip, site: tt.Site) -> bool:
        return True

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + torch.nn.functional.linear(x, self.m.to(x.dtype), self.s.to(x.dtype)).to(y.dtype)


@dataclass(frozen=True)
class Prompt(tt.MethodConfig):
    """Learned tokens at every block's input."""

    tokens: int = 2


@tt.method(Prompt, paper="a test")
class PromptAdapter(tt.TokenAdapter):
    identity_at_start = False

    def __init__(self, config: Prompt, site: tt.Site, *, rng: torch.Generator):
        super().__init__(config, site)
        self.p = self.normal(config.tokens, site.in_features, std=1.0, rng=rng)

    @classmethod
    def entry(cls, config: Prompt) -> str:
        return "block"

    def tokens(self) -> torch.Tensor:
        return self.p


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 16, 0.0, batch_first=True), 2, enable_nested_tensor=False)


@pytest.mark.parametrize("config", [Gain(), Shift(), Prompt()], ids=lambda c: type(c).__name__)
def test_trains_saves_and_leaves(config: tt.MethodConfig, tmp_path) -> None:
    model, x = net(), torch.randn(3, 5, 12)
    base = model(x)
    tt.attach(model, config, targets="block" if isinstance(config, Prompt) else "mlp", name="own")
    assert model(x).shape == base.shape
    if not isinstance(config, Prompt):
        assert torch.allclose(model(x), base)
    optimizer = torch.optim.SGD(tt.parameters(model), lr=0.1)
    losses, target = [], torch.randn(3, 5, 12)
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model(x) - target).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    tt.save(model, tmp_path, name="own")
    fresh = net()
    tt.load(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))
    tt.detach(fresh, "own")
    assert torch.equal(fresh(x), base)


def test_merges_routes_and_is_listed() -> None:
    model, x = net().eval(), torch.randn(3, 5, 12)
    for name, value in (("a", 0.5), ("b", -0.5)):
        tt.attach(model, Gain(start=value), targets="mlp.up", name=name)
    tt.activate(model, "a")
    with torch.no_grad():
        a = model(x[:1])
    tt.merge(model, "a")
    with torch.no_grad():
        assert torch.allclose(model(x[:1]), a, atol=1e-6)
    tt.unmerge(model, "a")
    with torch.no_grad(), tt.routed(model, ["a", "b", None]):
        rows = model(x)
    assert torch.allclose(rows[:1], a, atol=1e-6)
    assert "Gain" in tt.core.registry.names()


def test_activation_adapters_without_a_weight_form_refuse_to_merge() -> None:
    model = net()
    tt.attach(model, Shift(), targets="mlp.up", name="s")
    with pytest.raises(tt.NotMergeable, match="activations"):
        tt.merge(model, "s")


def shaken(model: nn.Module, name: str, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in tt.parameters(model, name):
            p.add_(torch.randn_like(p) * 0.1)


@pytest.mark.parametrize("targets", ["attn", "mlp", "block", "mlp.up"])
def test_an_activation_adapter_acts_on_branches_and_blocks(targets: str, tmp_path) -> None:
    """Whole or spread over their block; it trains, routes and is saved with what it reads."""
    model, x = net().double().eval(), torch.randn(3, 5, 12, dtype=torch.float64)
    base = model(x)
    for seed, name in enumerate("ab"):
        tt.attach(model, Skip(), targets=targets, name=name)
        shaken(model, name, seed)
    tt.activate(model, "a")
    a = model(x)
    a.square().sum().backward()
    assert all(p.grad is not None for p in tt.parameters(model, "a"))
    tt.activate(model, "b")
    b = model(x)
    with tt.routed(model, ["b", None, "a"]):
        torch.testing.assert_close(model(x), torch.stack([b[0], base[1], a[2]]))
    tt.save(model, tmp_path, name="b")
    fresh = net().double().eval()
    tt.load(fresh, tmp_path)
    torch.testing.assert_close(fresh(x), b)


def test_an_affine_activation_adapter_has_a_weight_form() -> None:
    model, x = net().double().eval(), torch.randn(3, 5, 12, dtype=torch.float64)
    tt.attach(model, Skip(), targets="mlp.up", name="s")
    shaken(model, "s", 0)
    layer = model.layers[0].linear1
    adapter = layer.trimtab.s.module
    torch.testing.assert_close(tt.effective_weight(model, "layers.0.linear1"), layer._parameters["weight"] + adapter.m)
    torch.testing.assert_close(tt.effective_weight(model, "layers.0.linear1", tensor="bias"), layer._parameters["bias"] + adapter.s)
    y = model(x)
    tt.merge(model, "s")
    torch.testing.assert_close(model(x), y)
    tt.unmerge(model, "s")
    tt.attach(model, Skip(), targets="mlp", name="branch")
    with pytest.raises(tt.NotMergeable, match="Skip at layers.0.linear2 acts on activations"):
        tt.merge(model, "branch")


def test_a_sequential_shows_what_it_runs_and_not_its_host() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    layers = list(model)
    model._modules["trimtab"] = Host()
    model.__class__ = adapted_class(nn.Sequential, frozenset())
    assert list(model) == layers and len(model) == 3 and model[-1] is layers[-1] and list(model[:-1]) == layers[:-1]
    assert type(model[1:]) is nn.Sequential
    model(torch.randn(2, 4))


def test_a_name_is_registered_once() -> None:
    with pytest.raises(tt.Unsupported, match="taken"):

        @tt.method(Gain, paper="again")
        class Other(tt.Reparameterization):
            pass


@pytest.mark.parametrize("entry", registry.entries(), ids=lambda entry: entry.name)
def test_search_spaces_name_fields_and_valid_values(entry) -> None:
    fields = {field.name: field for field in dataclasses.fields(entry.config)}
    for name, space in entry.config.search.items():
        assert name in fields, f"{entry.name}.search names {name!r}, which is no field"
        values = (space.low, space.high) if isinstance(space, tt.Span) else space
        assert len(set(values)) == len(values) >= 2 and list(values) == sorted(values, key=lambda v: (str(type(v)), v))
        for value in values:
            assert getattr(entry.config(**{name: value}), name) == value
    rate = entry.config.learning_rate
    assert 0 < rate.low < rate.high and rate.log
