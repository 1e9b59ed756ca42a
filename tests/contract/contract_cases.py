"""Small models, one a kind of place, and the matrix of methods, kinds and dtypes that the contract suite runs over."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.core import registry
from trimtab.core.errors import TrimtabError

BATCH, TOKENS, WIDTH = 3, 4, 12


class Conv1D(nn.Module):
    """transformers' Conv1D, by structure: weight (in, out), attribute nf."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.3)
        self.bias = nn.Parameter(torch.randn(nf) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], self.nf)


class Attention(nn.Module):
    """Attention over a fused qkv projection."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = (z.reshape(n, t, self.num_heads, -1).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, 2)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(width, 16))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(16, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Fused(nn.Module):
    """Two timm-like blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(WIDTH), Block(WIDTH)])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Spread(nn.Module):
    """torch's encoder, norms in front: packed attention, and feed-forwards that are no module of their own."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class Packed(nn.Module):
    """nn.MultiheadAttention, whose projections are a packed parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.out = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attn(x, x, x, need_weights=False)[0])


class Experts(nn.Module):
    """A bank of experts as 3-d parameters (experts, out, in)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 16, WIDTH) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(3, WIDTH, 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("ntd,efd->entf", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("entf,edf->ntd", F.silu(gate) * up, self.down_proj)


class Bank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.out = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.experts(x))


class Convolutions(nn.Module):
    def __init__(self, dims: int, groups: int = 1) -> None:
        super().__init__()
        cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.first = cls(4, 8, 3, padding=1, groups=groups, stride=2, padding_mode="circular" if dims == 2 else "zeros")
        self.second = cls(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)))


class Plain(nn.Module):
    """Linear layers with and without a bias, a norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 16)
        self.norm = nn.LayerNorm(16)
        self.down = nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.norm(self.up(x))))


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH, padding_idx=0)
        self.out = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x))


def _sequence(dtype: torch.dtype) -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, dtype=dtype)


@dataclass(frozen=True)
class Kind:
    """A kind of place: a model, its input, and where to attach.

    Attributes:
        targets: names of matrices; ``tensors`` methods (norms, biases) use their own default.
        routes: whether rows of a batch can be told apart there.
        whole: whether the targets are whole modules, for methods that act on activations.
    """

    name: str
    build: object
    inputs: object
    targets: tuple[str, ...]
    routes: bool = True
    whole: bool = False


KINDS = (
    Kind("linear", Plain, _sequence, ("up", "down")),
    Kind("conv1d", lambda: Convolutions(1), lambda d: torch.randn(BATCH, 4, 9, dtype=d), ("first", "second")),
    Kind("conv2d", lambda: Convolutions(2), lambda d: torch.randn(BATCH, 4, 6, 6, dtype=d), ("first", "second")),
    Kind("conv3d", lambda: Convolutions(3), lambda d: torch.randn(BATCH, 4, 4, 4, 4, dtype=d), ("first",)),
    Kind("grouped", lambda: Convolutions(2, groups=2), lambda d: torch.randn(BATCH, 4, 6, 6, dtype=d), ("first",)),
    Kind("Conv1D", lambda: nn.Sequential(Conv1D(16, WIDTH), nn.GELU(), Conv1D(8, 16)), _sequence, ("0", "2")),
    Kind("embedding", Embedded, lambda d: torch.randint(0, 20, (BATCH, TOKENS)), ("embed",)),
    Kind("packed", Packed, _sequence, ("attn",), routes=False),
    Kind("packed part", Packed, _sequence, ("attn.q", "attn.v"), routes=False),
    Kind("fused", Fused, _sequence, ("attn.qkv",)),
    Kind("fused part", Fused, _sequence, ("attn.q", "attn.v", "mlp.down")),
    Kind("bank", Bank, _sequence, ("experts",), routes=False),
    Kind("whole attn", Fused, _sequence, ("attn",), whole=True),
    Kind("whole mlp", Fused, _sequence, ("mlp",), whole=True),
    Kind("spread mlp", Spread, _sequence, ("mlp",), whole=True),
    Kind("block", Fused, _sequence, ("block",), whole=True),
)
BY_NAME = {kind.name: kind for kind in KINDS}


