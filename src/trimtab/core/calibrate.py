"""Gradients of base weights, and activations, on sample data, for methods that start from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from trimtab.core.errors import Unsupported
from trimtab.core.site import Site, is_quantised

__all__ = ["site_activations", "site_gradients"]


def site_gradients(
    model: nn.Module, sites: list[Site], loss: Callable[[nn.Module], Tensor | Iterable[Tensor]], powers: list[int] | None = None
) -> list[Site]:
    """Set ``site.gradient``: the sum over batches of ``(dL/dW) ** power``, shape ``(out, in)``, float32, on the CPU.

    A hook moves each gradient away as soon as it is accumulated, so that one gradient at a time stands beside the
    weights. Weights, flags and gradients of the model are as before afterwards.

    Args:
        loss: gives a scalar, or yields scalars, one a batch; each graph is gone before the next batch is asked for.
        powers: 1 or 2 for every site; None: 1.

    Returns:
        Sites of a method's default that the loss does not depend on.

    Raises:
        Unsupported: a quantised base, a gradient that is not finite, or no gradient at a site that was named (or at any).
    """
    wanted = list(zip(sites, powers or [1] * len(sites), strict=True))
    for site in sites:
        if is_quantised(site.parameter()):
            raise Unsupported(f"{site.name} is quantised; a gradient start needs the unquantised weights")
    sums = _collect(model, {(site.parameter(), power) for site, power in wanted}, loss)
    unreached = [site for site, power in wanted if (site.parameter(), power) not in sums]
    _refuse_named(unreached, sites, "the loss does not depend on {}; a gradient start needs a loss that does")
    for site, power in wanted:
        gradient = sums.get((site.parameter(), power))
        if gradient is None:
            continue
        if not bool(torch.isfinite(gradient).all()):
            raise Unsupported(f"the loss gives {site.name} a gradient with NaN or infinite values; use other sample data")
        site.gradient = site.take(site.matrix(gradient))
    return unreached


def _refuse_named(unreached: list[Site], sites: list[Site], message: str) -> None:
    """Raise for the first site that the sample data does not reach, if it was named, or if it reaches none."""
    named = unreached if len(unreached) == len(sites) else [site for site in unreached if site.clause is not None]
    if named:
        raise Unsupported(message.format(named[0].name))


def _collect(
    model: nn.Module, wanted: set[tuple[Tensor, int]], loss: Callable[[nn.Module], Tensor | Iterable[Tensor]]
) -> dict[tuple[Tensor, int], Tensor]:
    """Sums of the wanted powers of the parameters' gradients; what the loss does not reach is not in it."""
    sums: dict[tuple[Tensor, int], Tensor] = {}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    learning = {parameter for parameter, _ in wanted}

    def take(parameter: Tensor) -> None:
        gradient = parameter.grad.detach().to_dense().float().cpu()  # an embedding's may be sparse
        parameter.grad = None
        for power in (2, 1):
            key = parameter, power
            if key in wanted:
                term = gradient.square() if power == 2 else gradient
                sums[key] = sums[key].add_(term) if key in sums else term

    hooks = []
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(parameter in learning)
        hooks = [p.register_post_accumulate_grad_hook(take) for p in learning]
        with torch.enable_grad():
            losses = loss(model)
            for batch in (losses,) if isinstance(losses, Tensor) else losses:
                if batch.requires_grad:  # else it reaches no site
                    batch.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return sums


def site_activations(
    model: nn.Module, sites: list[Site], loss: Callable[[nn.Module], Tensor | Iterable[Tensor]]
) -> list[Site]:
    """Set ``site.activation``: root mean squares over tokens of a linear place's inputs and outputs, float64, on the CPU.

    Args:
        loss: as for ``site_gradients``; what it returns is not used.

    Returns:
        Sites of a method's default that the loss does not run.

    Raises:
        Unsupported: a place that is no linear layer, that was named and the loss does not run, or whose activations are not
            finite.
    """
    for site in sites:
        if site.kind != "linear":
            raise Unsupported(f"{site.name} is no linear layer; activations are measured at linear layers alone")
    sums: dict[nn.Module, list[Tensor]] = {}
    counts: dict[nn.Module, int] = {}

    def see(module: nn.Module, args: tuple, y: Tensor) -> None:
        both = [t.detach().reshape(-1, t.shape[-1]) for t in (args[0], y)]
        squares = [t.square().sum(0, dtype=torch.float64).cpu() for t in both]
        sums[module] = [a + b for a, b in zip(sums[module], squares, strict=True)] if module in sums else squares
        counts[module] = counts.get(module, 0) + len(both[0])

    hooks = [module.register_forward_hook(see) for module in {site.module for site in sites}]
    try:
        with torch.no_grad():
            losses = loss(model)
            for _ in () if isinstance(losses, Tensor) else losses:
                pass
    finally:
        for hook in hooks:
            hook.remove()
    unreached = [site for site in sites if not counts.get(site.module)]
    _refuse_named(unreached, sites, "the loss does not run {}; a start from activations needs sample data that does")
    for site in sites:
        if site in unreached:
            continue
        inputs, outputs = (s.div(counts[site.module]).sqrt() for s in sums[site.module])
        if not bool(torch.isfinite(torch.cat([inputs, outputs])).all()):
            raise Unsupported(f"{site.name} has activations with NaN or infinite values; use other sample data")
        site.activation = inputs, outputs if site.rows is None else site.rows.take(outputs, 0)
    return unreached
