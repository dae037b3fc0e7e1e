"""Attention and feed-forward: Transformers' own, with norms on their projections where asked for."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from spannorm.models.configuration import SpanNormConfig
from spannorm.norms import Norm, build_norm


class NormedLinear(nn.Linear):
    """A projection whose output is normalized, in groups of the norm's width (a head's, for QK norm)."""

    def __init__(self, linear: nn.Linear, norm: Norm) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return self.norm(y.unflatten(-1, (-1, self.norm.weight.shape[0]))).flatten(-2)


def build_attention(config: SpanNormConfig, layer_idx: int) -> LlamaAttention:
    """Causal self-attention with RoPE and grouped queries; QK norm per head if the configuration says so."""
    attention = LlamaAttention(config, layer_idx)
    if config.qk_norm:
        for name in ("q_proj", "k_proj"):
            norm = build_norm("rmsnorm", attention.head_dim, config.rms_norm_eps)
            setattr(attention, name, NormedLinear(getattr(attention, name), norm))
    return attention


def build_ffn(config: SpanNormConfig) -> nn.Module:
    """SwiGLU feed-forward."""
    return LlamaMLP(config)
