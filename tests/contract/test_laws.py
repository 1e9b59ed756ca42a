"""The laws of design section 2, for every registered method at every kind of place that it applies to."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from contract_cases import BATCH, Case, cases, weight_cases
from torch import nn
from torch.utils.checkpoint import checkpoint

import trimtab as tt
from trimtab.core.contracts import Selection
from trimtab.core.host import CHILD, on_tensors
from trimtab.core.kinds import Through

ALL = cases()
WEIGHT = weight_cases()
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 6e-2}


def close(a: torch.Tensor, b: torch.Tensor, *, slack: float = 1.0, computed: torch.dtype | None = None) -> None:
    """Relative to the largest entry: layers downstream mix entries of all sizes. ``computed``: the dtype of the work."""
    scale = max(1.0, b.detach().abs().max().item())
    tolerance = TOLERANCE[computed or min((a.dtype, b.dtype), key=lambda d: torch.finfo(d).bits)] * slack * scale
    error = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
    assert error <= tolerance, f"error {error:.2e} above {tolerance:.2e}"


@torch.no_grad()
def out(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Output in eval mode, always by the same kernels (some of torch's depend on who requires a gradient)."""
    return model.eval()(x)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def matrix_adapters(model: nn.Module) -> list:
    group = model.__dict__["_trimtab_state"].groups["default"]
    return [a for a in group.adapters if not a.site.substitutes and a.site.part is None]


@pytest.mark.parametrize("case", ALL)
def test_starts_at_the_base(case: Case) -> None:
    model, x = case.model(), case.inputs()
    base = model(x)
    case.attach(model, moved=False)
    if case.adapter.identity(case.config):
        close(model(x), base)
    else:
        assert not torch.allclose(model(x), base)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("case", WEIGHT)
def test_forward_is_the_base_operation_with_the_weight(case: Case, dtype: torch.dtype) -> None:
    """Value and every gradient: input, parameters. The derived form is the definition."""
    model = case.model(dtype)
    case.attach(model)
    for adapter in matrix_adapters(model):
        site = adapter.site
        x = _input(site, dtype)
        fast = adapter.run(x, site)
        definition = adapter.derived(x, site)
        close(fast, definition)
        assert fast.dtype == definition.dtype == dtype
        seed = torch.randn(fast.shape, generator=torch.Generator().manual_seed(5)).to(fast.dtype)
        inputs = [p for p in adapter.parameters()] + ([x] if x.is_floating_point() else [])
        got = torch.autograd.grad(fast, inputs, seed, allow_unused=True)
        want = torch.autograd.grad(definition, inputs, seed, allow_unused=True)
        for g, w, p in zip(got, want, inputs, strict=True):
            w = torch.zeros_like(p) if w is None else w
            close(torch.zeros_like(p) if g is None else g, w, slack=2.0, computed=dtype)


