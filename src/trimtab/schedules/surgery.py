"""Cut units out of a base: smaller dense matrices in place of the whole ones, adapters too; and put the very originals back.

The base is never written: ``cut`` gives the modules new, smaller parameters, made by index_select. What becomes of the whole ones
is ``originals``: ``"keep"`` holds them where they are, ``"host"`` in the memory of the CPU, ``"drop"`` nowhere, so that they are
freed if nobody else holds them; putting them back then needs the base again (a state dict, a model, a file), which is compared
with what was left, bit for bit.

Adapters follow their places: what carries cut inputs or outputs (``Adapter.in_axes``, ``out_axes``) loses the same entries, and the
optimizer's state with it; parameters stay the same objects.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from trimtab.core import anatomy as anatomy_module
from trimtab.core.contracts import Adapter
from trimtab.core.cut import ATTRIBUTE, Cut, Kept, Slice, by_units, cut_of
from trimtab.core.errors import CheckpointMismatch, TrimtabError, Unsupported, nearest, raise_all
from trimtab.core.state import ATTRIBUTE as STATE
from trimtab.core.state import ModelState, unwrap
from trimtab.schedules import optim
from trimtab.schedules.units import KINDS, Units, find_units

__all__ = ["axis", "check", "check_followers", "cut", "floats", "put_back", "settle", "shared_copy", "slices_of", "trial"]

ORIGINALS = ("keep", "host", "drop")
Resliced = Callable[[nn.Parameter, int, Tensor], None]


def slices_of(model: nn.Module, kept: Kept) -> tuple[dict[str, Slice], list[tuple[nn.Module, str, int]]]:
    """The modules to cut, by path, and the numbers to change: ``(module, attribute, new value)``; for an uncut model.

    Raises:
        Unsupported: a kind, a path or a count that the model does not have; a unit that cannot be cut; nothing left of a layer.
    """
    problems: list[TrimtabError] = []
    found: dict[str, Slice] = {}
    numbers: list[tuple[nn.Module, str, int]] = []
    for kind, places in kept.items():
        if kind not in KINDS:
            raise Unsupported(f"there are no units called {kind!r}{nearest(kind, KINDS)}")
        known = {units.reader: units for units in find_units(model, kind)}
        for path, (count, index) in places.items():
            problem = _problem(known.get(path), path, kind, count, index, known)
            if problem:
                problems.append(Unsupported(problem))
                continue
            units = known[path]
            if len(index) < count:
                found.update({m.path: Slice(m.path, m.side, m.index(index)) for m in units.members})
                numbers += [(module, name, each * len(index)) for module, name, each in units.numbers]
    raise_all(problems)
    return found, numbers


def check(model: nn.Module, kept: Kept) -> None:
    """Raise what ``cut`` would raise."""
    root = unwrap(model)
    check_followers(root.__dict__.get(STATE), slices_of(root, kept)[0])


def _problem(units: Units | None, path: str, kind: str, count: int, index: Tensor, known: Mapping[str, Any]) -> str | None:
    if units is None:
        return f"{path} reads no {kind} in this model{nearest(path, known)}"
    if units.count != count:
        return f"{path} reads {units.count} {kind} in this model, and the cut is of {count}"
    if not len(index):
        return f"none of the {count} {kind} of {path} would be left; keep at least one"
    if int(index[0]) < 0 or int(index[-1]) >= count or bool((index.diff() <= 0).any()):
        return f"the {kind} kept at {path} must be ascending numbers from 0 to {count - 1}, found {index.tolist()[:8]}..."
    return None


@torch.no_grad()
def cut(
    model: nn.Module,
    kept: Kept,
    *,
    originals: str = "keep",
    optimizer: Optimizer | None = None,
    resliced: Resliced = lambda parameter, dim, index: None,
) -> Cut:
    """Leave of every reader's units those in ``kept``; all checks come before the first change.

    Args:
        kept: kind -> path of the reader -> (count, ascending indices). Readers that are not named stay whole.
        originals: what becomes of the uncut parameters: ``"keep"``, ``"host"``, ``"drop"``.
        optimizer: whose state follows.
        resliced: is told of every adapter tensor that was cut: ``(tensor, dim, index)``.

    Raises:
        Unsupported: the model cannot be cut so; it is unchanged then.
    """
    root = unwrap(model)
    if originals not in ORIGINALS:
        raise ValueError(f"originals must be one of {', '.join(ORIGINALS)}, found {originals!r}")
    if cut_of(root) is not None:
        raise Unsupported("units were cut out of this model before; trimtab.schedules.restoration.restore(model) first")
    slices, numbers = slices_of(root, kept)
    state: ModelState | None = root.__dict__.get(STATE)
    followers = check_followers(state, slices)
    left = {kind: {path: (n, index) for path, (n, index) in places.items() if len(index) < n} for kind, places in kept.items()}
    record = Cut(left, slices)
    modules = dict(root.named_modules())
    for adapter, piece in followers:
        adapter.losing(**{"inputs" if piece.side == "in" else "outputs": piece.local(adapter.site.rows)})
    for piece in slices.values():
        record.parameters += [(piece.path, *entry) for entry in _cut_module(modules[piece.path], piece, originals)]
    for module, name, value in numbers:
        record.numbers.append((module, name, getattr(module, name)))
        setattr(module, name, value)
    root.__dict__[ATTRIBUTE] = record
    for adapter, piece in followers:
        for name, dim, index in _follows(adapter, piece):
            tensor = getattr(adapter, name)
            optim.reslice(optimizer, tensor, dim, index)
            resliced(tensor, dim, index)
    _refresh_sites(root, [adapter for adapter, _ in followers])
    return record


def _cut_module(module: nn.Module, piece: Slice, originals: str) -> Iterator[tuple[nn.Module, str, nn.Parameter | None]]:
    """Give ``module`` its smaller parameters and sizes; yields what it had."""
    for tensor in ("weight", "bias"):
        whole = module._parameters.get(tensor)
        if whole is None or (tensor == "bias" and piece.side == "in"):
            continue
        part = whole.detach().index_select(axis(module, tensor, piece.side), piece.index.to(whole.device))
        module._parameters[tensor] = nn.Parameter(part, requires_grad=whole.requires_grad)
        yield module, tensor, _stored(whole, originals)
    _resize(module, piece, len(piece.index))


def settle(record: Cut, originals: str) -> None:
    """Move what a cut has kept to where ``originals`` says."""
    record.parameters = [(*where, None if whole is None else _stored(whole, originals)) for *where, whole in record.parameters]


def _stored(whole: nn.Parameter, originals: str) -> nn.Parameter | None:
    if originals == "drop":
        return None
    if originals == "keep" or whole.device.type in ("cpu", "meta"):
        return whole
    return nn.Parameter(whole.detach().cpu(), requires_grad=whole.requires_grad)


# -- adapters


def check_followers(state: ModelState | None, slices: Mapping[str, Slice]) -> list[tuple[Adapter, Slice]]:
    """The adapters at the places that are cut.

    Raises:
        Unsupported: one of them cannot follow, or is merged.
    """
    problems: list[TrimtabError] = []
    found = []
    for group in state.groups.values() if state else ():
        here = [(a, slices[a.site.path]) for a in group.adapters if a.site.path in slices]
        here = [(a, piece) for a, piece in here if piece.side == "out" or a.site.kind != "vector"]  # a bias has no inputs
        if here and group.merged:
            problems.append(Unsupported(f"the adapter {group.name!r} is merged into weights that would be cut; tt.unmerge it"))
        for adapter, piece in here:
            if (adapter.in_axes if piece.side == "in" else adapter.out_axes) is None:
                problems.append(
                    Unsupported(
                        f"{type(adapter.config).__name__} at {adapter.site.name} cannot follow when "
                        f"{'inputs' if piece.side == 'in' else 'outputs'} of its place are cut away; leave such places out of its "
                        "targets, or take a method that can (LoRA)"
                    )
                )
        found += here
    raise_all(problems)
    return found


def _follows(adapter: Adapter, piece: Slice) -> Iterator[tuple[str, int, Tensor]]:
    """``(tensor, dim, index)`` of what an adapter loses with its place."""
    index, inwards = piece.local(adapter.site.rows), piece.side == "in"
    width = adapter.site.shape[-1 if inwards else 0]
    for name, dim in (adapter.in_axes if inwards else adapter.out_axes).items():
        yield name, dim, by_units(index, width // getattr(adapter, name).shape[dim])  # one entry for several neighbours


def _refresh_sites(root: nn.Module, adapters: Iterable[Adapter]) -> None:
    """Sizes and rows of the places as they are now."""
    parts = anatomy_module.of(root).parts
    for adapter in adapters:
        site = adapter.site
        if site.part is not None:
            site.rows = parts[site.path][site.part]
        stored = site.module._parameters[site.tensor]
        shape = list(site.matrix(stored).shape)
        if site.rows is not None:
            shape[0] = site.rows.count
        site.shape = tuple(shape)


# -- back


@torch.no_grad()
def put_back(root: nn.Module, source: Any = None) -> None:
    """The uncut parameters and numbers, the very originals where they were kept; adapters are not looked at.

    Args:
        source: where dropped parameters come from: a state dict, a model, a safetensors file or a folder of them.

    Raises:
        CheckpointMismatch: it lacks one, or does not agree with what is left of it.
        Unsupported: parameters were dropped and there is no source.
    """
    record = cut_of(root)
    lost = [(path, tensor) for path, _, tensor, whole in record.parameters if whole is None]
    if lost and source is None:
        raise Unsupported(
            f"the whole parameters were dropped when the model was cut ({len(lost)}, first {'.'.join(lost[0])}); "
            "pass source=: the base's state dict, model, or safetensors file"
        )
    found = _read(source, [f"{path}.{tensor}" for path, tensor in lost])
    ready = []
    for path, module, tensor, whole in record.parameters:
        part = module._parameters[tensor]
        if whole is None:
            whole = _compared(f"{path}.{tensor}", found[f"{path}.{tensor}"], part, module, record.slices[path])
        elif whole.device != part.device:
            whole = nn.Parameter(whole.to(part.device))
        ready.append((module, tensor, whole.requires_grad_(part.requires_grad)))
    for (path, *_), (module, tensor, whole) in zip(record.parameters, ready, strict=True):
        module._parameters[tensor] = whole
        if tensor == "weight":
            piece = record.slices[path]
            _resize(module, piece, whole.shape[axis(module, tensor, piece.side)])
    for module, name, value in record.numbers:
        setattr(module, name, value)
    del root.__dict__[ATTRIBUTE]


def axis(module: nn.Module, tensor: str, side: str) -> int:
    """The axis of a stored tensor that a cut of ``side`` shortens."""
    if tensor == "bias":
        return 0
    transposed = not isinstance(module, nn.Linear) and hasattr(module, "nf")
    return int((side == "in") != transposed)


def _resize(module: nn.Module, piece: Slice, size: int) -> None:
    """What a linear layer says of its own size."""
    for name in ("out_features", "nf") if piece.side == "out" else ("in_features", "nx"):
        if hasattr(module, name):
            setattr(module, name, size)


def _read(source: Any, names: list[str]) -> dict[str, Tensor]:
    """The named tensors out of a state dict, a model, or safetensors files."""
    if not names:
        return {}
    if isinstance(source, nn.Module):
        source = source.state_dict()
    if isinstance(source, Mapping):
        found = {name: source[name] for name in names if name in source}
    else:
        from trimtab.compat.safetensors_file import read_header, read_tensor

        path, found = Path(source), {}
        for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            header = read_header(file)
            found |= {name: read_tensor(header, name) for name in names if name in header.entries}
    missing = [name for name in names if name not in found]
    if missing:
        known = list(source) if isinstance(source, Mapping) else []
        raise CheckpointMismatch(f"the source of the base has no tensor {missing[0]}{nearest(missing[0], known)}")
    return found


def _compared(name: str, whole: Tensor, part: Tensor, module: nn.Module, piece: Slice) -> nn.Parameter:
    """A parameter from outside, if what was left of it is the same to the bit."""
    dim = axis(module, name.rpartition(".")[2], piece.side)
    whole = whole.detach().to(part.device)
    fits = whole.dim() == part.dim() and whole.dtype == part.dtype and len(piece.index) <= whole.shape[dim]
    fits = fits and int(piece.index[-1]) < whole.shape[dim]
    if not fits or not torch.equal(whole.index_select(dim, piece.index.to(whole.device)), part):
        raise CheckpointMismatch(f"{name} of the source is another base's: it differs from what this model has left of it")
    return nn.Parameter(whole.clone())


# -- trying first


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose parameters and buffers are the same tensors, adapters' own ones excepted."""
    root = unwrap(model)
    state: ModelState | None = root.__dict__.get(STATE)
    own = {id(t) for g in (state.groups.values() if state else ()) for a in g.adapters for t in (*a.parameters(), *a.buffers())}
    memo = {id(t): t for t in (*root.parameters(), *root.buffers()) if id(t) not in own}
    return copy.deepcopy(root, memo)


