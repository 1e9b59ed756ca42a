"""AdaLoRA's budget: the numbers of its schedule and scores, masks, ranks that are cut with their moments (arXiv 2303.10512)."""

from __future__ import annotations

import pytest
import torch
from small_blocks import adamw, batch, loss, net, scheduled, steps

import trimtab as tt
from trimtab.methods.reparameterized.adalora import AdaLoRAAdapter, orthogonality
from trimtab.schedules.bilevel import cubic_budget
from trimtab.schedules.run import Run


def adalora(rank: int = 4, **more) -> torch.nn.Module:
    return net(tt.AdaLoRA(rank=rank, **more), moved=True, head=False)


def places(model: torch.nn.Module) -> list[AdaLoRAAdapter]:
    return [m for m in model.modules() if isinstance(m, AdaLoRAAdapter)]


def run(model: torch.nn.Module, budget: tt.Schedule, total: int, *, until: int | None = None) -> Run:
    optimizer = adamw(model)
    with scheduled(model, optimizer, budget, steps=total) as s:
        steps(model, optimizer, s, range(until or total))
    return s


def test_the_budget():
    found = [cubic_budget(t, 100, 10, 20, 120, 80) for t in (10, 11, 20, 45, 50, 80, 81, 100)]
    assert found == [120, 118, 105, 85, 83, 80, 80, 80]


def test_moving_averages():
    """Scores of a constant importance of 1."""
    model = adalora()
    with scheduled(model, adamw(model), tt.BudgetSchedule(target=2), steps=10) as s:
        budget, found = s.schedules[0], []
        for _ in range(3):
            for p in tt.parameters(model):
                p.grad = 1 / p.detach()
            budget.importance.observe()
            name = next(iter(budget.places))
            found.append(float(budget.importance.scores(name)[0][0, 0]))
            torch.testing.assert_close(budget.triplet_scores()[name], torch.full((4,), 3 * found[-1]))
        assert found == pytest.approx([0.019125, 0.060148, 0.106639], abs=1e-6)


def test_the_chosen_ranks_add_up_to_the_budget():
    model = adalora()
    budget = tt.BudgetSchedule(target=2, warmup=2, final=3, shrink=False)
    optimizer, count = adamw(model), []
    with scheduled(model, optimizer, budget, steps=12) as s:
        for step in range(12):
            steps(model, optimizer, s, [step])
            count.append(sum(int((place.e != 0).sum()) for place in places(model)))
    n = len(places(model))
    assert count == [budget.budget(t) for t in range(1, 13)] and count[0] == 4 * n and count[-1] == 2 * n
    assert len({int((place.e != 0).sum()) for place in places(model)}) > 1  # not the same everywhere


def test_pruned_triplets_may_return_until_the_final_phase():
    model = adalora()
    optimizer, masks = adamw(model, 0.05), []
    with scheduled(model, optimizer, tt.BudgetSchedule(target=2, final=4, shrink=False), steps=40) as s:
        for step in range(40):
            steps(model, optimizer, s, [step])
            masks.append(torch.cat([place.e[:, 0] != 0 for place in places(model)]))
    returned = [bool((b & ~a).any()) for a, b in zip(masks, masks[1:], strict=False)]
    assert any(returned[:35]) and not any(returned[36:])
    assert all(torch.equal(mask, masks[35]) for mask in masks[36:])


@pytest.mark.parametrize("final", [0, 3])
def test_cut_ranks_give_the_same_model_and_smaller_tensors(final):
    """Without the penalty, a norm over all triplets of a place, in which pruned ones would go on to count."""
    cut, masked = adalora(penalty=0.0), adalora(penalty=0.0)
    for model, shrink in ((cut, True), (masked, False)):
        run(model, tt.BudgetSchedule(target=2, final=final, shrink=shrink), 9)
    x = batch(99)[0]
    torch.testing.assert_close(cut(x), masked(x))
    ranks = [place.e.shape[0] for place in places(cut)]
    assert sum(ranks) == 2 * len(ranks) and [int((p.e != 0).sum()) for p in places(masked)] == ranks
    assert all(p.p.shape[1] == p.q.shape[0] == r for p, r in zip(places(cut), ranks, strict=True))
    assert all(p.resized == (r != 4) for p, r in zip(places(cut), ranks, strict=True))


def test_what_is_delivered_in_between_is_cut_too():
    model = adalora()
    optimizer, x = adamw(model), batch(99)[0]
    with scheduled(model, optimizer, tt.BudgetSchedule(target=2), steps=8) as s:
        steps(model, optimizer, s, range(6))
        before, shapes = {k: v.clone() for k, v in model.state_dict().items()}, [p.e.shape[0] for p in places(model)]
        full = model(x)
        with s.weights():
            torch.testing.assert_close(model(x), full)
            assert sum(p.e.shape[0] for p in places(model)) == s.schedules[0].budget(6) < sum(shapes)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_cut_adapter_is_saved_loaded_merged_and_written_for_peft(tmp_path):
    model, x = adalora(), batch(99)[0]
    run(model, tt.BudgetSchedule(target=1, final=2), 8)
    ranks, want = [p.e.shape[0] for p in places(model)], model(x)
    assert 0 in ranks  # a place that lost all of its ranks
    tt.save(model, tmp_path / "a")
    tt.save(model, tmp_path / "peft", format="peft")
    tt.detach(model, "default")
    tt.load(model, tmp_path / "a")
    assert [p.e.shape[0] for p in places(model)] == ranks
    torch.testing.assert_close(model(x), want)
    tt.merge(model, "default")
    torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-4)
    tt.unmerge(model, "default")
    tt.detach(model, "default")
    tt.load(model, tmp_path / "peft")
    torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-4)


