"""ReFT: the formula and its relatives, orthonormal rows, chosen tokens, spans, generation with a cache, starts, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.core.account import saved_bytes
from trimtab.methods.additive.reft import orthonormal

transformers = pytest.importorskip("transformers")
D = torch.float64
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, pad_token_id=0)).to(D).eval()


def attached(config: tt.ReFT, model: nn.Module | None = None, *, moved: bool = True) -> tuple[nn.Module, list]:
    model = nn.Sequential(nn.Linear(6, 8, dtype=D)) if model is None else model
    targets = "0" if isinstance(model, nn.Sequential) else None
    tt.attach(model, config, targets=targets, rng=torch.Generator().manual_seed(0))
    if moved:
        torch.manual_seed(1)
        with torch.no_grad():
            for p in tt.parameters(model):
                p.add_(torch.randn_like(p) * 0.3)
    return model, model.__dict__["_trimtab_state"].groups["default"].adapters


def edited(a: nn.Module, h: Tensor, k: int = 0) -> Tensor:
    """The formula, with R from torch's own orthogonalisation of the same matrix."""
    p, w, b = a.p[k], a.w[k], a.b[k]
    R = p
    if a.config.orthogonal:
        Q, upper = torch.linalg.qr(p.t())
        R = (Q * upper.diagonal().sign()).t()
    inner = h @ w.t() + b - (h @ R.t() if a.config.subtract else 0)
    return h + inner @ R


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("subtract", [True, False])
def test_the_definition(orthogonal, subtract) -> None:
    _, (a,) = attached(tt.ReFT(rank=3, orthogonal=orthogonal, subtract=subtract))
    h = torch.randn(2, 5, 8, dtype=D)
    torch.testing.assert_close(a(h, h), edited(a, h))


def test_loreft_sets_the_coordinates_in_the_subspace_and_leaves_the_rest() -> None:
    """R h' = W h + b, and h' - h lies in the rows of R."""
    _, (a,) = attached(tt.ReFT(rank=3))
    h = torch.randn(20, 8, dtype=D)
    R = orthonormal(a.p[0])
    new = a(h, h)
    torch.testing.assert_close(R @ R.t(), torch.eye(3, dtype=D))
    torch.testing.assert_close(new @ R.t(), h @ a.w[0].t() + a.b[0])
    torch.testing.assert_close((new - h) - (new - h) @ R.t() @ R, torch.zeros_like(h), atol=1e-12, rtol=0)


def test_orthonormal_rows() -> None:
    p = torch.randn(3, 8, dtype=D)
    R = orthonormal(p)
    torch.testing.assert_close(R @ R.t(), torch.eye(3, dtype=D))
    torch.testing.assert_close(orthonormal(R), R)
    assert torch.linalg.matrix_rank(torch.cat([p, R])) == 3
    assert torch.autograd.gradcheck(orthonormal, p.requires_grad_())
    assert orthonormal(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_starts() -> None:
    h = torch.randn(4, 8, dtype=D)
    for subtract in (True, False):
        _, (a,) = attached(tt.ReFT(rank=3, subtract=subtract), moved=False)
        torch.testing.assert_close(a(h, h), h)
        a(h, h).square().sum().backward()
        assert bool(a.w.grad.abs().max() > 0) and bool(a.b.grad.abs().max() > 0)
    _, (a,) = attached(tt.ReFT(rank=3, start="paper"), moved=False)
    assert (a(h, h) - h).norm() > 0.1 * h.norm()
    assert max(a.w.abs().max(), a.b.abs().max()) <= 8**-0.5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("first", "last"), [(2, 3), (1, 1), (4, 4)])
def test_chosen_tokens(first, last, tied) -> None:
    """Seven tokens, of which each end takes three at most, as the authors' ``min(n // 2, first)``."""
    _, (a,) = attached(tt.ReFT(rank=2, first=first, last=last, tied=tied))
    h = torch.randn(3, 7, 8, dtype=D)
    want = h.clone()
    first, start = min(first, 3), 7 - min(last, 3)
    want[:, :first] = edited(a, h[:, :first], 0)
    want[:, start:] = edited(a, h[:, start:], 0 if tied else 1)
    torch.testing.assert_close(a(h, h), want)
    assert torch.equal(a(h, h)[:, first:start], h[:, first:start])


@pytest.mark.parametrize("config", [{"first": 2}, {"last": 2}])
def test_one_end_alone(config) -> None:
    _, (a,) = attached(tt.ReFT(rank=2, **config))
    h = torch.randn(3, 7, 8, dtype=D)
    want, part = h.clone(), slice(None, 2) if "first" in config else slice(-2, None)
    want[:, part] = edited(a, h[:, part])
    torch.testing.assert_close(a(h, h), want)


