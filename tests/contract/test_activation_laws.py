"""The laws of activation adapters, for every registered one at every place: matrices' outputs, whole branches, blocks."""

from __future__ import annotations

import pytest
import torch
from contract_cases import WIDTH, Case, Fused, Kind, cases, fits, move
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import trimtab as tt
from trimtab.core.account import saved_bytes

D = torch.float64
ACTIVATION = [p for p in cases() if issubclass(p.values[0].adapter, tt.ActivationAdapter)]
TRANSFORMERS = [p for p in ACTIVATION if p.values[0].kind.name in ("fused", "whole attn", "whole mlp", "spread mlp", "block")]
LINEAR = [p for p in ACTIVATION if p.values[0].kind.name in ("linear", "Conv1D", "whole mlp")]


def group(model: nn.Module, name: str = "default") -> list:
    return model.__dict__["_trimtab_state"].groups[name].adapters


def clean(model: nn.Module) -> bool:
    """Whether no module still holds what it was handed in a forward."""
    return not any(m.fed for m in model.modules() if hasattr(m, "fed"))


@pytest.mark.parametrize("case", ACTIVATION)
def test_the_module_gives_forward_of_its_input_and_output(case: Case) -> None:
    """Hooks on an unadapted twin that apply each adapter where its site says are the definition."""
    model, twin, x = case.model(D).eval(), case.model(D).eval(), case.inputs(D)
    case.attach(model)
    seen = {}
    for adapter in group(model):
        site = adapter.site
        module = twin.get_submodule(site.path)
        if site.source_path is not None:
            source = twin.get_submodule(site.source_path)
            source.register_forward_pre_hook(lambda m, args, path=site.source_path: seen.update({path: args[0]}))
        if adapter.at_input:
            module.register_forward_pre_hook(lambda m, args, a=adapter: (a(args[0], args[0]), *args[1:]))
            continue

        def change(m: nn.Module, args: tuple, y, a=adapter):
            first = y if isinstance(y, Tensor) else y[0]
            new = a(seen.get(a.site.source_path, args[0]), first)
            assert new.shape == first.shape and new.dtype == first.dtype
            return new if isinstance(y, Tensor) else (new, *y[1:])

        module.register_forward_hook(change)
    torch.testing.assert_close(model(x), twin(x))
    assert clean(model)


@pytest.mark.parametrize("case", ACTIVATION)
def test_function_transforms_give_the_same_value_and_gradients(case: Case) -> None:
    """Kernels against the plain composition of torch operations, which is what runs inside of transforms."""
    model, x = case.model(D), case.inputs(D)
    case.attach(model)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inputs = {"x": x} if x.is_floating_point() else {}

    def loss(params: dict, inputs: dict) -> Tensor:
        return functional_call(model, params, (inputs.get("x", x),)).square().mean()

    want, value = grad_and_value(loss, argnums=(0, 1))({k: v.detach() for k, v in params.items()}, inputs)
    if inputs:
        inputs = {"x": x.clone().requires_grad_()}
    ours = loss(params, inputs)
    got = torch.autograd.grad(ours, [*params.values(), *inputs.values()])
    torch.testing.assert_close(ours, value)
    for (name, w), g in zip([*want[0].items(), *want[1].items()], got, strict=True):
        torch.testing.assert_close(g, w, msg=lambda text, name=name: f"{name}: {text}")


