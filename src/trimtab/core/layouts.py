"""Which rows of a fused projection are queries, keys and values: found by running the attention on a hollow copy of it.

Names and shapes do not tell it (thirds, head by head, groups, q before v before k). So the projection's output is replaced by a
free tensor, and autograd says what of it reaches the attention's queries, keys and values. Values leave the scores alone, and reach
other tokens' outputs; keys reach other tokens' scores; queries their own token's scores alone. Nothing of the model runs but a copy
without weights, so that a trial costs no memory and works on meta, quantised and sharded models alike.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from trimtab.core.site import Rows
from trimtab.core.structure import class_of, is_matrix, sizes

__all__ = ["Layouts"]

TOKENS = 4
_SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax})
_HIDDEN = ("encoder_hidden_states", "key_value_states", "encoder_states", "residual", "kv", "context", "key", "value", "query")
_ROTARY = ("position_embeddings", "rotary_emb", "rotary_embeddings", "rope", "freqs_cis", "freqs")


class Layouts(Mapping):
    """Path of a fused projection -> part (``q``, ``k``, ``v``) -> its rows; tried when asked for, and kept.

    A path is missing where no trial proves its layout; ``reason(path)`` then says why.
    """

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module], roles: dict[str, str]):
        self._model, self._modules = model, modules
        self._paths = [p for p, role in roles.items() if role in ("attn.qkv", "attn.kv")]
        self._known: dict[Any, dict[str, Rows] | str] = {}

    def __getitem__(self, path: str) -> dict[str, Rows]:
        found = self._look(path) if path in self._paths else ""
        if isinstance(found, str):
            raise KeyError(path)
        return found

    def __iter__(self) -> Iterator[str]:
        return (path for path in self._paths if not isinstance(self._look(path), str))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def fused(self, path: str) -> bool:
        """Whether ``path`` is a fused projection, its layout known or not."""
        return path in self._paths

    def reason(self, path: str) -> str:
        """Why the layout of ``path`` is not known."""
        found = self._look(path)
        return found if isinstance(found, str) else ""

    def _look(self, path: str) -> dict[str, Rows] | str:
        module = self._modules[path]
        if isinstance(module, nn.MultiheadAttention):
            if module.in_proj_weight is None:
                return f"{path} keeps its projections apart"
            return {part: Rows(i * module.embed_dim, module.embed_dim) for i, part in enumerate("qkv")}
        key = _alike(self._modules[path.rpartition(".")[0]], module)
        if key not in self._known:
            with torch.inference_mode(False), torch.enable_grad():  # whatever the caller's own mode is
                self._known[key] = _prove(self._model, self._modules, path)
        return self._known[key]


def _alike(holder: nn.Module, module: nn.Module) -> tuple:
    """What two layers must share for one trial to serve both: class, sizes, and every number of the attention but its index."""
    own = {n: v for n, v in vars(holder).items() if isinstance(v, int | float | str) and "idx" not in n and "index" not in n}
    own = {n: v for n, v in own.items() if n not in ("training", "layer", "layer_id", "layer_number")}
    return class_of(holder), sizes(module), tuple(sorted(own.items(), key=lambda item: item[0]))


# -- one trial


class _Leaf(nn.Module):
    """Stands where the fused projection stood: gives a free tensor of its output's shape."""

    def __init__(self, out: int):
        super().__init__()
        self.out, self.given = out, []

    def forward(self, x: Tensor) -> Tensor:
        y = torch.randn(*x.shape[:-1], self.out, generator=torch.Generator().manual_seed(1)).requires_grad_()
        self.given.append(y)
        return y


