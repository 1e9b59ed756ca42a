"""Light-PEFT in a loop: what is estimated, what is cut, and runs that end in the same bytes wherever they are interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from cut_models import Fused, build, floats, furthest, masked, run
from torch import Tensor, nn

import trimtab as tt
from trimtab.core.cut import cut_of
from trimtab.core.state import state_of
from trimtab.schedules import restoration
from trimtab.schedules.light_peft import LightPEFT
from trimtab.schedules.units import find_units

FAMILY = "llama, a key for two queries"  # 2 layers, 4 groups of heads, 48 channels, 14 linear layers
SMALL = {"heads": 0.5, "channels": 0.25, "modules": 0.5, "ranks": 0.5}


def net(family: str = FAMILY, method: tt.MethodConfig | None = None, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    model = build(family).to(dtype).train()
    rng = torch.Generator().manual_seed(1)
    tt.attach(model, method or tt.LoRA(rank=4), **({"targets": "attention | mlp", "rng": rng} | more))
    return model


def batch(step: int, rows: int = 4) -> Tensor:
    return torch.randint(0, 64, (rows, 8), generator=torch.Generator().manual_seed(step))


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def optimizer(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW(tt.parameters(model), lr=lr, weight_decay=0.1)


def train(model: nn.Module, *schedules: tt.Schedule, opt: torch.optim.Optimizer | None = None, steps: int = 8,
          stop: int | None = None, parts: int = 1, state: dict | None = None, opt_state: dict | None = None) -> dict:  # fmt: skip
    """A run of ``steps`` steps, or its part up to ``stop``; what a checkpoint holds."""
    opt = opt or optimizer(model)
    with tt.scheduled(model, opt, *schedules, steps=steps, state=state) as s:
        if opt_state:
            opt.load_state_dict(opt_state)
        losses = []
        for step in range(s.step_number, stop or steps):
            for part in batch(step).chunk(parts):
                value = loss(model, part) / parts
                value.backward()
            s.step()
            losses.append(value.item())
        return {"state": s.state_dict(), "opt": opt.state_dict(), "losses": losses, "optimizer": opt}


def adapters(model: nn.Module) -> list:
    return state_of(model).groups["default"].adapters


def test_counts_after_the_cut():
    model = net()
    schedule = LightPEFT(3, **SMALL)
    before = sum(p.numel() for p in tt.parameters(model))
    train(model, schedule)
    assert [u.count for u in find_units(model, "heads")] == [2, 2]
    assert sum(u.count for u in find_units(model, "channels")) == 72
    assert all(u.count >= 1 for u in find_units(model, "channels"))
    ranks = [a.a.shape[0] for a in adapters(model)]
    assert sum(ranks) == 14 and len(ranks) <= 7  # 7 of 14 modules, 14 of their 28 ranks
    assert len(schedule.done["lost"]) == 14 - len(ranks)
    assert sum(p.numel() for p in tt.parameters(model)) < 0.25 * before
    assert all(a.config.scale == 2 for a in adapters(model))
    for a in adapters(model):
        assert a.site.shape == tuple(a.site.module.weight.shape) == (a.b.shape[0], a.a.shape[1])
    assert model(input_ids=batch(0)).logits.shape == (4, 8, 64)
    assert model.generate(batch(0)[:1], max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 12)


def test_the_start_is_the_plain_model_and_the_penalty_is_exact():
    """Oracle 4: bit-identical outputs; lambda times the number of units; lambda more in each factor's gradient."""
    model, plain = net(), net()
    schedule = LightPEFT(3, l1=0.25, **SMALL)
    opt = optimizer(model)
    with tt.scheduled(model, opt, schedule, steps=8) as s:
        found, wanted = model(input_ids=batch(0), labels=batch(0)), plain(input_ids=batch(0), labels=batch(0))
        assert torch.equal(found.logits, wanted.logits) and torch.equal(found.loss, wanted.loss)
        assert schedule.extra_loss() == 0.25 * (2 * 4 + 2 * 48)
        masks = list(schedule.stage.masks.values())
        assert opt.param_groups[-1]["params"] == masks and opt.param_groups[-1]["weight_decay"] == 0
        found.loss.backward()
        task = [m.grad.clone() for m in masks]
        s.gradients_ready()
        for mask, before in zip(masks, task, strict=True):
            torch.testing.assert_close(mask.grad, before + 0.25, rtol=0, atol=1e-7)
            assert before.abs().max() > 0
        s.step()


