"""Convolutions whose forward is not the known one: transposed ones, subclasses with a forward of their own, bare kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.core import registry
from trimtab.core.contracts import Reparameterization

D = torch.float64


class Standardised(nn.Conv2d):
    """A convolution of a standardised kernel, as in ResNetV2."""

    def forward(self, x: Tensor) -> Tensor:
        W = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, W, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Causal(nn.Conv1d):
    """A convolution that pads on the left."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(F.pad(x, (2, 0)), self.weight, self.bias, groups=self.groups)


PLACES = {
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5)),
    "transposed 1d, two groups": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, stride=2), (2, 4, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 5)),
    "transposed 2d, four groups": (lambda: nn.ConvTranspose2d(4, 8, 2, groups=4), (2, 4, 3, 3)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, 2), (2, 4, 3, 3, 3)),
    "standardised": (lambda: Standardised(4, 6, 3), (2, 4, 5, 5)),
    "causal": (lambda: Causal(4, 6, 3), (2, 4, 5)),
    "causal, two groups": (lambda: Causal(4, 6, 3, groups=2), (2, 4, 5)),
}


def rows(module: nn.Module) -> Tensor:
    """The kernel with a row an output channel, by hand."""
    W, groups = module._parameters["weight"].detach(), module.groups
    if not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return W.reshape(len(W), -1)
    size = len(W) // groups
    return torch.cat([W[g * size : (g + 1) * size].transpose(0, 1).reshape(W.shape[1], -1) for g in range(groups)])


def kernel(module: nn.Module, matrix: Tensor) -> Tensor:
    """The inverse of ``rows``."""
    W, groups = module._parameters["weight"], module.groups
    if not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return matrix.reshape(W.shape)
    parts = matrix.chunk(groups)
    return torch.cat([part.reshape(W.shape[1], len(W) // groups, *W.shape[2:]).transpose(0, 1) for part in parts])


def configs() -> list:
    found = []
    for entry in registry.entries():
        if issubclass(entry.adapter, Reparameterization) and entry.adapter.__module__.startswith("trimtab."):
            variant = (entry.tests or ({},))[0]
            found.append(pytest.param(entry.config(**variant), id=entry.name))
    return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("config", configs())
def test_every_method_acts_on_the_matrix_of_output_channels(config, place) -> None:
    make, shape = PLACES[place]
    torch.manual_seed(0)
    model, x = nn.Sequential(make()).to(D), torch.randn(shape, dtype=D)
    more = {"loss": lambda m: m(x).pow(2).sum()} if type(config).adapter_class.wants(config) else {}
    try:
        tt.attach(model, config, targets=["0"], rng=torch.Generator().manual_seed(1), **more)
    except tt.TrimtabError as error:
        pytest.skip(str(error))
    with torch.no_grad():
        for p in tt.parameters(model):
            p.add_(torch.randn_like(p) * 0.1)
    adapters = {a.site.tensor: a for a in model._trimtab_state.groups["default"].adapters}
    values = {}
    if "weight" in adapters:
        values["0.weight"] = kernel(model[0], adapters["weight"].weight(rows(model[0])))
        assert tuple(tt.effective_weight(model, "0").shape) == tuple(rows(model[0]).shape)
    bias = model[0]._parameters["bias"]
    if "bias" in adapters:
        values["0.bias"] = adapters["bias"].weight(bias.detach())
    elif adapters["weight"].rebias and bias is not None:
        values["0.bias"] = adapters["weight"].bias(bias.detach())
    torch.manual_seed(0)
    expected = torch.func.functional_call(nn.Sequential(make()).to(D), values, (x,))
    y = model(x)
    torch.testing.assert_close(y, expected)
    learns = [p for p in tt.parameters(model) if p.requires_grad]
    mine = torch.autograd.grad(y.pow(2).sum(), learns, allow_unused=True)
    for a, b in zip(mine, torch.autograd.grad(expected.pow(2).sum(), learns, allow_unused=True), strict=True):
        torch.testing.assert_close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b)
    tt.merge(model, "default", max_error=1e-6)
    torch.testing.assert_close(model(x), y)
