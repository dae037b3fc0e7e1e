"""torchtitan's debug models, shorter, with an attention that a CPU can differentiate.

Its language models take flex or varlen attention, neither of which has a CPU backward: here they get torchtitan's
`ScaledDotProductAttention`.
"""

from __future__ import annotations

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
