"""spannorm: decide where the norms of a deep Transformer go.

The core (placements, depth rules, init) needs PyTorch alone. The Hugging Face side loads on first use:
`spannorm.rewire` and `spannorm.load`, `spannorm.SpanNormConfig` and `spannorm.SpanNormForCausalLM`, or `import
spannorm.models`, which registers the Auto classes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spannorm.block import Block
from spannorm.errors import InputError
from spannorm.init import init_plan, init_receipt, init_weights_, parameter_groups
from spannorm.norms import LayerNorm, RMSNorm
from spannorm.placements import (
    PLACEMENTS,
    Placement,
    PostNorm,
    PreNorm,
    SpanNorm,
    build_placement,
    register_placement,
)
from spannorm.scaling import depth_rule, depth_rule_names

if TYPE_CHECKING:
    from spannorm.models import SpanNormConfig, SpanNormForCausalLM, SpanNormModel
    from spannorm.rewiring import load, rewire

__version__ = "0.1.0"

_LAZY = {
    **dict.fromkeys(("SpanNormConfig", "SpanNormForCausalLM", "SpanNormModel"), "spannorm.models"),
    **dict.fromkeys(("load", "rewire"), "spannorm.rewiring"),
}

__all__ = [
    "PLACEMENTS",
    "Block",
    "InputError",
    "LayerNorm",
    "Placement",
    "PostNorm",
    "PreNorm",
    "RMSNorm",
    "SpanNorm",
    "SpanNormConfig",
    "SpanNormForCausalLM",
    "SpanNormModel",
    "build_placement",
    "depth_rule",
    "depth_rule_names",
    "init_plan",
    "init_receipt",
    "init_weights_",
    "load",
    "parameter_groups",
    "register_placement",
    "rewire",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'spannorm' has no attribute {name!r}")
