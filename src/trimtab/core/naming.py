"""What names say of a module: one place for all of them. They decide first; position and shape only where they are silent.

A name is read as words (``cross_attn_query_pos_proj`` is query and pos, ``WqkvProj`` is qkv): words that say nothing of the role
(proj, layer, linear, the kind of attention) are left out, and the rest must be one of the known sets in full.
"""

from __future__ import annotations

import re
from functools import cache

__all__ = [
    "ATTENTION", "ATTENTION_CLASS", "FEED_FORWARD", "HEAD", "MIXER", "attention_role", "auxiliary_role", "feed_forward_role",
    "leaf", "output_rank", "says_position", "words",
]  # fmt: skip

#: parts of a path, or classes, that are an attention
ATTENTION = re.compile(r"attn|attention|(^|_)mha($|_)|deltanet|(^|[._])(self|cross)_?att($|[._])|(^|_)time_mix", re.IGNORECASE)
#: classes that are one
ATTENTION_CLASS = re.compile(r"(Attention|Attn|MHA)(V?\d+|\dD)?$|DeltaNet|TimeMix")
#: parts of a path, or classes, that are a feed-forward
FEED_FORWARD = re.compile(
    r"(^|[._])(mlps?|ffn?|feed_?forward\d*|dense_?relu_?dense|channel_mix(ing)?|experts?|shared_experts?|intermediate)($|[._])"
    r"|FeedForward|MLP$|Mlp$|FFN|DenseActDense|DenseGatedActDense|ChannelMix|SwiGLU|Experts?$|Intermediate$"
)
#: classes that mix tokens without attention; their projections widen and narrow as a feed-forward's do
MIXER = re.compile(
    r"Mamba|Mixer2?$|SSM|ShortConv|Recurrent(Block|GemmaR)|RgLru|S4|Hyena|LSTMLayer|ConvModule|ConvolutionModule|Convolution$"
    r"|LightConv|Modulation|Laurel"
)
HEAD = re.compile(
    r"(.*_)?head|heads|(.*_)?classifier|score|fc|qa_outputs|cls|logits|embed_out|output_layer|out_head|proj_out"
    r"|(class|bbox|box|mask)_(predictor|embed)|(.*_)?predictions|vocab_transform",
    re.IGNORECASE,
)

_NOTHING = frozenset(
    "proj projs projection project projector lin linear layer to in w c attn attention att self cross sa ca head heads content net"
    " dense weight enc dec mem fc with mqa states embed".split()
)
_Q, _K, _V = {"q", "query", "queries"}, {"k", "key", "keys"}, {"v", "value", "values"}
_FIRST, _SECOND = {"a", "down", "compress"}, {"b", "up", "decompress"}
_FUSED = {"qkv", "wqkv", "qkvz", "qkvg", "qkvo"}
_WEAK = re.compile(r"in_proj|c_attn|att_proj|attn_proj_in|fused_in_proj", re.IGNORECASE)
_SHORT = {"wq": "q", "wk": "k", "wv": "v", "wo": "o", "wkv": "kv", "dq": "q_a", "uq": "q_b", "dkv": "kv_a", "ukv": "kv_b",
          "uk": "k", "uv": "v", "toqkv": "qkv", "wg": "g"}  # fmt: skip
_POSITION = {"pos", "position", "positions", "positional", "rel", "relative", "r", "sine", "rotary", "rpe", "bias", "distance"}
_GATE = {"gate", "gates", "g", "z", "receptance", "ogate", "gating", "og"}
_NOT_PROJECTIONS = _POSITION | _GATE | {"sconv", "conv", "convolution", "norm", "mask", "weight", "weights", "offsets", "scale"}
_OUT = {"o", "out", "output", "post", "final"}


def leaf(path: str) -> str:
    """The last part of a dotted path."""
    return path.rpartition(".")[2]


@cache
def words(name: str) -> frozenset[str]:
    """The words of a name that say something, in lower case."""
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", name).lower()
    found: list[str] = []
    for word in re.split(r"[_\W]+", split):
        found += _SHORT.get(word, word).split("_")
    kept = [re.sub(r"(?<=[a-z])\d+$", "", word) for word in found]
    return frozenset(word for word in kept if word and word not in _NOTHING and not word.isdigit())


