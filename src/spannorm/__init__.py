"""spannorm: decide where the norms of a deep Transformer go.

Names load on first use, so that `import spannorm` is quick. The core (placements, depth rules, init, theory, probes)
needs PyTorch and NumPy. `rewire`, `load`, `SpanNormConfig` and the models need Transformers; `audit` needs it only for
a configuration. `import spannorm.models` registers the models with the Auto classes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spannorm import probes as probes
    from spannorm import theory as theory
    from spannorm.auditing import audit
    from spannorm.block import Block
    from spannorm.errors import InputError
    from spannorm.init import init_plan, init_receipt, init_weights_, parameter_groups
    from spannorm.loading import load
    from spannorm.models import SpanNormConfig, SpanNormForCausalLM, SpanNormModel
    from spannorm.norms import LayerNorm, RMSNorm
    from spannorm.placements import (
        PLACEMENTS,
        Placement,
        PostNorm,
        PreNorm,
        Projection,
        SpanNorm,
        Stack,
        build_placement,
        register_placement,
    )
    from spannorm.rewiring import rewire
    from spannorm.roles import Fused
    from spannorm.scaling import depth_rule, depth_rule_names

__version__ = "0.2.0"

_WHERE = {
    "auditing": ("audit",),
    "block": ("Block",),
    "errors": ("InputError",),
    "init": ("init_plan", "init_receipt", "init_weights_", "parameter_groups"),
    "loading": ("load",),
    "models": ("SpanNormConfig", "SpanNormForCausalLM", "SpanNormModel"),
    "norms": ("LayerNorm", "RMSNorm"),
    "placements": (
        *("PLACEMENTS", "Placement", "PostNorm", "PreNorm", "Projection", "SpanNorm", "Stack"),
        *("build_placement", "register_placement"),
    ),
    "rewiring": ("rewire",),
    "roles": ("Fused",),
    "scaling": ("depth_rule", "depth_rule_names"),
}
_HOME = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "PLACEMENTS",
    "Block",
    "Fused",
    "InputError",
    "LayerNorm",
    "Placement",
    "PostNorm",
    "PreNorm",
    "Projection",
    "RMSNorm",
    "SpanNorm",
    "SpanNormConfig",
    "SpanNormForCausalLM",
    "SpanNormModel",
    "Stack",
    "audit",
    "build_placement",
    "depth_rule",
    "depth_rule_names",
    "init_plan",
    "init_receipt",
    "init_weights_",
    "load",
    "parameter_groups",
    "probes",
    "register_placement",
    "rewire",
    "theory",
]


def __getattr__(name: str) -> Any:
    if name in ("probes", "theory"):
        return import_module(f"spannorm.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'spannorm' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"spannorm.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
