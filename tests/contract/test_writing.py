"""A model may write to what a layer gives it, and to a view of it: ``nn.ReLU(inplace=True)``, ``self.l(x).view(...).mul_(...)``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contract_cases import Case, cases
from torch import Tensor, nn

import trimtab as tt

KINDS = ("linear", "Conv1D", "conv2d", "grouped", "embedding", "fused", "fused part", "packed", "whole mlp")
ALL = [p for p in cases() if p.values[0].kind.name in KINDS]


def written(y: Tensor) -> Tensor:
    y.mul_(1.5)
    y.view(-1).add_(0.25)
    return y.relu_()


def plain(y: Tensor) -> Tensor:
    return (y * 1.5 + 0.25).relu()


def hooked(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    def hook(module: nn.Module, args: tuple, y: object) -> object:
        return change(y.contiguous()) if isinstance(y, Tensor) else (change(y[0].contiguous()), *y[1:])

    adapters = [a for group in model.__dict__["_trimtab_state"].groups.values() for a in group.adapters]
    for module in {id(a.site.module): a.site.module for a in adapters}.values():
        module.register_forward_hook(hook)


@pytest.mark.parametrize("case", ALL)
def test_what_a_layer_gives_may_be_written_to(case: Case) -> None:
    found = []
    for change in (plain, written):
        model, x = case.model(torch.float64), case.inputs(torch.float64)
        x = x.requires_grad_(True) if x.is_floating_point() else x
        case.attach(model)
        hooked(model, change)
        y = model(x)
        y.pow(2).sum().backward()
        found.append([y, x.grad, *(p.grad for p in tt.parameters(model))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b)