class _Thin(nn.Linear):
    """A matrix of rank one in the place of any other: every output depends on every input, and there are no weights."""

    def __init__(self, out: int, fan_in: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = fan_in, out
        self.weight, self.bias = nn.Parameter(_cheap((out, fan_in)), requires_grad=False), None

    def forward(self, x: Tensor) -> Tensor:
        mixed = x.float() @ torch.linspace(0.5, 1.5, x.shape[-1])
        return mixed[..., None] * torch.linspace(-1.0, 1.0, self.out_features) / x.shape[-1] ** 0.5


def _cheap(shape: tuple[int, ...]) -> Tensor:
    """A tensor of ``shape`` that stores its last axis alone."""
    last = torch.linspace(0.1, 1.0, shape[-1]) if shape else torch.tensor(0.5)
    return last.expand(shape)


def _hollow(module: nn.Module, inner: str) -> tuple[nn.Module, _Leaf, nn.Module]:
    """A copy without weights, on the CPU, in eval mode; its free tensor at ``inner``; and the module that holds that."""
    memo: dict[int, Any] = {}
    for m in module.modules():
        memo |= {id(p): nn.Parameter(_cheap(tuple(p.shape)), requires_grad=False) for p in m._parameters.values() if p is not None}
        memo |= {id(b): _buffer(b) for b in m._buffers.values() if b is not None}
        if "_trimtab_state" in m.__dict__:
            memo[id(m.__dict__["_trimtab_state"])] = None
    copied = copy.deepcopy(module, memo)
    fused = copied.get_submodule(inner)
    leaf = _Leaf(sizes(fused)[0])
    for m in list(copied.modules()):
        m.__dict__.pop("_trimtab_state", None)
        m._modules.pop("trimtab", None)
        m.__class__ = class_of(m)
        for name, child in m._modules.items():
            if child is not None and is_matrix(child):
                m._modules[name] = leaf if child is fused else _Thin(*sizes(child))
    holder = copied.get_submodule(inner.rpartition(".")[0])
    return copied.eval(), leaf, holder


def _buffer(buffer: Tensor) -> Tensor:
    if not buffer.is_meta:
        return buffer.detach().float().cpu() if buffer.is_floating_point() else buffer.detach().cpu()
    return torch.ones(buffer.shape, dtype=torch.float32 if buffer.is_floating_point() else buffer.dtype)


class _Watch(TorchFunctionMode):
    """Notes the arguments of attention functions, and the scores that are written out; these are cut off from what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.attended: list[tuple[Tensor, Tensor, Tensor]] = []
        self.scores: list[Tensor] = []

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = [*args, *(kwargs[n] for n in ("query", "key", "value")[len(args) :])]
            self.attended.append(tuple(given[:3]))
        if func in _SOFTMAX:
            self.scores.append(args[0] if args else kwargs["input"])
            return func(*args, **kwargs).detach()
        return func(*args, **kwargs)


    def first(self) -> None:
        """Forget all but the first attention that depends on the free tensor."""
        self.attended = [given for given in self.attended if any(t.requires_grad for t in given)][:1]
        self.scores = [scores for scores in self.scores if scores.requires_grad][:1]


class _Done(Exception):
    """The attention has run; the rest of the model need not."""


def _prove(model: nn.Module, modules: dict[str, nn.Module], path: str) -> dict[str, Rows] | str:
    """The rows of each part, or why they are not known: the modules around are tried from the inside out, then the whole model."""
    around, inner, reason = path, "", "its attention could not be run on its own"
    width = sizes(modules[path])[1]
    while around:
        around, _, name = around.rpartition(".")
        inner = f"{name}.{inner}" if inner else name
        found = _tried(modules[around], inner, list(_calls(modules[around], width)))
        if isinstance(found, dict):
            return found
        reason = found or reason
    found = _tried(model, path, list(_whole_calls(model)))
    return found if isinstance(found, dict) else found or reason


def _tried(module: nn.Module, inner: str, calls: list[dict[str, Any]]) -> dict[str, Rows] | str:
    """Run a hollow copy on each call until one shows the parts; ``""`` if none runs."""
    if not calls:
        return ""
    copied, leaf, holder = _hollow(module, inner)
    outputs: list[Any] = []

    def stop(m: nn.Module, args: tuple, output: Any) -> None:
        outputs.append(output)
        raise _Done

    holder.register_forward_hook(stop)
    reason = ""
    for given in calls:
        outputs.clear()
        leaf.given.clear()
        watch = _Watch()
        try:
            with torch.device("cpu"), watch:
                outputs.append(copied(**given))
            watch.first()  # the holder is no module that is called: other attentions may follow it
        except _Done:
            pass
        except Exception:  # not the arguments that it takes; the next are tried, and running out of them is told
            continue
        if leaf.given:
            found = _told_apart(leaf.given[0], watch, outputs)
            if isinstance(found, dict):
                return found
            reason = found
    return reason


def _told_apart(leaf: Tensor, watch: _Watch, outputs: list[Any]) -> dict[str, Rows] | str:
    """Rows of q, k and v by what a free tensor (..., out) reaches."""
    hits: dict[str, Tensor] = {part: torch.zeros(leaf.shape[-1], dtype=torch.bool) for part in "qkv"}
    if any(t.requires_grad for given in watch.attended for t in given):
        for given in watch.attended:
            for part, tensor in zip("qkv", given, strict=True):
                hits[part] |= _reached(tensor, leaf).any(0)
    elif any(s.requires_grad for s in watch.scores):
        for scores in watch.scores:
            reached = _reached(scores[..., -1, :], leaf)  # the last token's scores
            hits["k"] |= reached[:-1].any(0)
            hits["q"] |= reached[-1]
        hits["q"] &= ~hits["k"]
        hits["v"] = _values(outputs, leaf) & ~hits["k"] & ~hits["q"]
    else:
        return "its attention neither calls an attention function nor takes a softmax of what it projects"
    found = {part: _rows(hit) for part, hit in hits.items() if hit.any()}
    overlap = hits["q"] & hits["k"] | hits["k"] & hits["v"] | hits["q"] & hits["v"]
    if overlap.any() or {"k", "v"} - set(found) or any(rows is None for rows in found.values()):
        return "its attention mixes the projected features before queries, keys and values part"
    return found  # type: ignore[return-value]


def _reached(tensor: Tensor, leaf: Tensor) -> Tensor:
    """Which of a leaf's numbers ``tensor`` depends on, (tokens, out)."""
    if not tensor.requires_grad:
        return torch.zeros(leaf.flatten(0, -2).shape, dtype=torch.bool)
    weight = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(2)) + 0.5
    finite = torch.where(tensor.isfinite(), tensor, torch.zeros_like(tensor))
    (found,) = torch.autograd.grad((finite * weight).sum(), leaf, retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf).bool().flatten(0, -2) if found is None else (found != 0).flatten(0, -2)


