"""Which method of trimtab is which of huggingface/peft's: config fields, tensor names and layouts, one row a peft type.

Known from peft 0.21's tree (tuners/*/{config,layer,model}.py). ``peft.py`` and ``peft_write.py`` work by these rows alone;
nothing here imports peft.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trimtab.compat.peft_table import (
    Fields,
    Stored,
    Tensors,
    Twin,
    channels,
    kernel,
    other_blocks,
    other_side,
    pack_ia3,
    pack_projections,
    pointwise,
    projections,
    slices,
    unpack_ia3,
    without_tensors,
)
from trimtab.core.contracts import MethodConfig
from trimtab.core.errors import Unsupported
from trimtab.core.registry import get
from trimtab.core.site import Site

__all__ = ["LORA", "TWINS", "tucker"]


# -- LoRA, rsLoRA, DoRA; PiSSA and OLoRA as far as peft starts them again at every load

_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_MOVED = {"pissa": "PiSSA", "olora": "OLoRA"}


def _read_lora(f: Fields, stored: Tensors) -> MethodConfig:
    rank, alpha, start = f["r"], f["lora_alpha"], f["init_lora_weights"]
    start = start.lower() if isinstance(start, str) else start
    moved = _MOVED.get(start)
    if f["use_rslora"] and (f["use_dora"] or moved):  # the same scale by another alpha
        alpha = alpha * math.sqrt(rank)
    if moved:
        return get(moved)(rank=rank, alpha=alpha)
    if start not in _STARTS:
        raise Unsupported(
            f"init_lora_weights={start!r}: these factors belong to a base whose weights peft changed when training started; "
            "save them in peft with path_initial_model_for_weight_conversion=..., which writes a plain LoRA of twice the rank"
        )
    name = "DoRA" if f["use_dora"] else "RsLoRA" if f["use_rslora"] else "LoRA"
    return get(name)(rank=rank, alpha=alpha, dropout=f["lora_dropout"])


def _write_lora(config: Any) -> Fields:
    kind = type(config).__name__
    alpha = config.alpha if config.alpha is not None else 8 if kind == "RsLoRA" else 2 * config.rank
    return {
        "r": config.rank, "lora_alpha": alpha, "lora_dropout": config.dropout, "init_lora_weights": True,
        "use_rslora": kind == "RsLoRA", "use_dora": kind == "DoRA",
    }  # fmt: skip


def _moved_start(stored: Tensors, f: Fields, site: Site, common: Tensors) -> Tensors:
    """The start that peft computes again from the base at every load."""
    start = f["init_lora_weights"]
    if isinstance(start, str) and start.lower() in _MOVED:
        config = _read_lora(f, stored)
        b, a = type(config).adapter_class.start(config, site, torch.Generator())
        stored |= {"a0": a.float(), "b0": b.float()}
    return stored


LORA = Twin(
    peft_type="LORA",
    methods=("LoRA", "RsLoRA", "DoRA"),
    tensors=(
        Stored("a", "lora_A.weight", kernel, embedding="lora_embedding_A"),
        Stored("b", "lora_B.weight", pointwise, embedding="lora_embedding_B"),
        Stored("m", "lora_magnitude_vector", channels),
        Stored("a0", "a0", derived=True),
        Stored("b0", "b0", derived=True),
    ),
    layers=frozenset({"Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "Embedding"}),
    fields={"r": ..., "lora_alpha": ..., "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "init_lora_weights": True},
    read=_read_lora,
    write=_write_lora,
    harmless=("qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    patterns={"r": "rank_pattern", "lora_alpha": "alpha_pattern"},
    unpack=_moved_start,
)


# -- AdaLoRA


def _read_adalora(f: Fields, stored: Tensors) -> MethodConfig:
    alpha = f["lora_alpha"] if f["lora_alpha"] > 0 else f["init_r"]
    return get("AdaLoRA")(rank=f["init_r"], alpha=alpha, dropout=f["lora_dropout"], penalty=f["orth_reg_weight"])


def _write_adalora(config: Any) -> Fields | None:
    alpha = 2 * config.rank if config.alpha is None else config.alpha
    if alpha <= 0:
        return None
    return {
        "init_r": config.rank, "target_r": config.rank, "lora_alpha": alpha, "lora_dropout": config.dropout,
        "orth_reg_weight": config.penalty, "total_step": 1,
    }  # fmt: skip


def _pruned(stored: Tensors, f: Fields, site: Site, common: Tensors) -> Tensors:
    """Triplets that peft cut off at saving come back as zeros: the divisor is the rank at the start."""
    mask = (f["rank_pattern"] or {}).get(f"{f['path']}.lora_E")
    if mask is None:
        return stored
    where = torch.tensor(mask, dtype=torch.bool)

    def padded(value: Tensor, dim: int) -> Tensor:
        if value.shape[dim] != int(where.sum()):
            return value
        shape = list(value.shape)
        shape[dim] = len(where)
        return value.new_zeros(shape).index_copy(dim, where.nonzero()[:, 0], value)

    return {key: padded(value, 1 if key == "lora_B" else 0) for key, value in stored.items()}


# -- LoHa and LoKr, with their Tucker form for convolutions, which has an exact matrix form


def tucker(stored: Tensors, t: str, a: str, b: str) -> None:
    """``a`` (r, out), ``b`` (r, in), ``t`` (r, r, k...) -> ``a`` (out, r), ``b`` (r, in * k)."""
    core = stored.pop(t)
    r, s = core.shape[:2]
    kernel = torch.einsum("rsk,si->rik", core.reshape(r, s, -1), stored[b])
    stored |= {a: stored[a].t().contiguous(), b: kernel.reshape(r, -1)}


def _unpack_loha(stored: Tensors, f: Fields, site: Site, common: Tensors) -> Tensors:
    for i in "12":
        if {f"hada_t{i}", f"hada_w{i}_a", f"hada_w{i}_b"} <= set(stored):
            tucker(stored, f"hada_t{i}", f"hada_w{i}_a", f"hada_w{i}_b")
    return stored


def _unpack_lokr(stored: Tensors, f: Fields, site: Site, common: Tensors) -> Tensors:
    if {"lokr_t2", "lokr_w2_a", "lokr_w2_b"} <= set(stored):
        tucker(stored, "lokr_t2", "lokr_w2_a", "lokr_w2_b")
    return stored


def _lycoris(config: Any) -> Fields:
    return {"r": config.rank, "alpha": config.rank if config.alpha is None else config.alpha, "use_effective_conv2d": False}


# -- OFT and BOFT


def _terms(peft_terms: int) -> int:
    """Our number of Neumann terms; peft's 3 sums 4 terms."""
    if peft_terms < 3:
        raise Unsupported(f"num_cayley_neumann_terms={peft_terms} is no rotation to first order that trimtab has; use 3 or more")
    return max(peft_terms, 4)