def test_factors_that_go_on_learning_keep_the_function():
    """Oracle 3: the cut model with ``masks="keep"`` is the one whose lost units had a factor of zero."""
    model = net(dtype=torch.float64)
    schedule = LightPEFT(4, heads=0.5, channels=0.25, modules=0, ranks=0, l1=1e-2, mask_rate=3, masks="keep")
    opt = optimizer(model)
    with tt.scheduled(model, opt, schedule, steps=8) as s:
        for step in range(4):
            loss(model, batch(step)).backward()
            s.step()
        soft = {path: mask.detach().clone() for path, mask in schedule.stage.masks.items()}
        whole = net(dtype=torch.float64)
        whole.load_state_dict({k: v for k, v in model.state_dict().items()})
        s.begin()  # the cut
        kept = {path: index for found in cut_of(model).kept.values() for path, (_, index) in found.items()}
        factors = {p: torch.zeros_like(m).index_copy(0, kept[p], m[kept[p]]) if p in kept else m for p, m in soft.items()}
        with masked(whole.eval(), factors):
            wanted = run(whole)
        assert furthest(run(model.eval()), wanted) < 1e-14
        assert all(len(m.unique()) > 1 for m in soft.values())
        loss(model.train(), batch(4)).backward()
        s.step()
    assert len([a for a in adapters(model) if isinstance(a.config, tt.UnitMask)]) == 4
    assert opt.param_groups[-1]["params"] and all(p.numel() in (2, *range(20, 49)) for p in opt.param_groups[-1]["params"])


def test_the_cut_takes_the_optimizers_state_along():
    model = net()
    schedule = LightPEFT(3, **SMALL)
    opt = optimizer(model)
    with tt.scheduled(model, opt, schedule, steps=8) as s:
        for step in range(3):
            loss(model, batch(step)).backward()
            s.step()
        objects = {a: (a.a, a.a.detach().clone(), opt.state[a.a]["exp_avg"].clone()) for a in adapters(model)}
        s.begin()
        for a in adapters(model):
            parameter, value, average = objects[a]
            assert a.a is parameter and opt.state[parameter]["exp_avg"].shape == parameter.shape
            rows = [next(i for i in range(4) if _within(row, value[i])) for row in parameter]
            for row, of in zip(opt.state[parameter]["exp_avg"], rows, strict=True):
                assert _within(row, average[of])
            assert float(opt.state[parameter]["step"]) == 3
        held = {id(p) for group in opt.param_groups for p in group["params"]}
        assert held == {id(p) for p in tt.parameters(model)}
        assert set(map(id, opt.state)) == held


def _within(part: Tensor, whole: Tensor) -> bool:
    """Whether the entries of ``part`` are entries of ``whole``, in order."""
    places = iter(whole.tolist())
    return all(any(x == y for y in places) for x in part.tolist())


def test_pruned_ranks_leave_the_others_terms_alone():
    """Oracle 7: delta W is scale * sum over what is left; its rank is what is left; the scale is the original's."""
    model = net(method=tt.LoRA(rank=6, alpha=7.0), dtype=torch.float64)
    schedule = LightPEFT(3, heads=0, channels=0, modules=0, ranks=0.5)
    with tt.scheduled(model, optimizer(model), schedule, steps=8) as s:
        for step in range(3):
            loss(model, batch(step)).backward()
            s.step()
        before = {a.site.path: (a.b.detach().clone(), a.a.detach().clone()) for a in adapters(model)}
        s.begin()
        ranks = {path: index for _, path, _, index in schedule.done["ranks"]}
        assert sum(map(len, ranks.values())) == 42 and len({len(index) for index in ranks.values()}) > 1
        for path, index in ranks.items():
            B, A = before[path]
            wanted = 7 / 6 * sum(torch.outer(B[:, k], A[k]) for k in index)
            delta = tt.effective_weight(model, path) - model.get_submodule(path)._parameters["weight"]
            torch.testing.assert_close(delta, wanted)
            assert torch.linalg.matrix_rank(delta) == len(index)


