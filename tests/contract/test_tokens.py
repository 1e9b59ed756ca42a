"""The laws of token adapters, for every registered one in every kind of stack: outputs keep the base's shapes, a cache changes
nothing, padding changes nothing, checkpointing changes no gradient, rows of a batch may differ."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from token_cases import GENERATING, TOKENS, VOCABULARY, TokenCase, token_cases
from torch.utils.checkpoint import checkpoint

import trimtab as tt

ALL = token_cases()
SOME = token_cases("llama", "t5", "bert", "vit", "fused", "packed")
HUGGING = [p for p in ALL if p.values[0].home.hugging]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    error = (a.double() - b.double()).abs().max().item() / max(1.0, b.abs().max().item())
    assert a.shape == b.shape and error <= tolerance, f"error {error:.1e}"


@pytest.mark.parametrize("case", ALL)
def test_shapes_are_the_bases_and_disabling_gives_the_base_back(case: TokenCase) -> None:
    plain = case.model()
    with torch.no_grad():
        base = case.run(plain)
        model = case.attached()
        adapted = case.run(model)
        assert adapted.shape == base.shape and not torch.allclose(adapted, base, atol=1e-3)
        with tt.disabled(model):
            assert torch.equal(case.run(model), base)
        close(case.run(model), adapted)
        tt.activate(model)
        assert torch.equal(case.run(model), base)
        tt.detach(model, "default")
        assert torch.equal(case.run(model), base)
    assert {path: type(m) for path, m in model.named_modules()} == {path: type(m) for path, m in plain.named_modules()}
    assert not [a for m in model.modules() for a in vars(m) if "trimtab" in a]
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("case", SOME)
def test_starts_at_the_base_where_promised(case: TokenCase) -> None:
    model = case.model()
    base = case.run(model)
    tt.attach(model, case.config)
    same = torch.allclose(case.run(model), base, atol=1e-5 * max(1.0, base.abs().max().item()))
    assert same == type(case.config).adapter_class.identity(case.config)


@pytest.mark.parametrize("case", HUGGING)
def test_hidden_states_and_attentions_have_the_bases_shapes(case: TokenCase) -> None:
    model = case.attached()
    if case.home.name != "bloom":
        model.set_attn_implementation("eager")
    more = {"output_hidden_states": True, "output_attentions": True}
    inputs = case.home.inputs(1)
    adapted = model(**inputs, **more)
    with tt.disabled(model):
        base = model(**inputs, **more)
    for key, value in base.items():
        if isinstance(value, tuple):
            assert [v.shape for v in value] == [v.shape for v in adapted[key]], key


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", token_cases(*GENERATING))
def test_generation_with_a_cache_equals_generation_without(case: TokenCase, side: str) -> None:
    """Dynamic and static caches against none, logits of every step, with padding; and a padded row against the row alone."""
    model = case.attached()
    ids = torch.randint(3, VOCABULARY, (3, TOKENS), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    for row, count in ((0, 3), (1, 1)):
        mask[row, slice(0, count) if side == "left" else slice(TOKENS - count, None)] = 0
    more = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    without = model.generate(ids * mask, attention_mask=mask, use_cache=False, **more)
    caches = [{"use_cache": True}]
    if case.home.name != "bloom":  # BLOOM has no static cache
        caches.append({"cache_implementation": "static"})
    for cache in caches:
        found = model.generate(ids * mask, attention_mask=mask, **cache, **more)
        assert torch.equal(found.sequences, without.sequences)
        close(torch.stack(found.logits), torch.stack(without.logits))
    if side == "left" or case.home.name in ("t5", "bart"):
        if case.home.name == "bart" and side == "left":
            return  # BART counts padding in its positions, with or without adapters
        row = mask[0].bool()
        alone = model.generate(ids[:1, row], attention_mask=mask[:1, row], use_cache=True, **more)
        close(torch.stack(alone.logits)[:, 0], torch.stack(without.logits)[:, 0])


@pytest.mark.parametrize("case", token_cases("llama", "t5"))
def test_beams_and_one_cache_for_many_sequences(case: TokenCase) -> None:
    model = case.attached()
    ids = case.home.inputs(1)["input_ids"][1:]
    more = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(model.generate(ids, use_cache=True, **more), model.generate(ids, use_cache=False, **more))
    # generate keeps a static cache for the next call: what is kept with it must not survive a change of the adapter
    static = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    model.generate(ids[:, :1], **static)
    with torch.no_grad():
        for p in tt.parameters(model):
            p.mul_(-1.5)
    assert torch.equal(model.generate(ids[:, :1], **static), model.generate(ids[:, :1], max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("case", SOME)
def test_save_load_copies_and_pickles(case: TokenCase, tmp_path) -> None:
    model = case.attached(name="wave.α")
    with torch.no_grad():
        expected = case.run(model)
        tt.save(model, tmp_path)
        fresh = case.model()
        tt.load(fresh, tmp_path)
        assert torch.equal(case.run(fresh), expected)
        assert not any(p.requires_grad for p in fresh.parameters())
        assert sum(".trimtab." in n for n, _ in fresh.named_parameters()) == len(tt.parameters(model))  # what is shared stays so
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(case.run(other), expected)
            for p in tt.parameters(other):
                p.add_(1.0)
            assert torch.equal(case.run(model), expected)
            tt.detach(other, "wave.α")
        assert torch.equal(case.run(model), expected)


@pytest.mark.parametrize("case", ALL)
def test_rows_of_a_batch_may_differ(case: TokenCase) -> None:
    model = case.attached(name="a", seed=2)
    case.attached(name="b", seed=3, model=model)
    with torch.no_grad():
        expected = []
        for row, names in enumerate((["b"], [], ["a"])):
            tt.activate(model, *names)
            expected.append(case.run(model)[row])
        with tt.routed(model, ["b", None, "a"]):
            close(case.run(model), torch.stack(expected))
        tt.activate(model, "a")
        close(case.run(model)[2], expected[2])


@pytest.mark.parametrize("case", SOME)
def test_two_adapters_together_and_one_taken_off(case: TokenCase) -> None:
    model = case.attached(name="a", seed=2)
    alone = case.run(model)
    case.attached(name="b", seed=3, model=model)
    both = case.run(model)
    assert not torch.allclose(both, alone, atol=1e-3)
    tt.activate(model, "b", "a")
    close(case.run(model), both) if type(case.config).adapter_class.entry(case.config) != "model" else None
    tt.detach(model, "b")
    assert torch.equal(case.run(model), alone)


def gradients(case: TokenCase, model: torch.nn.Module, batches: int, wrap=None) -> list[torch.Tensor]:
    """Gradients of several batches whose forwards all run before the first backward."""
    model.zero_grad()
    torch.manual_seed(7)  # dropout
    losses = [(case.run(model, seed) if wrap is None else wrap(seed)).float().pow(2).sum() for seed in range(1, batches + 1)]
    for loss in losses:
        loss.backward()
    return [p.grad.clone() for p in tt.parameters(model)]


@pytest.mark.parametrize("case", ALL)
def test_gradient_checkpointing_gives_the_same_gradients(case: TokenCase) -> None:
    """Block by block, with two forwards before the first backward: each recomputation must find its own tokens again."""
    model = case.attached().train()
    plain = gradients(case, model, 2)
    assert all(g.abs().sum() > 0 for g in plain)
    if case.home.hugging:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        again = gradients(case, model, 2)
    else:
        again = gradients(case, model, 2, lambda s: checkpoint(model, case.home.inputs(s), use_reentrant=False))
    for g, want in zip(again, plain, strict=True):
        close(g / want.abs().max(), want / want.abs().max(), 1e-3)


@pytest.mark.parametrize("case", SOME)
def test_a_step_trains_exactly_the_tokens(case: TokenCase) -> None:
    model = case.attached()
    before = {key: value.clone() for key, value in model.state_dict().items() if "trimtab" not in key}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in tt.parameters(model)}
    optimizer = torch.optim.SGD(tt.parameters(model), lr=0.1)
    case.run(model).pow(2).sum().backward()
    optimizer.step()  # raises GradientMismatch unless exactly the declared parameters have gradients
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("case", SOME)
def test_half_precision_and_autocast(case: TokenCase) -> None:
    exact = case.run(case.attached())
    half = case.attached(model=case.model(torch.bfloat16))
    y = case.run(half, dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16
    y.float().pow(2).sum().backward()
    assert all(p.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in tt.parameters(half))
    model = case.attached()
    with torch.autocast("cpu", torch.bfloat16):
        y = case.run(model)
    assert (y.float() - exact).pow(2).mean().sqrt() < 0.2 * exact.std()
    y.float().pow(2).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in tt.parameters(model))


@pytest.mark.slow
@pytest.mark.parametrize("case", [p for p in token_cases("llama", "bert", "vit", "fused") if "lstm" not in p.id])
def test_fullgraph_compile_without_recompiling_on_a_switch(case: TokenCase) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = case.attached(name="a", seed=2)
    case.attached(name="b", seed=3, model=model)
    tt.activate(model, "a")
    more = {"use_cache": False} if case.home.name == "llama" else {}
    eager = case.run(model, **more)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    if case.home.name in ("llama", "bert"):  # transformers looks at a mask's values, which no graph can
        ids = case.home.inputs(1)["input_ids"]
        eager, run = model(input_ids=ids, **more).logits, lambda m: m(input_ids=ids, **more).logits
    else:
        run = case.run
    close(run(compiled), eager)
    run(compiled).pow(2).sum().backward()
    seen = counter.frame_count
    tt.activate(model, "b")
    close(run(compiled), run(model))
    tt.activate(model, "a")
    close(run(compiled), eager)
    assert counter.frame_count == seen, "switching between adapters of one shape compiled something"