def _triangle(stored: Tensors) -> int | None:
    """The block size that the stored triangles tell; peft adjusts one that does not divide the width."""
    q = next((v for k, v in stored.items() if k.endswith("_R.weight")), None)
    return None if q is None or q.dim() != 2 else (1 + math.isqrt(1 + 8 * q.shape[1])) // 2


def _read_oft(f: Fields, stored: Tensors) -> MethodConfig:
    return get("OFT")(
        block_size=_triangle(stored), block_share=f["block_share"], dropout=f["module_dropout"],
        neumann=_terms(f["num_cayley_neumann_terms"]) if f["use_cayley_neumann"] else None,
        eps=f["eps"] if f["coft"] else None,
    )  # fmt: skip


def _write_oft(config: Any) -> Fields | None:
    if config.neumann == 3:
        return None
    return {
        "r": config.blocks or 0, "oft_block_size": 0 if config.blocks else config.size(0), "block_share": config.block_share,
        "module_dropout": config.dropout, "coft": config.eps is not None, "eps": config.eps or 6e-5,
        "use_cayley_neumann": config.neumann is not None, "num_cayley_neumann_terms": config.neumann or 5,
    }  # fmt: skip


def _sign(stored: Tensors, f: Fields, adapter: Any = None) -> Tensors:
    """peft's Neumann branch is the transpose of its exact one: a rotation by ``-Q``."""
    return {key: -value for key, value in stored.items()} if f["use_cayley_neumann"] else stored


def _read_boft(f: Fields, stored: Tensors) -> MethodConfig:
    # without its CUDA kernel peft trains one factor, whatever its config says: the tensor tells
    shape = stored["boft_R"].shape if "boft_R" in stored else (1, 0, 4, 4)
    return get("BOFT")(block_size=shape[-1], factors=shape[0], dropout=f["boft_dropout"])


def _write_boft(config: Any) -> Fields:
    return {
        "boft_block_size": 0 if config.blocks else config.size(0), "boft_block_num": config.blocks or 0,
        "boft_n_butterfly_factor": config.factors, "boft_dropout": config.dropout,
    }  # fmt: skip