class Wide(Fused):
    """Wide enough for a thin hidden activation to be thin."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        block = lambda: nn.TransformerEncoderLayer(64, 2, 128, 0.0, batch_first=True, norm_first=True)  # noqa: E731
        self.blocks = nn.ModuleList([block(), block()])
        self.head = nn.Linear(64, 64)


def elsewhere(among: str, build: type, inputs, *places: tuple[str, ...]) -> list:
    """The variants that act at places of kind ``among``, at those ``places`` of another model that they say they act at."""
    return [
        pytest.param(Case(config, kind, targets), id=f"{p.id.rpartition('-')[0]}-{targets[0]}")
        for p in ACTIVATION
        if p.values[0].kind.name == among
        for targets in places
        if fits(config := p.values[0].config, kind := Kind("elsewhere", build, inputs, targets), targets)
    ]


WIDE = elsewhere("linear", Wide, lambda d: torch.randn(3, 4, 64, dtype=d), ("mlp.down",), ("mlp",))


@pytest.mark.parametrize("case", WIDE)
def test_keeps_one_activation_a_place_and_what_is_thin(case: Case) -> None:
    """Beyond what the frozen model keeps: the tensor that is read, once, and a quarter of it."""
    model = case.model()
    case.attach(model)
    x = case.inputs().requires_grad_()
    with saved_bytes(model, beside=(x,)) as adapted:
        model(x)
    with tt.disabled(model), saved_bytes(model, beside=(x,)) as floor:
        model(x)
    widest = max(max(adapter.site.shape) for adapter in group(model))
    reads = case.adapter.reads(case.config)
    read = {"output": 64, "residual": 64}.get(reads, widest)
    budget = len(group(model)) * x[..., 0].numel() * read * x.element_size()
    assert adapted.total - floor.total <= 1.25 * budget


@pytest.mark.parametrize("case", LINEAR)
def test_affine_adapters_merge_and_others_refuse(case: Case) -> None:
    model, x = case.model(D).eval(), case.inputs(D)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    case.attach(model)
    adapted = model(x).detach()
    path = group(model)[0].site.path
    affine = all(a.merges(a.config, a.site) and hasattr(a.site.module, "weight") and not a.site.source for a in group(model))
    if not affine:
        with pytest.raises(tt.NotMergeable, match="activations"):
            tt.merge(model, "default")
        with pytest.raises(tt.Unsupported, match="activations"):
            tt.effective_weight(model, path, name="default")
        torch.testing.assert_close(model(x), adapted, atol=0, rtol=0)
    else:
        weight = tt.effective_weight(model, path, name="default")
        tt.merge(model, "default")
        torch.testing.assert_close(model(x), adapted)
        torch.testing.assert_close(tt.effective_weight(model, path), weight)
        tt.unmerge(model, "default")
        torch.testing.assert_close(model(x), adapted)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("case", [p for p in LINEAR if p.values[0].kind.name == "linear"])
def test_affine_adapters_compose_with_a_low_rank_update(case: Case) -> None:
    """On one Linear, what acts on the output comes after what changes the matrix, attached in either order."""
    for order in (("lora", "default"), ("default", "lora")):
        model, x = case.model(D).eval(), case.inputs(D)
        for name in order:
            if name == "lora":
                tt.attach(model, tt.LoRA(rank=2), targets=list(case.targets), name="lora")
                move(model, "lora", 5)
            else:
                case.attach(model)
        out = model(x).detach()
        adapter = group(model)[0]
        if not adapter.merges(adapter.config, adapter.site):
            return
        for a in group(model):
            weight = tt.effective_weight(model, a.site.path, name=("default", "lora"))
            bias = a.bias(a.site.module._parameters["bias"])
            linear = case.model(D).get_submodule(a.site.path)
            linear.weight.data, linear.bias = weight, None if bias is None else nn.Parameter(bias.detach())
            z = torch.randn(3, a.site.in_features, dtype=D)
            torch.testing.assert_close(linear(z), a.site.module(z))
        tt.merge(model, "lora")
        tt.merge(model, "default")
        torch.testing.assert_close(model(x), out)
        tt.unmerge(model, "default")
        tt.unmerge(model, "lora")
        torch.testing.assert_close(model(x), out)


class MaskedAttention(nn.Module):
    """Attention whose second argument has rows, as a padding mask has; returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, hidden_states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (p(hidden_states) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)), mask


class MaskedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.self_attn = MaskedAttention()
        self.mlp = nn.Sequential()
        for name, module in (("fc1", nn.Linear(WIDTH, 16)), ("act", nn.GELU()), ("fc2", nn.Linear(16, WIDTH))):
            self.mlp.add_module(name, module)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(hidden_states=self.norm1(x), mask=mask)[0]
        return x + self.mlp(self.norm2(x))


class Masked(nn.Module):
    """A mask a row; a layer that is checkpointed by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([MaskedBlock(), MaskedBlock()])
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(x.shape[1], device=x.device)
        lengths = (x[:, 0, 0] > 0).long() + 2  # depends on the row alone
        mask = (rows[None, None, :] < lengths[:, None, None]).expand(-1, x.shape[1], -1)
        for block in self.blocks:
            x = checkpoint(block, x, mask, use_reentrant=False) if self.checkpointing else block(x, mask)
        return x


MASKED = elsewhere("whole mlp", Masked, lambda d: torch.randn(3, 4, WIDTH, dtype=d), ("attn", "mlp"), ("block",))


@pytest.mark.parametrize("case", MASKED)
def test_routed_rows_keep_their_own_masks(case: Case) -> None:
    model, x = case.model(D).eval(), case.inputs(D)
    case.attach(model, name="a", seed=2)
    case.attach(model, name="b", seed=3)
    expected = []
    for row, names in enumerate((["b"], [], ["a"])):
        tt.activate(model, *names)
        expected.append(model(x[row : row + 1]))
    with tt.routed(model, ["b", None, "a"]):
        torch.testing.assert_close(model(x), torch.cat(expected))
    assert clean(model)


@pytest.mark.parametrize("case", MASKED)
def test_checkpointing_block_by_block_gives_the_same_gradients(case: Case) -> None:
    model, x = case.model(D), case.inputs(D)
    case.attach(model)
    model(x).square().sum().backward()
    plain = [p.grad.clone() for p in tt.parameters(model)]
    model.zero_grad()
    model.checkpointing = True
    model(x).square().sum().backward()
    for p, g in zip(tt.parameters(model), plain, strict=True):
        torch.testing.assert_close(p.grad, g)
    assert clean(model)


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_nothing_but_the_adapter_gets_a_gradient(case: Case) -> None:
    model, x = case.model(), case.inputs()
    case.attach(model)
    model(x).square().sum().backward()
    learning = {id(p) for p in tt.parameters(model)}
    assert {id(p) for p in model.parameters() if p.grad is not None} == learning
