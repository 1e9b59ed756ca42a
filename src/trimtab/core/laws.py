"""What learned tokens must do in a model, tried before they are trusted.

A prompt made of the embeddings of real tokens acts as those tokens do, ``[P; x]``. The ways to get there, in order of what they
cost and disturb, are tried against the model's own run on the tokens' ids; the first that gives the same is taken, and a model in
which none does is refused. Learned keys and values that are those of real tokens in front act, at every attention, as those tokens
do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trimtab.core.calls import first_of, first_tensor, replace_first
from trimtab.core.errors import TrimtabError, Unsupported
from trimtab.core.line import in_sequence
from trimtab.core.tokens import Acting, Beside, Recorder, entered
from trimtab.core.trial import Sample, enough, hidden, padded, quiet, runs, sample, short

if TYPE_CHECKING:
    from trimtab.core.host import Host

__all__ = ["BESIDE", "LINE", "manner", "try_group"]

#: the two ways of a prompt in a causal stack: its keys and values beside the sequence's own; itself in the sequence
BESIDE, LINE = "beside", "line"
_WORDS = {BESIDE: "with their keys and values beside the text's", LINE: "with them in the sequence"}
_ADVICE = "Use an adapter of weights (tt.LoRA) for this model"


@dataclass(eq=False)
class _Tokens:
    """Stands for the adapters that act: ``p`` (1, p, width) for every row."""

    p: Tensor
    adapters: tuple = ()
    rows: None = None

    def tokens(self, n: int) -> tuple[Tensor, None]:
        return self.p, None


# -- a prompt in a causal stack


def manner(host: Host, body: nn.Module) -> str:
    """How a prompt acts in the causal stack ``body``: ``BESIDE`` or ``LINE``.

    It is tried once; where it cannot be (no weights, or parts of them), attention in every block speaks for ``BESIDE``.

    Raises:
        Unsupported: neither way gives what the model makes of the tokens themselves.
    """
    if host.manner is None and runs(body):
        host.manner = _tried(host, body)
    if host.manner is not None:
        return host.manner
    return BESIDE if all(any(map(_listens, block.modules())) for block in host.blocks) else LINE


def _listens(module: nn.Module) -> bool:
    """Whether ``module`` is an attention that serves a prompt."""
    here = module._modules.get("trimtab")
    return here is not None and any(duty == "listen" for served in here.served.values() for duty, _ in served)


def _tried(host: Host, body: nn.Module) -> str:
    listeners = [module._modules["trimtab"] for module in body.modules() if _listens(module)]
    with quiet(body), _acting(body, {host: {"listen": Acting()} for host in listeners}):
        tokens = sample(body, host.width)
        seen = partial(hidden, host.blocks[enough(host.blocks) - 1])
        try:
            text, want = (seen(lambda part=part: tokens.run(part)) for part in (tokens.text, slice(None)))
        except Exception as error:
            raise Unsupported(
                f"{host.asked} was tried at {host.path or 'the model'} on a few tokens, and the model itself does not run on them "
                f"alone ({short(error)}). {_ADVICE}, or target another stack"
            ) from error
        if (problem := _needs_ids(tokens, seen, want)) is not None:
            raise Unsupported(
                f"{host.asked} puts tokens in front that are no entries of the vocabulary, and the model {problem}. {_ADVICE}"
            )
        reasons = []
        for each in (BESIDE, LINE) if listeners else (LINE,):
            try:
                wrong = _wrong(host, each, tokens, seen, text, want)
            except Exception as error:
                wrong = f"the model fails ({short(error)})"
            if wrong is None:
                return each
            reasons.append(f"{_WORDS[each]}, {wrong}")
    raise Unsupported(
        f"{host.asked} was tried at {host.path or 'the model'} on a few tokens of the vocabulary, which must act in front of a "
        f"text as they do when the model reads them there. They do not: {'; '.join(reasons)}. {_ADVICE}"
    )


def _wrong(host: Host, each: str, tokens: Sample, seen: Callable, text: Tensor, want: Tensor) -> str | None:
    """What is wrong with a way; None: nothing."""
    run = partial(_run_line if each == LINE else _run_beside, host, tokens, seen)
    got = run(tokens.learned, {})
    if each == BESIDE:
        if not host.rotates and (own := tokens.own_positions()) is not None:
            want = seen(lambda: tokens.run(slice(None), **own))
        want = want[:, tokens.front :]
    effect = (want[:, -text.shape[1] :] - text).abs().max().item()
    if (problem := _differs(got, want, effect)) is not None:
        return problem
    run(tokens.learned, padded(tokens, seen))
    if each == LINE:  # once to the end, for what the body gives beside the hidden states
        in_sequence(host, tokens.body, _Tokens(tokens.learned), tokens.forward, (), tokens.call(tokens.text))
    return None


def _needs_ids(tokens: Sample, seen: Callable, want: Tensor) -> str | None:
    """Why embeddings do not stand for tokens in this model; None: they do."""
    if tokens.ids is None:
        return None
    by_embedding = replace(tokens, ids=None)
    strange = replace(by_embedding, embedded=tokens.embedded.roll(1, -1))
    reads = "reads more of its tokens than their embeddings, namely their ids"
    try:
        got = seen(lambda: by_embedding.run(slice(None)))
        seen(lambda: strange.run(slice(None)))
    except Exception as error:
        return f"{reads} (on embeddings alone: {short(error)})"
    problem = _differs(got, want, 0.0)
    return None if problem is None else f"{reads} (on embeddings alone, {problem.partition(',')[0]})"


def _run_line(host: Host, tokens: Sample, seen: Callable, p: Tensor, more: dict[str, Tensor]) -> Tensor:
    return seen(lambda: in_sequence(host, tokens.body, _Tokens(p), tokens.forward, (), tokens.call(tokens.text, **more)))


def _run_beside(host: Host, tokens: Sample, seen: Callable, p: Tensor, more: dict[str, Tensor]) -> Tensor:
    from trimtab.compat.bodies import run_alone
    from trimtab.core.flows import noted

    beside = noted(None, lambda: seen(lambda: run_alone(tokens.body, p, None, rotated=host.rotates)), before=True)
    with entered((beside,)):
        return seen(lambda: tokens.run(tokens.text, **more))


def _differs(got: Tensor, want: Tensor, effect: float) -> str | None:
    if got.shape != want.shape:
        return f"an output has the shape {tuple(got.shape)} where the model's own has {tuple(want.shape)}"
    if not torch.isfinite(got).all():
        return "an output is not finite"
    exact, scale = want.dtype in (torch.float32, torch.float64), want.abs().max().item()
    allowed = (2e-3 * effect + 1e-5 * scale) if exact else (0.05 * effect + 0.02 * scale)
    error = (got - want).abs().max().item()
    return None if error <= allowed else f"the hidden states are off by {error:.2g}, where the tokens' whole effect is {effect:.2g}"


@contextmanager
def _acting(body: nn.Module, duties: Mapping[Host, dict[str, Acting]]) -> Iterator[None]:
    """Of all learned tokens in ``body`` those of ``duties`` act, and no others."""
    hosts = [host for module in body.modules() if (host := module._modules.get("trimtab")) is not None]
    before = [host.acts for host in hosts]
    for host in hosts:
        host.acts = copy(host.acts)
        host.acts.duties = duties.get(host, {})
    try:
        yield
    finally:
        for host, acts in zip(hosts, before, strict=True):
            host.acts = acts


# -- tokens at attentions and blocks


def try_group(name: str, method: str, hosts: Sequence[Host], body: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Run ``body`` with the token adapters called ``name``, which stand at blocks and attentions of its stack.

    A body that does not run on ids alone, or has no weights yet, is not tried.

    Args:
        method: its name, for messages.
        hosts: what serves the adapters in the stack.

    Raises:
        Unsupported: the model fails with them, they change nothing, or its attention does something else with keys in front of
            the text's than with those of tokens in front.
    """
    if not runs(body):
        return
    with quiet(body):
        tokens, seen = sample(body), partial(hidden, blocks[-1])
        with _acting(body, {}):
            try:
                plain = seen(lambda: tokens.run(tokens.text))
            except Exception:
                return
        try:
            with _acting(body, {}):
                masked = padded(tokens, seen)
            with _acting(body, {host: _duties(host, name) for host in hosts}):
                got = seen(lambda: tokens.run(tokens.text))
                seen(lambda: tokens.run(tokens.text, **masked))
        except TrimtabError:
            raise
        except Exception as error:
            problem = f"{method} was tried on a few tokens, and the model fails with it ({short(error)}). {_ADVICE}"
            raise Unsupported(problem) from error
        adapters = [adapter for host in hosts for _, adapter in host.token_duties(name)]
        if torch.equal(got, plain) and not all(type(a).identity(a.config) for a in adapters):
            raise Unsupported(
                f"{method} was tried on a few tokens, and nothing changes: what it adds does not reach the text. {_ADVICE}"
            )
        attentions = [host for host in hosts if any(duty in ("beside", "listen") for duty, _ in host.token_duties(name))]
        if all(duty not in ("enter", "carry") for host in hosts for duty, _ in host.token_duties(name)):
            _keys_in_front(method, attentions, tokens, partial(hidden, blocks[enough(blocks) - 1]))


