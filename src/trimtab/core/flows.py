"""How token adapters act while a hosted module runs. A module has duties, each with the adapters that it serves:

===========  =====================  ===============================================================================
duty         module                 what it does
===========  =====================  ===============================================================================
``beside``   an attention           adds the keys and values of the adapters that stand at it
``listen``   an attention           adds, notes or makes room for what the passages say (``trimtab.core.tokens``)
``fresh``    a block                tokens come in at its input and end with it
``enter``    a block                tokens come in at its input and go on
``carry``    a later block          takes them from the block before it
``leave``    the last block         does not pass them on
``prompt``   a causal stack's body  runs the tokens alone, then the model with their keys and values beside its own
``pass``     a causal stack's block hands the passages on to its own second run, in a checkpoint's backward
===========  =====================  ===============================================================================

In a causal stack the tokens in front do not depend on what follows, so that one run of them alone serves all rows. The same holds
for tokens that enter every block anew, in any model: what a block makes of them is thrown away, so only the keys and values that
its attention sees in them matter. Where tokens look at the sequence, they are in it, in front, while a block runs; between
blocks the sequence has its own length, and the tokens travel as an attribute of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trimtab.core.calls import first_of, first_tensor, replace_first, replace_output
from trimtab.core.errors import Unsupported
from trimtab.core.laws import LINE, manner
from trimtab.core.tokens import Acting, Beside, Call, Inserted, Recorder, Without, attend, entered, passages

if TYPE_CHECKING:
    from trimtab.core.host import Host

__all__ = ["ATTENTION_DUTIES", "listens", "noted", "plain", "run"]

Inner = Callable[[tuple, dict], Any]
ATTENTION_DUTIES = frozenset({"beside", "listen"})
_CARRIED, _PASSED = "_trimtab_carried", "_trimtab_passed"


def run(host: Host, module: nn.Module, args: tuple, kwargs: dict, acting: dict[str, Acting], inner: Inner) -> Any:
    """The forward of ``module`` with the token adapters that act there; ``inner(args, kwargs)`` is the forward without them."""
    if not ATTENTION_DUTIES.isdisjoint(acting):
        inner = partial(_attention, host, module, inner)
    if "fresh" in acting:
        inner = partial(_fresh, host, module, acting["fresh"], inner)
    if "enter" in acting or "carry" in acting:
        inner = partial(_carried, host, module, acting, inner)
    if "pass" in acting:
        inner = partial(_passed, host, inner)
    if "prompt" in acting:
        inner = partial(_prompted, host, module, acting["prompt"], inner)
    return inner(args, kwargs)


def plain(
    host: Host, acting: dict[str, Acting], inner: Inner, args: tuple, kwargs: dict, *, damped: bool
) -> Tensor | None:
    """The output of ``host``'s module without the tokens that stand at it, for a factor on what they change; None: none stand here.

    Raises:
        Unsupported: the tokens go through several modules, or the call has a cache, which a second run would fill twice.
    """
    from trimtab.compat.bodies import cache_of

    if damped and not {"enter", "carry", "prompt"}.isdisjoint(acting):
        raise Unsupported(f"the tokens at {host.path} go through several blocks: no factor at one place weighs what they change")
    if {"beside", "fresh"}.isdisjoint(acting):
        return None
    if cache_of(args, kwargs) is not None:
        raise Unsupported(f"a factor on the tokens at {host.path} needs a second run of it, and the call has a cache: use none")
    with entered((*passages(), Without(host.path))):
        return first_tensor(inner(args, kwargs))


# -- blocks


def _fresh(host: Host, module: nn.Module, acting: Acting, inner: Inner, args: tuple, kwargs: dict) -> Any:
    """Tokens that enter this block and end with it: as keys and values where its attention can be reached, else in line."""
    x = first_of(args, kwargs)
    if not host.reaches:
        tokens, seen = acting.tokens(x.shape[0])
        _once(host, module, args, kwargs)
        y, _ = _in_line(args, kwargs, tokens.to(x.dtype).expand(x.shape[0], -1, -1), seen, inner)
        return y

    def alone() -> Beside:
        from trimtab.compat import bodies

        tokens, seen = acting.tokens(x.shape[0])
        return noted(seen, lambda: inner(*bodies.alone(args, kwargs, tokens.to(x.dtype))))

    beside, _ = _with_cache(host, acting, x, args, kwargs, alone)
    with entered((*passages(), beside)):
        return inner(args, kwargs)


def _once(host: Host, block: nn.Module, args: tuple, kwargs: dict) -> None:
    """Tokens in line enter with every call: none may go on from another.

    Raises:
        Unsupported: the cache of this block has begun.
    """
    from trimtab.compat.states import begun_at, state_of

    state = next((value for value in args if hasattr(value, "get_seq_length")), None) or state_of(kwargs)
    if state is not None and not torch.compiler.is_compiling() and begun_at(state, block):
        raise Unsupported(
            f"the learned tokens at {host.path} stand in the block's own sequence, and enter with every call; a call that goes on "
            "from a cache has them in it already: call the model with use_cache=False"
        )


def noted(seen: Tensor | None, run_alone: Callable[[], Any], *, before: bool = False) -> Beside:
    """What the attentions see in learned tokens while ``run_alone()`` runs them."""
    from trimtab.compat.bodies import unrecorded

    recorder = Recorder()
    with entered((recorder,)), unrecorded():
        run_alone()
    # a copy: a checkpoint that runs this again in backward notes it again
    return Beside(dict(recorder.found), seen, before)


def _with_cache(host: Host, acting: Acting, x: Tensor, args: tuple, kwargs: dict, make: Callable[[], Beside]) -> tuple[Beside, Any]:
    """The keys and values of learned tokens, and the cache of the call.

    They are kept with the cache, so that the tokens that follow need no run of the learned ones.
    """
    from trimtab.compat.bodies import cache_of, kept, starts

    cache = cache_of(args, kwargs)
    beside = None if starts(cache, x) else kept(cache, host.path, acting)
    if beside is None:
        beside = make()
        if cache is not None:
            kept(cache, host.path, acting, beside)
    return beside, cache


@dataclass(eq=False)
class _Carried:
    """Tokens between two blocks: ``(n, p, width)``, and which of them a row has, ``(n, p)`` or None for all."""

    tokens: Tensor
    seen: Tensor | None


def _carried(host: Host, module: nn.Module, acting: dict[str, Acting], inner: Inner, args: tuple, kwargs: dict) -> Any:
    """Tokens that go through the blocks: in line while a block runs, an attribute of the hidden states between two."""
    x = first_of(args, kwargs)
    if "enter" in acting:
        _once(host, module, args, kwargs)
    carried = _handed_on(host, x) if "carry" in acting else None
    if "enter" in acting:
        tokens, seen = acting["enter"].tokens(x.shape[0])
        new = _Carried(tokens.to(x.dtype).expand(x.shape[0], -1, -1), seen)
        carried = new if carried is None else _both(carried, new)
    y, tokens = _in_line(args, kwargs, carried.tokens, carried.seen, inner)
    if "leave" in acting:
        return y
    onward = _Carried(tokens, carried.seen)
    if not torch.compiler.is_compiling():
        _ON_THE_WAY.set((host.next, x.shape, onward))
    return replace_output(y, partial(_mark, _CARRIED, onward))


#: what the last block gave: path of the next one, shape of the hidden states, tokens. For forwards whose hooks (FSDP2's, a move to
#: another device) hand on a copy of the hidden states, without the attribute
_ON_THE_WAY: ContextVar[tuple[str, torch.Size, _Carried] | None] = ContextVar("trimtab_on_the_way", default=None)


def _handed_on(host: Host, x: Tensor) -> _Carried:
    """The tokens that come with the hidden states ``x``."""
    carried = getattr(x, _CARRIED, None)
    if carried is None and not torch.compiler.is_compiling():
        way = _ON_THE_WAY.get()
        # in backward, a checkpoint runs some blocks again: what the last block of all gave is another forward's, or none's
        forward = torch._C._current_graph_task_id() == -1
        if way is not None and forward and way[:2] == (host.path, x.shape):
            carried = _Carried(way[2].tokens.to(x.device), way[2].seen)
    if carried is None:
        raise Unsupported(
            f"the learned tokens were lost on the way to {host.path}: between two blocks they travel with the hidden states, and "
            "something (a hook, an offload, a checkpoint within a checkpoint) put another tensor in their place; use "
            "PrefixTuning or VPT(deep=True), whose tokens do not travel"
        )
    if not torch.compiler.is_compiling():
        _ON_THE_WAY.set(None)
    setattr(x, _CARRIED, carried)  # for a checkpoint that runs this block again on x
    return carried


def _both(a: _Carried, b: _Carried) -> _Carried:
    tokens = torch.cat([a.tokens, b.tokens], 1)
    if a.seen is None and b.seen is None:
        return _Carried(tokens, None)
    seen = [torch.ones(c.tokens.shape[:2], dtype=torch.bool, device=tokens.device) if c.seen is None else c.seen for c in (a, b)]
    return _Carried(tokens, torch.cat(seen, 1))


def _in_line(args: tuple, kwargs: dict, tokens: Tensor, seen: Tensor | None, inner: Inner) -> tuple[Any, Tensor]:
    """The block on ``[tokens, x]``: its output for x, and for the tokens."""
    from trimtab.compat.bodies import lengthened

    x = first_of(args, kwargs)
    if x.dim() != 3:
        raise Unsupported(f"learned tokens enter blocks of (n, tokens, width) activations; this one got {tuple(x.shape)}")
    p = tokens.shape[1]
    args, kwargs = replace_first(args, kwargs, lambda _: torch.cat([tokens, x], 1))
    with entered((*passages(), Inserted(p, seen))):
        y = inner(*lengthened(args, kwargs, p))
    rest: list[Tensor] = []

    def take(full: Tensor) -> Tensor:
        rest.append(full[:, :p])
        return full[:, p:]

    return replace_output(y, take), rest[0]


def _mark(name: str, value: Any, tensor: Tensor) -> Tensor:
    setattr(tensor, name, value)
    return tensor


def _passed(host: Host, inner: Inner, args: tuple, kwargs: dict) -> Any:
    """A block of a causal stack: the passages of the run that it belongs to, also when a checkpoint repeats it in backward."""
    x = first_of(args, kwargs)
    held = passages() or getattr(x, _PASSED, ())
    if not (held and torch.is_grad_enabled()):
        return inner(args, kwargs)
    setattr(x, _PASSED, held)
    with entered(held):
        y = inner(args, kwargs)
    for passage in held:
        if isinstance(passage, Recorder):
            y = _bind(host, passage, y)
    return replace_output(y, partial(_mark, _PASSED, held))


def _bind(host: Host, recorder: Recorder, y: Any) -> Any:
    """The block's output, bound to the keys and values that were noted in it."""
    inside = [path for path in recorder.found if path.startswith(f"{host.path}.")]
    noted = [tensor for path in inside for tensor in recorder.found[path]]
    bound = _Bound.apply(first_tensor(y), *noted)
    for number, path in enumerate(inside):
        recorder.found[path] = bound[2 * number + 1], bound[2 * number + 2]
    return replace_output(y, lambda _: bound[0])


