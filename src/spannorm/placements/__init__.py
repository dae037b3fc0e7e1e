"""Where the norms go: the registry of placements.

Adding one takes a class and a line here, or `register_placement` from a file of your own (docs/add_a_placement.md).
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

from spannorm.errors import InputError, unknown
from spannorm.placements.base import Placement, Sublayer
from spannorm.placements.hybrid import HybridNorm, HybridNormStar
from spannorm.placements.output import NormFormer, OLMo2Norm, PeriLN
from spannorm.placements.post import DeepNorm, Keel, PostNorm
from spannorm.placements.pre import LayerNormScaling, PreNorm, SubLN, mix_norm
from spannorm.placements.span import SpanNorm
from spannorm.placements.streams import ResiDual, SiameseNorm

PLACEMENTS: dict[str, Callable[..., Placement]] = {
    "pre": PreNorm,
    "post": PostNorm,
    "span": SpanNorm,
    "deepnorm": DeepNorm,
    "peri": PeriLN,
    "olmo2": OLMo2Norm,
    "hybrid": HybridNorm,
    "hybrid_star": HybridNormStar,
    "mix": mix_norm,
    "lns": LayerNormScaling,
    "subln": SubLN,
    "normformer": NormFormer,
    "residual": ResiDual,
    "siamese": SiameseNorm,
    "keel": Keel,
}
"""Every name that `build_placement`, the configuration and the recipes take."""


def register_placement(name: str, build: Callable[..., Placement]) -> None:
    """Give a placement of your own a name: then models, recipes and the command line take it like any other.

    Args:
        name: not yet taken.
        build: a `Placement` subclass, or a function with the same keyword arguments.

    Raises:
        InputError: the name is taken by another placement.
    """
    if PLACEMENTS.get(name, build) is not build:
        raise InputError(f"the placement name {name!r} is taken: choose another.")
    PLACEMENTS[name] = build


def build_placement(
    name: str,
    *,
    hidden_size: int,
    layer_idx: int,
    num_layers: int,
    depth_rule: str | None = None,
    norm: str = "rmsnorm",
    eps: float = 1e-6,
    **options: Any,
) -> Placement:
    """Build the placement of one block by its registered name.

    Args are those of `Placement`; `options` are the placement's own (SpanNorm: `initial_norm`).

    Raises:
        InputError: unknown name, norm, rule or option; a block index outside the stack.
    """
    if name not in PLACEMENTS:
        raise unknown("placement", name, PLACEMENTS)
    own = placement_options(name)
    for option in options:
        if option not in own:
            raise InputError(
                f"placement {name!r} has no option {option!r}: "
                + (f"it takes {', '.join(own)}." if own else "it takes none.")
            )
    return PLACEMENTS[name](
        hidden_size=hidden_size,
        layer_idx=layer_idx,
        num_layers=num_layers,
        depth_rule=depth_rule,
        norm=norm,
        eps=eps,
        **options,
    )


def placement_options(name: str) -> list[str]:
    """The names of a placement's own options."""
    common = signature(Placement).parameters
    own = signature(PLACEMENTS[name]).parameters.values()
    return [p.name for p in own if p.kind is Parameter.KEYWORD_ONLY and p.name not in common]


__all__ = [
    "PLACEMENTS",
    "DeepNorm",
    "HybridNorm",
    "HybridNormStar",
    "Keel",
    "LayerNormScaling",
    "NormFormer",
    "OLMo2Norm",
    "PeriLN",
    "Placement",
    "PostNorm",
    "PreNorm",
    "ResiDual",
    "SiameseNorm",
    "SpanNorm",
    "SubLN",
    "Sublayer",
    "build_placement",
    "mix_norm",
    "placement_options",
    "register_placement",
]