# -- MiSS, Bone and Bat


def _read_miss(f: Fields, stored: Tensors) -> MethodConfig:
    if f["init_weights"] == "bat":  # peft gives it no dropout, whatever miss_dropout says
        return get("Bat")(rank=f["r"])
    mini = f["mini_r"] if f["init_weights"] == "mini" else None
    return get("MiSS")(rank=f["r"], dropout=f["miss_dropout"], mini=mini)


def _write_miss(config: Any) -> Fields | None:
    if type(config).__name__ == "Bat":
        if config.form != "col":
            return None
        return {"r": config.rank, "miss_dropout": 0.0, "init_weights": "bat", "mini_r": 1}
    if getattr(config, "shared", "inputs") == "outputs":
        return None
    mini = getattr(config, "mini", None)
    return {"r": config.rank, "miss_dropout": config.dropout, "init_weights": "mini" if mini else True, "mini_r": mini or 1}


def _read_bone(f: Fields, stored: Tensors) -> MethodConfig:
    return get("Bat" if f["init_weights"] == "bat" else "Bone")(rank=f["r"])


_CONVS = {"Conv1d", "Conv1d*", "Conv2d", "Conv2d*"}
TWINS: dict[str, Twin] = {
    twin.peft_type: twin
    for twin in (
        LORA,
        Twin(
            peft_type="ADALORA",
            methods=("AdaLoRA",),
            tensors=(Stored("p", "lora_B"), Stored("e", "lora_E"), Stored("q", "lora_A")),
            layers=frozenset({"Linear", "Conv1D", "Conv2d"}),
            fields={"init_r": ..., "lora_alpha": ..., "lora_dropout": 0.0, "orth_reg_weight": 0.5, "rank_pattern": None},
            read=_read_adalora,
            write=_write_adalora,
            harmless=(*LORA.harmless, "r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step",
                      "init_lora_weights", "use_rslora", "alpha_pattern"),
            unpack=_pruned,
        ),
        Twin(
            peft_type="LOHA",
            methods=("LoHa",),
            tensors=(
                Stored("w1a", "hada_w1_a"), Stored("w1b", "hada_w1_b"), Stored("w2a", "hada_w2_a"), Stored("w2b", "hada_w2_b"),
            ),
            layers=frozenset({"Linear", *_CONVS}),
            fields={"r": ..., "alpha": ..., "rank_dropout": 0.0, "module_dropout": 0.0},
            read=lambda f, stored: get("LoHa")(
                rank=f["r"], alpha=f["alpha"], rank_dropout=f["rank_dropout"], module_dropout=f["module_dropout"]
            ),
            write=lambda c: _lycoris(c) | {"rank_dropout": c.rank_dropout, "module_dropout": c.module_dropout},
            harmless=("init_weights", "use_effective_conv2d"),
            patterns={"r": "rank_pattern", "alpha": "alpha_pattern"},
            unpack=_unpack_loha,
            also=("hada_t1", "hada_t2"),
        ),
        Twin(
            peft_type="LOKR",
            methods=("LoKr",),
            tensors=(
                Stored("w1", "lokr_w1"), Stored("w1a", "lokr_w1_a"), Stored("w1b", "lokr_w1_b"),
                Stored("w2", "lokr_w2", kernel), Stored("w2a", "lokr_w2_a"), Stored("w2b", "lokr_w2_b"),
            ),
            layers=frozenset({"Linear", *_CONVS}),
            fields={"r": ..., "alpha": ..., "decompose_factor": ..., "decompose_both": ...},
            read=lambda f, stored: get("LoKr")(
                rank=f["r"], alpha=f["alpha"], factor=f["decompose_factor"], decompose_both=f["decompose_both"]
            ),
            write=lambda c: _lycoris(c) | {"decompose_factor": c.factor, "decompose_both": c.decompose_both},
            harmless=("init_weights", "use_effective_conv2d", "rank_dropout_scale"),
            training=("rank_dropout", "module_dropout"),
            patterns={"r": "rank_pattern", "alpha": "alpha_pattern"},
            unpack=_unpack_lokr,
            also=("lokr_t2",),
        ),
        Twin(
            peft_type="OFT",
            methods=("OFT",),
            tensors=(Stored("q", "oft_R.weight", embedding="oft_embedding_R.weight"),),
            layers=frozenset({"Linear", "Embedding"}),
            fields={"block_share": ..., "module_dropout": 0.0, "coft": ..., "eps": 6e-5,
                    "use_cayley_neumann": ..., "num_cayley_neumann_terms": ...},
            read=_read_oft,
            write=_write_oft,
            harmless=("init_weights", "r", "oft_block_size"),
            unpack=lambda stored, fields, site, common: _sign(stored, fields),
            pack=_sign,
            against=lambda config, path, stored, site: other_blocks(
                config, stored, site, size=_triangle(stored), names=("oft_block_size", "r")
            ),
        ),
        Twin(
            peft_type="BOFT",
            methods=("BOFT",),
            tensors=(Stored("x", "boft_R"), Stored("s", "boft_s")),
            layers=frozenset({"Linear"}),
            fields={"boft_dropout": 0.0},
            read=_read_boft,
            write=_write_boft,
            harmless=("init_weights", "boft_block_size", "boft_block_num", "boft_n_butterfly_factor"),
            against=lambda config, path, stored, site: other_blocks(
                config, stored, site, names=("boft_block_size", "boft_block_num"),
                size=stored["boft_R"].shape[-1] if "boft_R" in stored else None,
            ),
        ),
        Twin(
            peft_type="VERA",
            methods=("VeRA",),
            tensors=(
                Stored("d", "vera_lambda_d"), Stored("e", "vera_lambda_b"),
                Stored("A", "vera_A", derived=True), Stored("B", "vera_B", derived=True),
            ),
            layers=frozenset({"Linear", "Conv1D"}),
            fields={"r": ..., "projection_prng_key": ..., "save_projection": ..., "vera_dropout": 0.0, "d_initial": 0.1},
            read=lambda f, stored: get("VeRA")(
                rank=f["r"], dropout=f["vera_dropout"], seed=f["projection_prng_key"], d_initial=f["d_initial"] or 0.1
            ),
            write=lambda c: {
                "r": c.rank, "vera_dropout": c.dropout, "projection_prng_key": c.seed, "d_initial": c.d_initial,
                "save_projection": True,
            },
            harmless=("init_weights",),
            unpack=slices,
            pack=lambda stored, fields, adapter: {k: v for k, v in stored.items() if k not in ("vera_A", "vera_B")},
            common=projections,
            pack_common=pack_projections,
        ),
        Twin(
            peft_type="FOURIERFT",
            methods=("FourierFT",),
            tensors=(Stored("c", "fourierft_spectrum"),),
            layers=frozenset({"Linear", "Conv1D"}),
            fields={"n_frequency": ..., "scaling": ..., "random_loc_seed": ...},
            read=lambda f, stored: get("FourierFT")(
                coefficients=f["n_frequency"], alpha=f["scaling"], seed=f["random_loc_seed"]
            ),
            write=lambda c: {"n_frequency": c.coefficients, "scaling": c.scale, "random_loc_seed": c.seed},
            harmless=("init_weights",),
            patterns={"n_frequency": "n_frequency_pattern"},
            prefix=r".*\.",
        ),
        Twin(
            peft_type="MISS",
            methods=("MiSS", "Bone", "Bat"),
            tensors=(Stored("d", "miss_block"), Stored("b", "miss_block")),
            layers=frozenset({"Linear"}),
            fields={"r": ..., "miss_dropout": 0.0, "mini_r": 1, "init_weights": ...},
            read=_read_miss,
            write=_write_miss,
        ),
        Twin(
            peft_type="IA3",
            methods=("IA3",),
            tensors=(Stored("l", "ia3_l"),),
            layers=frozenset({"Linear", "Conv1D"}),
            fields={},
            read=lambda f, stored: get("IA3")(side=f.get("side", "output")),
            write=lambda c: {},
            harmless=("feedforward_modules", "init_ia3_weights"),
            unpack=unpack_ia3,
            pack=pack_ia3,
            against=other_side,
            gather=lambda adapters: {"feedforward_modules": [a.site.path for a in adapters if a.at_input]},
        ),
        Twin(
            peft_type="BONE",  # peft's name for MiSS until 0.17; read only
            methods=(),
            tensors=(Stored("d", "bone_block"), Stored("b", "bone_block")),
            layers=frozenset({"Linear"}),
            fields={"r": ..., "init_weights": ...},
            read=_read_bone,
            write=lambda c: None,
        ),
        without_tensors("LN_TUNING"),
        without_tensors("TRAINABLE_TOKENS", "init_weights"),
    )
}  # fmt: skip
