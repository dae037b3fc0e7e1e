"""Attention and feed-forward: Transformers' own, with norms on their projections where a placement asks for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from spannorm.models.configuration import SpanNormConfig
from spannorm.models.experts import MixtureOfExperts
from spannorm.norms import Norm, build_norm


class NormedLinear(nn.Linear):
    """A projection with a norm on what it reads or writes, in groups of the norm's width (a head's, or all of it).

    It takes over the weights of a plain projection, whose name and place in the checkpoint stay.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.input_norm: Norm | None = None
        self.output_norm: Norm | None = None
        self.head_scale: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.head_scale is not None:
            x = (x.unflatten(-1, (len(self.head_scale), -1)) * self.head_scale[:, None]).flatten(-2)
        if self.input_norm is not None:
            x = _grouped(self.input_norm, x)
        y = super().forward(x)
        return y if self.output_norm is None else _grouped(self.output_norm, y)


def _grouped(norm: Norm, x: Tensor) -> Tensor:
    return norm(x.unflatten(-1, (-1, norm.weight.shape[0]))).flatten(-2)


def _normed(owner: nn.Module, name: str) -> NormedLinear:
    """The projection of that name, made one that can carry norms."""
    linear = getattr(owner, name)
    if not isinstance(linear, NormedLinear):
        linear = NormedLinear(linear)
        setattr(owner, name, linear)
    return linear


def build_attention(config: SpanNormConfig, layer_idx: int, inner_norms: Mapping[str, str]) -> LlamaAttention:
    """Causal self-attention with RoPE and grouped queries, and the norms inside it.

    Args:
        inner_norms: of `Placement.inner_norms`, those on q, k, v, attn_out and head_scale.
    """
    attention = LlamaAttention(config, layer_idx)
    if config.qk_norm:
        inner_norms = {"q": "head", "k": "head", **inner_norms}
    for role, name in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj")):
        if role in inner_norms:
            projection = _normed(attention, name)
            size = attention.head_dim if inner_norms[role] == "head" else projection.out_features
            projection.output_norm = build_norm(config.norm, size, config.rms_norm_eps)
    if "attn_out" in inner_norms:
        projection = _normed(attention, "o_proj")
        projection.input_norm = build_norm(config.norm, projection.in_features, config.rms_norm_eps)
    if "head_scale" in inner_norms:
        _normed(attention, "o_proj").head_scale = nn.Parameter(torch.ones(config.num_attention_heads))
    return attention


def build_ffn(config: SpanNormConfig, layer_idx: int, inner_norms: Mapping[str, str]) -> nn.Module:
    """SwiGLU feed-forward, or a mixture of them where the configuration says so, and the norms inside.

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
        projection = _normed(ffn, "down_proj")
        projection.input_norm = build_norm(config.norm, projection.in_features, config.rms_norm_eps)
    return ffn