def _duties(host: Host, name: str) -> dict[str, Acting]:
    duties: dict[str, list] = {}
    for duty, adapter in host.token_duties(name):
        duties.setdefault(duty, []).append(adapter)
    return {duty: Acting(adapters) for duty, adapters in duties.items()}


def _keys_in_front(method: str, hosts: Sequence[Host], tokens: Sample, seen: Callable) -> None:
    """Each attention on a text, with the keys and values of tokens in front beside its own, gives what it gives behind them.

    Attentions whose scores have a bias by distance are left out: a learned key has no position.
    """
    from trimtab.compat.bodies import takes

    if not takes(tokens.body, "position_ids"):
        return  # where the text stands cannot be told to the model
    modules = {path: module for path, module in tokens.body.named_modules() if module._modules.get("trimtab") in hosts}
    watch = _Watch(modules)
    recorder, p = Recorder(), tokens.front
    behind = torch.arange(p, tokens.embedded.shape[1], device=tokens.embedded.device).repeat(2, 1)
    with _acting(tokens.body, {host: {"listen": Acting()} for host in hosts}):
        with watch.noting():
            seen(lambda: tokens.run(slice(None)))
        with entered((recorder,)):
            seen(lambda: tokens.run(slice(None)))
        want = {path: made[:, p:] for path, made in watch.made.items()}
        paths = {module._modules["trimtab"].path: path for path, module in modules.items()}
        odd = [path for path, (k, _) in recorder.found.items() if k.shape[-2] != tokens.embedded.shape[1]]
        if odd:
            raise Unsupported(
                f"{method} adds keys to those of the text's tokens, and {odd[0]} compares {recorder.found[odd[0]][0].shape[-2]} "
                f"keys for {tokens.embedded.shape[1]} tokens. {_ADVICE}"
            )
        beside = Beside({path: (k[..., :p, :], v[..., :p, :]) for path, (k, v) in recorder.found.items()}, None, True)
        with watch.forcing(p), entered((beside,)):
            seen(lambda: tokens.run(tokens.text, position_ids=behind))
    for path, inside in paths.items():
        if path not in recorder.found or inside in watch.biased or inside not in want:
            continue
        problem = _differs(watch.made[inside], want[inside], want[inside].abs().max().item())
        if problem is not None:
            raise Unsupported(
                f"{method} was tried at {path} with the keys and values of real tokens, which must act beside the text's as they "
                f"do in front of it. They do not ({problem}): this attention does more with its keys than compare them. {_ADVICE}"
            )


