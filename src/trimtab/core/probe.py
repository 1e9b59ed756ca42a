"""The table of methods, its capabilities found by trying, not by asking: each is run on small models."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core import registry
from trimtab.core.activation import activate, parameters, routed
from trimtab.core.attach import attach
from trimtab.core.contracts import ActivationAdapter, MethodConfig, TokenAdapter
from trimtab.core.errors import TrimtabError
from trimtab.core.merging import merge, unmerge
from trimtab.core.table import Table

__all__ = ["methods"]

Try = Callable[[registry.MethodEntry], bool]


def methods(*, probe: bool = True) -> Table:
    """One row a registered method: source, default targets, and what it can do, tried on small models.

    Columns ``linear`` to ``experts`` say whether the method trains at that kind of place, ``branch`` whether it acts on a whole
    attention or feed-forward, ``tokens`` whether it is learned tokens in a stack of blocks, ``merges`` whether a merge keeps the
    output, ``routes`` whether rows of a batch can have different adapters, ``identity`` whether it starts at the base,
    ``needs W`` whether its fast path reads the dense weight (so that a quantised base is dequantised each step).

    Args:
        probe: False leaves the tried columns out; the table is then immediate.
    """
    tried = (
        {
            "identity": _identity,
            "linear": _on(_linear),
            "conv": _on(_conv),
            "embedding": _on(_embedding),
            "packed": _on(_packed),
            "experts": _on(_experts),
            "branch": _branch,
            "tokens": _tokens,
            "bf16": _bf16,
            "merges": _merges,
            "routes": _routes,
        }
        if probe
        else {}
    )
    table = Table(("method", "paper", "targets", *tried, "needs W", "summary"), title="methods", limit=200)
    for entry in registry.entries():
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = [_attempt(test, entry) for test in tried.values()]
        needs = getattr(entry.adapter, "needs_weight", False)
        table.add(entry.name, entry.paper, entry.adapter.targets, *found, bool(needs), entry.summary)
    return table


def _attempt(test: Try, entry: registry.MethodEntry) -> bool:
    """A capability is absent only if the method itself says so; any other exception is a bug and must surface."""
    try:
        return test(entry)
    except TrimtabError:
        return False


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,eoi->...o", x, self.up_proj)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


def _linear() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), torch.randn(2, 4, 8)


def _conv() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv2d(2, 8, 2)), torch.randn(2, 2, 4, 4)


def _embedding() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Embedding(8, 8)), torch.randint(0, 8, (2, 4))


def _packed() -> tuple[nn.Module, Tensor]:
    return _Attention(), torch.randn(2, 4, 8)


def _experts() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(_Experts()), torch.randn(2, 4, 8)


def _blocks() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 3, 8)


def _home(entry: registry.MethodEntry) -> Callable[[], tuple[nn.Module, Tensor]]:
    """Where a method of its contract acts."""
    return _blocks if issubclass(entry.adapter, TokenAdapter) else _linear


def _attached(
    entry: registry.MethodEntry,
    build: Callable[[], tuple[nn.Module, Tensor]],
    *,
    dtype: torch.dtype = torch.float32,
    names: tuple[str, ...] = ("probe",),
    moved: bool = True,
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = build()
    model = model.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    config = entry.config(**(entry.tests[0] if entry.tests else {}))
    own = entry.adapter.tensors is not None
    # the first child, or whatever the method's own default finds in it
    outer = lambda path, module: "." not in path and path != "" and not isinstance(module, nn.LayerNorm)  # noqa: E731
    targets = None if own or build is _blocks else outer
    _prepare(model, config, targets)
    for name in names:
        attach(model, config, targets=targets, name=name, loss=lambda m: m(x).float().pow(2).sum())
        with torch.no_grad():
            for p in parameters(model, name):
                p.add_(torch.randn_like(p) * 0.05 * moved)
    return model, x


def _prepare(model: nn.Module, config: MethodConfig, targets: Any) -> None:
    """Put on, inactive, the adapters that the method needs beside it."""
    needs = config.adapter_class.needs(config)
    for name in needs:
        attach(model, registry.get("SeriesAdapter")(bottleneck=2, init="bert"), targets=targets, name=name, trainable=False)
    if needs:
        activate(model)


def _on(build: Callable[[], tuple[nn.Module, Tensor]]) -> Try:
    def trains(entry: registry.MethodEntry) -> bool:
        model, x = _attached(entry, build)
        model(x).pow(2).sum().backward()
        return all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in parameters(model))

    return trains


def _branch(entry: registry.MethodEntry) -> bool:
    if not issubclass(entry.adapter, ActivationAdapter):
        return False
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    config = entry.config(**(entry.tests[0] if entry.tests else {}))
    _prepare(model, config, "mlp")
    attach(model, config, targets="mlp")
    model(torch.randn(2, 4, 8)).pow(2).sum().backward()
    return all(p.grad is not None for p in parameters(model))


def _tokens(entry: registry.MethodEntry) -> bool:
    return issubclass(entry.adapter, TokenAdapter) and _on(_blocks)(entry)


def _bf16(entry: registry.MethodEntry) -> bool:
    model, x = _attached(entry, _home(entry), dtype=torch.bfloat16)
    y = model(x)
    y.float().pow(2).sum().backward()
    return y.dtype == torch.bfloat16 and all(bool(torch.isfinite(p.grad).all()) for p in parameters(model))


def _identity(entry: registry.MethodEntry) -> bool:
    model, x = _attached(entry, _home(entry), moved=False)
    torch.manual_seed(0)
    base, _ = _home(entry)()
    return torch.allclose(model(x), base(x), atol=1e-5)


def _merges(entry: registry.MethodEntry) -> bool:
    model, x = _attached(entry, _linear)
    model.eval()
    before, weight = model(x), model[0]._parameters["weight"].clone()
    merge(model, "probe")
    same = torch.allclose(model(x), before, atol=1e-4)
    unmerge(model, "probe")
    return same and torch.equal(model[0]._parameters["weight"], weight)


def _routes(entry: registry.MethodEntry) -> bool:
    model, x = _attached(entry, _home(entry), names=("a", "b"))
    model.eval()
    with torch.no_grad(), routed(model, ["b", None]):
        return model(x).shape[0] == 2