@pytest.mark.parametrize("tied", [True, False])
def test_spans_count_from_each_rows_own_text(tied) -> None:
    model, (a,) = attached(tt.ReFT(rank=2, first=2, last=2, tied=tied))
    x = torch.randn(4, 7, 6, dtype=D)
    h = model[0].weight.new_empty(0)
    with tt.disabled(model):
        h = model(x)
    start, stop = torch.tensor([0, 3, 2, 1]), torch.tensor([7, 7, 3, 4])  # the last but one: a single token; the last: three
    want = h.clone()
    for row, (i, j) in enumerate(zip(start.tolist(), stop.tolist(), strict=True)):
        n = min(2, (j - i) // 2)
        head, tail = range(i, i + n), range(j - n, j)
        want[row, list(head)] = edited(a, h[row, list(head)])
        want[row, list(tail)] = edited(a, h[row, list(tail)], 0 if tied else 1)
    with tt.spans(model, stop, start=start):
        torch.testing.assert_close(model(x), want)
        torch.testing.assert_close(model(x.repeat_interleave(2, 0)), want.repeat_interleave(2, 0))  # two beams a row
    assert a.span is None
    with tt.spans(model, torch.tensor([7] * 4)):
        inside = model(x)
    torch.testing.assert_close(inside, model(x))


def test_padding_changes_nothing_within_spans() -> None:
    model, _ = attached(tt.ReFT(rank=2, first=1, last=2), llama())
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    left = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    alone = model(ids).logits
    with tt.spans(model, torch.tensor([8]), start=torch.tensor([3])):
        mask = (left != 0).long()
        padded = model(left, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(padded[:, 3:], alone)


def test_generation_with_and_without_a_cache_agree() -> None:
    model, _ = attached(tt.ReFT(rank=2, first=1, last=2), llama())
    ids = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]])
    mask = torch.ones_like(ids)
    generate = lambda m, **more: m.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **more)  # noqa: E731
    with tt.spans(model, torch.tensor([5, 5])):
        cached = generate(model, use_cache=True)
        assert torch.equal(cached, generate(model, use_cache=False))
        assert generate(model, num_beams=2).shape == (2, 11)
    with tt.disabled(model):
        assert not torch.equal(generate(model), cached)
    everywhere, _ = attached(tt.ReFT(rank=2), llama())
    assert torch.equal(generate(everywhere, use_cache=True), generate(everywhere, use_cache=False))


def test_keeps_the_edited_states_alone() -> None:
    n, tokens, d, r = 3, 40, 32, 2
    y = torch.randn(n, tokens, d, requires_grad=True)
    model = nn.Sequential(nn.Linear(d, d))
    for config, count in ((tt.ReFT(rank=r), tokens), (tt.ReFT(rank=r, first=2, last=3), 5)):
        tt.attach(model, config, targets="0")
        (a,) = model.__dict__["_trimtab_state"].groups["default"].adapters
        with saved_bytes(model) as saved:
            a(y, y)
        index = 0 if config.everywhere else 8 * count
        assert saved.total == n * count * (d + r) * 4 + index
        tt.detach(model, "default")


def test_everywhere_at_a_linear_layer_it_merges_and_at_chosen_tokens_not() -> None:
    model, _ = attached(tt.ReFT(rank=3))
    x = torch.randn(2, 5, 6, dtype=D)
    y = model(x)
    tt.merge(model, "default")
    torch.testing.assert_close(model(x), y)
    model, _ = attached(tt.ReFT(rank=3, first=1))
    with pytest.raises(tt.NotMergeable):
        tt.merge(model, "default")


def test_errors() -> None:
    model, _ = attached(tt.ReFT(rank=2, first=1))
    x = torch.randn(3, 5, 6, dtype=D)
    with pytest.raises(tt.ShapeMismatch, match="given 2 rows, but 0 got a batch of 3"), tt.spans(model, torch.tensor([5, 5])):
        model(x)
    with tt.spans(model, torch.tensor([5] * 3)), tt.routed(model, ["default", None, None]):
        with pytest.raises(tt.Unsupported, match=r"tt\.routed and tt\.spans"):
            model(x)
    for stop, start in ((torch.tensor([3]), torch.tensor([3])), (torch.tensor([3]), torch.tensor([-1])), (torch.ones(2, 2), None)):
        with pytest.raises(tt.ShapeMismatch, match="start < stop"), tt.spans(model, stop, start=start):
            pass
    with pytest.raises(tt.NoMatch, match="no ReFT is attached"), tt.spans(llama(), torch.tensor([3])):
        pass
    with pytest.raises(tt.ShapeMismatch, match="rank 9 is larger than the 8 features of 0"):
        attached(tt.ReFT(rank=9))


@pytest.mark.parametrize(
    "values",
    [
        {"rank": 0}, {"first": -1}, {"last": 1.5}, {"first": 0, "last": 0}, {"tied": False, "first": 2}, {"start": "zero"},
        {"dropout": 1.0},
    ],
)
def test_bad_hyperparameters(values) -> None:
    with pytest.raises(tt.ShapeMismatch):
        tt.ReFT(**values)