def test_only_adapters_or_only_the_base_can_be_pruned():
    model = net()
    whole = sum(p.numel() for n, p in model.named_parameters() if "trimtab" not in n)
    train(model, LightPEFT(3, heads=0, channels=0, modules=0.5, ranks=0))
    assert cut_of(model).kept == {} or sum(p.numel() for n, p in model.named_parameters() if "trimtab" not in n) == whole
    assert len(adapters(model)) == 7
    model = net("bert", targets="attn.q")
    schedule = LightPEFT(3, heads=1, channels=20, modules=0, ranks=0)
    assert schedule.owns == frozenset()  # another schedule may see to the ranks
    ids = torch.randint(3, 60, (4, 8))
    with tt.scheduled(model, optimizer(model), schedule, steps=6) as s:
        for _ in range(6):
            model(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
            s.step()
    assert [u.count for u in find_units(model, "heads")] == [3, 3]
    assert sum(u.count for u in find_units(model, "channels")) == 128 - 20


def test_micro_batches_decide_alike():
    """Oracle 11, in a run: 1 x 4 rows and 4 x 1."""
    found = []
    for parts in (1, 4):
        model = net(dtype=torch.float64)
        schedule = LightPEFT(4, **SMALL)
        train(model, schedule, steps=6, parts=parts)
        found.append(schedule.done)
    assert found[0]["kept"] == found[1]["kept"] and found[0]["lost"] == found[1]["lost"]
    assert all(torch.equal(a[-1], b[-1]) for a, b in zip(found[0]["ranks"], found[1]["ranks"], strict=True))


def test_padding_is_known_from_the_models_mask():
    model = net("bert")
    schedule = LightPEFT(4, **SMALL)
    mask = torch.ones(4, 8, dtype=torch.long)
    mask[:, 5:] = 0
    with tt.scheduled(model, optimizer(model), schedule, steps=8) as s:
        for step in range(3):
            model(input_ids=batch(step) % 60 + 3, attention_mask=mask, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
            s.step()
        counts = schedule.stage.ratios.total[:, 1]
    assert counts.tolist() == [4 * 5.0] * len(counts)  # of the one step in the second half


# -- resuming


@pytest.mark.parametrize("masks", ["reset", "keep"])
@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_run_resumes_to_the_bit(stop: int, masks: str, tmp_path: Path):
    """Stopped in either stage, right before and right after the cut; the checkpoint is adapter, optimizer and schedules."""
    settings = SMALL | {"masks": masks}
    whole = net()
    first = train(whole, LightPEFT(4, **settings))
    half = net()
    stored = train(half, LightPEFT(4, **settings), stop=stop)
    tt.save(half, tmp_path / "a")
    torch.save({"state": stored["state"], "opt": stored["opt"]}, tmp_path / "s.pt")
    stored = torch.load(tmp_path / "s.pt", weights_only=True)
    model = build(FAMILY).to(torch.float32).train()
    restoration.load(model, tmp_path / "a", trainable=True)
    again = train(model, LightPEFT(4, **settings), state=stored["state"], opt_state=stored["opt"])
    assert again["losses"] == first["losses"][stop:]
    ours, theirs = model.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_a_whole_model_is_cut_again_on_resuming():
    """Without files: the adapter attached anew, the state dict loaded after ``tt.scheduled`` has made the cut again."""
    whole = net()
    first = train(whole, LightPEFT(4, **SMALL))
    half = net()
    stored = train(half, LightPEFT(4, **SMALL), stop=6)
    model, losses = net(), []
    opt = optimizer(model)
    with tt.scheduled(model, opt, LightPEFT(4, **SMALL), steps=8, state=stored["state"]) as s:
        model.load_state_dict(half.state_dict())
        opt.load_state_dict(stored["opt"])
        for step in range(6, 8):
            value = loss(model, batch(step))
            value.backward()
            s.step()
            losses.append(value.item())
    assert losses == first["losses"][6:]
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in model.state_dict().items())


# -- with others


class Told(tt.Schedule):
    """Writes down which parameters were cut, and what was removed."""

    def __init__(self) -> None:
        self.cut: list[int] = []
        self.gone: list = []

    def resliced(self, parameter: nn.Parameter, dim: int, index: Tensor) -> None:
        assert parameter.shape[dim] == len(index)
        self.cut.append(id(parameter))

    def removed(self, adapters: list) -> None:
        self.gone += adapters


def test_other_schedules_are_told():
    model, told = net(), Told()
    before, shapes = adapters(model)[:], {id(p): p.shape for p in tt.parameters(model)}
    train(model, LightPEFT(3, **SMALL), told)
    assert set(told.gone) == set(before) - set(adapters(model))
    assert {id(p) for p in tt.parameters(model) if p.shape != shapes[id(p)]} <= set(told.cut)


def test_an_error_leaves_a_plain_model():
    model = net()
    with pytest.raises(KeyError), tt.scheduled(model, optimizer(model), LightPEFT(3, **SMALL), steps=8):
        loss(model, batch(0)).backward()
        raise KeyError
    assert not any(m._forward_pre_hooks for n, m in model.named_modules() if "trimtab" not in n)
    assert torch.equal(floats(model.eval()(input_ids=batch(0)))[0], floats(net().eval()(input_ids=batch(0)))[0])


# -- what is refused


def test_no_importance_is_an_error_and_no_cut():
    """Oracle 6: at LoRA's start every ratio and every score is exactly 0."""
    for rate, amounts, message in (
        (0.0, {"heads": 0, "channels": 0, "ranks": 0}, "no adapted module changed anything"),
        (0.0, {"heads": 0, "channels": 0, "modules": 0}, "all scores of ranks are 0"),
        (0.0, {}, "no importance recorded: the factors of the heads that model.layers.0.self_attn.o_proj reads have not moved"),
    ):
        model = net()
        with pytest.raises(RuntimeError, match=message):
            train(model, LightPEFT(3, l1=0.0, **SMALL | amounts), opt=optimizer(model, lr=rate))
        assert cut_of(model) is None and len(adapters(model)) == 14


def test_models_that_cannot_be_cut_are_refused_at_the_start_or_the_first_call():
    t5 = hf.T5EncoderModel(hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=64))
    tt.attach(t5, tt.LoRA(rank=2), targets="attn.q")
    with pytest.raises(tt.Unsupported, match="relative_attention_bias"):
        train(t5, LightPEFT(3))
    bloom = hf.BloomForCausalLM(hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64)).train()
    tt.attach(bloom, tt.LoRA(rank=2), targets="attn.qkv")
    with pytest.raises(tt.Unsupported, match="counts its units in a way"):
        train(bloom, LightPEFT(3))
    model = net(method=tt.LoHa(rank=2))
    with pytest.raises(tt.Unsupported, match="LoHa at .* cannot follow"):
        train(model, LightPEFT(3, ranks=0))
    model = net(method=tt.LoHa(rank=2))
    with pytest.raises(tt.Unsupported, match="needs ranks to prune, which none of the 14 adapted places has; set ranks=0"):
        train(model, LightPEFT(3, heads=0, channels=0))
    model = net(method=tt.BitFit(), targets="attn.q")
    with pytest.raises(tt.Unsupported, match="LightPEFT needs modules to prune"):
        train(model, LightPEFT(3))
    assert not any(m._forward_pre_hooks for n, m in model.named_modules() if "trimtab" not in n)