class _Bound(torch.autograd.Function):
    """Identity of several tensors: none of them gets its gradient before all have theirs.

    FSDP gathers a block's weights when the gradient of the block's output comes. Keys and values that are used elsewhere must not
    come back into the block before that.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def _prompted(host: Host, module: nn.Module, acting: Acting, inner: Inner, args: tuple, kwargs: dict) -> Any:
    """A causal stack: the tokens run alone, then the sequence with their keys and values; or the tokens in the sequence."""
    from trimtab.core.line import in_sequence

    act = in_sequence if manner(host, module) == LINE else _beside_sequence
    return act(host, module, acting, inner, args, kwargs)


def _beside_sequence(host: Host, module: nn.Module, acting: Acting, inner: Inner, args: tuple, kwargs: dict) -> Any:
    """A causal stack: the tokens alone, then the sequence with their keys and values."""
    from trimtab.compat.bodies import cache_of, input_of, kept, placed, run_alone

    x = input_of(args, kwargs)
    if host.rotates:
        args, kwargs = placed(module, args, kwargs, x.shape[1])

    def alone() -> Beside:
        tokens, seen = acting.tokens(x.shape[0])
        return noted(seen, lambda: run_alone(module, tokens, seen, rotated=host.rotates), before=True)

    beside, cache = _with_cache(host, acting, x, args, kwargs, alone)
    with entered((*passages(), beside)):
        y = inner(args, kwargs)
    made = cache_of((), y) if cache is None and hasattr(y, "keys") else None
    if made is not None:  # the model has made the cache itself
        kept(made, host.path, acting, beside)
    return y


# -- attention


def listens(host: Host) -> bool:
    """Whether the attention above ``host`` has anything to do now."""
    return not ATTENTION_DUTIES.isdisjoint(host.duties()) and ("beside" in host.duties() or bool(passages()))


def _attention(host: Host, module: nn.Module, inner: Inner, args: tuple, kwargs: dict) -> Any:
    """An attention module with the keys and values of learned tokens."""
    if not listens(host) or host.redirected:
        return inner(args, kwargs)  # an attention that asks for its function gets ours (trimtab.compat.attention)
    if isinstance(module, nn.MultiheadAttention):
        from trimtab.core.packed import attention

        return attention(host, host.inside(module), *args, **kwargs)
    if host.cached:
        from trimtab.compat.caches import attention as by_cache

        return by_cache(host, module, inner, args, kwargs)
    mode = _Attention(host)
    with mode:
        y = inner(args, kwargs)
    if not mode.used and ("beside" in host.duties() or any(isinstance(p, Inserted) and p.seen is not None for p in passages())):
        raise Unsupported(
            f"learned keys cannot join at {host.path} (and rows with and without learned tokens cannot be told apart): its forward "
            "does not call torch's scaled_dot_product_attention; target attentions that do, or change this one to"
        )
    return y


class _Attention(TorchFunctionMode):
    """Joins the extras at every call of torch's attention while one module runs."""

    def __init__(self, host: Host):
        super().__init__()
        self.host, self.used = host, False

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") != "scaled_dot_product_attention":
            return func(*args, **(kwargs or {}))
        self.used = True
        return self.attention(func, *args, **(kwargs or {}))

    def attention(
        self, func: Callable, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        def torchs(call: Call) -> tuple[Tensor, None]:
            more = {"scale": scale, "enable_gqa": enable_gqa, "is_causal": call.causal}
            return func(call.query, call.key, call.value, call.mask, dropout_p, **more), None

        mask = attn_mask
        if mask is not None and mask.dim() < 4:
            mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
        call = Call(query, key, value, mask, is_causal, scale=scale)
        return attend(self.host.path, self.host.extras(query.shape[0]), call, torchs, axis=-2)[0]
