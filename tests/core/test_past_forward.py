"""A parameter that is read past its module's forward, by its parent or by a loss: it acts there as it does in the forward.

The right value is a plain copy of the model with the dense adapted weight written in.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.core import registry
from trimtab.core.contracts import Reparameterization

D = torch.float64


class Net(nn.Module):
    """Children whose forward is called, is not called, or both."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 12)
        self.called = nn.Linear(12, 12)
        self.past = nn.Linear(12, 12)
        self.both = nn.Linear(12, 12)
        self.conv = nn.Conv1d(12, 12, 3, groups=12, padding=2)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 11)

    def body(self, ids: Tensor) -> Tensor:
        h = self.called(self.table.weight[ids])
        h = torch.addmm(self.past.bias, h.flatten(0, 1), self.past.weight.t()).view(h.shape)
        h = self.both(h[:, :2]).sum(1, keepdim=True) + F.linear(h, self.both.weight[:6].repeat(2, 1), self.both.bias)
        h = F.conv1d(h.transpose(1, 2), self.conv.weight, self.conv.bias, groups=12, padding=1).transpose(1, 2)
        return F.layer_norm(h, (12,), self.norm.weight, self.norm.bias).to(self.head.weight.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.body(ids), self.head.weight, self.head.bias)


IDS = torch.tensor([[1, 5, 3, 10], [0, 2, 9, 5]])
PLACES = ["table", "called", "past", "both", "conv", "head"]


def fresh() -> Net:
    torch.manual_seed(0)
    return Net().to(D)


def moved(model: nn.Module, name: str = "default", seed: int = 1) -> None:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tt.parameters(model, name):
            p.add_(torch.randn(p.shape, generator=rng, dtype=D) * 0.3)


def hosts(model: nn.Module) -> dict[str, nn.Module]:
    return model.__dict__["_trimtab_state"].hosts


def values(model: nn.Module) -> dict[str, Tensor]:
    """Name -> adapted value, with its graph, computed from the adapters' definitions and the base's parameters alone."""
    found = {}
    for path, module in hosts(model).items():
        for adapter in module._modules["trimtab"].adapters("default"):
            site = adapter.site
            stored = module._parameters[site.tensor].detach()
            new = site.unmatrix(adapter.weight(site.matrix(stored))).reshape(stored.shape)
            found[f"{path}.{site.tensor}"] = new
            if getattr(adapter, "rebias", False) and site.tensor == "weight" and module._parameters.get("bias") is not None:
                found[f"{path}.bias"] = adapter.bias(module._parameters["bias"].detach())
    return found


def cases() -> list:
    found = []
    for entry in registry.entries():
        if issubclass(entry.adapter, Reparameterization) and entry.adapter.__module__.startswith("trimtab."):
            for variant in entry.tests or ({},):
                label = ",".join(f"{k}={v}" for k, v in variant.items())
                found.append(pytest.param(entry.config(**variant), id=f"{entry.name}({label})"))
    return found


def attached(config: tt.MethodConfig, **more: object) -> tuple[Net, list[str]]:
    """A net with ``config`` at every place that it fits, moved away from its start; and those places."""
    model, places = fresh(), []
    if type(config).adapter_class.wants(config):
        more["loss"] = lambda m: m(IDS).pow(2).sum()
    own = type(config).adapter_class.tensors is not None
    for target in [None] if own else PLACES:
        try:
            tt.attach(model, config, targets=target if own else [target], rng=torch.Generator().manual_seed(3), **more)
        except (tt.ShapeMismatch, tt.Unsupported, tt.NoMatch):
            continue
        places.append(target)
    if places:
        moved(model)
    return model, places


