"""A model run block by block on calibration data, with one block's weights in memory.

A pass runs the whole model's own code from its inputs to the block in question: blocks before it are replaced by what they put
out, so that masks, positions and everything else that the model computes around its blocks is right for any architecture; the
first thing behind the block is never reached. Layers that read the same tensor (q, k and v; gate and up) share the second moments
of it, and are sketched before the next ones are measured.

Source of the order: arXiv 2210.17323 and its later code (true sequential).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from trimtab.core.anatomy import Anatomy
from trimtab.core.errors import Unsupported
from trimtab.core.structure import sizes
from trimtab.kernels.sweep import Hessian

__all__ = ["BlockWalk"]

Batch = Mapping[str, Tensor]


class _Stop(Exception):
    """Enough of the model has run."""


def _inputs(module: nn.Module) -> int:
    return sizes(module)[1]


class BlockWalk:
    """Walks through the blocks of ``model``, which has no weights but those that ``read`` gives it on the way.

    Args:
        model: its parameters on the meta device; buffers real.
        batches: inputs of the model, by name.
        read: name of a parameter or buffer -> its value, or None where the checkpoint has none of its own.
        device: to run on.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        batches: Sequence[Batch],
        read: Callable[[str], Tensor | None],
        *,
        device: torch.device,
    ):
        self.model, self.batches, self.read, self.device = model, batches, read, device
        self.blocks = anatomy.blocks or ("",)
        #: list of blocks -> what the last finished block of it put out, a batch each
        self.outputs: dict[str, list[Any]] = {}
        self.current = 0
        self.filled: set[str] = set()
        if hasattr(model, "config"):
            model.config.use_cache = False
        inside = {path for path in anatomy.modules if anatomy.block_of(path) is not None or not anatomy.blocks}
        for path, module in anatomy.modules.items():
            if path not in inside:
                module.register_forward_pre_hook(lambda m, args, path=path: self._fill(path, m, deep=False))
            if path in self.blocks and anatomy.blocks:
                module.forward = lambda *args, path=path, **kwargs: self._too_early(path)

    def walk(self, index: int, targets: Sequence[str], learn: Callable[[list[str], Hessian], None] | None) -> None:
        """Run block ``index``, after those before it.

        Args:
            targets: paths of the layers in it that are to be measured.
            learn: called with layers that read one tensor, and its second moments, set after set in the order of the block; it may
                replace their weights. None: only run the block, which is sketched already.
        """
        path = self.blocks[index]
        block = self.model.get_submodule(path)
        block.__dict__.pop("forward", None)
        before = [(part._parameters, dict(part._parameters)) for part in block.modules()]
        self._fill(path, block, deep=True)
        waiting = list(targets) if learn is not None else []
        while waiting:
            sets = self._sets(path, waiting)
            for layers in sets:
                learn(layers, self._moments(path, layers))
                waiting = [layer for layer in waiting if layer not in layers]
            if not sets:  # experts that no token was sent to
                for layer in waiting:
                    learn([layer], Hessian(_inputs(self.model.get_submodule(layer))))
                break
        stack = path.rpartition(".")[0]
        made = [self._run(path, number, {}) for number in range(len(self.batches))]
        self.outputs[stack] = made
        block.forward = lambda *args, **kwargs: self.outputs[stack][self.current]
        for parameters, empty in before:  # nothing of the block's weights stays
            parameters.update(empty)

    def _too_early(self, path: str) -> None:
        raise Unsupported(f"{path} runs before a block that stands before it: this model cannot be calibrated block by block")

    def _fill(self, path: str, module: nn.Module, *, deep: bool) -> None:
        """Give ``module``, and what is in it if ``deep``, the values of its parameters and buffers; once."""
        if path in self.filled:
            return
        self.filled.add(path)
        for name, part in module.named_modules() if deep else [("", module)]:
            prefix = ".".join(filter(None, (path, name)))
            for tensors in (part._parameters, part._buffers):
                for key, old in tensors.items():
                    full = f"{prefix}.{key}" if prefix else key
                    value = None if old is None else self.read(full)
                    if value is not None:
                        value = value.to(self.device)
                        tensors[key] = nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value
                    elif isinstance(old, nn.Parameter) and old.is_meta:
                        raise Unsupported(
                            f"the checkpoint has no tensor for {full}, so that the model cannot be run; sketch it without "
                            "calibration data"
                        )
                    elif old is not None and old.device != self.device:
                        tensors[key] = old.to(self.device)

    def _run(self, path: str, number: int, hooks: Mapping[str, Callable[[nn.Module, tuple], None]]) -> Any:
        """One batch up to the end of the block at ``path``; its output.

        Raises:
            Unsupported: the block is not reached, or changes what came out of the one before it.
        """
        self.current = number
        block, caught = self.model.get_submodule(path), []

        def end(module: nn.Module, args: tuple, output: Any) -> None:
            caught.append(tree_map_only(Tensor, lambda t: t.detach(), output))
            raise _Stop

        handles = [block.register_forward_hook(end)]
        handles += [block.register_forward_pre_hook(lambda m, a, k: self._check(path, (a, k)), with_kwargs=True)]
        handles += [self.model.get_submodule(layer).register_forward_pre_hook(hook) for layer, hook in hooks.items()]
        try:
            with torch.no_grad(), contextlib.suppress(_Stop):
                self.model(**{key: value.to(self.device) for key, value in self.batches[number].items()})
        finally:
            for handle in handles:
                handle.remove()
        if not caught:
            raise Unsupported(f"the calibration data does not run the block {path}; give inputs that do, or sketch without data")
        return caught[0]

    def _check(self, path: str, inputs: Any) -> None:
        """The block must take the output of its predecessor as it is: earlier ones are not kept."""
        before = self.outputs.get(path.rpartition(".")[0])
        if before is None:
            return
        main = tree_leaves(before[self.current])[0]
        given = [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.shape == main.shape]
        if all(t.data_ptr() != main.data_ptr() for t in given):
            raise Unsupported(
                f"{path} does not take the output of the block before it as it is: this model cannot be calibrated block by block; "
                "sketch it without calibration data"
            )

    def _sets(self, path: str, layers: Sequence[str]) -> list[list[str]]:
        """The layers that the data reaches, in their order, those that read the same tensor together."""
        found: list[list[str]] = []
        seen: set[str] = set()
        for number in range(len(self.batches)):
            inputs: dict[tuple, list[str]] = {}
            held: list[Tensor] = []  # so that no address is given out twice

            def see(module: nn.Module, args: tuple, layer: str = "") -> None:
                if layer not in seen:
                    seen.add(layer)
                    held.append(args[0])  # noqa: B023
                    inputs.setdefault((args[0].data_ptr(), args[0].shape, args[0].stride()), []).append(layer)  # noqa: B023

            self._run(path, number, {layer: lambda m, a, layer=layer: see(m, a, layer) for layer in layers})
            found += inputs.values()
            if len(seen) == len(layers):
                break
        return found

    def _moments(self, path: str, layers: Sequence[str]) -> Hessian:
        """Second moments of what ``layers`` read, over all batches."""
        found = Hessian(_inputs(self.model.get_submodule(layers[0])), device=self.device)
        for number in range(len(self.batches)):
            self._run(path, number, {layers[0]: lambda module, args: found.add(args[0])})
        return found
