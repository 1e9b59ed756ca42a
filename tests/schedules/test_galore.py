"""GaLore: projections, state, and steps by hand (arXiv 2403.03507)."""

from __future__ import annotations

import pytest
import torch
from small_blocks import adamw, batch, loss, net, scheduled, steps
from torch import nn

import trimtab as tt
from trimtab.schedules.galore import basis, lifted, projected


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_the_projection(shape):
    G = torch.randn(shape, dtype=torch.float64)
    P = basis(G, min(shape))
    torch.testing.assert_close(lifted(projected(G, P), P, shape), G, atol=1e-13, rtol=0)
    S = torch.linalg.svdvals(G)
    for rank in (1, 3, 5):
        P = basis(G, rank)
        R = projected(G, P)
        assert R.shape == ((shape[0], rank) if shape[0] >= shape[1] else (rank, shape[1]))
        gap = (lifted(R, P, shape) - G).norm() / G.norm()
        torch.testing.assert_close(gap, (S[rank:].square().sum().sqrt() / G.norm()))


class One(nn.Module):
    """A matrix that learns, and a loss with a given gradient."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 8, bias=False, dtype=torch.float64)

    def forward(self, G):
        return (self.layer(torch.eye(12, dtype=torch.float64)).t() * G).sum()


def test_steps_by_hand():
    """Adam on R beside a matrix, the basis made anew every second step, weight decay on W."""
    torch.manual_seed(0)
    model = One()
    tt.attach(model, tt.Unfreeze(), targets=["layer"])
    W = model.layer.weight.detach().clone()
    gradients = [torch.randn(8, 12, dtype=torch.float64) for _ in range(5)]
    optimizer = torch.optim.AdamW(tt.parameters(model), lr=0.1, weight_decay=0.2)
    with tt.scheduled(model, optimizer, tt.GaLore(rank=3, scale=0.5, every=2)) as s:
        for G in gradients:
            model(G).backward()
            s.step()
        state = optimizer.state[tt.parameters(model)[0]]
        assert state["exp_avg"].shape == (3, 12)
    p, P, m, v = W, torch.empty(0), torch.zeros(3, 12), torch.zeros(3, 12)
    for t, G in enumerate(gradients, 1):
        P = basis(G, 3) if t % 2 else P
        R = P.t() @ G
        m, v = 0.9 * m + 0.1 * R, 0.999 * v + 0.001 * R.square()
        step = -0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        p = (p + 0.5 * P @ step) * (1 - 0.1 * 0.2)
    torch.testing.assert_close(tt.parameters(model)[0].detach(), p)


def test_the_state_s_size():
    """2 m r + n r where Adam holds 2 m n; and the weights are whole outside of the optimizer's step."""
    model = net(tt.Unfreeze(), targets="attn.q", head=False)
    optimizer, r = adamw(model), 2
    with scheduled(model, optimizer, tt.GaLore(rank=r)) as s:
        steps(model, optimizer, s, range(3))
        values = [p for p in tt.parameters(model) if p.dim() == 2]
        assert all(p.shape == (8, 8) for p in values)
        held = sum(t.numel() for p in values for t in optimizer.state[p].values() if t.dim())
        assert held + sum(P.numel() for P in s.schedules[0].bases.values()) == 4 * (2 * 8 * r + 8 * r)


def test_accumulation_and_clipping_work():
    found = []
    for accumulation in (1, 4):
        model = net(tt.Unfreeze(), targets="attn", head=False)
        optimizer = torch.optim.SGD(tt.parameters(model), lr=0.1)
        with scheduled(model, optimizer, tt.GaLore(rank=2)) as s:
            for step in range(3):
                ids, labels = batch(step)
                for part in zip(ids.chunk(accumulation), labels.chunk(accumulation), strict=True):
                    (loss(model, part) / accumulation).backward()
                s.step(max_grad_norm=0.05)
        found.append(model)
    for a, b in zip(found[0].parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_an_error_in_the_optimizer_leaves_the_weights():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise KeyError

    model = net(tt.Unfreeze(), targets="attn.q", head=False)
    before = [p.detach().clone() for p in tt.parameters(model)]
    optimizer = Failing(tt.parameters(model), lr=0.1)
    with pytest.raises(KeyError), scheduled(model, optimizer, tt.GaLore(rank=2)) as s:
        steps(model, optimizer, s, [0])
    assert all(torch.equal(a, b) for a, b in zip(tt.parameters(model), before, strict=True))


def test_bad_input():
    for wrong in ({"rank": 0}, {"every": 0}, {"scale": 0.0}):
        with pytest.raises(ValueError, match="at least 1"):
            tt.GaLore(**wrong)
    model = net(head=False)
    with pytest.raises(tt.Unsupported, match="attached: LoRA"):
        scheduled(model, adamw(model), tt.GaLore())
    model = net(tt.Unfreeze(), targets="attn.q", head=False)
    with pytest.warns(UserWarning, match="clamped"):
        scheduled(model, adamw(model), tt.GaLore(rank=9))


def test_what_the_error_advises_lets_the_weights_learn():
    """The advice, taken at its word, gives GaLore the model's matrices, and not the head alone."""
    model = net(tt.LoRA(rank=2), head=False)
    with pytest.raises(tt.Unsupported, match=r"tt\.attach\(model, tt\.Unfreeze\(\), targets='linear'\)"):
        scheduled(model, adamw(model), tt.GaLore(rank=2)).__enter__()
    tt.detach(model, "default")
    tt.attach(model, tt.Unfreeze(), targets="linear")
    galore = tt.GaLore(rank=2)
    with scheduled(model, adamw(model), galore) as s:
        steps(model, s.optimizer, s, range(1))
        inside = {name for name in galore.weights_of if name.startswith("blocks.")}
    assert len(inside) >= 4 * 4


def test_a_head_that_learns_alone_is_told():
    model = net(tt.Unfreeze(), targets="head", head=False, layers=None)
    with pytest.warns(UserWarning, match="the head alone learns"):
        scheduled(model, adamw(model), tt.GaLore(rank=2)).__enter__()
