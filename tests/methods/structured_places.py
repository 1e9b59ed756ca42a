"""Places and measures for the tests of the structured methods (LoHa, LoKr, OFT, BOFT, FourierFT, MiSS, Bone)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.core.contracts import MethodConfig, Reparameterization
from trimtab.core.kinds import LinearSite
from trimtab.core.site import Operation

LLAMA = (((3072, 3072), 28), ((1024, 3072), 28))  # q and v of Llama-3.2-3B: (out, in) and how many


def site(module: nn.Linear, *, dtype: torch.dtype | None = None, meta: bool = False) -> LinearSite:
    """The place of a frozen Linear."""
    module.requires_grad_(False)
    W = module.weight
    return LinearSite(
        module=module, path="fc", tensor="weight", shape=tuple(W.shape), dtype=W.dtype,
        adapter_dtype=dtype or W.dtype, device=torch.device("meta") if meta else W.device,
    )


def build(config: MethodConfig, place: LinearSite, *, seed: int = 0, move: float = 0.1) -> Reparameterization:
    """The config's adapter at ``place``, its parameters a random step of size ``move`` away from their start."""
    cls = type(config).adapter_class
    cls.check(config, place)
    rng = torch.Generator().manual_seed(seed)
    adapter = cls(config, place, rng=rng)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(move * torch.randn(p.shape, generator=rng).to(p))
    return adapter


def layer(out: int, fan_in: int, *, bias: bool = True, dtype: torch.dtype = torch.float64, seed: int = 1) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(fan_in, out, bias=bias, dtype=dtype)


def count(config: MethodConfig, shapes: tuple = LLAMA) -> int:
    """Trainable numbers of ``config`` on places of these shapes, built without values."""
    total = 0
    for (out, fan_in), copies in shapes:
        place = site(nn.Linear(fan_in, out, bias=False, device="meta"), meta=True)
        adapter = type(config).adapter_class(config, place, rng=torch.Generator())
        assert all(p.is_meta for p in (*adapter.parameters(), *adapter.buffers()))
        total += copies * sum(p.numel() for p in adapter.parameters())
    return total


class Opaque(Operation):
    """A Linear that offers no dense matrix, as a quantised or an adapted base does."""

    kind = "linear"

    def __init__(self, place: LinearSite):
        self.place, self.out_features, self.in_features = place, place.out_features, place.in_features

    def __call__(self, x: Tensor) -> Tensor:
        return self.place(x)

    @property
    def weight(self) -> Tensor:
        return self.place.weight

    @property
    def bias(self) -> Tensor | None:
        return self.place.bias

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.place.apply(x, weight)

    def project(self, x: Tensor, a: Tensor) -> Tensor:
        return self.place.project(x, a)

    def emit(self, u: Tensor) -> Tensor:
        return u


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    return list(torch.autograd.grad(y, inputs, seed))


def assert_law(adapter: Reparameterization, base: Operation, *, tokens: tuple[int, ...] = (3, 5), atol: float = 1e-10) -> None:
    """``forward(x)`` is the base operation with ``weight(W)`` (and ``bias(b)``), in value and in every gradient."""
    torch.manual_seed(3)
    x = torch.randn(*tokens, base.in_features, dtype=base.weight.dtype, requires_grad=True)
    inputs = [x, *adapter.parameters()]
    fast, definition = adapter(x, base), adapter.derived(x, base)
    assert fast.dtype == definition.dtype
    torch.testing.assert_close(fast, definition, atol=atol, rtol=atol)
    for got, want in zip(gradients(fast, inputs), gradients(definition, inputs), strict=True):
        torch.testing.assert_close(got, want, atol=atol, rtol=atol)


def saved_bytes(run, *constants: Tensor) -> int:
    """Bytes of distinct storages that autograd keeps while ``run()`` is differentiated, ``constants`` (parameters) left out."""
    own = {c.untyped_storage().data_ptr() for c in constants}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    del y
    return total