@dataclass(frozen=True)
class Case:
    """One method variant at one kind of place."""

    config: tt.MethodConfig
    kind: Kind
    targets: tuple[str, ...] | None

    @property
    def adapter(self) -> type:
        return type(self.config).adapter_class

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.kind.build().to(dtype)

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        torch.manual_seed(seed)
        return self.kind.inputs(dtype)

    def attach(self, model: nn.Module, *, name: str = "default", seed: int = 2, moved: bool = True, **more: object) -> None:
        """Attach; ``moved`` takes the parameters a random step away from their start."""
        more.setdefault("targets", list(self.targets) if self.targets else None)
        self.prepare(model)
        if self.adapter.wants(self.config):
            x = self.inputs(next(model.parameters()).dtype)
            more["loss"] = lambda m: m(x).float().pow(2).sum()
        tt.attach(model, self.config, name=name, rng=torch.Generator().manual_seed(seed), **more)
        if moved:
            move(model, name, seed)


    def prepare(self, model: nn.Module) -> None:
        """Put the adapters on that the method needs: frozen, inactive, equal at every call."""
        state = model.__dict__.get("_trimtab_state")
        before, there = (state.active, state.groups) if state else ((), {})
        for seed, name in enumerate(self.adapter.needs(self.config)):
            if name not in there:
                rng = torch.Generator().manual_seed(seed)
                series = tt.SeriesAdapter(bottleneck=2, init="bert")
                tt.attach(model, series, targets=list(self.targets), name=name, rng=rng)
                move(model, name, seed)
                state = model.__dict__["_trimtab_state"]
                state.groups[name].trainable = False
                for p in tt.parameters(model, name):
                    p.requires_grad_(False)
                tt.activate(model, *before)

    def detach(self, model: nn.Module, name: str = "default") -> None:
        """Take ``name`` off, and what ``prepare`` put on."""
        tt.detach(model, name)
        for needed in self.adapter.needs(self.config):
            tt.detach(model, needed)


def move(model: nn.Module, name: str, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tt.parameters(model, name):
            p.add_(torch.randn(p.shape, generator=rng).to(p) * 0.1)


def fits(config: tt.MethodConfig, kind: Kind, targets: tuple[str, ...] | None) -> bool:
    """Whether the method says that it applies there: a dry run, which must refuse with one of trimtab's own errors."""
    torch.manual_seed(0)
    if kind.whole and not issubclass(type(config).adapter_class, tt.ActivationAdapter):
        return False
    try:
        model = kind.build()
        Case(config, kind, targets).prepare(model)
        tt.attach(model, config, targets=list(targets) if targets else None, dry_run=True)
    except TrimtabError:
        return False
    return True


def cases() -> list:
    found = []
    for entry in registry.entries():
        if not entry.adapter.__module__.startswith("trimtab."):
            continue  # methods of other test files
        own = entry.adapter.tensors is not None
        for variant in entry.tests or ({},):
            config = entry.config(**variant)
            for kind in KINDS:
                targets = None if own else kind.targets
                if fits(config, kind, targets):
                    label = ",".join(f"{k}={v}" for k, v in variant.items())
                    found.append(pytest.param(Case(config, kind, targets), id=f"{entry.name}({label})-{kind.name}"))
    return found


def weight_cases() -> list:
    """Cases of methods that state ``weight``."""
    return [p for p in cases() if issubclass(p.values[0].adapter, tt.Reparameterization)]


__all__ = ["BATCH", "BY_NAME", "KINDS", "Case", "Fused", "Spread", "cases", "fits", "move", "weight_cases"]
