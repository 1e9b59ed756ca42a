"""The blocks of a model: lists of layers of one kind, and the towers that they make up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from trimtab.core.roles import attention_roles
from trimtab.core.structure import class_of, has_matrix, is_matrix, is_norm, sizes

__all__ = ["Tower", "beside", "block_paths", "towers"]

#: what joins towers, or makes outputs, and is no tower itself
_JOINT = re.compile(r"merger|projector|connector|adapter|(^|[._])heads?($|[._])|downsampl|upsampl|embedd|predictor", re.IGNORECASE)


@dataclass(frozen=True)
class Tower:
    """Blocks that one part of a model runs one after the other: an encoder, a decoder, a vision tower.

    Attributes:
        path: path of the list that holds them; a ``*`` where a number stands, if they are in several (the stages of a Swin).
        blocks: their indices in the anatomy.
    """

    path: str
    blocks: tuple[int, ...]


def towers(blocks: tuple[str, ...]) -> tuple[Tower, ...]:
    """The towers of a model, in the order of their first blocks; lists that differ in a number alone are one."""
    lists: dict[str, dict[str, list[int]]] = {}
    for index, path in enumerate(blocks):
        home = path.rpartition(".")[0]
        lists.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", home), {}).setdefault(home, []).append(index)
    found = [(pattern if len(homes) > 1 else next(iter(homes)), homes) for pattern, homes in lists.items()]
    return tuple(Tower(path, tuple(sorted(i for run in homes.values() for i in run))) for path, homes in found)


def beside(main: str, blocks: tuple[str, ...], found: tuple[Tower, ...]) -> tuple[str, ...]:
    """Outermost modules of the towers that are not those of the module ``main``, and hold none of its own.

    Where ``main`` holds several towers (a text model with its vision tower in it), its own is the one nearest to it.
    """

    def below(path: str) -> bool:
        return not main or path.startswith(f"{main}.")

    own = [t for t in found if below(t.path)]
    if not own:
        return ()
    nearest = min(t.path.count(".") for t in own)
    own = [t for t in own if t.path.count(".") == nearest]
    mine = [blocks[t.blocks[0]] for t in own]
    away = []
    for tower in found:
        names = blocks[tower.blocks[0]].split(".")
        paths = [".".join(names[:depth]) for depth in range(1, len(names))]
        apart = next((p for p in paths if not any(f"{m}.".startswith(f"{p}.") for m in mine)), None)
        if tower not in own and apart is not None:
            away.append(apart)
    return tuple(dict.fromkeys(away))


def block_paths(modules: dict[str, nn.Module]) -> list[str]:
    """Elements of the outermost lists whose elements have attention, or mix tokens and come back to their norm's width.

    Every list is judged by itself, so that a tower which is recognised hides no other. Where a model has neither, lists of
    elements with a norm (convolutional stages) are its blocks.
    """
    candidates = _candidates(modules)
    chosen = _outermost(candidates, modules, (_attends, _returns)) or _outermost(candidates, modules, (_has_norm,))
    position = {path: i for i, path in enumerate(modules)}
    return sorted(chosen, key=position.__getitem__)


def _outermost(candidates: dict[str, list[str]], modules: dict[str, nn.Module], tests: tuple) -> list[str]:
    """Elements of the lists that pass one of the tests; the first test that any list passes at a place decides there."""
    passing: dict[str, list[str]] = {}
    for test in tests:
        for path, elements in candidates.items():
            covered = any(path.startswith(f"{e}.") or _around(path, e) for listed in passing.values() for e in listed)
            if not covered and path not in passing and any(test(element, candidates, modules) for element in elements):
                passing[path] = elements
    return [element for elements in passing.values() for element in elements]


def _around(path: str, element: str) -> bool:
    """Whether the list ``path`` has ``element`` in one of its elements: it is then made of blocks, and none itself."""
    return element.startswith(f"{path}.") and element.rpartition(".")[0] != path


def _candidates(modules: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Lists of modules that may be blocks: path of the list -> paths of its elements."""
    found = {}
    for path, module in modules.items():
        children = [c for c in module._modules.values() if c is not None]
        sequence = isinstance(module, nn.ModuleList) or (
            isinstance(module, nn.Sequential) and len({class_of(c) for c in children}) == 1
        )
        if not sequence or not children:
            continue
        if all(any(True for _ in c.children()) and has_matrix(c) for c in children):
            found[path] = [f"{path}.{name}" if path else name for name, c in module._modules.items() if c is not None]
    # a list of different things inside an element of another list, or that is one itself, is its make-up (T5), not blocks
    elements = {e for listed in found.values() for e in listed}
    for path in list(found):
        inside = any(path == element or path.startswith(f"{element}.") for element in elements)
        if inside and (
            len({class_of(modules[e]) for e in found[path]}) > 1 or (path in elements and _differ(found[path], modules))
        ):
            del found[path]
    return found


def _differ(elements: list[str], modules: dict[str, nn.Module]) -> bool:
    """Whether some of the elements attend and others do not, though all are of one class (a norm around either)."""
    found = {bool(attention_roles(e, [p for p in modules if p.startswith(f"{e}.")], modules)) for e in elements}
    return len(found) > 1


def _own(element: str, candidates: dict[str, list[str]], modules: dict[str, nn.Module]) -> Iterator[str]:
    """Paths below ``element`` that no nested list covers; none if it is such a list itself (the blocks of a stage)."""
    if element in candidates:
        return
    nested = [p for p in candidates if p.startswith(f"{element}.")]
    for path in modules:
        if path.startswith(f"{element}.") and not any(path == n or path.startswith(f"{n}.") for n in nested):
            yield path


def _attends(element: str, candidates: dict[str, list[str]], modules: dict[str, nn.Module]) -> bool:
    roles = attention_roles(element, list(_own(element, candidates, modules)), modules)
    return any(role != "indexer" for role in roles.values())


def _returns(element: str, candidates: dict[str, list[str]], modules: dict[str, nn.Module]) -> bool:
    """Whether the element's matrices read what its norm gives, and bring something back to that width."""
    if _JOINT.search(element):
        return False
    own = list(_own(element, candidates, modules))
    weights = [getattr(modules[p], "weight", None) for p in own if is_norm(p, modules[p])]
    widths = {w.shape[0] for w in weights if w is not None and w.dim() == 1}
    shapes = [sizes(modules[p]) for p in own if is_matrix(modules[p])]
    return len(shapes) > 1 and any(w in [fan_in for _, fan_in in shapes] and w in [out for out, _ in shapes] for w in widths)


def _has_norm(element: str, candidates: dict[str, list[str]], modules: dict[str, nn.Module]) -> bool:
    return any(is_norm(p, modules[p]) for p in _own(element, candidates, modules))