@torch.no_grad()
def trial(model: nn.Module, kept: Kept, run: Callable[[nn.Module], Any], expected: list[Tensor]) -> None:
    """Cut a copy, and confirm that it gives what the whole model gives with the other units masked.

    Args:
        run: calls a model on sample data; all floating-point tensors of what it returns are compared.
        expected: those of the masked model.

    Raises:
        Unsupported: the cut model fails, or gives something else.
    """
    twin = shared_copy(model)
    cut(twin, kept, originals="drop")
    advice = "; this architecture counts its units in a way that its modules do not show, and cannot be cut"
    try:
        found = floats(run(twin))
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        raise Unsupported(f"{type(twin).__name__} does not run with units cut out: {error}{advice}") from error
    for ours, theirs in zip(found, expected, strict=True):
        error = (ours.double() - theirs.double()).norm().item() if ours.shape == theirs.shape else float("inf")
        # what roundings can add up to, in the coarsest dtype that takes part
        limit = max(torch.finfo(t.dtype).eps for t in (ours, *_some_floats(twin))) ** 0.5
        if not error <= limit * max(theirs.double().norm().item(), torch.finfo(torch.float32).tiny):
            raise Unsupported(
                f"{type(twin).__name__} with units cut out differs from the masked model by {error:.2e} of "
                f"{theirs.double().norm().item():.2e}{advice}"
            )


def floats(tree: Any) -> list[Tensor]:
    """The floating-point tensors of an output."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _some_floats(model: nn.Module) -> list[Tensor]:
    return [next(p for p in model.parameters() if p.is_floating_point())]
