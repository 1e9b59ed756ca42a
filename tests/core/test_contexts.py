"""``disabled``, ``routed``, ``scaled`` and an ``activate`` inside them are values of the caller's context.

The right outputs are those of the model with the adapters activated one by one, outside of all contexts.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import itertools
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small_net import net, shake
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trimtab as tt
from trimtab.core.activation import scaled

NAMES = ("a", "b")
IDS = torch.arange(10).reshape(2, 5)


def model_with(*, targets: str = "q_proj | v_proj | down_proj", methods=None) -> nn.Module:
    model = net().eval()
    for seed, name in enumerate(NAMES):
        method = (methods or {}).get(name, tt.LoRA(rank=2))
        tt.attach(model, method, targets=targets, name=name, rng=torch.Generator().manual_seed(seed), check_gradients=False)
        torch.manual_seed(seed)
        shake(model, name)
    tt.activate(model, "a")
    return model


def alone(model: nn.Module, *names: str) -> Tensor:
    before = model.__dict__["_trimtab_state"].active
    tt.activate(model, *names)
    y = model(IDS)
    tt.activate(model, *before)
    return y


def same(x: Tensor, y: Tensor) -> None:
    torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def served() -> tuple[nn.Module, dict[str | None, Tensor]]:
    model = model_with()
    with torch.no_grad():
        return model, {None: alone(model), "a": alone(model, "a"), "b": alone(model, "b")}


def rows_of(expected: dict, rows) -> Tensor:
    return torch.stack([expected[name][i] for i, name in enumerate(rows)])


ROUTES = [["a", "b"], ["b", None], [None, "a"], ["b", "b"]]


def test_a_nested_block_gives_back_the_outer_one(served) -> None:
    model, expected = served
    with torch.no_grad():
        with tt.routed(model, ["a", "b"]):
            with tt.disabled(model):
                same(model(IDS), expected[None])
                with tt.routed(model, ["b", None]):
                    same(model(IDS), rows_of(expected, ["b", None]))
                same(model(IDS), expected[None])
            same(model(IDS), rows_of(expected, ["a", "b"]))
            tt.activate(model, "b")
            same(model(IDS), expected["b"])
        same(model(IDS), expected["a"])
        with tt.disabled(model):
            tt.activate(model, "b")
            same(model(IDS), expected["b"])
        same(model(IDS), expected["a"])
        with pytest.raises(RuntimeError, match="out"), tt.routed(model, ["b", "b"]):
            raise RuntimeError("out")
        same(model(IDS), expected["a"])


def test_factors_weigh_what_rows_and_names_change(served) -> None:
    model, expected = served
    hosts = model.__dict__["_trimtab_state"].hosts
    with torch.no_grad(), scaled(model, dict.fromkeys(hosts, 0.0)):
        same(model(IDS), expected[None])
        with tt.routed(model, ["a", "b"]):
            same(model(IDS), expected[None])
            with scaled(model, {}):
                same(model(IDS), rows_of(expected, ["a", "b"]))
        tt.activate(model, "b")
        same(model(IDS), expected[None])


def test_two_hundred_threads_get_their_own(served) -> None:
    """Plain, disabled and routed forwards at once on one model: every output is right, and nothing stays behind."""
    model, expected = served
    before = {key: value.clone() for key, value in model.state_dict().items()}
    objects = {name: id(p) for name, p in model.named_parameters()}
    jobs = list(itertools.islice(itertools.cycle(["plain", "disabled", *ROUTES]), 200))
    barrier = threading.Barrier(20, timeout=60)

    def work(job) -> Tensor:
        with torch.no_grad():
            barrier.wait()
            if job == "plain":
                return model(IDS)
            with tt.disabled(model) if job == "disabled" else tt.routed(model, job):
                first = model(IDS)
                torch.testing.assert_close(model(IDS), first)
                return first

    with ThreadPoolExecutor(20) as pool:
        outputs = list(pool.map(work, jobs))
    wrong = 0
    for job, y in zip(jobs, outputs, strict=True):
        right = expected["a"] if job == "plain" else expected[None] if job == "disabled" else rows_of(expected, job)
        wrong += not torch.allclose(y, right, atol=1e-5)
    assert wrong == 0
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    copy.deepcopy(model), pickle.dumps(model)


def test_threads_train_through_their_own_routes() -> None:
    """Gradients of routed rows in several threads add up to those of the same rows one after the other."""
    def gradients(run) -> list[Tensor]:
        model = model_with()
        run(model)
        return [p.grad for name in NAMES for p in tt.parameters(model, name)]

    def step(model: nn.Module, rows) -> Tensor:
        with tt.routed(model, rows):
            return model(IDS).pow(2).mean()

    def at_once(model: nn.Module) -> None:
        with ThreadPoolExecutor(4) as pool:
            losses = list(pool.map(lambda rows: step(model, rows), ROUTES * 2))
        sum(losses).backward()

    for a, b in zip(gradients(at_once), gradients(lambda m: sum(step(m, r) for r in ROUTES * 2).backward()), strict=True):
        same(a, b)


def test_a_route_follows_the_parameters_while_it_is_open() -> None:
    model = model_with()
    optimizer = torch.optim.SGD([p for name in NAMES for p in tt.parameters(model, name)], lr=0.5)
    with tt.routed(model, ["a", "b"]):
        for _ in range(3):
            optimizer.zero_grad()
            model(IDS).pow(2).mean().backward()
            optimizer.step()
        y = model(IDS)
    same(y, torch.stack([alone(model, "a")[0], alone(model, "b")[1]]))


def test_tasks_of_one_thread_get_their_own(served) -> None:
    model, expected = served

    async def one(rows) -> bool:
        with tt.routed(model, rows) if rows is not None else tt.disabled(model):
            right = expected[None] if rows is None else rows_of(expected, rows)
            good = True
            for _ in range(3):
                await asyncio.sleep(0)
                good &= torch.allclose(model(IDS), right, atol=1e-5)
            good &= torch.allclose(await asyncio.to_thread(model, IDS), right, atol=1e-5)
        await asyncio.sleep(0)
        return good and torch.allclose(model(IDS), expected["a"], atol=1e-5)

    async def everything() -> list[bool]:
        return await asyncio.gather(*[one(rows) for rows in [*ROUTES, None] * 3])

    with torch.no_grad():
        assert all(asyncio.run(everything()))


def test_spans_belong_to_their_thread() -> None:
    model = net().eval()
    tt.attach(model, tt.ReFT(rank=2, last=1), targets="layers.1.down_proj", check_gradients=False)
    shake(model)
    stops = [torch.tensor([n, m]) for n in (2, 3, 4, 5) for m in (2, 3, 4, 5)]

    def one(stop: Tensor) -> Tensor:
        with torch.no_grad(), tt.spans(model, stop):
            return model(IDS)

    expected = [one(stop) for stop in stops]
    with ThreadPoolExecutor(16) as pool:
        for y, right in zip(pool.map(one, stops * 10), expected * 10, strict=True):
            same(y, right)
    with tt.spans(model, stops[0]):
        assert copy.deepcopy(model)._trimtab_state.groups["default"].adapters[0].span is None


def test_a_thread_sees_a_block_only_with_its_context(served) -> None:
    model, expected = served
    with torch.no_grad(), tt.disabled(model), ThreadPoolExecutor(1) as pool:
        same(pool.submit(torch.no_grad()(model), IDS).result(), expected["a"])
        same(pool.submit(contextvars.copy_context().run, torch.no_grad()(model), IDS).result(), expected[None])


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_carries_no_block(served, twin, tmp_path) -> None:
    model, expected = served
    for block in (tt.routed(model, ["b", None]), tt.disabled(model), scaled(model, dict.fromkeys(model._trimtab_state.hosts, 0.0))):
        with torch.no_grad(), block:
            other = twin(model)
            same(other(IDS), expected["a"])
            with tt.disabled(other):
                same(other(IDS), expected[None])
            torch.save(model.state_dict(), tmp_path / "state.pt")
            tt.save(model, tmp_path / "b", name="b")
        assert set(torch.load(tmp_path / "state.pt")) == set(model.state_dict())
        fresh = net().eval()
        tt.load(fresh, tmp_path / "b", name="b")
        same(fresh(IDS), expected["b"])


def test_nothing_is_merged_inside_a_block() -> None:
    model = model_with()
    y = alone(model, "a")
    for block in (tt.routed(model, ["a", None]), tt.disabled(model), scaled(model, {})):
        with block, pytest.raises(tt.NotMergeable, match="block of .* is open"):
            tt.merge(model, "a")
    entered, leave = threading.Event(), threading.Event()

    def elsewhere() -> None:
        with tt.routed(model, ["a", None]):
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    entered.wait(30)
    with pytest.raises(tt.NotMergeable, match="in another thread"):
        tt.merge(model, "a")
    leave.set()
    thread.join()
    tt.merge(model, "a")
    same(model(IDS), y)
    for refused in (tt.disabled(model), tt.routed(model, ["a", None])):
        with pytest.raises(tt.Unsupported, match="merged"), refused:
            model(IDS)
    tt.unmerge(model, "a")
    same(model(IDS), y)


def test_what_is_attached_inside_a_block_acts_after_it() -> None:
    model = model_with()
    base = alone(model)
    with tt.disabled(model):
        tt.attach(model, tt.LoRA(rank=2), targets="o_proj", name="new", check_gradients=False)
        shake(model, "new")
        same(model(IDS), base)
    assert model._trimtab_state.active == ("a", "new")
    assert not torch.allclose(model(IDS), base)


class Checkpointed(nn.Module):
    """A net whose layers run again in backward."""

    def __init__(self, inner: nn.Module, reentrant: bool, depth: int = 1):
        super().__init__()
        self.inner, self.reentrant, self.depth = inner, reentrant, depth

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.inner.layers:
            run = layer
            for _ in range(self.depth):
                run = self.again(run)
            h = run(h)
        return h

    def again(self, run):
        return lambda h: checkpoint(run, h, use_reentrant=self.reentrant)


BLOCKS = {
    "routed": lambda m: tt.routed(m, ["b", None]),
    "disabled, then another": lambda m: tt.disabled(m),
    "scaled": lambda m: scaled(m, dict.fromkeys(m._trimtab_state.hosts, 0.5)),
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("reentrant", "depth"), [(False, 1), (True, 1), (False, 2), (True, 2)])
@pytest.mark.parametrize("where", ["inside", "after", "in another", "on a thread"])
def test_a_checkpoint_repeats_the_block_of_its_forward(block, reentrant, depth, where) -> None:
    """Two forwards, one in a block and one outside of it, before one backward."""
    torch.manual_seed(0)
    h0 = torch.randn(2, 5, 16)

    def gradients(repeat: bool) -> list[Tensor]:
        model = model_with()
        run = Checkpointed(model, reentrant, depth) if repeat else lambda h: [h := layer(h) for layer in model.layers][-1]
        h = h0.clone().requires_grad_(True)
        with BLOCKS[block](model):
            loss = run(h).pow(2).mean()
            loss = loss + 0 if where == "inside" else loss
            if where == "inside":
                loss.backward()
        if where != "inside":
            loss = loss + run(h).pow(3).mean()
        if where == "after":
            loss.backward()
        elif where == "in another":
            with tt.routed(model, ["b", "b"]):
                loss.backward()
        elif where == "on a thread":
            with ThreadPoolExecutor(1) as pool:
                pool.submit(loss.backward).result()
        return [h.grad, *(p.grad for name in NAMES for p in tt.parameters(model, name))]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        same(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b)


def test_a_repeated_forward_that_nothing_tells_is_refused() -> None:
    """Another library's checkpoint, after a block with gradients."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, layer, h):
            ctx.layer, ctx.h = layer, h.detach()
            return layer(h)

        @staticmethod
        def backward(ctx, g):
            with torch.enable_grad():
                h = ctx.h.requires_grad_(True)
                return None, torch.autograd.grad(ctx.layer(h), h, g)[0]

    model = model_with()
    h = torch.randn(2, 5, 16, requires_grad=True)
    Own.apply(model.layers[0], h).sum().backward()
    with torch.no_grad(), tt.disabled(model):
        model(IDS)
    Own.apply(model.layers[0], h).sum().backward()
    with tt.routed(model, ["a", None]):
        y = Own.apply(model.layers[0], h)
        model(IDS)
    with pytest.raises(tt.Unsupported, match="which forward it repeats"):
        y.sum().backward()


def test_compiled_models_follow_the_block_and_switch_without_recompiling() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = model_with()
    with torch.no_grad():
        expected = {None: alone(model), "a": alone(model, "a"), "b": alone(model, "b")}
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        same(compiled(IDS), expected["a"])
        with tt.disabled(model):
            same(compiled(IDS), expected[None])
        seen = counter.frame_count
        for _ in range(2):
            tt.activate(model, "b")
            same(compiled(IDS), expected["b"])
            with tt.disabled(model):
                same(compiled(IDS), expected[None])
            tt.activate(model, "a")
            same(compiled(IDS), expected["a"])
        assert counter.frame_count == seen
        with tt.disabled(model):
            tt.activate(model, "b")
            same(compiled(IDS), expected["b"])
        with tt.routed(model, ["b", None]):
            same(compiled(IDS), rows_of(expected, ["b", None]))
        same(compiled(IDS), expected["a"])

        async def task(block, right) -> bool:
            with block:
                await asyncio.sleep(0)
                return torch.allclose(compiled(IDS), right, atol=1e-5)

        async def both() -> list[bool]:
            return await asyncio.gather(task(tt.disabled(model), expected[None]), task(scaled(model, {}), expected["a"]))

        assert asyncio.run(both()) == [True, True]
