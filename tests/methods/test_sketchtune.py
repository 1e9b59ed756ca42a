"""SketchTune: worked numbers, gradients of tables, chunks, kept bytes, counts, training, bad input (arXiv 2410.06364)."""

from __future__ import annotations

import warnings

import pytest
import torch
from structured_places import assert_law, build, count, layer, saved_bytes, site
from torch import nn

import trimtab as tt
from trimtab.core.errors import ShapeMismatch
from trimtab.kernels import sketch
from trimtab.kernels.codes import pack, unpack
from trimtab.kernels.sketch import dense_weight, sketched, to_table
from trimtab.methods.reparameterized.sketchtune import SketchTune

D = torch.float64
LLAMA_7B = (((4096, 4096), 4 * 32), ((11008, 4096), 2 * 32), ((4096, 11008), 32))
LLAMA_13B = (((5120, 5120), 4 * 40), ((13824, 5120), 2 * 40), ((5120, 13824), 40))
LLAMA_3_8B = (((4096, 4096), 2 * 32), ((1024, 4096), 2 * 32), ((14336, 4096), 2 * 32), ((4096, 14336), 32))


def random_sketch(out: int, groups: int, size: int, bits: int, dtype: torch.dtype = D) -> tuple[torch.Tensor, torch.Tensor]:
    """A table (out, groups, 2^bits) and packed codes of ``size`` columns a group."""
    rng = torch.Generator().manual_seed(out + groups + size + bits)
    codes = torch.randint(1 << bits, (out, groups, size), generator=rng).to(torch.uint8)
    return torch.randn(out, groups, 1 << bits, generator=rng, dtype=torch.float64).to(dtype), pack(codes, bits)


def test_worked_example():
    """Oracle 5."""
    table = torch.tensor([[[-1.0, 0, 0.5, 2]]], dtype=D, requires_grad=True)
    codes = pack(torch.tensor([[[3, 0, 2, 2]]], dtype=torch.uint8), 2)
    x = torch.tensor([[1.0, 2, 3, -1]], dtype=D, requires_grad=True)
    assert dense_weight(table, codes, 2).tolist() == [[2, -1, 0.5, 0.5]]
    y = sketched(x, table, codes, 2)
    assert y.tolist() == [[1]]
    y.backward(torch.tensor([[2.0]], dtype=D))
    assert table.grad.tolist() == [[[4, 0, 4, 2]]] and x.grad.tolist() == [[4, -2, 1, 1]]


def test_few_distinct_values_are_kept_to_the_bit():
    """Oracle 1: at most 2^b distinct values in each group of a row, all of them their own."""
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(6, 2, 4, generator=rng)
    index = torch.randint(4, (6, 2, 32), generator=rng)
    place = site(nn.Linear(64, 6))
    with torch.no_grad():
        place.module.weight.copy_(values.gather(-1, index).flatten(1))
    for bits in (2, 3, 4):
        adapter = build(SketchTune(bits=bits, groups=2), place, move=0)
        assert torch.equal(adapter.weight(place.weight), place.weight)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_gradient_of_a_table_is_the_sum_over_its_codes(bits):
    """Oracle 2: scattered, by autograd through the gather, and by one-hot products; sums over a group agree with dW's."""
    table, codes = random_sketch(6, 3, 8, bits)
    dW = torch.randn(6, 24, dtype=D)
    got = to_table(dW, codes, bits)
    table.requires_grad_()
    dense_weight(table, codes, bits).backward(dW)
    hot = torch.nn.functional.one_hot(unpack(codes, bits).long(), 1 << bits).to(D)
    torch.testing.assert_close(got, table.grad)
    torch.testing.assert_close(got, torch.einsum("ogj,ogjc->ogc", dW.view(6, 3, 8), hot))
    torch.testing.assert_close(got.sum(-1), dW.view(6, 3, 8).sum(-1))
    torch.testing.assert_close(sketch._masked_sums(dW.view(6, 3, 8), unpack(codes, bits), 1 << bits), got)