@cache
def attention_role(name: str, *, attention: bool = False) -> str | None:
    """``attn.q``, ``attn.kv``, ... if the name alone says so; None otherwise. ``weak_qkv`` for names that others bear, too.

    A low-rank pair (multi-head latent attention) is named by what comes out: ``q_b_proj`` gives the queries and is ``attn.q``,
    ``kv_b_proj`` is ``attn.kv``; what goes into them (``q_a_proj``, ``kv_a_proj_with_mqa``) is ``attn.q_a``, ``attn.kv_a``.
    In what is known for an ``attention``, further words (``query_global``, ``layout_key``) do not matter.
    """
    if _WEAK.fullmatch(name):
        return "weak_qkv"
    said = set(words(name))
    step = "_a" if said & _FIRST else ""
    kinds = [kind for kind, names in (("q", _Q), ("k", _K), ("v", _V)) if said & names]
    for fused in ("qkv", "kv", "qk"):
        if said & (_FUSED if fused == "qkv" else {fused}):
            kinds = list(fused)
    rest = said - _Q - _K - _V - _FUSED - {"kv", "qk"} - _FIRST - _SECOND
    if not kinds or (rest & _NOT_PROJECTIONS if attention else rest):
        return None
    what = "".join(kinds)
    if what in ("k", "v") and step:
        what = "kv"
    return f"attn.{what}{step}" if what in ("q", "k", "v", "kv", "qkv", "qk") else None


def says_position(name: str) -> bool:
    """Whether a name speaks of positions: a relative key, a network that makes a bias of distances."""
    return bool(words(name) & _POSITION)


def auxiliary_role(name: str) -> str:
    """The role of a matrix of an attention that is neither q, k, v nor o: of positions, of a gate, or something else."""
    said = words(name)
    if says_position(name):
        return "attn.pos"
    if said & _GATE:
        return "attn.gate"
    return "attn.o_a" if said & _OUT and said & _FIRST else "attn.other"


def output_rank(inner: str) -> int:
    """How well the path below an attention names its output: 2 by its own words, 1 by saying nothing else, 0 otherwise."""
    own = words(leaf(inner))
    around = words(leaf(inner.rpartition(".")[0])) if "." in inner else frozenset()
    if own & _OUT:
        return 2 if own <= _OUT | _SECOND else 0
    if own - _SECOND:
        return 0
    return 2 if around & _OUT and around <= _OUT else 1


_ROLES = {
    "mlp.gate_up": "gate_up gate_up_proj up_gate_proj gate_and_up_proj proj_up_gate_z w12 w1w3 w13 fc1_gate wi_fused input_linear",
    "mlp.down": "down down_proj proj_down ffn_down w2 w_2 w_out wo w3_down fc2 fc_out c_proj lin2 linear2 linear_2 dense2"
    " linear_fc2 dense_4h_to_h pwconv2 pointwise_conv2 output_dense out_linear output_linear linear_out ffn_output",
    "mlp.gate": "gate gate_proj ffn_gate proj_up_gate wi_0 w_0 w1 w_gate linear_gate fc_gate gate_linear fc1_g",
    "mlp.up": "up up_proj proj_up ffn_up w3 w_1 w_in wi wi_1 v1 fc1 fc1_x fc_in c_fc lin1 linear1 linear_1 dense1 linear_fc1"
    " linear_v dense_h_to_4h pwconv1 pointwise_conv1 intermediate_dense ffn",
}
_FEED_FORWARD_ROLES = {name: role for role, names in _ROLES.items() for name in names.split()}


def feed_forward_role(name: str, siblings: set[str]) -> str | None:
    """``mlp.up`` and the like if the name says so. Of ``w1`` and ``w2``, ``w1`` is a gate only beside a ``w3`` (or ``v1``)."""
    lower = name.lower()
    if lower == "w1" and not siblings & {"w3", "v1"}:
        return "mlp.up"
    if lower == "w_1" and "w_0" not in siblings:
        return "mlp.up"
    return _FEED_FORWARD_ROLES.get(lower)