@pytest.mark.parametrize("config", cases())
def test_every_method_acts_where_a_parent_reads_past_the_forward(config) -> None:
    model, places = attached(config)
    assert places, "the method fits no place of the net"
    y = model(IDS)
    parameters = [p for p in tt.parameters(model) if p.requires_grad]
    plain, written = fresh(), values(model)
    expected = torch.func.functional_call(plain, written, (IDS,))
    torch.testing.assert_close(y, expected)
    mine = torch.autograd.grad(y.pow(2).sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected.pow(2).sum(), parameters, allow_unused=True)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b)
    tt.merge(model, "default", max_error=1e-6)
    torch.testing.assert_close(model(IDS), expected)
    tt.unmerge(model, "default")
    torch.testing.assert_close(model(IDS), y)
    with tt.disabled(model):
        torch.testing.assert_close(model(IDS), fresh()(IDS))


def lora(targets: list[str] | None = None) -> Net:
    model = fresh()
    tt.attach(model, tt.LoRA(rank=2), targets=targets or PLACES, rng=torch.Generator().manual_seed(3))
    moved(model)
    return model


def test_a_loss_outside_of_every_forward_reads_the_adapted_head() -> None:
    """A fused loss gets the hidden states and the head's weight; also as a custom function, which no operation announces."""

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h, weight):
            ctx.save_for_backward(h, weight)
            return (h @ weight.t()).pow(2).sum()

        @staticmethod
        def backward(ctx, g):
            h, weight = ctx.saved_tensors
            dy = 2 * g * (h @ weight.t())
            return dy @ weight, (dy.flatten(0, 1).t() @ h.flatten(0, 1))

    model = lora()
    plain = dict(values(model))
    h = model.body(IDS)
    expected = F.linear(h, plain["head.weight"]).pow(2).sum()
    wanted = torch.autograd.grad(expected, tt.parameters(model), retain_graph=True)
    for loss in (lambda: F.linear(h, model.head.weight).pow(2).sum(), lambda: Fused.apply(h, model.head.weight)):
        got = loss()
        torch.testing.assert_close(got, expected)
        for a, b in zip(torch.autograd.grad(got, tt.parameters(model), retain_graph=True), wanted, strict=True):
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(Fused.apply(h, model.head.weight), expected)
    torch.testing.assert_close(model.head.weight.detach(), tt.effective_weight(model, "head"))


def test_what_a_read_says_of_itself_costs_no_product() -> None:
    model, made = lora(), []
    adapter = model.past._modules["trimtab"].adapters("default")[0]
    own = adapter.weight
    adapter.weight = lambda W: made.append(1) or own(W)
    w, base = model.past.weight, model.past._parameters["weight"]
    told = (w.shape, w.dtype, w.device, w.ndim, w.numel(), w.size(1), w.is_meta, w.is_floating_point(), len(w), w.grad, w.layout)
    assert told == (base.shape, base.dtype, base.device, 2, 144, 12, False, True, 12, None, base.layout)
    assert isinstance(w, nn.Parameter)
    assert model.past.weight is w
    assert w.new_zeros(2).dtype == torch.ones(1).to(w).dtype == torch.empty_like(w).dtype == D
    assert w.requires_grad
    assert not made
    w.sum()
    assert made == [1]


def test_what_writes_to_a_read_writes_to_the_base() -> None:
    model = lora()
    base = model.past._parameters["weight"]
    with torch.no_grad():
        nn.init.constant_(model.past.weight, 3.0)
        assert bool((base == 3).all())
        model.past.weight[0] = 4.0
        model.past.weight.data[1] = 5.0
        model.past.weight.data.copy_(model.past.weight.data * 0 + 2.0)
        assert bool((base == 2).all())
        model.past.weight.mul_(2).add_(torch.ones(12, 12))
        torch.mul(base, 2, out=model.past.weight)
        assert bool((base == 10).all())
    model.past.weight.data = torch.ones(12, 12, dtype=D)
    assert bool((base == 1).all())
    model.past.weight.requires_grad = True
    assert base.requires_grad
    model.past.weight.requires_grad_(False)
    assert not base.requires_grad
    model.past.weight.note = "kept"
    assert base.note == "kept"
    assert model.past._parameters["weight"] is base


def test_a_tie_made_through_a_read_ties_to_the_base() -> None:
    model = lora(["table"])
    other = nn.Linear(12, 11, bias=False)
    other.weight = model.table.weight
    assert other._parameters["weight"] is model.table._parameters["weight"]
    assert model.get_parameter("table.weight") is model.table.weight
    replaced = nn.Parameter(torch.zeros(11, 12, dtype=D))
    model.table.weight = replaced
    assert model.table._parameters["weight"] is replaced


