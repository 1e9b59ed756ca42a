"""Which rows of a fused projection are q, k and v: found by trial, against what the models' own attention gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.core import anatomy
from trimtab.core.selection import select

transformers = pytest.importorskip("transformers")

HEADS, SIZE, WIDTH = 2, 4, 8
ORDERS = {
    "thirds": lambda y: y.chunk(3, -1),
    "v first": lambda y: (lambda v, q, k: (q, k, v))(*y.chunk(3, -1)),
    "head by head": lambda y: [t.flatten(-2) for t in y.unflatten(-1, (HEADS, 3, SIZE)).unbind(-2)],
    "size outermost": lambda y: [t.flatten(-2) for t in y.unflatten(-1, (WIDTH, 3)).unsqueeze(-2).unbind(-1)],
}


class Attention(nn.Module):
    """An attention that takes its projection apart in a given order, and softmaxes itself or leaves that to torch."""

    def __init__(self, order: str, written_out: bool):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.order, self.written_out = order, written_out

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for t in ORDERS[self.order](self.qkv(x)))
        if self.written_out:
            y = torch.softmax(q @ k.transpose(-1, -2) / SIZE**0.5, -1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


def rows_by_hand(order: str) -> dict[str, list[int]]:
    """The row numbers of each part, from what the order does to the numbers 0, 1, 2, ... themselves."""
    parts = ORDERS[order](torch.arange(3.0 * WIDTH).view(1, 1, -1))
    return {name: sorted(part.flatten().long().tolist()) for name, part in zip("qkv", parts, strict=True)}


@pytest.mark.parametrize("written_out", [False, True], ids=["torch's attention", "softmax"])
@pytest.mark.parametrize("order", ORDERS)
def test_any_order_is_found(order: str, written_out: bool) -> None:
    model = nn.Sequential(nn.ModuleDict({"attn": Attention(order, written_out)}))
    with torch.no_grad():  # the trial does not depend on the caller's mode
        parts = anatomy.of(model).parts["0.attn.qkv"]
    found = {part: sorted(rows.index(torch.device("cpu")).tolist()) for part, rows in parts.items()}
    assert found == rows_by_hand(order)


CONFIGS = {
    "codegen": ("CodeGenModel", "CodeGenConfig", {"n_embd": 32, "n_layer": 1, "n_head": 8, "rotary_dim": 4, "vocab_size": 40,
                "n_ctx": 32}),
    "deberta": ("DebertaModel", "DebertaConfig", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
                "intermediate_size": 48, "vocab_size": 40, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "falcon, grouped": ("FalconModel", "FalconConfig", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
                        "num_kv_heads": 2, "new_decoder_architecture": True, "vocab_size": 40}),
    "gpt_bigcode": ("GPTBigCodeModel", "GPTBigCodeConfig", {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 40}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_change_of_the_values_leaves_the_attention_probabilities_alone(name: str) -> None:
    """And a change of queries or keys moves them, in the model itself with its own weights."""
    cls, config, values = CONFIGS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**values, attn_implementation="eager")
    model = getattr(transformers, cls)(config).eval()
    found = anatomy.of(model)
    path = next(p for p, r in found.roles.items() if r == "attn.qkv")
    module, parts = model.get_submodule(path), found.parts[path]
    ids = torch.arange(5, 12)[None]
    run = lambda: model(input_ids=ids, output_attentions=True, use_cache=False).attentions[0]  # noqa: E731
    assert sum(rows.count for rows in parts.values()) == module.weight.shape[0 if isinstance(module, nn.Linear) else 1]
    with torch.no_grad():
        before, weight = run(), module.weight.detach().clone()
        for part, rows in parts.items():
            index = rows.index(torch.device("cpu"))
            (module.weight if isinstance(module, nn.Linear) else module.weight.t())[index] += 0.5 * torch.randn(len(index), 32)
            moved = (run() - before).abs().max()
            assert (moved == 0) if part == "v" else (moved > 1e-4), part
            module.weight.copy_(weight)


class Linear(nn.Module):
    """Attention without a softmax: which rows are which shows nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(q @ (k.transpose(-1, -2) @ v))


def test_parts_that_no_trial_proves_are_refused_when_asked_for_and_the_whole_is_not() -> None:
    model = nn.Sequential(nn.ModuleDict({"attn": Linear()}))
    with pytest.raises(
        tt.Unsupported, match=r"attn\.v would be rows of .*0\.attn\.qkv.*is not known.*target the whole of it, 'attn\.qkv'"
    ):
        tt.attach(model, tt.LoRA(rank=2), targets="attn.v")
    assert len(tt.attach(model, tt.LoRA(rank=2), targets="attention")) == 2


def test_latent_attention_has_its_keys_and_values_as_rows() -> None:
    config = transformers.DeepseekV3Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, intermediate_size=48, vocab_size=40, first_k_dense_replace=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.DeepseekV3ForCausalLM(config)
    home = "model.layers.0.self_attn."
    roles = {p.removeprefix(home): r for p, r in anatomy.of(model).roles.items() if p.startswith(home) and r != "norm"}
    assert roles == {
        "q_a_proj": "attn.q_a", "q_b_proj": "attn.q", "kv_a_proj_with_mqa": "attn.kv_a", "kv_b_proj": "attn.kv", "o_proj": "attn.o",
    }  # fmt: skip
    value = select(model, "attn.v")[0]
    assert (value.path, value.rows.index(torch.device("cpu"))[:10].tolist()) == (home + "kv_b_proj", [*range(8, 16), 24, 25])
    assert [p.path for p in select(model, "mlp")] == [f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")]
