"""torchtitan's debug models, shorter, with an attention that a CPU can differentiate.

Its language models take flex or varlen attention, neither of which has a CPU backward: here they get torchtitan's
`ScaledDotProductAttention`.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry as llama3
from torchtitan.models.qwen3 import model_registry as qwen3

MODELS = {
    "llama3": lambda: llama3("debugmodel"),
    "qwen3": lambda: qwen3("debugmodel"),
    "moe": lambda: qwen3("debugmodel_moe", moe_comm_backend="standard"),
}


def tiny(model: str = "llama3", layers: int = 4):
    """The model spec of one of them."""
    spec = MODELS[model]()
    spec.model.layers = spec.model.layers[:layers]
    for layer in spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return spec


def in_fp32(self, x_RD, num_tokens_per_expert_E):
    """torchtitan computes experts in bf16 whatever the model's dtype: to compare functions, the same in fp32."""
    weights = [w.to_local() if isinstance(w, DTensor) else w for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD)]
    parts = x_RD.split(num_tokens_per_expert_E.int().tolist())
    each = zip(parts, *weights, strict=True)
    return torch.cat([F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2) for x, w1, w2, w3 in each])