def _values(outputs: list[Any], leaf: Tensor) -> Tensor:
    """Rows whose other tokens reach the last token's output, with the probabilities held."""
    tokens = leaf.flatten(0, -2).shape[0]
    for output in outputs:
        for tensor in output if isinstance(output, list | tuple) else [output]:
            if isinstance(tensor, Tensor) and tensor.requires_grad and tensor.flatten(0, -2).shape[0] == tokens:
                return _reached(tensor.flatten(0, -2)[-1], leaf)[:-1].any(0)
    return torch.zeros(leaf.shape[-1], dtype=torch.bool)


def _rows(hit: Tensor) -> Rows | None:
    """A mask over rows as runs of one size, one stride apart; None if it is not so regular."""
    index = hit.nonzero().flatten()
    starts = [int(i) for i, before in zip(index, [None, *index[:-1]], strict=True) if before is None or i != before + 1]
    size, rest = divmod(len(index), len(starts))
    stride = starts[1] - starts[0] if len(starts) > 1 else 0
    rows = Rows(starts[0], size, len(starts), stride)
    return rows if not rest and torch.equal(rows.index(torch.device("cpu")), index) else None


# -- arguments


def _calls(module: nn.Module, width: int) -> Iterator[dict[str, Any]]:
    """Arguments on which an attention may run: tokens in the usual shapes, rotations, masks left out."""
    try:
        names = inspect.signature(inspect.unwrap(class_of(module).forward)).parameters
    except (TypeError, ValueError):
        return
    names = {n: p for n, p in list(names.items())[1:] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    if class_of(module).forward is nn.Module.forward or not names:
        return
    size = next((v for n in ("head_dim", "head_size", "attention_head_size") if isinstance(v := getattr(module, n, None), int)), 0)
    rotated = getattr(module, "rotary_ndims", None) or getattr(module, "qk_rope_head_dim", None) or size
    for shape in ((1, TOKENS), (TOKENS,), (1, 2, 2)):
        x = torch.randn(*shape, width, generator=torch.Generator().manual_seed(0))
        for angles in dict.fromkeys((rotated, size, 0)):
            yield {n: v for i, (n, p) in enumerate(names.items()) if (v := _argument(i, n, p, x, angles, module)) is not _LEFT_OUT}


_LEFT_OUT = object()


def _argument(position: int, name: str, parameter: inspect.Parameter, x: Tensor, angles: int, module: nn.Module) -> Any:
    if position == 0 or name in _HIDDEN:
        return x
    if name in _ROTARY and angles:
        table = torch.linspace(0.1, 1.0, TOKENS * angles).view(*x.shape[:-2], TOKENS, angles) if x.dim() < 4 else None
        return (table, table)
    if name in ("position_ids", "cache_position", "positions"):
        return torch.arange(TOKENS)[None] if name != "cache_position" else torch.arange(TOKENS)
    if name == "cu_seqlens":
        return torch.tensor([0, TOKENS], dtype=torch.int32)
    if name == "rotary_pos_emb" and angles:
        return torch.rand(TOKENS, angles // 2)
    if name == "alibi" or name == "position_bias":
        heads = next((v for n in ("num_heads", "n_heads") if isinstance(v := getattr(module, n, None), int)), 1)
        return torch.zeros(heads, 1, TOKENS)
    return _LEFT_OUT if parameter.default is not parameter.empty else None


def _whole_calls(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Token ids for a whole model that takes them."""
    try:
        names = inspect.signature(inspect.unwrap(class_of(model).forward)).parameters
    except (TypeError, ValueError):
        return
    if "input_ids" in names:
        ids = torch.arange(3, 3 + TOKENS)[None]
        yield {"input_ids": ids} | ({"decoder_input_ids": ids} if "decoder_input_ids" in names else {})