def test_what_belongs_to_the_base_stays_its_own(tmp_path) -> None:
    plain, model = fresh(), lora()
    own = {key: value for key, value in model.state_dict().items() if "trimtab" not in key}
    assert list(own) == list(plain.state_dict())
    for key, value in plain.state_dict().items():
        assert torch.equal(own[key], value)
    assert {id(p) for p in model.parameters()} >= {id(m._parameters["weight"]) for m in hosts(model).values()}
    y = model(IDS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(IDS), y)
        twin.load_state_dict({key: value * 0 for key, value in twin.state_dict().items()})
        assert not twin(IDS).any()
        torch.testing.assert_close(model(IDS), y)
    torch.save(model.past.weight, tmp_path / "w.pt")
    torch.testing.assert_close(torch.load(tmp_path / "w.pt"), tt.effective_weight(model, "past"))
    torch.testing.assert_close(copy.deepcopy(model.past.weight), tt.effective_weight(model, "past"))
    assert model.half()(IDS).dtype == torch.float16
    tt.detach(model, "default")
    assert type(model.past) is nn.Linear
    assert type(model.past.weight) is nn.Parameter


def test_rows_with_different_adapters_are_refused_where_a_weight_is_read() -> None:
    model = lora(["past"])
    tt.attach(model, tt.LoRA(rank=2), targets=["past"], name="b")
    moved(model, "b", 7)
    tt.activate(model, "default")
    expected = model(IDS).detach()
    with tt.routed(model, ["default", "default"]):
        torch.testing.assert_close(model(IDS), expected)
    for rows in (["default", "b"], ["default", None]):
        with tt.routed(model, rows), pytest.raises(tt.Unsupported, match="past.weight is read past .* tt.routed"):
            model(IDS)
    with tt.routed(model, [None, None]):
        torch.testing.assert_close(model(IDS), fresh()(IDS))


def test_an_affine_adapter_on_activations_acts_as_its_weight_form() -> None:
    model = fresh()
    tt.attach(model, tt.ParallelAdapter(bottleneck=2, act="none"), targets=["past", "both"])
    moved(model)
    plain = fresh()
    for path in ("past", "both"):
        for tensor in ("weight", "bias"):
            plain.get_submodule(path)._parameters[tensor].data = tt.effective_weight(model, path, tensor=tensor)
    torch.testing.assert_close(model(IDS), plain(IDS))
    y = model(IDS)
    y.pow(2).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in tt.parameters(model))
    tt.merge(model, "default")
    torch.testing.assert_close(model(IDS), y)


@pytest.mark.parametrize("target", ["past", "both", "table"])
def test_an_adapter_without_a_weight_form_is_refused_where_a_weight_is_read(target) -> None:
    model = fresh()
    tt.attach(model, tt.SeriesAdapter(bottleneck=2), targets=[target], check_gradients=False)
    moved(model)
    with pytest.raises(tt.Unsupported, match=rf"{target}\.(weight|bias) is read past the module's forward, where SeriesAdapter"):
        model(IDS)
    assert model.get_submodule(target).weight.dtype == D
    with tt.disabled(model):
        torch.testing.assert_close(model(IDS), fresh()(IDS))


def test_compiled_parents_read_the_adapted_value_and_a_switch_recompiles_nothing() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = lora()
    tt.attach(model, tt.LoRA(rank=2), targets=PLACES, name="b")
    moved(model, "b", 9)
    tt.activate(model, "default")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(IDS), model(IDS))
    compiled(IDS).pow(2).sum().backward()
    seen = counter.frame_count
    tt.activate(model, "b")
    torch.testing.assert_close(compiled(IDS), model(IDS))
    assert counter.frame_count == seen
    with tt.disabled(model):
        torch.testing.assert_close(compiled(IDS), fresh()(IDS))
    torch.testing.assert_close(compiled(IDS), model(IDS))