class _Watch:
    """The inputs and outputs of attentions in a run, and the same inputs put in again in another."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        self.modules, self.given, self.made = modules, {}, {}
        self.biased: set[str] = set()

    @contextmanager
    def noting(self) -> Iterator[None]:
        def before(path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.given[path] = first_of(args, kwargs)
            if any("bias" in key or key == "alibi" for key, value in kwargs.items() if value is not None) or _own_bias(module):
                self.biased.add(path)

        with self._hooked(before):
            yield

    @contextmanager
    def forcing(self, p: int) -> Iterator[None]:
        """The inputs of the tokens from p on."""

        def instead(path: str, module: nn.Module, args: tuple, kwargs: dict) -> tuple:
            return replace_first(args, kwargs, lambda _: self.given[path][:, p:].contiguous())

        with self._hooked(instead):
            yield

    @contextmanager
    def _hooked(self, before: Callable) -> Iterator[None]:
        def after(path: str, module: nn.Module, args: tuple, y: object) -> None:
            self.made[path] = first_tensor(y)

        handles = [m.register_forward_pre_hook(partial(before, path), with_kwargs=True) for path, m in self.modules.items()]
        handles += [m.register_forward_hook(partial(after, path)) for path, m in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _own_bias(module: nn.Module) -> bool:
    """Whether an attention has a table of its own by which it weighs distances."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return any(re.search(r"rel|dist|bias_table|position", name) for name, _ in tensors)