def test_ranks_cut_with_their_moments_equal_ranks_that_are_masked():
    """After 5 steps keep ranks 0, 2 and 5 of 6; 7 more steps equal steps in which the others do not act."""
    index, models = torch.tensor([0, 2, 5]), []
    for cut in (True, False):
        model = net(tt.LoRA(rank=6, alpha=6), dtype=torch.float64, head=False)
        optimizer = adamw(model)
        with scheduled(model, optimizer, tt.Schedule()) as s:
            steps(model, optimizer, s, range(5))
            if cut:
                for adapter in s.adapters():
                    s.slice_rank(adapter, index)
                assert {tuple(v.shape) for st in optimizer.state.values() for v in st.values() if v.dim()} == {
                    tuple(p.shape) for p in tt.parameters(model)
                }
            else:
                rest = torch.ones(6, dtype=torch.float64)
                rest[index] = 0

                class Masked(torch.nn.Module):
                    def forward(self, b, mask=1 - rest):
                        return b * mask

                for adapter in s.adapters():
                    torch.nn.utils.parametrize.register_parametrization(adapter, "b", Masked())
            steps(model, optimizer, s, range(5, 12))
        models.append(model)
    x = batch(99)[0]
    torch.testing.assert_close(models[0](x), models[1](x), atol=1e-15, rtol=0)


def test_equal_ranks_at_start_and_end_run():
    """peft's release asks for the 0-th smallest score here."""
    model = adalora(rank=3)
    run(model, tt.BudgetSchedule(target=3), 5)
    assert all(place.e.shape == (3, 1) for place in places(model))


def test_the_penalty_is_added_once_whatever_the_accumulation():
    models = []
    for accumulation, by_hand in ((1, True), (1, False), (4, False)):
        model = adalora(penalty=0.7)
        optimizer = torch.optim.SGD(tt.parameters(model), lr=0.1)
        if by_hand:
            (loss(model, batch(0)) + orthogonality(model)).backward()
            optimizer.step()
        else:
            with scheduled(model, optimizer, tt.BudgetSchedule(target=4), steps=5) as s:
                steps(model, optimizer, s, [0], accumulation=accumulation)
        models.append(model)
    for a, b, c in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


def test_ist_and_the_budget_take_layers_at_rest_out_of_the_scores():
    model = adalora()
    optimizer = adamw(model)
    with scheduled(model, optimizer, tt.IST(uniform=True), tt.BudgetSchedule(target=2, warmup=3), steps=6) as s:
        ist, budget = s.schedules
        steps(model, optimizer, s, [0])
        seen = {name for name in budget.places if budget.importance.average[name][0].any()}
        assert seen == {name for name in budget.places if name.startswith(f"blocks.{ist.chosen[0]}.")}
        steps(model, optimizer, s, range(1, 6))
    assert sum(place.e.shape[0] for place in places(model)) == 2 * len(places(model))


def test_peft_s_allocator_gives_the_same_scores():
    peft = pytest.importorskip("peft")
    from peft.tuners.adalora.layer import RankAllocator

    model = adalora()
    theirs = torch.nn.Module()
    for i, place in enumerate(places(model)):
        for name, value in (("lora_A", place.q), ("lora_B", place.p), ("lora_E", place.e)):
            theirs.register_parameter(f"place_{i}_{name}_default", value)
    config = peft.AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=2, deltaT=1, total_step=10)
    allocator = RankAllocator.__new__(RankAllocator)
    allocator.peft_config, allocator.adapter_name = config, "default"
    allocator.beta1 = allocator.beta2 = 0.85
    allocator.reset_ipt()
    with scheduled(model, adamw(model), tt.BudgetSchedule(target=2, warmup=1, final=2), steps=10) as s:
        budget = s.schedules[0]
        for step in range(4):
            loss(model, batch(step)).backward()
            budget.importance.observe()
            allocator.update_ipt(theirs)
        for i, (name, own) in enumerate(budget.triplet_scores().items()):
            e, a, b = (allocator._element_score(f"place_{i}_lora_{k}_default") for k in "EAB")
            torch.testing.assert_close(own, e[:, 0] + a.mean(1) + b.mean(0), msg=name)


def test_bad_input():
    for wrong in ({"target": 0}, {"interval": 0}, {"warmup": -1}, {"final": -1}, {"betas": (0.0, 0.5)}):
        with pytest.raises(ValueError, match="betas" if "betas" in wrong else "at least"):
            tt.BudgetSchedule(**wrong)
    for given, message in ((tt.BudgetSchedule(2, warmup=5, final=5), "leave none"), (tt.BudgetSchedule(5), "would grow")):
        with pytest.raises(ValueError, match=message):
            run(adalora(), given, 10)
    with pytest.raises(tt.Unsupported, match="gives out the ranks of AdaLoRA adapters"):
        run(net(), tt.BudgetSchedule(2), 10)
    model = adalora()
    with pytest.raises(ValueError, match="needs the number of optimizer steps"):
        scheduled(model, adamw(model), tt.BudgetSchedule(2))
    model = net(tt.DoRA(rank=2))
    with scheduled(model, adamw(model), tt.Schedule()) as s:
        steps(model, s.optimizer, s, [0])
        next(iter(tt.parameters(model))).grad = torch.ones_like(next(iter(tt.parameters(model))))
        with pytest.raises(RuntimeError, match="shapes change in step_begin only"):
            s.slice_rank(s.adapters()[0], torch.tensor([0]))
    model = net(tt.OFT(block_size=4))
    with scheduled(model, adamw(model), tt.Schedule()) as s, pytest.raises(tt.Unsupported, match="OFT has no ranks"):
        s.slice_rank(s.adapters()[0], torch.tensor([0]))
