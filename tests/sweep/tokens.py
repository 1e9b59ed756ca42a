"""What learned tokens do in a causal model, against the same computed by hand: ``prompt(built)`` and ``prefix(built)``.

A verdict is ``"equal"``, ``"refused: ..."`` (one of our errors), ``"base fails"``, or begins with ``WRONG`` or ``CRASH``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import trimtab as tt
from sweep.tiny_models import Built
from trimtab.core import anatomy
from trimtab.core.errors import TrimtabError

__all__ = ["cached", "found", "prefix", "prompt", "prompted", "short", "widened"]

P, T, STEPS = 3, 6, 3
_WINDOWS = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size", "index_topk")


def widened(built: Built) -> nn.Module:
    """A model like ``built``'s whose windows and selections hold all tokens of a trial (they cut ``[P; x]``, and never learned
    tokens), a decoder where it can be one, its weights large enough that tokens see each other."""
    config = built.model.config
    for each in (config, config.get_text_config()):
        for name in _WINDOWS:
            if isinstance(getattr(each, name, None), int) and getattr(each, name) > 0:
                setattr(each, name, 64)
    if getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder:
        config.is_decoder = True
    model = type(built.model)(config).float().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(torch.randn(p.shape, generator=generator) * 0.02)
                spread = p.std().item() if p.dim() > 1 else 1.0
                p.mul_(min(0.2 / spread, 10.0) if 0 < spread < 0.2 else 1.0)
    return model


def ids(rows: int = 2, count: int = T) -> Tensor:
    return torch.randint(5, 90, (rows, count), generator=torch.Generator().manual_seed(1))


def _logits(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output[0]


def _far(a: Tensor, b: Tensor, effect: float) -> bool:
    return a.shape != b.shape or not (a - b).abs().max().item() <= 2e-3 * effect + 1e-5 * b.abs().max().item()


def _verdict(model: nn.Module, check: Callable[[], str | None]) -> str:
    try:
        with torch.no_grad():
            model(input_ids=ids())
    except Exception:
        return "base fails"
    try:
        problem = check()
    except TrimtabError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"CRASH {type(error).__name__}: {error}"
    return "equal" if problem is None else f"WRONG {problem}"


def _text_blocks(model: nn.Module) -> Callable[[str, nn.Module], bool] | None:
    """The blocks of the text's stack, where a model has towers for images or sounds, too."""
    blocks = anatomy.of(model).blocks
    other = [path for path in blocks if re.search(r"vision|visual|image|img|audio|speech", path)]
    return (lambda path, module: path in blocks and path not in other) if other and len(other) < len(blocks) else None


def prompted(model: nn.Module) -> Tensor:
    """Attach a prompt of N(0, 1) entries; returns it."""
    method = tt.PromptTuning(tokens=P, init="normal", std=1.0)
    tt.attach(model, method, targets=_text_blocks(model), rng=torch.Generator().manual_seed(2))
    return tt.parameters(model)[0]


def prompt(model: nn.Module) -> str:
    """The prompt against ``[P; x]`` in the bare model: logits of the text.

    Where a model has a table of positions, the text keeps its own, from its first row on, as the prompt does.
    """

    def check() -> str | None:
        p, x = prompted(model).detach(), ids()
        with torch.no_grad():
            got = _logits(model(input_ids=x))
            with tt.disabled(model):
                base = _logits(model(input_ids=x))
                both = torch.cat([p.expand(2, -1, -1), model.get_input_embeddings()(x)], 1)
                own = torch.cat([torch.arange(P), torch.arange(T)])[None].expand(2, -1)
                wanted = [_logits(model(inputs_embeds=both.clone()))[:, P:]]
                body = tt.core.state.state_of(model).groups["default"].adapters[0].site.module._modules["trimtab"]
                if body.manner == "beside" and not body.rotates:
                    mask = torch.ones(2, P + T, dtype=torch.long)
                    wanted.append(_logits(model(inputs_embeds=both.clone(), position_ids=own, attention_mask=mask))[:, P:])
        effect = (got - base).abs().max().item()
        if effect == 0:
            return "it changes nothing"
        off = min((got - want).abs().max().item() / effect for want in wanted)
        return f"it is off [P; x] by {off:.0e} of its effect" if all(_far(got, want, effect) for want in wanted) else None

    return _verdict(model, check)


def prefix(model: nn.Module) -> str:
    """A prefix in every attention: it changes the logits, and gets gradients.

    That it acts as keys in front do is what is tried when it is attached.
    """

    def check() -> str | None:
        x = ids()
        with torch.no_grad():
            base = _logits(model(input_ids=x))
        method = tt.PrefixTuning(tokens=P, std=1.0)
        tt.attach(model, method, targets=_text_blocks(model), rng=torch.Generator().manual_seed(2))
        got = _logits(model(input_ids=x))
        got.float().pow(2).mean().backward()
        still = [n for n, q in model.named_parameters() if q.requires_grad and (q.grad is None or not q.grad.abs().sum() > 0)]
        if still:
            return f"no gradient reaches {still[0]}"
        return None if (got - base).abs().max() > 0 else "it changes nothing"

    return _verdict(model, check)


def cached(model: nn.Module) -> str:
    """Generation with a cache against generation without, logits of every step; a padded row against the row alone.

    What the base itself does not keep (a cache that changes its output, padding that does) is not asked of the adapter; nor that
    padding changes nothing in a model that counts it in its positions, since ``generate`` cannot tell it any.
    """

    def check() -> str | None:
        x = ids()
        mask = torch.ones_like(x)
        mask[0, :2] = 0
        for rows, seen in ((x, torch.ones_like(x)), (x * mask, mask)):
            if _off(_steps(model, rows, seen, True), _steps(model, rows, seen, False)) and not _base_is_off(model, rows, seen):
                return "a cache changes it"
        if "position_ids" not in inspect.signature(model.forward).parameters:
            return None
        alone = _steps(model, x[:1, 2:], mask[:1, 2:], True)
        if _off(_steps(model, x * mask, mask, True)[:, :1], alone):
            with tt.disabled(model):
                if not _off(_steps(model, x * mask, mask, True)[:, :1], _steps(model, x[:1, 2:], mask[:1, 2:], True)):
                    return "padding changes it"
        return None

    return _verdict(model, check)


def _base_is_off(model: nn.Module, x: Tensor, mask: Tensor) -> bool:
    with tt.disabled(model):
        return _off(_steps(model, x, mask, True), _steps(model, x, mask, False))


def _off(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-4 * b.abs().max())


def _steps(model: nn.Module, x: Tensor, mask: Tensor, cache: bool) -> Tensor:
    """Logits of every step, ``(steps, n, vocabulary)``."""
    more = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
    more |= {"output_logits": True, "return_dict_in_generate": True, "use_cache": cache}
    with torch.no_grad():
        return torch.stack(model.generate(x, attention_mask=mask, **more).logits)


def found(built: Built) -> dict[str, str]:
    """All verdicts of one architecture."""
    rows = {}
    for name, check in (("prompt", prompt), ("prefix", prefix)):
        model = widened(built)
        rows[name] = check(model)
        if rows[name] == "equal":
            rows[f"{name} cached"] = cached(model)
    return rows


def short(verdict: str) -> str:
    """A verdict without numbers and without what hangs on them."""
    return re.sub(r"[-+.e\d]*\d[-+.e\d]*", "#", verdict.replace("\n", " "))[:150]
