"""project: an update in the subspaces of another base of equal shape, against the dense formula."""

from __future__ import annotations

import pytest
import torch
from saved_adapters import X, adapter, merged_update, net
from torch import nn

import trimtab as tt
from core.small_net import Net

PATHS = ("layers.0.attn.q_proj", "layers.1.down_proj")


def narrow(W: torch.Tensor, energy: float) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Projectors on the leading singular vectors, dense."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    shares = S.square().cumsum(0) / S.square().sum()
    k = next(i + 1 for i, share in enumerate(shares) if share >= energy)
    return U[:, :k] @ U[:, :k].T, Vh[:k].T @ Vh[:k], k


@pytest.mark.parametrize("method", [tt.LoRA(rank=3), tt.LoKr(rank=2), tt.DoRA(rank=2)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("energy", [0.6, 0.95])
def test_is_the_dense_formula(method: tt.MethodConfig, energy: float, tmp_path) -> None:
    source = adapter(tmp_path / "a", method, 1)
    size = {} if type(method) is tt.LoRA else {"max_error": 0.0}
    report = tt.project(source, tmp_path / "b", target=net(seed=5), source=net(), energy=energy, **size)
    rows = {row["path"]: row for row in report}
    for path in PATHS:
        W, D = net(seed=5).get_submodule(path).weight.detach(), merged_update(source, path)
        left, right, k = narrow(W, energy)
        expected = left @ D @ right
        found = merged_update(tmp_path / "b", path, make=lambda: net(seed=5))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert rows[path]["k"] == k < 16
        assert rows[path]["kept"] == pytest.approx((expected.norm() / D.norm()).item(), rel=1e-4)
    with pytest.raises(tt.CheckpointMismatch, match="another base"):  # it is the target's now
        tt.load(net(), tmp_path / "b")


def test_all_singular_vectors_of_square_weights_keep_everything(tmp_path) -> None:
    source = adapter(tmp_path / "a", tt.LoRA(rank=3), 1, "attn.q")
    report = tt.project(source, tmp_path / "b", target=net(), energy=1.0)
    assert report.column("kept") == pytest.approx([1.0] * 2)
    models = [net(), net()]
    for model, folder in zip(models, (source, tmp_path / "b"), strict=True):
        tt.load(model, folder)
    torch.testing.assert_close(models[1](X), models[0](X), atol=1e-5, rtol=1e-5)


def test_a_target_of_other_shapes_or_places_is_refused_by_name(tmp_path) -> None:
    source = adapter(tmp_path / "a", tt.LoRA(rank=3), 1)
    with pytest.raises(tt.ShapeMismatch, match=r"q_proj.weight is \(24, 24\) in the target and \(16, 16\)(.|\n)*down_proj"):
        tt.project(source, tmp_path / "b", target=Net(width=24))
    with pytest.raises(tt.TrimtabError, match="layers"):
        tt.project(source, tmp_path / "b", target=nn.Sequential(nn.Linear(16, 16)))
    with pytest.raises(tt.ShapeMismatch, match="energy is a share"):
        tt.project(source, tmp_path / "b", target=net(seed=5), energy=0.0)
    norms = adapter(tmp_path / "n", tt.NormTuning(), 1, None)
    with pytest.raises(tt.Unsupported, match="updates of matrices alone"):
        tt.project(norms, tmp_path / "b", target=net(seed=5), source=net())
    assert not (tmp_path / "b").exists()