def test_a_second_cut_is_refused():
    model = net()
    train(model, LightPEFT(3, **SMALL))
    with pytest.raises(tt.Unsupported, match="were cut out of this model before"):
        train(model, LightPEFT(3, **SMALL))
    restoration.restore(model)
    assert cut_of(model) is None
    model = Fused().train()
    tt.attach(model, tt.LoRA(rank=2), targets="mlp.down")
    with pytest.raises(RuntimeError, match="needs the services of a run"):
        LightPEFT(3).start(model, steps=9)


@pytest.mark.parametrize("wrong, message", [
    ({"heads": 1.0}, "heads must be a share"), ({"channels": -0.1}, "channels must be"), ({"ranks": True}, "ranks must be"),
    ({"estimate": 0}, "estimate must be"), ({"estimate": 1.0}, "estimate must be"), ({"l1": -1.0}, "l1 must be"),
    ({"masks": "fold"}, "'reset' or 'keep'"), ({"originals": "disk"}, "keep, host, drop"), ({"align": 0}, "align at least 1"),
    ({"heads": 0, "channels": 0, "modules": 0, "ranks": 0}, "nothing would be pruned"),
])  # fmt: skip
def test_bad_numbers(wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        LightPEFT(**wrong)


def test_numbers_that_do_not_fit_the_run_or_the_model():
    for schedule, steps, message in (
        (LightPEFT(8), 8, "takes 8 of 8 steps"), (LightPEFT(0.5), None, "needs the number of optimizer steps"),
        (LightPEFT(3, heads=4), 8, "heads=4 would take all of the 4"), (LightPEFT(3, channels=96), 8, "would take all of the 96"),
        (LightPEFT(3, modules=14), 8, "would take all of the 14"), (LightPEFT(3, ranks=56), 8, "would take all of the 56"),
    ):  # fmt: skip
        model = net()
        with pytest.raises(ValueError, match=message):
            tt.scheduled(model, optimizer(model), schedule, steps=steps)
    model = net()
    stored = train(model, LightPEFT(3, **SMALL), stop=2)
    with pytest.raises(ValueError, match="takes 3 steps, and this one 4"):
        train(net(), LightPEFT(4, **SMALL), state=stored["state"])


@pytest.mark.parametrize("stop", [2, 5])
def test_averages_of_what_was_cut_resume_too(stop: int, tmp_path: Path):
    """Checkpoints before the cut do not count; ranks and modules that go leave the average."""
    make = lambda: [LightPEFT(3, **SMALL), tt.CheckpointAveraging(every=1, by="step")]  # noqa: E731
    whole, half, given = net(), net(), make()
    train(whole, *given)
    assert len(given[1].values) == 5
    with tt.scheduled(half, opt := optimizer(half), *make(), steps=8) as s:
        for step in range(stop):
            loss(half, batch(step)).backward()
            s.step()
        # a checkpoint: finish() averages
        stored = {"state": s.state_dict(), "opt": opt.state_dict()}
        tt.save(half, tmp_path / "a")
    model = build(FAMILY).to(torch.float32).train()
    restoration.load(model, tmp_path / "a", trainable=True)
    train(model, *make(), state=stored["state"], opt_state=stored["opt"])
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in model.state_dict().items())