def _input(site, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(4)
    if site.kind == "embedding":
        return torch.randint(0, site.in_features, (BATCH, 4))
    if site.kind in ("conv", "grouped"):
        spatial = (6,) * len(site.module.kernel_size)
        return torch.randn(BATCH, site.module.in_channels, *spatial, dtype=dtype, requires_grad=True)
    return torch.randn(BATCH, 4, site.in_features, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("case", WEIGHT)
def test_module_output_is_that_of_a_base_with_the_effective_weights(case: Case) -> None:
    model, x = case.model(torch.float64), case.inputs(torch.float64)
    case.attach(model)
    plain = case.model(torch.float64)
    group = model.__dict__["_trimtab_state"].groups["default"]
    sites = [each.site for adapter in group.adapters for each in on_tensors(adapter)]
    for site in {(site.path, site.tensor): site for site in sites}.values():
        dense = tt.effective_weight(model, site.path, tensor=site.tensor)
        module = plain.get_submodule(site.path)
        value = site.unmatrix(dense)
        if module._parameters[site.tensor] is None:  # a bias for a module that had none
            module._parameters[site.tensor] = nn.Parameter(value.to(torch.float64))
        with torch.no_grad():
            module._parameters[site.tensor].copy_(value.reshape(module._parameters[site.tensor].shape))
    close(model(x), plain(x))


@pytest.mark.parametrize("case", WEIGHT)
def test_merge_keeps_the_output_and_unmerge_the_bytes(case: Case) -> None:
    model, x = case.model().eval(), case.inputs()
    before = snapshot(model)
    pointers = {key: value.data_ptr() for key, value in model.state_dict().items()}
    case.attach(model)
    adapted = model(x)
    report = tt.merge(model, "default")
    close(model(x), adapted)
    assert all(row["output error"] < 1e-5 for row in report)
    tt.unmerge(model, "default")
    close(model(x), adapted)
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value)
        assert model.state_dict()[key].data_ptr() == pointers[key]


@pytest.mark.parametrize("case", [p for p in WEIGHT if "linear" in p.id.split("-")[-1]])
def test_many_rounds_in_bf16_leave_the_base_alone(case: Case) -> None:
    model = case.model(torch.bfloat16)
    before = snapshot(model)
    case.attach(model)
    for _ in range(5):
        tt.merge(model, "default")
        tt.unmerge(model, "default")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("case", ALL)
def test_state_dict_is_the_bases_plus_the_adapters(case: Case) -> None:
    model = case.model()
    before, kinds = snapshot(model), {path: type(m) for path, m in model.named_modules()}
    order, flags = list(before), {n: p.requires_grad for n, p in model.named_parameters()}
    pointers = {key: value.data_ptr() for key, value in model.state_dict().items()}
    case.attach(model)
    after = model.state_dict()
    for key in before:
        assert torch.equal(after[key], before[key])
        assert after[key].data_ptr() == pointers[key]
    assert all(f".{CHILD}." in f".{key}" for key in after if key not in before)
    for path, cls in kinds.items():
        assert isinstance(model.get_submodule(path), cls)
        assert type(model.get_submodule(path)).__name__ == cls.__name__
    case.detach(model)
    assert list(model.state_dict()) == order
    assert {path: type(m) for path, m in model.named_modules()} == kinds
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not [a for m in model.modules() for a in vars(m) if "trimtab" in a]


@pytest.mark.parametrize("case", ALL)
def test_a_step_trains_exactly_the_adapter(case: Case) -> None:
    model, x = case.model(), case.inputs()
    before = snapshot(model)
    case.attach(model)
    learning = {id(p) for p in tt.parameters(model)}
    assert {id(p) for p in model.parameters() if p.requires_grad} == learning
    start = [p.detach().clone() for p in tt.parameters(model)]
    optimizer = torch.optim.SGD(tt.parameters(model), lr=0.1)
    model(x).pow(2).sum().backward()
    optimizer.step()  # raises GradientMismatch unless exactly the declared parameters have gradients
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert any(not torch.equal(a, b) for a, b in zip(start, tt.parameters(model), strict=True))


@pytest.mark.parametrize("case", ALL)
def test_save_and_load_give_the_same_model(case: Case, tmp_path) -> None:
    model, x = case.model(), case.inputs()
    case.attach(model, name="wave.α lora")
    tt.save(model, tmp_path / "a", name="wave.α lora")
    fresh = case.model()
    case.prepare(fresh)
    alone = None if not case.adapter.needs(case.config) else True  # what it needs stands on the model: say that it acts
    assert tt.load(fresh, tmp_path / "a", active=alone) == "wave.α lora"
    close(out(fresh, x), out(model, x))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in fresh.state_dict().items())
    assert not any(p.requires_grad for p in fresh.parameters())
    ours = {k: v.dtype for k, v in model.state_dict().items()}
    assert {k: v.dtype for k, v in fresh.state_dict().items()} == ours
    base_bytes = sum(v.numel() * v.element_size() for v in case.model().state_dict().values())
    if not issubclass(case.adapter, Selection) and base_bytes > 1e6:
        assert sum(f.stat().st_size for f in (tmp_path / "a").iterdir()) < base_bytes


@pytest.mark.parametrize("case", ALL)
def test_copies_and_pickles_are_whole_and_independent(case: Case) -> None:
    model, x = case.model().eval(), case.inputs()
    case.attach(model)
    expected = out(model, x)
    twin = copy.deepcopy(model)
    stream = io.BytesIO()
    pickle.dump(model, stream)
    thawed = pickle.loads(stream.getvalue())
    for other in (twin, thawed):
        assert torch.equal(out(other, x), expected)
        with tt.disabled(other):
            assert torch.equal(out(other, x), out(case.model(), x))
        with torch.no_grad():
            for p in tt.parameters(other):
                p.add_(1.0)
        assert torch.equal(out(model, x), expected)
        tt.detach(other, "default")
    assert torch.equal(out(model, x), expected)


