"""Attention and feed-forward: Transformers' own, with norms on their projections if the placement needs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from spannorm.inner_norms import add_inner_norm
from spannorm.models.configuration import SpanNormConfig
from spannorm.models.experts import MixtureOfExperts
from spannorm.roles import Fused

_PROJECTIONS: dict[Any, str] = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "attn_out": "o_proj",
    "head_scale": "o_proj",
}


def build_attention(config: SpanNormConfig, layer_idx: int, inner_norms: Mapping[Any, str]) -> LlamaAttention:
    """Causal self-attention with RoPE and grouped queries, and the norms inside it.

    Args:
        inner_norms: of `Placement.inner_norms`, those on q, k, v, attn_out and head_scale.
    """
    attention = LlamaAttention(config, layer_idx)
    if config.qk_norm:
        inner_norms = {"q": "head", "k": "head", **inner_norms}
    for role, over in inner_norms.items():
        if (name := _PROJECTIONS.get(role)) is not None:
            heads = config.num_key_value_heads if role in ("k", "v") else config.num_attention_heads
            add_inner_norm(attention, name, Fused((role,)), role, over, heads, config.stack.new_norm)
    return attention


def build_ffn(config: SpanNormConfig, layer_idx: int, inner_norms: Mapping[str, str]) -> nn.Module:
    """SwiGLU feed-forward, or a mixture of experts if the configuration says so, and the norms inside it.

    Args:
        inner_norms: of `Placement.inner_norms`, the one on ffn_down.
    """
    if not config.is_sparse(layer_idx):
        return _with_inner_norm(LlamaMLP(config), config, inner_norms)
    mixture = MixtureOfExperts(config, inner_norms)
    if mixture.shared_expert is not None:
        _with_inner_norm(mixture.shared_expert, config, inner_norms)
    return mixture


def _with_inner_norm(ffn: nn.Module, config: SpanNormConfig, inner_norms: Mapping[str, str]) -> nn.Module:
    if "ffn_down" in inner_norms:
        add_inner_norm(ffn, "down_proj", Fused(("ffn_down",)), "ffn_down", "width", 1, config.stack.new_norm)
    return ffn
