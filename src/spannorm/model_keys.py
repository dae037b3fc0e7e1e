"""The keys of a model's configuration: the kind and the limits of each.

Recipes and `SpanNormConfig` are both checked with this table. It needs neither PyTorch nor Transformers, so that a bad
recipe is refused before they load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spannorm.errors import InputError
from spannorm.scaling import BASE_INITS
from spannorm.values import NONE, Limits, checked

ACTIVATIONS = (
    "silu", "swish", "gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh",
    "gelu_python_tanh", "gelu_accurate", "quick_gelu", "relu", "relu2", "relu6", "leaky_relu", "sigmoid", "tanh",
    "hardswish", "mish", "laplace", "linear", "sqrtsoftplus",
)  # fmt: skip
"""Transformers' activations without parameters. An activation's parameters would have no role here."""

_WIDTH, _DEPTH = Limits(least=1, most=1 << 20), Limits(least=1, most=1 << 16)
_TOKEN, _COUNT = Limits(least=0, most=(1 << 31) - 1), Limits(least=1, most=1 << 24)
_WEIGHT = Limits(least=0, most=1e6)

MODEL_KEYS: Mapping[str, tuple[Any, Limits]] = {
    "vocab_size": (int, _COUNT),
    "hidden_size": (int, _WIDTH),
    "intermediate_size": (int, _WIDTH),
    "num_hidden_layers": (int, _DEPTH),
    "num_attention_heads": (int, _DEPTH),
    "num_key_value_heads": (int | None, _DEPTH),
    "head_dim": (int | None, _DEPTH),
    "hidden_act": (str, Limits(known=ACTIVATIONS)),
    "max_position_embeddings": (int, _COUNT),
    "initializer_range": (float, Limits(least=0, most=1)),
    "rms_norm_eps": (float, Limits(above=0, most=1)),
    "use_cache": (bool, NONE),
    "pad_token_id": (int | None, _TOKEN),
    "bos_token_id": (int | None, _TOKEN),
    "eos_token_id": (int | list[int] | None, _TOKEN),
    "pretraining_tp": (int | None, Limits(least=1, most=1)),  # Transformers no longer does anything with another
    "tie_word_embeddings": (bool, NONE),
    "rope_parameters": (Mapping[str, Any] | None, NONE),
    "attention_bias": (bool, NONE),
    "attention_dropout": (float, Limits(least=0, below=1)),
    "mlp_bias": (bool, NONE),
    "placement": (str, NONE),
    "depth_rule": (str | None, NONE),
    "placement_options": (Mapping[str, Any] | None, NONE),
    "norm": (str, NONE),
    "qk_norm": (bool, NONE),
    "base_init": (str, Limits(known=tuple(BASE_INITS))),
    "init_seed": (int, Limits(least=0, most=(1 << 32) - 1)),
    "embedding_multiplier": (float | None, Limits(above=0, most=1e6)),
    "num_experts": (int, Limits(least=0, most=1 << 16)),
    "num_experts_per_tok": (int, _DEPTH),
    "moe_intermediate_size": (int, Limits(least=0, most=1 << 20)),
    "norm_topk_prob": (bool, NONE),
    "shared_expert_intermediate_size": (int | None, _WIDTH),
    "decoder_sparse_step": (int, _DEPTH),
    "router_aux_loss_coef": (float, _WEIGHT),
    "router_aux_scope": (str, Limits(known=("sequence", "batch"))),
    "router_z_loss_coef": (float, _WEIGHT),
    "output_router_logits": (bool, NONE),
}
"""The keys that a recipe's `model` accepts: kind and limits."""

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""Keys that a recipe must have. The configuration's defaults are a Llama with seven billion parameters."""


def checked_key(key: str, value: Any, where: str = "`{}`") -> Any:
    """The value of one of `MODEL_KEYS` as its kind.

    Args:
        where: the text around the key in the message.

    Raises:
        InputError: another kind, or outside the limits.
    """
    kind, limits = MODEL_KEYS[key]
    return checked(kind, value, where.format(key), limits)


def check_sizes_given(model: Mapping[str, Any]) -> None:
    """Raise an `InputError` if a recipe's model does not give its sizes."""
    needed = [key for key in SIZES if key != "intermediate_size" or not _all_sparse(model)]
    if missing := [key for key in needed if key not in model]:
        raise InputError(
            f"the recipe does not say {', '.join(f'model.{key}' for key in missing)}: a model's size has no default. "
            "recipes/demo.yaml is a small one."
        )


def _all_sparse(model: Mapping[str, Any]) -> bool:
    return bool(model.get("num_experts")) and model.get("decoder_sparse_step", 1) == 1
