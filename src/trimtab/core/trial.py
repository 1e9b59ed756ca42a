"""Running the body of a stack on a handful of tokens, to see what it does: as many blocks as it takes to see each kind of them,
in evaluation mode and without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.calls import first_tensor
from trimtab.core.site import base_class

__all__ = ["Sample", "causal", "enough", "hidden", "padded", "quiet", "runs", "sample", "short", "table_width"]

#: tokens of a trial, learned ones and text together; fewer where a model has a window as small
_LONGEST = 32
_WINDOW = ("sliding_window", "window_size", "attention_chunk_size", "attention_window")


class _Seen(Exception):
    """The last block of interest has run: what follows is not needed."""


@dataclass(eq=False)
class Sample:
    """Tokens ``[a; x]`` for a body, half of them in front: ids ``(2, t)``, or None for a body without a table, and embeddings."""

    body: nn.Module
    ids: Tensor | None
    embedded: Tensor
    front: int

    @property
    def learned(self) -> Tensor:
        """The embeddings of the tokens in front, ``(1, p, width)``."""
        return self.embedded[:1, : self.front].clone()

    @property
    def text(self) -> slice:
        return slice(self.front, None)

    def call(self, part: slice, **more: Any) -> dict[str, Any]:
        """The body's arguments for a part of the tokens."""
        from trimtab.compat.bodies import takes

        given = {"inputs_embeds": self.embedded[:, part].clone()} if self.ids is None else {"input_ids": self.ids[:, part]}
        return {**given, **more, **({"use_cache": False} if takes(self.body, "use_cache") else {})}

    def run(self, part: slice, **more: Any) -> Any:
        """The body itself on a part of the tokens."""
        return self.forward((), self.call(part, **more))

    def forward(self, args: tuple, kwargs: dict) -> Any:
        return base_class(self.body).forward(self.body, *args, **kwargs)

    def own_positions(self) -> dict[str, Tensor] | None:
        """Positions where the tokens in front and the text each begin at the first row of a table; None: the body takes none."""
        from trimtab.compat.bodies import takes

        if not takes(self.body, "position_ids"):
            return None
        text = self.embedded.shape[1] - self.front
        positions = torch.cat([torch.arange(n, device=self.embedded.device) for n in (self.front, text)]).repeat(2, 1)
        if not takes(self.body, "attention_mask"):
            return {"position_ids": positions}
        # with a mask, a body does not take the second beginning for another sequence
        return {"position_ids": positions, "attention_mask": torch.ones_like(positions)}


def sample(body: nn.Module, width: int | None = None) -> Sample:
    """Ids across the vocabulary, and their embeddings; for a body without a table random embeddings of ``width`` alone."""
    count = _length(body)
    table = _table(body)
    if table is not None:
        entries, device = table.weight.shape[0], table.weight.device
        ids = (torch.arange(1, count + 1, device=device) * max(entries // (count + 2), 1) + 1) % entries
        rows = torch.stack([ids, torch.cat([ids[: count // 2], ids[count // 2 :].flip(0)])])  # two texts behind the same tokens
        return Sample(body, rows, table(rows), count // 2)
    like = next(p for p in body.parameters() if p.is_floating_point())
    drawn = torch.randn(2, count, width, generator=torch.Generator().manual_seed(0))
    drawn[1, : count // 2] = drawn[0, : count // 2]
    return Sample(body, None, drawn.to(like.device, like.dtype), count // 2)


def _length(body: nn.Module) -> int:
    """Tokens that every window of the model sees at once."""
    config = getattr(body, "config", None)
    windows = [value for name in _WINDOW if isinstance(value := getattr(config, name, None), int) and value > 0]
    return max(4, min([_LONGEST, *windows]))


def _table(body: nn.Module) -> nn.Module | None:
    table = body.get_input_embeddings() if hasattr(body, "get_input_embeddings") else None
    return table if isinstance(getattr(table, "weight", None), Tensor) and table.weight.dim() == 2 else None


def table_width(body: nn.Module) -> int | None:
    """Width of what a body takes for a token, by its table; None: it has none."""
    table = _table(body)
    return None if table is None else getattr(table, "embedding_dim", table.weight.shape[1])


def causal(body: nn.Module) -> bool | None:
    """Whether no token of ``body`` sees a later one, tried on two texts that end differently; None where it cannot be tried."""
    if not runs(body) or _table(body) is None:
        return None
    with quiet(body):
        both = sample(body)
        other = Sample(body, torch.cat([both.ids[:, :-1], both.ids[:, :1]], 1), both.embedded, both.front)
        try:
            a, b = (first_tensor(each.run(slice(None))).float() for each in (both, other))
        except Exception:
            return None
    return bool(torch.allclose(a[:, :-1], b[:, :-1], atol=1e-5 * max(1.0, a.abs().max().item()), rtol=1e-3))


def runs(body: nn.Module) -> bool:
    """Whether ``body`` has all of its weights here, whole."""
    if torch.compiler.is_compiling():
        return False
    return all(not p.is_meta and not hasattr(p, "device_mesh") for p in body.parameters())


def short(error: Exception) -> str:
    """An error of the model's, in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def hidden(last: nn.Module, run: Callable[[], Any]) -> Tensor:
    """The output of the block ``last`` while ``run()`` runs, which goes no further."""
    found: list[Tensor] = []

    def stop(module: nn.Module, args: Any, y: Any) -> None:
        found.append(first_tensor(y))
        raise _Seen

    handle = last.register_forward_hook(stop)
    try:
        run()
    except _Seen:
        pass
    finally:
        handle.remove()
    return found[-1]


def padded(tokens: Sample, seen: Callable[[Callable[[], Any]], Tensor]) -> dict[str, Tensor]:
    """A mask of the text whose first row has padding at its left; none where the body takes none, or does not run with it."""
    from trimtab.compat.bodies import takes

    if not takes(tokens.body, "attention_mask"):
        return {}
    mask = torch.ones(2, tokens.embedded.shape[1] - tokens.front, dtype=torch.long, device=tokens.embedded.device)
    mask[0, 0] = 0
    try:
        seen(lambda: tokens.run(tokens.text, attention_mask=mask))
    except Exception:  # (it wants its mask in another form)
        return {}
    return {"attention_mask": mask}


def enough(blocks: Sequence[nn.Module]) -> int:
    """How many of the first blocks contain each kind of block; two at least, so that what one hands the next is seen, too."""
    first: dict[tuple, int] = {}
    for index, block in enumerate(blocks):
        first.setdefault(_kind(block), index)
    return min(max(max(first.values()) + 1, 2), len(blocks))


def _kind(block: nn.Module) -> tuple:
    """What tells kinds of blocks apart: their modules, and the switches set in them."""
    return tuple(
        (name, base_class(module), *sorted((k, repr(v)) for k, v in vars(module).items() if _switch(k, v)))
        for name, module in block.named_modules()
        if "trimtab" not in name
    )


def _switch(name: str, value: Any) -> bool:
    return not name.startswith(("_", "training")) and (value is None or isinstance(value, bool | str))


@contextmanager
def quiet(body: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, nothing collected, the random state untouched, no passages."""
    from trimtab.compat.bodies import unrecorded
    from trimtab.core.tokens import entered

    training = [module for module in body.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), unrecorded(), entered(()):
            yield
    finally:
        for module in training:
            module.training = True
