"""A tiny random model of every supported family: three blocks, no two sizes alike where the family lets them differ."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SMALL: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 10,
}
GROUPS: dict[str, Any] = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "granite": {"residual_multiplier": 0.22, "embedding_multiplier": 3.0, "attention_multiplier": 0.2},
    "smollm3": {},
    "starcoder2": {},
    "ernie4_5": {},
    "phi3": {"resid_pdrop": 0.2},
    "nanochat": {},
    "stablelm": {"hidden_dropout": 0.2},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 37},
    "gpt_neox": {"use_parallel_residual": False, "hidden_dropout": 0.2, "num_key_value_heads": None},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, **EXPERTS},
    "olmoe": {"num_experts": 4, **EXPERTS},
    "mixtral": {"num_local_experts": 4, **EXPERTS},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, **EXPERTS},
    "glm4_moe": {"head_dim": 8, "first_k_dense_replace": 1, **EXPERTS, **GROUPS},
    "deepseek_v3": {"first_k_dense_replace": 1, **EXPERTS, **LATENT, **GROUPS},
}


def tiny_config_of(family: str, **overrides: Any) -> Any:
    own = FAMILIES.get(family, {})
    none = {key: None for key in SMALL if key.endswith("token_id")}
    return AutoConfig.for_model(family, **{**(none if family == "gpt2" else SMALL), **own, **overrides})


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> Any:
    """Eager attention: the one backend that float64, checkpointing and every mask have in common."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config_of(family, **overrides), attn_implementation="eager")


def in_float64(model: Any) -> Any:
    """With experts that compute in float64: the default kernel of fused experts takes no more than fp32."""
    if any(name.endswith(".experts") for name, _ in model.named_modules()):
        model.set_experts_implementation("batched_mm")
    return model.double()


def checkpoint(model: Any) -> None:
    """Turn activation checkpointing on, by the name that this Transformers has for it."""
    on = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    on({"use_reentrant": False})
