"""Parameters of a placed model by torchtitan's names and by those of our Hugging Face model.

Two other things differ. In RoPE, torchtitan's Llama rotates neighbouring channels of a head together, and Hugging Face
rotates channel i with channel i + half. So rows of q and k, and gains over their channels, change their order. And
torchtitan has separate gate and up matrices of the experts, which Hugging Face stacks.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

_HUGGING_FACE = (
    (r"^tok_embeddings\.", "model.embed_tokens."),
    (r"^norm\.", "model.norm."),
    (r"^layers\.", "model.layers."),
    (r"\.attention\.(?:qkv_linear\.)?", ".self_attn."),
    (r"\.w([qkv])\.", r".\1_proj."),
    (r"\.wo\.", ".o_proj."),
    (r"\.feed_forward\.", ".mlp."),
    (r"\.mlp\.w1\.", ".mlp.gate_proj."),
    (r"\.mlp\.w2\.", ".mlp.down_proj."),
    (r"\.mlp\.w3\.", ".mlp.up_proj."),
    (r"\.moe\.router\.", ".mlp."),
    (r"\.moe\.routed_experts\.inner_experts\.w2_EDF$", ".mlp.experts.down_proj"),
    (r"\.moe\.routed_experts\.inner_experts\.w[13]_EFD$", ".mlp.experts.gate_up_proj"),
)
_TITAN = (
    (r"^model\.embed_tokens\.", "tok_embeddings."),
    (r"^model\.", ""),
    (r"\.self_attn\.([qkv])_proj\.", r".attention.qkv_linear.w\1."),
    (r"\.self_attn\.o_proj\.", ".attention.wo."),
    (r"\.self_attn\.", ".attention."),
    (r"\.mlp\.gate\.", ".moe.router.gate."),
    (r"\.mlp\.experts\.down_proj$", ".moe.routed_experts.inner_experts.w2_EDF"),
    (r"\.mlp\.experts\.gate_up_proj$", ".moe.routed_experts.inner_experts.w1_EFD"),
    (r"\.mlp\.gate_proj\.", ".feed_forward.w1."),
    (r"\.mlp\.down_proj\.", ".feed_forward.w2."),
    (r"\.mlp\.up_proj\.", ".feed_forward.w3."),
    (r"\.mlp\.", ".feed_forward."),
)
TURNED = re.compile(r"\.attention\.(?:qkv_linear\.w[qk]|[qk]_norm)\.")
"""Parameters for which RoPE's order of channels matters."""


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, other in table:
        name = re.sub(pattern, other, name)
    return name


def hugging_face_name(name: str) -> str:
    """torchtitan's name of a parameter → that of our Hugging Face model."""
    return _renamed(name, _HUGGING_FACE)


def titan_name(name: str) -> str:
    """The reverse. For the experts' stacked gate and up matrices, the name of the first."""
    return _renamed(name, _TITAN)


def _here(value: Any) -> Any:
    """A sharded tensor as a whole one on every process, because its rows will change places."""
    if isinstance(value, DTensor):
        return value.redistribute(placements=[Replicate()] * value.device_mesh.ndim)
    return value


def to_halves(value: Tensor, head_dim: int) -> Tensor:
    """Rows in torchtitan's order of RoPE's pairs → in Hugging Face's; (heads · head_dim, …) or a gain."""
    value = _here(value)
    tail = value.shape[1:]
    return value.reshape(-1, head_dim // 2, 2, *tail).transpose(1, 2).reshape(-1, *tail).contiguous()


def to_pairs(value: Tensor, head_dim: int) -> Tensor:
    """The reverse."""
    value = _here(value)
    tail = value.shape[1:]
    return value.reshape(-1, 2, head_dim // 2, *tail).transpose(1, 2).reshape(-1, *tail).contiguous()