def test_a_constant_moves_one_output_by_the_groups_input():
    """Oracle 3."""
    table, codes = random_sketch(5, 2, 8, 4)
    x = torch.randn(7, 16, dtype=D)
    before = sketched(x, table, codes, 4)
    table[3, 1] += 0.25
    moved = sketched(x, table, codes, 4) - before
    torch.testing.assert_close(moved[:, 3], 0.25 * x[:, 8:].sum(1))
    assert not moved[:, [0, 1, 2, 4]].any()


def test_names_of_entries_do_not_matter():
    """Oracle 4."""
    table, codes = random_sketch(5, 2, 8, 3)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    renamed = pack(order.argsort()[unpack(codes, 3).long()].to(torch.uint8), 3)
    assert torch.equal(dense_weight(table[..., order], renamed, 3), dense_weight(table, codes, 3))


@pytest.mark.parametrize("bits", [2, 4])
def test_a_random_change_of_tables_has_full_rank(bits):
    """Oracle 7: 64 x 256, one group."""
    table, codes = random_sketch(64, 1, 256, bits)
    assert torch.linalg.matrix_rank(dense_weight(table, codes, bits)) == 64


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_law_in_runs_of_rows_and_whole(bits, bias, monkeypatch):
    """Oracle 11: two rows at a time or all at once, value and gradients are those of the dense weight."""
    place = site(layer(7, 48, bias=bias))
    for run in (2 * 48, 1 << 21):
        monkeypatch.setattr(sketch, "_RUN", run)
        assert_law(build(SketchTune(bits=bits, groups=2), place, move=0.1), place)


def test_kept_for_backward_is_x_alone_and_shared():
    """Oracle 11: q, k and v on one input keep it once; a frozen table keeps nothing."""
    places = [site(layer(32, 64, bias=False, dtype=torch.float32)) for _ in range(3)]
    adapters = [build(SketchTune(bits=4), place) for place in places]
    x = torch.randn(10, 64, requires_grad=True)
    known = [t for a in adapters for t in (a.table, a.codes)]
    assert saved_bytes(lambda: sum(a(x, p) for a, p in zip(adapters, places, strict=True)), *known) == x.nbytes
    for adapter in adapters:
        adapter.requires_grad_(False)
    assert saved_bytes(lambda: adapters[0](x, places[0]), *known) == 0


def test_nothing_of_the_weights_size_is_made(monkeypatch):
    """Neither W as floats nor its gradient: the largest tensor of a step is a run's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(sketch, "_RUN", 16 * 512)
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() * t.element_size() for t in (out if isinstance(out, (tuple, list)) else (out,))
                         if isinstance(t, torch.Tensor) and t.is_floating_point())  # fmt: skip
            return out

    table, codes = random_sketch(512, 1, 512, 4, torch.float32)
    x = torch.randn(4, 512, requires_grad=True)
    table.requires_grad_()
    with Watch():
        sketched(x, table, codes, 4).sum().backward()
    assert max(sizes) <= 512 * 512 * 4 / 8


def test_narrow_activations_beside_a_wide_table():
    """bfloat16 activations, a float32 table: the output is narrow, the table's gradient is not."""
    table, codes = random_sketch(8, 2, 16, 4, torch.float32)
    table.requires_grad_()
    x = torch.randn(5, 32).bfloat16()
    y = sketched(x, table, codes, 4)
    want = x.float() @ dense_weight(table, codes, 4).bfloat16().float().t()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, rtol=0.02, atol=0.05)
    y.sum().backward()
    assert table.grad.dtype == torch.float32


def test_counts():
    """Oracle 10: all seven matrices of every block; and the codes' bytes are out in b / 8."""
    for groups, want in ((1, 21_757_952), (2, 43_515_904), (4, 87_031_808), (8, 174_063_616)):
        assert count(SketchTune(groups=groups), LLAMA_7B) == want
    printed = ((1, 34.1, 22.0), (2, 68.2, 44.0), (4, 136.3, 88.1), (8, 272.6, 176.2))
    for groups, larger, newer in printed:
        assert round(count(SketchTune(groups=groups), LLAMA_13B) / 1e6, 1) == larger
        assert round(count(SketchTune(groups=groups), LLAMA_3_8B) / 1e6, 1) == newer
    for bits in (2, 3, 4):
        adapter = build(SketchTune(bits=bits), site(layer(16, 64)))
        assert adapter.codes.nbytes == 16 * 64 * bits / 8


