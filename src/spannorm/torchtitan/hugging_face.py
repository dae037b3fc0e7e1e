"""Conversion between a torchtitan run and a folder of our Hugging Face model."""

from __future__ import annotations

from typing import Any

import torch
from torchtitan.models.common.rope import ComplexRoPE
from torchtitan.protocols.state_dict_adapter import StateDictAdapter as TitanAdapter
from torchtitan.tools.logging import logger

from spannorm.errors import InputError
from spannorm.torchtitan.model import embedding_scale, heads_of
from spannorm.torchtitan.names import TURNED, hugging_face_name, titan_name, to_halves, to_pairs

_NOT_PARAMETERS = ("expert_bias_E", "tokens_per_expert_E", "rope.cache")


class StateDictAdapter(TitanAdapter):
    """Weights by torchtitan's names ↔ by those of `SpanNormForCausalLM`, sharded or whole."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """torchtitan → Hugging Face. Routers' balancing biases do not exist there: they are left out, with a notice."""
        heads, tied = heads_of(self.model_config), self.model_config.enable_weight_tying  # type: ignore[attr-defined]
        found: dict[str, Any] = {}
        for name, value in state_dict.items():
            if name.endswith(_NOT_PARAMETERS):
                if name.endswith("expert_bias_E"):
                    _warn_of_bias(name, value)
                continue
            if tied and name == "lm_head.weight":
                continue
            key = hugging_face_name(name)
            if name.endswith("w1_EFD"):
                up = state_dict[name.replace("w1_EFD", "w3_EFD")]
                value = torch.cat([value, up], dim=1)
            elif name.endswith("w3_EFD"):
                continue
            elif heads.pairs and TURNED.search(name):
                value = to_halves(value, heads.channels)
            found[key] = value
        return found

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Hugging Face → torchtitan."""
        heads, tied = heads_of(self.model_config), self.model_config.enable_weight_tying  # type: ignore[attr-defined]
        found: dict[str, Any] = {}
        for key, value in hf_state_dict.items():
            name = titan_name(key)
            if name.endswith("w1_EFD"):
                found[name], found[name.replace("w1_EFD", "w3_EFD")] = value.chunk(2, dim=1)
                continue
            if heads.pairs and TURNED.search(name):
                value = to_pairs(value, heads.channels)
            found[name] = value
        if tied:
            found.setdefault("lm_head.weight", found["tok_embeddings.weight"])
        return found


def _warn_of_bias(name: str, value: torch.Tensor) -> None:
    if bool((value != 0).any()):
        logger.warning(
            f"{name} is not zero: torchtitan's router adds it when it chooses experts, and the Hugging Face model has "
            "no such bias. Train with moe.load_balance_coeff=None for a folder that computes the same."
        )


def hugging_face_config(config: Any) -> dict[str, Any]:
    """The `config.json` for `SpanNormConfig`, from a configuration of ours with a placement.

    Raises:
        InputError: RoPE or routing that the Hugging Face model does not have.
    """
    first, heads, chosen = config.layers[0], heads_of(config), config.placement
    stack = first.stack
    attention = first.attention
    own_qk_norm = attention.qk_norm is not None
    made: dict[str, Any] = {
        "model_type": "spannorm",
        "architectures": ["SpanNormForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": heads.queries,
        "num_key_value_heads": heads.keys,
        "head_dim": heads.channels,
        "max_position_embeddings": attention.rope.max_seq_len,
        "rope_parameters": _rope(attention.rope),
        "rms_norm_eps": stack.eps,
        "hidden_act": "silu",
        "tie_word_embeddings": config.enable_weight_tying,
        "placement": stack.placement,
        "depth_rule": stack.depth_rule,
        "placement_options": dict(stack.options) or None,
        "norm": stack.norm,
        "qk_norm": own_qk_norm,
        "base_init": chosen.base_init,
        "initializer_range": chosen.initializer_range,
        "init_seed": chosen.init_seed or 0,
        "embedding_multiplier": embedding_scale(config),
    }
    dense = [layer.feed_forward for layer in config.layers if layer.feed_forward is not None]
    mixtures = [layer.moe for layer in config.layers if layer.moe is not None]
    if dense and mixtures:
        raise InputError("our Hugging Face model has no name yet for torchtitan's mix of dense and sparse layers.")
    if mixtures:
        moe = mixtures[0]
        if moe.router.score_func != "softmax" or moe.router.route_scale != 1.0 or moe.router.num_expert_groups:
            raise InputError("our Hugging Face model routes by a softmax over all experts; this model does otherwise.")
        experts = moe.routed_experts.inner_experts
        made |= {
            "intermediate_size": experts.hidden_dim,
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.router.top_k,
            "moe_intermediate_size": experts.hidden_dim,
            "norm_topk_prob": moe.router.route_norm,
        }
        if moe.shared_experts is not None:
            raise InputError("shared experts of torchtitan's have no adapter here yet.")
    else:
        made["intermediate_size"] = dense[0].w1.out_features
    return made


def _rope(rope: Any) -> dict[str, Any]:
    if rope.scaling == "none":
        return {"rope_type": "default", "rope_theta": rope.theta}
    if rope.scaling == "llama" and isinstance(rope, ComplexRoPE.Config):
        return {
            "rope_type": "llama3",
            "rope_theta": rope.theta,
            "factor": rope.scaling_factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }
    raise InputError(f"RoPE scaling {rope.scaling!r} has no adapter to our Hugging Face model.")