@pytest.mark.parametrize("case", ALL)
def test_switching_and_disabling(case: Case) -> None:
    model, x = case.model().eval(), case.inputs()
    base = out(model, x)
    case.attach(model, name="a", seed=2)
    only_a = out(model, x)
    case.attach(model, name="b", seed=3)
    tt.activate(model, "b")
    only_b = out(model, x)
    tt.activate(model, "a")
    assert torch.equal(out(model, x), only_a)
    with tt.disabled(model):
        assert torch.equal(out(model, x), base)
    assert torch.equal(out(model, x), only_a)
    tt.activate(model)
    assert torch.equal(out(model, x), base)
    tt.activate(model, "b")
    assert torch.equal(out(model, x), only_b)
    assert all(p.requires_grad for name in "ab" for p in tt.parameters(model, name))
    tt.detach(model, "a")
    assert torch.equal(out(model, x), only_b)


@pytest.mark.parametrize("case", [p for p in WEIGHT if p.values[0].kind.name in ("linear", "conv2d", "embedding", "bank")])
def test_two_adapters_compose_in_order(case: Case) -> None:
    model, x = case.model(torch.float64).eval(), case.inputs(torch.float64)
    case.attach(model, name="a", seed=2)
    case.attach(model, name="b", seed=3)
    group = model.__dict__["_trimtab_state"].groups
    both = model(x)
    for first, second in zip(group["a"].adapters, group["b"].adapters, strict=True):
        want = second.weight(first.weight(first.site.weight))
        if not first.site.substitutes:
            close(Through(second, Through(first, first.site)).weight, want)
        close(tt.effective_weight(model, first.site.path, tensor=first.site.tensor), want)
    tt.merge(model, "a")
    tt.merge(model, "b")
    close(model(x), both)
    tt.unmerge(model, "b")
    tt.unmerge(model, "a")
    close(model(x), both)


@pytest.mark.parametrize("case", [p for p in ALL if p.values[0].kind.routes])
def test_routed_rows_equal_separate_batches(case: Case) -> None:
    model, x = case.model(torch.float64).eval(), case.inputs(torch.float64)
    case.attach(model, name="a", seed=2)
    case.attach(model, name="b", seed=3)
    if any(a.site.substitutes for a in model.__dict__["_trimtab_state"].groups["a"].adapters):
        with pytest.raises(tt.Unsupported, match="share"), tt.routed(model, ["a", None, "b"]):
            pass
        return
    expected = []
    for row, names in enumerate((["b"], [], ["a"])):
        tt.activate(model, *names)
        expected.append(model(x[row : row + 1]))
    with tt.routed(model, ["b", None, "a"]):
        routed = model(x)
    close(routed, torch.cat(expected))
    tt.activate(model, "a")
    close(model(x[2:]), expected[2])


@pytest.mark.parametrize("case", ALL)
def test_gradient_checkpointing_gives_the_same_gradients(case: Case) -> None:
    model, x = case.model(torch.float64), case.inputs(torch.float64)
    case.attach(model)
    model(x).pow(2).sum().backward()
    plain = [p.grad.clone() for p in tt.parameters(model)]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).pow(2).sum().backward()
    for p, g in zip(tt.parameters(model), plain, strict=True):
        close(p.grad, g)


@pytest.mark.parametrize("case", ALL)
def test_autocast(case: Case) -> None:
    model, x = case.model(), case.inputs()
    case.attach(model)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    close(y.to(torch.bfloat16), exact.to(torch.bfloat16), slack=2.0)
    y.float().pow(2).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in tt.parameters(model))


@pytest.mark.parametrize("case", ALL)
def test_half_precision_trains(case: Case) -> None:
    model, x = case.model(torch.bfloat16), case.inputs(torch.bfloat16)
    case.attach(model)
    y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().pow(2).sum().backward()
    for p in tt.parameters(model):
        assert p.dtype == torch.float32
        assert p.grad.dtype == torch.float32
        assert torch.isfinite(p.grad).all()


COMPILED = ("linear", "fused part", "packed", "conv2d", "whole mlp", "spread mlp")


@pytest.mark.slow
@pytest.mark.parametrize("case", [p for p in ALL if p.values[0].kind.name in COMPILED])
def test_fullgraph_compile_without_recompiling_on_a_switch(case: Case) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, x = case.model(), case.inputs()
    case.attach(model, name="a", seed=2)
    case.attach(model, name="b", seed=3)
    tt.activate(model, "a")
    eager = model(x)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    close(compiled(x), eager)
    compiled(x).pow(2).sum().backward()
    seen = counter.frame_count
    tt.activate(model, "b")
    close(compiled(x), model(x))
    tt.activate(model, "a")
    close(compiled(x), eager)
    shapes = [[p.shape for p in tt.parameters(model, name)] for name in "ab"]
    if shapes[0] == shapes[1]:  # a method whose sizes the data chooses may have given the second adapter others
        assert counter.frame_count == seen, "switching between adapters of one shape compiled something"
