"""Every argument of every method and schedule has the type that its annotation says, checked before anything else."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any

import pytest

import trimtab as tt
from core.small_net import net
from trimtab.core import registry
from trimtab.core.fieldtypes import leaves, typed
from trimtab.schedules import registry as schedules

METHODS = [(entry.name, entry.config) for entry in registry.entries()]
SCHEDULES = [(entry.name, entry.schedule) for entry in schedules.entries()]
OWNERS = METHODS + SCHEDULES
ARGUMENTS = [(cls, name) for _, cls in OWNERS for name in inspect.signature(cls).parameters]


def hint_of(cls: type, name: str) -> Any:
    return typing.get_type_hints(cls.__init__)[name]


def wrong(cls: type, name: str) -> list[Any]:
    """Values that no annotation of the project means by this one."""
    kinds = leaves(hint_of(cls, name))
    found = [object(), {"a": 1}, {1}, b"x"]
    if bool not in kinds:
        found += [True, False]
    if not {int, float} & kinds:
        found += [3, 2.5]
    if str not in kinds:
        found += ["16", "0.1", ""]
    if type(None) not in kinds:
        found.append(None)
    if float in kinds or int in kinds:
        found += [float("nan"), float("inf"), -float("inf")]
    if int in kinds and float not in kinds:
        found += [2.5, 1.0]
    if not any(typing.get_origin(each) is tuple for each in (hint_of(cls, name), *typing.get_args(hint_of(cls, name)))):
        found += [(1, 2), [1, 2], ("a",)]
    return found


def test_every_argument_is_annotated_and_there_are_many():
    assert len(METHODS) >= 40 and len(SCHEDULES) >= 8 and len(ARGUMENTS) > 150
    assert all(hint_of(cls, name) is not Any for cls, name in ARGUMENTS)


@pytest.mark.parametrize(("cls", "name"), ARGUMENTS, ids=lambda each: each if isinstance(each, str) else each.__name__)
def test_a_value_of_another_type_is_told_with_owner_name_and_value(cls: type, name: str):
    for value in wrong(cls, name):
        with pytest.raises(tt.ShapeMismatch) as caught:
            cls(**{name: value})
        message = str(caught.value)
        assert message.startswith(f"{cls.__name__}: {name} must be ") and message.endswith(f"found {value!r}"), message


@pytest.mark.parametrize(("name", "cls"), OWNERS, ids=[name for name, _ in OWNERS])
def test_defaults_pass_written_out(name: str, cls: type):
    defaults = {key: p.default for key, p in inspect.signature(cls).parameters.items() if p.default is not inspect.Parameter.empty}
    cls(**defaults)


@pytest.mark.parametrize(("name", "cls"), METHODS, ids=[name for name, _ in METHODS])
def test_a_config_is_stored_and_read_back(name: str, cls: type):
    for more in registry.entry(name).tests or ({},):
        config = cls(**more)
        stored = registry.config_to_dict(config)
        lists = {key: list(value) if isinstance(value, tuple) else value for key, value in stored.items()}
        assert registry.config_from_dict(lists) == config


def test_numbers_pass_as_numbers_and_lists_as_tuples():
    assert tt.LoRA(alpha=16).alpha == 16 and tt.LoRA(alpha=None).alpha is None
    assert typed("X", {"a": [[1, 2], [3]]}, {"a": tuple[tuple[int, ...], ...]}) == {"a": ((1, 2), (3,))}
    assert typed("X", {"a": "one"}, {"a": typing.Literal["one", "two"]}) == {"a": "one"}
    message = "X: a must be 'one' or 'two', found 'three'; b must be an integer or None, found True"
    with pytest.raises(tt.ShapeMismatch, match=message):
        typed("X", {"a": "three", "b": True}, {"a": typing.Literal["one", "two"], "b": int | None})
    with pytest.raises(tt.ShapeMismatch, match="grid must be a list of 2: an integer, an integer or None, found"):
        tt.Bat(grid=(1, 2, 3))


def test_a_method_of_a_users_own_is_checked_too():
    @dataclasses.dataclass(frozen=True)
    class Own(tt.MethodConfig):
        """W' = W + c."""

        size: int = 3
        names: tuple[str, ...] = ()

    @tt.method(Own, paper="test")
    class OwnAdapter(tt.Reparameterization):
        def __init__(self, config, site, *, rng):
            super().__init__(config, site)
            self.c = self.zeros(1, 1)

        def weight(self, W):
            return W + self.c

    assert Own(names=["a", "b"]).names == ("a", "b") and Own(4).size == 4
    with pytest.raises(tt.ShapeMismatch, match="Own: size must be an integer, found '3'"):
        Own("3")
    with pytest.raises(tt.ShapeMismatch, match="Own: names must be a list, each entry a text, found 'a'"):
        dataclasses.replace(Own(), names="a")


@pytest.mark.parametrize("layers", [True, "0", 1.0, [True], ["a"], [0.5], "01"])
def test_layers_that_are_no_numbers_of_blocks_are_refused(layers: Any):
    with pytest.raises(tt.NoMatch, match="layers are numbers of blocks, as in"):
        tt.attach(net(), tt.LoRA(rank=2), layers=layers)


def test_one_layer_may_be_a_number():
    models = [net(), net()]
    for model, layers in zip(models, (0, [0]), strict=True):
        tt.attach(model, tt.LoRA(rank=2), layers=layers)
    assert len(set(tuple(p.shape for p in tt.parameters(model)) for model in models)) == 1
