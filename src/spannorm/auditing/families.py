"""Every causal-LM family of the installed Transformers: its default configuration, completed where needed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spannorm.auditing.inspection import Audit

_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
_INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
INCOMPLETE: Mapping[str, Mapping[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {**_EXPERTS, "n_group": 1, "topk_group": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "dbrx": {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 1e4}},
}  # fmt: skip
"""Values that a default configuration lacks although its model needs them."""


def default_configuration(model_type: str) -> Any:
    """A family's default configuration, with the missing values."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type](**INCOMPLETE.get(model_type, {}))


@dataclass(frozen=True)
class Surveyed:
    """One family of the sweep."""

    model_type: str
    audit: Audit | None
    error: str
    """Why there is no audit; empty if there is one."""


def survey(names: Iterable[str] | None = None) -> Iterator[Surveyed]:
    """Audit the default configuration of every causal-LM family of the installed Transformers, made small.

    Args:
        names: families; None means all in `MODEL_FOR_CAUSAL_LM_MAPPING`.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import logging

    from spannorm.auditing.inspection import audit_target
    from spannorm.auditing.targets import resolve
    from spannorm.errors import InputError

    logging.set_verbosity_error()
    for name in names or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield Surveyed(name, audit_target(resolve(name)), "")
        except InputError as error:
            yield Surveyed(name, None, str(error))
