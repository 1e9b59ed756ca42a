"""The check at the first step: a gradient that the loss forgot is an error, one that could not come is told."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from partial_nets import X, partial

import trimtab as tt
from trimtab.core import guard
from trimtab.core.noting import noted


def step(model, optimizer, loss=lambda out: out["logits"].square().sum(), **inputs):
    """One step; the warnings that it gave."""
    optimizer.zero_grad()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loss(model(X, **inputs)).backward()
        optimizer.step()
    return [str(w.message) for w in told if "gradient" in str(w.message)]


def attached(flaw: str = "", **more):
    model = partial(flaw)
    tt.attach(model, tt.LoRA(rank=2), head=False, **more)
    return model, torch.optim.SGD(tt.parameters(model), lr=0.1)


def test_what_a_forward_does_not_use_is_told_and_is_no_error() -> None:
    """Unused modules, a last block that nobody reads, an index, an idle expert, an absent input, a pooler: all at once."""
    model, optimizer = attached()
    (told,) = step(model, optimizer)
    assert "did not run" in told and "10 (tower.0.q_proj" in told  # two blocks of four, an expert, and what nobody calls
    assert "ran, but none of the model's outputs depends on them: 1 (index)" in told
    assert "stand outside of the blocks, and the loss does not use what they give: 1 (pooler)" in told
    assert step(model, optimizer) == []  # once


@pytest.mark.parametrize("inputs", [{"drop": 0}, {"drop": 2}, {"other": X}, {"other": X, "drop": 1}])
def test_dropped_layers_and_absent_inputs_are_no_error(inputs) -> None:
    model, optimizer = attached(exclude="unused | index | pooler")
    (told,) = step(model, optimizer, **inputs)
    assert ("none of the model's outputs" in told) == ("other" in inputs)
    before = [p.clone() for p in tt.parameters(model)]
    step(model, optimizer, other=X)
    assert any(not torch.equal(a, b) for a, b in zip(before, tt.parameters(model), strict=True))


@pytest.mark.parametrize(
    "loss",
    [
        lambda out: out["pooled"].square().sum() + out["logits"].detach().sum() + 0 * X.sum(),
        lambda out: out["logits"].detach().sum() + torch.zeros(1, requires_grad=True).sum(),
    ],
    ids=["head forgotten", "all detached"],
)
def test_a_loss_that_forgets_what_was_named_is_an_error(loss) -> None:
    model = partial()
    tt.attach(model, tt.LoRA(rank=2), targets=["head", "pooler"], name="a")
    optimizer = torch.optim.SGD(tt.parameters(model), lr=0.1)
    with pytest.raises(tt.GradientMismatch, match=r"received no gradient \(.*head\.trimtab"):
        step(model, optimizer, loss)


def test_a_loss_that_forgets_blocks_is_an_error_for_the_default_too() -> None:
    model = partial()
    tt.attach(model, tt.LoRA(rank=2), head=False)
    optimizer = torch.optim.SGD(tt.parameters(model), lr=0.1)

    def forget(out):
        return (out["logits"].detach() * model.layers[0](X).sum()).sum()  # the first block alone learns

    with pytest.raises(tt.GradientMismatch, match=r"layers\.1"):
        step(model, optimizer, forget)


def test_a_checkpoint_that_cuts_gradients_off_is_an_error_that_names_it() -> None:
    model, optimizer = attached("checkpoint", exclude="unused | index | tower | experts.1")
    with pytest.raises(tt.GradientMismatch, match=r"layers\.0.*use_reentrant"):
        step(model, optimizer, other=None)


def test_a_checkpoint_with_gradients_is_none() -> None:
    model, optimizer = attached("checkpoint", exclude="unused | index | tower | experts.1 | pooler")
    optimizer.zero_grad()
    model(X.clone().requires_grad_(True))["logits"].square().sum().backward()
    optimizer.step()


def test_what_was_named_and_cannot_learn_is_an_error() -> None:
    """It runs, but the model itself lets no gradient back: nothing of what was asked for would be learnt."""
    model = partial("detached inside")
    tt.attach(model, tt.LoRA(rank=2), targets=["layers.0.q_proj", "layers.2.q_proj"])
    optimizer = torch.optim.SGD(tt.parameters(model), lr=0.1)
    with pytest.raises(tt.GradientMismatch, match=r"layers\.0\.q_proj"):
        step(model, optimizer)


def test_what_was_named_and_did_not_run_is_told_by_its_clause() -> None:
    model = partial()
    tt.attach(model, tt.LoRA(rank=2), targets=["layers", "tower"])
    optimizer = torch.optim.SGD(tt.parameters(model), lr=0.1)
    (told,) = step(model, optimizer)
    assert "nothing that targets='tower' names ran in this step" in told


def test_nothing_at_all_is_an_error() -> None:
    model = partial()
    tt.attach(model, tt.LoRA(rank=2), targets="tower")
    optimizer = torch.optim.SGD([*tt.parameters(model), model.head.weight.requires_grad_(True)], lr=0.1)
    with pytest.raises(tt.GradientMismatch, match=r"20|16 of"):
        step(model, optimizer)


def test_a_forward_that_nobody_went_back_through_does_not_count() -> None:
    """A look at the outputs before training, with an input that the first batch lacks."""
    model, optimizer = attached(exclude="unused | index | pooler | experts.1")
    model(X, other=X)
    (told,) = step(model, optimizer)
    assert "did not run" in told


def test_accumulated_forwards_count_together() -> None:
    model, optimizer = attached(exclude="unused | index | pooler | experts.1 | tower.1")
    model(X)["logits"].sum().backward()
    assert step_again(model, optimizer) == []


def step_again(model, optimizer):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model(X, other=X)["logits"].square().sum().backward()
        optimizer.step()
    return [str(w.message) for w in told]


def test_what_never_gets_a_gradient_is_told_again(monkeypatch) -> None:
    monkeypatch.setattr(guard, "LATE", 4)
    model, optimizer = attached(exclude="index | pooler | experts.1")
    step(model, optimizer)
    assert [step(model, optimizer, other=X) for _ in range(3)] == [[], [], []]
    (told,) = step(model, optimizer)
    assert "after 4 optimizer steps 10 declared parameters" in told and "tower.1.q_proj" in told  # and `unused`: not tower.0
    assert step(model, optimizer) == [] and model not in guard._PENDING


def test_nothing_of_the_watch_is_left() -> None:
    gc.collect()
    others = noted.listeners  # models of other tests that still live
    model = partial()
    before = copy.deepcopy(model.__dict__["_forward_hooks"])
    tt.attach(model, tt.LoRA(rank=2), head=False)
    twin = copy.deepcopy(model)
    tt.detach(model, "default")
    assert model._forward_hooks == before and noted.listeners == others and model not in guard._WATCHED
    tt.detach(twin, "default")
    assert not twin._forward_hooks
    tt.attach(model, tt.LoRA(rank=2), head=False)
    assert noted.listeners == others + 1
    del model
    gc.collect()
    assert noted.listeners == others


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_model_is_not_compiled_again_after_the_check(compiled) -> None:
    from torch._dynamo.testing import CompileCounter

    model = partial()
    tt.attach(model, tt.LoRA(rank=2), targets="layers")
    counter = CompileCounter()
    run = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
    optimizer = torch.optim.SGD(tt.parameters(model), lr=0.1)
    for _ in range(3):
        run(X)["logits"].square().sum().backward()
        optimizer.step()
    assert counter.frame_count == int(compiled)


@pytest.mark.parametrize("frozen", [False, True])
def test_running_statistics_that_move_are_told(frozen) -> None:
    """They change what the adapter stands on, and no adapter holds them."""
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    tt.attach(net, tt.LoRA(rank=2), targets=["0", "2"])
    net.train()
    net[1].train(not frozen)
    optimizer = torch.optim.SGD(tt.parameters(net), lr=0.1)
    net(torch.randn(4, 8)).square().sum().backward()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer.step()
    assert [("running statistics" in str(w.message)) for w in told] == [True] * (not frozen)