def test_more_groups_and_more_bits_come_nearer():
    place = site(layer(32, 256, dtype=torch.float32))
    error = lambda **given: (build(SketchTune(**given), place, move=0).weight(place.weight) - place.weight).norm().item()  # noqa: E731
    assert error(bits=2) > error(bits=3) > error(bits=4) > error(bits=4, groups=4) > error(bits=4, groups=8)


def test_a_step_of_the_table_is_a_step_of_the_shared_weights(tmp_path):
    """Gradient descent on the table moves all weights of a code together; saved and loaded, it computes the same."""
    model = nn.Sequential(nn.Linear(32, 16))
    tt.attach(model, SketchTune(bits=2), targets=["0"], rng=torch.Generator().manual_seed(0))
    (adapter,) = (m for m in model.modules() if isinstance(m, SketchTune.adapter_class))
    codes = unpack(adapter.codes, 2).view(16, 32).clone()
    x, optimizer, losses = torch.randn(64, 32), torch.optim.AdamW(tt.parameters(model), lr=1e-2, weight_decay=0.0), []
    for _ in range(20):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and torch.equal(unpack(adapter.codes, 2).view(16, 32), codes)
    W = tt.effective_weight(model, "0")
    assert all(len(W[row][codes[row] == c].unique()) <= 1 for row in range(16) for c in range(4))
    tt.save(model, tmp_path / "a")
    fresh = nn.Sequential(nn.Linear(32, 16))
    fresh.load_state_dict({"0.weight": model[0]._parameters["weight"], "0.bias": model[0].bias})
    tt.load(fresh, tmp_path / "a")
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)


def test_the_sum_into_a_table_is_deterministic_on_a_cpu():
    """Where deterministic algorithms are asked for, the scattered addition is used as well: nothing forbids it, bits repeat."""
    table, codes = random_sketch(64, 1, 4096, 2, torch.float32)
    dW = torch.randn(64, 4096)
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(2)
    try:
        first = to_table(dW, codes, 2)
        assert all(torch.equal(to_table(dW, codes, 2), first) for _ in range(5))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


def test_tables_of_another_shape_or_layer_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 16))
    tt.attach(model, SketchTune(bits=2), targets=["0"])
    tt.save(model, tmp_path / "a")
    with pytest.raises(ShapeMismatch, match="0 is 8x32 in this model; the adapter was made for 16x32"):
        tt.load(nn.Sequential(nn.Linear(32, 8)), tmp_path / "a")
    with pytest.raises(tt.NoMatch, match="acts on 0, which this model does not have"):
        tt.load(nn.ModuleDict({"fc": nn.Linear(32, 16)}), tmp_path / "a")


@pytest.mark.parametrize(
    ("config", "message"),
    [({"bits": 9}, "1 to 8 bits"), ({"bits": 0}, "at least 1"), ({"groups": 0}, "at least 1"), ({"restarts": 0}, "at least 1")],
)
def test_bad_config(config, message):
    with pytest.raises(ShapeMismatch, match=message):
        SketchTune(**config)


def test_bad_input():
    check = SketchTune.adapter_class.check
    with pytest.raises(ShapeMismatch, match="3 groups do not divide"):
        check(SketchTune(groups=3), site(layer(4, 32)))
    with pytest.raises(ShapeMismatch, match="do not fill whole bytes; pad them by 4 to 16"):
        check(SketchTune(bits=3), site(layer(4, 12)))
    broken = nn.Sequential(nn.Linear(16, 4))
    broken[0].weight.data[1, 2] = torch.nan
    with pytest.raises(ShapeMismatch, match="NaN or infinite values"):
        tt.attach(broken, SketchTune(bits=2), targets=["0"])
    with pytest.warns(UserWarning, match="small steps change nothing"):
        tt.attach(nn.Sequential(nn.Linear(16, 4)), SketchTune(bits=2), targets=["0"], dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tt.attach(nn.Sequential(nn.Linear(16, 4)), SketchTune(bits=2), targets=["0"])
