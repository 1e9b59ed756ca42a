"""A method defined in a test file is a full citizen: it trains, merges, saves, routes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.core import registry


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
