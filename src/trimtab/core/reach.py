"""Which declared parameters a gradient could reach: seen in the forward passes before the first optimizer step.

A hook behind the model's forward follows the autograd graph back from everything that the forward returns to the leaves.
What is found there can get a gradient, if the loss uses what was returned; what is not found cannot, whatever the loss is.
Beside it stands which adapted modules ran at all. A compiled forward is not looked into, and a model whose own forward is not
called (its parts alone are) is not seen; then nothing is known, and every missing gradient counts as a fault.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.contracts import Adapter
from trimtab.core.noting import noted
from trimtab.core.state import ATTRIBUTE, ModelState, host, trainable_parameters

__all__ = ["FAULT", "IDLE", "OUTSIDE", "UNREAD", "Reach", "begin", "end", "seen"]

FAULT = "fault"
IDLE = "did not run (a layer that was dropped, an input that was absent, an expert without tokens, a module without use)"
UNREAD = "ran, but none of the model's outputs depends on them"
OUTSIDE = "stand outside of the blocks, and the loss does not use what they give"

#: what is known of each model that waits for its first step
_SEEN: weakref.WeakKeyDictionary[nn.Module, Reach] = weakref.WeakKeyDictionary()


@dataclass
class Reach:
    """What the forward passes of the present step have shown.

    Attributes:
        called: whether one was seen.
        reached: ids of the declared parameters that an output depends on.
        ran: paths of the adapted modules that ran.
        cut: those that ran inside a checkpoint which lets no gradient through.
        opaque: whether an output depends on something that hides what it used.
        leave: says that nobody waits any more.
    """

    called: bool = False
    reached: set[int] = field(default_factory=set)
    ran: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    opaque: bool = False
    leave: Callable[[], Any] = bool

    def reason(self, adapter: Adapter, lost: set[int], *, beside: bool) -> str:
        """Why ``lost`` of the adapter's parameters have no gradient: ``FAULT``, or a reason that is no fault of the loss.

        Args:
            beside: whether places in the model's blocks got theirs, so that one outside of them is a branch without use (a
                pooler). Places that the user named are never that.
        """
        site = adapter.site
        if lost & self.reached:
            return OUTSIDE if site.clause is None and site.block is None and beside else FAULT
        if site.path not in self.ran:
            return IDLE
        return FAULT if self.opaque or site.path in self.cut else UNREAD


def begin(root: nn.Module) -> None:
    """Look at the forward passes of ``root`` from now on."""
    end(root)
    noted.listeners += 1
    _SEEN[root] = Reach(leave=weakref.finalize(root, _leave))
    root.register_forward_hook(_after)


def end(root: nn.Module) -> None:
    """Look no longer."""
    found = _SEEN.pop(root, None)
    if found is not None:
        found.leave()
    for key in [key for key, hook in root._forward_hooks.items() if hook is _after]:
        del root._forward_hooks[key]


def _leave() -> None:
    """One model fewer waits, or is there at all."""
    noted.listeners -= 1
    if not noted.listeners:
        noted.ran.clear()
        noted.cut.clear()


def seen(root: nn.Module) -> Reach | None:
    """What is known of the present step; None: nothing that could be relied on."""
    found = _SEEN.get(root)
    declared = _declared(root)
    sharded = any(hasattr(p, "full_tensor") for p in declared.values())  # the graph's leaves are others there
    return found if found is not None and found.called and found.reached and not sharded else None


def _declared(root: nn.Module) -> dict[int, nn.Parameter]:
    state: ModelState = root.__dict__[ATTRIBUTE]
    return {id(p): p for g in state.groups.values() for p in trainable_parameters(g)}


def _after(root: nn.Module, args: tuple, output: Any) -> None:
    found = None if torch.compiler.is_compiling() else _SEEN.get(root)
    if found is None:
        return
    hosts = {id(host(module)): path for path, module in root.__dict__[ATTRIBUTE].hosts.items()}
    ran, cut = ({hosts[i] for i in ids & hosts.keys()} for ids in (noted.ran, noted.cut))
    noted.ran -= hosts.keys()
    noted.cut -= hosts.keys()
    if not torch.is_grad_enabled():
        return
    declared = _declared(root)
    if all(p.grad is None for p in declared.values()):
        # nobody has gone back through what ran before: it is no part of this step
        found.reached, found.ran, found.cut, found.opaque = set(), set(), set(), False
    leaves, opaque = _leaves([t.grad_fn for t in _tensors(output) if t.grad_fn is not None], declared)
    found.called = True
    found.reached |= leaves
    found.ran |= ran
    found.cut |= cut
    found.opaque |= opaque


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def _leaves(nodes: list[Any], wanted: Mapping[int, nn.Parameter]) -> tuple[set[int], bool]:
    """Which of ``wanted`` the graph behind ``nodes`` ends in, and whether a reentrant checkpoint hides a part of it."""
    found: set[int] = set()
    opaque = False
    visited = set(nodes)
    stack = list(visited)
    while stack and len(found) < len(wanted):
        node = stack.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in wanted:
            found.add(id(leaf))
        opaque = opaque or type(node).__name__ == "CheckpointFunctionBackward"
        for after, _ in node.next_functions:
            if after is not None and after not in visited:
                visited.add(after)
                stack.append(after)
    return found, opaque
