"""Same parameters in, same output and gradients out as peft's LoHa, LoKr, OFT, BOFT, FourierFT, MiSS and Bat.

Known differences, each shown below: peft's Neumann branch of OFT approximates the transpose of its exact branch, so its
parameter enters with the other sign; COFT writes the projection into the parameter, so values agree and gradients only
inside the ball; without its CUDA kernel BOFT silently runs one factor, so more factors are compared with its permutations.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt

peft = pytest.importorskip("peft")

OUT, IN = 20, 24


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(IN, OUT, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def compare(
    config: tt.MethodConfig, theirs: object, names: dict[str, str], *, sign: float = 1.0, size: float = 0.3, atol: float = 1e-6
) -> None:
    """``names``: our parameter -> a piece of peft's; peft's values are drawn, ours are set to ``sign`` times them."""
    ours, base = Net(), Net()
    tt.attach(ours, config, targets="fc")
    other = peft.get_peft_model(base, theirs).double()
    rng = torch.Generator().manual_seed(1)
    pairs = {}
    for mine, part in names.items():
        (match,) = [p for n, p in other.named_parameters() if part in n.split(".")]
        (target,) = [p for n, p in tt.named_parameters(ours) if n.split(".")[-1] == mine]
        with torch.no_grad():
            match.add_(size * torch.randn(match.shape, generator=rng, dtype=match.dtype))
            target.copy_(sign * match.reshape(target.shape))
        pairs[mine] = (target, match)
    assert len(pairs) == len(list(tt.parameters(ours)))
    x = torch.randn(3, 7, IN, generator=rng, dtype=torch.float64)
    mine, them = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = ours(mine), other(them)
    torch.testing.assert_close(y, z, atol=atol, rtol=1e-6)
    seed = torch.randn(y.shape, generator=rng, dtype=y.dtype)
    y.backward(seed)
    z.backward(seed)
    torch.testing.assert_close(mine.grad, them.grad, atol=atol, rtol=1e-6)
    for target, match in pairs.values():
        torch.testing.assert_close(sign * target.grad, match.grad.reshape(target.shape), atol=atol, rtol=1e-6)


LOHA = {"w1a": "hada_w1_a", "w1b": "hada_w1_b", "w2a": "hada_w2_a", "w2b": "hada_w2_b"}


@pytest.mark.parametrize("rank", [1, 4])
def test_loha(rank):
    compare(tt.LoHa(rank=rank, alpha=6.0), peft.LoHaConfig(r=rank, alpha=6, target_modules=["fc"]), LOHA)


@pytest.mark.parametrize(
    ("rank", "factor", "both", "names"),
    [
        (1, -1, False, {"w1": "lokr_w1", "w2a": "lokr_w2_a", "w2b": "lokr_w2_b"}),
        (8, 4, False, {"w1": "lokr_w1", "w2": "lokr_w2"}),
        (1, 4, True, {"w1a": "lokr_w1_a", "w1b": "lokr_w1_b", "w2a": "lokr_w2_a", "w2b": "lokr_w2_b"}),
    ],
)
def test_lokr(rank, factor, both, names):
    theirs = peft.LoKrConfig(r=rank, alpha=3, decompose_factor=factor, decompose_both=both, target_modules=["fc"])
    compare(tt.LoKr(rank=rank, alpha=3.0, factor=factor, decompose_both=both), theirs, names)


@pytest.mark.parametrize("share", [False, True])
def test_oft_exact(share):
    theirs = peft.OFTConfig(oft_block_size=4, r=0, use_cayley_neumann=False, block_share=share, target_modules=["fc"])
    compare(tt.OFT(block_size=4, block_share=share), theirs, {"q": "oft_R"})


def test_oft_neumann_has_the_other_sign_in_peft():
    theirs = peft.OFTConfig(oft_block_size=4, r=0, use_cayley_neumann=True, target_modules=["fc"])
    compare(tt.OFT(block_size=4, neumann=5), theirs, {"q": "oft_R"}, sign=-1.0, size=0.05)


def test_coft_values():
    """Outside the ball: the projection is the same; the gradient is peft's straight-through one there, ours the exact one."""
    theirs = peft.OFTConfig(
        oft_block_size=4, r=0, use_cayley_neumann=False, coft=True, eps=0.1, target_modules=["fc"]
    )
    ours, other = Net(), peft.get_peft_model(Net(), theirs).double()
    tt.attach(ours, tt.OFT(block_size=4, eps=0.1), targets="fc")
    (q,), (weight,) = tt.parameters(ours), [p for n, p in other.named_parameters() if "oft_R" in n]
    with torch.no_grad():
        weight.normal_()
        q.copy_(weight)
    x = torch.randn(5, IN, dtype=torch.float64)
    torch.testing.assert_close(ours(x), other(x), atol=1e-6, rtol=1e-6)
    inside = peft.OFTConfig(oft_block_size=4, r=0, use_cayley_neumann=False, coft=True, eps=100.0, target_modules=["fc"])
    compare(tt.OFT(block_size=4, eps=100.0), inside, {"q": "oft_R"})


def test_boft_one_factor():
    with pytest.warns(UserWarning, match="CUDA extension"):
        theirs = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=["fc"])
        compare(tt.BOFT(block_size=4, factors=1), theirs, {"x": "boft_R", "s": "boft_s"})


def test_boft_factors_have_pefts_permutations():
    from peft.tuners.boft.layer import BOFTLayer

    from trimtab.kernels.rotation import turn

    width, b, m = 32, 4, 4
    blocks = torch.randn(m, width // b, b, b, dtype=torch.float64)
    x = torch.randn(3, width, dtype=torch.float64)
    for level in range(m):
        order = BOFTLayer.block_butterfly_perm(None, width, width // b // 2**level, b // 2, m - 1)
        P = BOFTLayer.perm2mat(None, order).double()
        dense = P @ torch.block_diag(*blocks[level]) @ P.t()
        torch.testing.assert_close(turn(x, blocks[level], level), x @ dense)


@pytest.mark.parametrize("n", [5, 300])
def test_fourierft(n):
    theirs = peft.FourierFTConfig(n_frequency=n, scaling=40.0, target_modules=["fc"])
    compare(tt.FourierFT(coefficients=n, alpha=40.0), theirs, {"c": "fourierft_spectrum"}, atol=2e-5)  # theirs: float32


@pytest.mark.parametrize(
    ("ours", "options"),
    [
        (tt.MiSS(rank=4), {"r": 4}),
        (tt.Bone(rank=4), {"r": 4}),
        (tt.MiSS(rank=7), {"r": 7}),
        (tt.MiSS(rank=4, mini=5), {"r": 4, "mini_r": 5, "init_weights": "mini"}),
    ],
)
def test_miss(ours, options):
    compare(ours, peft.MissConfig(target_modules=["fc"], **options), {"d": "miss_block"})


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_bat(rank):
    compare(tt.Bat(rank=rank), peft.MissConfig(r=rank, init_weights="bat", target_modules=["fc"]), {"b": "miss_block"})
