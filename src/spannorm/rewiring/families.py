"""One row per family: where a layer has its sublayers, norms and matrices, and what else it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from spannorm.auditing.steps import Source, Step
from spannorm.roles import GATE_UP, Fused, Roles


@dataclass(frozen=True)
class Family:
    """How a family's decoder layers are built. Paths are dotted, from the layer or from the base model.

    The defaults are Llama's. A layer calls `attention(hidden_states, **kwargs)` with all arguments that the model gives
    it, and uses the first result. It calls the FFN with the hidden states alone.
    """

    layers: str = "layers"
    """The base model's list of layers."""
    final_norm: str = "norm"
    """The base model's norm after the last layer."""
    embedding: tuple[str, ...] = ("embed_tokens",)
    """The base model's tables of token and position embeddings."""
    attention: str = "self_attn"
    ffn: str = "mlp"
    placement: str = "pre"
    """The family's own placement: rewiring to it with depth rule `none` changes nothing."""
    norms: Mapping[str, str] = field(
        default_factory=lambda: {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    )
    """Role in the placement → the layer's norm. Norms of roles that a placement does not have are dropped."""
    matrices: Roles = field(default_factory=lambda: LLAMA)
    """What each projection of a layer does. Paths that a layer lacks are ignored."""
    own_norms: Mapping[str, str] = field(default_factory=lambda: {"q": "self_attn.q_norm", "k": "self_attn.k_norm"})
    """The family's own norms inside attention, if a layer has them. They replace those of a placement."""
    dropouts: Mapping[str, str] = field(default_factory=dict)
    """`attn` and `ffn` → the layer's dropout on that branch's output."""
    multiplier: str | None = None
    """The layer's factor on both branches' outputs. It stays part of the branch."""
    parallel: str | None = None
    """The layer's flag for attention and FFN side by side. A placement runs them in turn."""
    unit_gain: float = 1.0
    """What a norm's weight is when its gain is 1."""
    scaled_embedding: bool = False
    """Whether the embedding is multiplied by √d on input."""
    scaled_init: str | None = None
    """The output matrices that the family itself already draws at 1/√(2L)."""
    unsupported: Mapping[str, str] = field(default_factory=dict)
    """Configuration flags that must be off → why."""
    found: bool = False
    """Whether an audit found this row, instead of a person writing it. Only audits set the following fields."""
    off: float = 0.0
    """The largest difference after a small model is rewired to its own wiring, relative to the largest logit. 0 means
    bit-identical."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of `placement`."""
    steps: Mapping[str, Sequence[Step]] = field(default_factory=dict)
    """`attn` and `ffn` → the steps in order, with their arguments; empty for one module, called as above."""
    returns: Sequence[Source] | None = None
    """What a layer returns after the stream; None if it returns a tensor."""
    unread: Sequence[str] = ()
    """Arguments of a layer that the audit saw nothing read. They must be None."""
    classes: Sequence[tuple[str, str]] = ()
    """Paths and class names that identify a layer of this kind."""
    unsplit: Sequence[str] = ()
    """Matrices that make q, k and v in an order that is not known; their role is `q`."""
    others: Sequence[Any] = ()
    """Rows of the layers of other kinds."""

    def __post_init__(self) -> None:
        rows = tuple(o if isinstance(o, Family) else Family(**o) for o in self.others)
        object.__setattr__(self, "others", rows)

    def of(self, layer: nn.Module) -> Family | None:
        """The row of a layer's own kind, or None."""
        modules = dict(layer.named_modules()) if self.found else {}

        def fits(row: Family) -> bool:
            return all(type(modules.get(path)).__name__ == name for path, name in row.classes)

        # if two fit, the more specific one
        rows = [row for row in (self, *self.others) if fits(row)]
        return max(rows, key=lambda row: len(row.classes), default=None)


def _heads(config: Any) -> int:
    return config.num_attention_heads


def _grouped_queries(config: Any) -> tuple[int, ...]:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return tuple(size * n for n in (config.num_attention_heads, *[config.num_key_value_heads] * 2))


def _latent_rows(config: Any) -> tuple[int, ...]:
    return config.qk_nope_head_dim, config.v_head_dim


def _intermediate(config: Any) -> int:
    return config.intermediate_size


LLAMA: Roles = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FUSED_QKV: Roles = {
    **LLAMA,
    "self_attn.qkv_proj": Fused(("q", "k", "v"), _grouped_queries),
    "mlp.gate_up_proj": GATE_UP,
}
MOE: Roles = {
    **LLAMA,
    "mlp.gate": "router",
    "mlp.experts.gate_up_proj": GATE_UP,
    "mlp.experts.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate",
    "mlp.shared_experts.up_proj": "ffn_up",
    "mlp.shared_experts.down_proj": "ffn_down",
}
SANDWICH = {
    "attn_norm": "input_layernorm",
    "attn_output_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_output_norm": "post_feedforward_layernorm",
}

_LLAMA_LIKE = Family()
_OLMO2 = Family(
    placement="olmo2", norms={"attn_norm": "post_attention_layernorm", "ffn_norm": "post_feedforward_layernorm"}
)
_GEMMA = Family(placement="peri", norms=SANDWICH, unit_gain=0.0, scaled_embedding=True)
_MOE = Family(matrices=MOE)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "olmo", "smollm3", "ernie4_5"), _LLAMA_LIKE),
    **dict.fromkeys(("olmo2", "olmo3"), _OLMO2),
    "granite": Family(multiplier="residual_multiplier"),
    "starcoder2": Family(matrices={**LLAMA, "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}),
    "phi3": Family(matrices=FUSED_QKV, dropouts={"attn": "resid_attn_dropout", "ffn": "resid_mlp_dropout"}),
    "nanochat": Family(matrices={**LLAMA, "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"}, scaled_init="attention-out"),
    "stablelm": Family(
        own_norms={"q": "self_attn.q_layernorm", "k": "self_attn.k_layernorm"},
        dropouts={"ffn": "dropout"},
        parallel="use_parallel_residual",
    ),
    "gpt2": Family(
        layers="h",
        final_norm="ln_f",
        embedding=("wte", "wpe"),
        attention="attn",
        norms={"attn_norm": "ln_1", "ffn_norm": "ln_2"},
        matrices={
            "attn.c_attn": Fused(("q", "k", "v"), transposed=True),
            "attn.c_proj": Fused(("attn_out",), transposed=True),
            "mlp.c_fc": Fused(("ffn_up",), transposed=True),
            "mlp.c_proj": Fused(("ffn_down",), transposed=True),
        },
        own_norms={},
        scaled_init="attention-out and FFN-down",
        unsupported={"add_cross_attention": "a placement has two sublayers, and cross-attention is a third"},
    ),
    "gpt_neox": Family(
        final_norm="final_layer_norm",
        embedding=("embed_in",),
        attention="attention",
        matrices={
            "attention.query_key_value": Fused(("q", "k", "v"), groups=_heads),
            "attention.dense": "attn_out",
            "mlp.dense_h_to_4h": "ffn_up",
            "mlp.dense_4h_to_h": "ffn_down",
        },
        own_norms={},
        dropouts={"attn": "post_attention_dropout", "ffn": "post_mlp_dropout"},
        parallel="use_parallel_residual",
    ),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
    "glm4": Family(
        placement="peri",
        norms={
            "attn_norm": "input_layernorm",
            "attn_output_norm": "post_self_attn_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "ffn_output_norm": "post_mlp_layernorm",
        },
        matrices=FUSED_QKV,
    ),
    **dict.fromkeys(("qwen3_moe", "olmoe", "mixtral", "glm4_moe"), _MOE),
    "gpt_oss": Family(
        matrices={
            **MOE,
            "mlp.router": "router",
            # gate and up alternate row by row
            "mlp.experts.gate_up_proj": Fused(("ffn_gate", "ffn_up"), groups=_intermediate, transposed=True),
            "mlp.experts.down_proj": Fused(("ffn_down",), transposed=True),
        },
    ),
    "deepseek_v3": Family(
        matrices={
            **MOE,
            "self_attn.q_a_proj": "q",
            "self_attn.q_b_proj": "q",
            "self_attn.kv_a_proj_with_mqa": "k",  # the latent of keys and values, and the rotated keys
            "self_attn.kv_b_proj": Fused(("k", "v"), _latent_rows, _heads),
        },
        own_norms={
            "q": "self_attn.q_a_layernorm",
            "k": "self_attn.kv_a_layernorm",
            "v": "self_attn.kv_a_layernorm",
        },
    ),
}
"""Configuration's `model_type` → row. Add your own row here."""
