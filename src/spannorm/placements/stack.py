"""The registry of placements, and the whole stack that a name stands for.

To add a placement, write a class and add a line here, or call `register_placement` in your own file
(docs/add_a_placement.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from inspect import isclass
from typing import Any, Literal, get_type_hints

from spannorm.errors import InputError, one_of, shown
from spannorm.norms import NORMS, Norm, build_norm
from spannorm.placements.base import Placement, check_norm, check_output_norms
from spannorm.placements.hybrid import HybridNorm, HybridNormStar
from spannorm.placements.hyper import GatedResidual, HyperConnections, ManifoldHyperConnections
from spannorm.placements.output import AveragedResidual, NormFormer, OLMo2Norm, PeriLN
from spannorm.placements.post import B2T, DeepNorm, Keel, PostNorm
from spannorm.placements.pre import GPAS, ChannelScaling, LayerNormScaling, MixLN, Parallel, PreNorm, SubLN
from spannorm.placements.sources import AttentionResiduals, BlockAttentionResiduals
from spannorm.placements.span import SpanNorm
from spannorm.placements.streams import MixedInput, ResiDual, SiameseNorm
from spannorm.scaling import depth_rule as work_out
from spannorm.values import Limits, checked

PLACEMENTS: dict[str, type[Placement]] = {
    "pre": PreNorm,
    "post": PostNorm,
    "span": SpanNorm,
    "b2t": B2T,
    "deepnorm": DeepNorm,
    "peri": PeriLN,
    "olmo2": OLMo2Norm,
    "hybrid": HybridNorm,
    "hybrid_star": HybridNormStar,
    "mix": MixLN,  # type: ignore[type-abstract]
    "lns": LayerNormScaling,
    "subln": SubLN,
    "normformer": NormFormer,
    "residual": ResiDual,
    "siamese": SiameseNorm,
    "keel": Keel,
    "gpas": GPAS,
    "parallel": Parallel,
    "averaged": AveragedResidual,
    "channel": ChannelScaling,
    "mixed_input": MixedInput,
    "hc": HyperConnections,
    "mhc": ManifoldHyperConnections,
    "gated": GatedResidual,
    "attnres": AttentionResiduals,
    "attnres_block": BlockAttentionResiduals,
}
"""Every name that `build_placement`, the configuration and the recipes accept."""


def register_placement(name: str, kind: type[Placement]) -> None:
    """Give your own placement a name. Then models, recipes, theory and the command line accept it like any other.

    Args:
        name: not yet taken.
        kind: a subclass of `Placement`.

    Raises:
        InputError: the name is taken by another placement, `kind` is not a placement, or it has no `final_norm`.
    """
    if not (isclass(kind) and issubclass(kind, Placement)):
        raise InputError(f"register_placement takes a subclass of Placement; got {kind!r}.")
    if not hasattr(kind, "final_norm") and "layout" not in vars(kind):
        raise InputError(f"{kind.__name__} must say `final_norm`: whether a norm follows the stack's last block.")
    if PLACEMENTS.get(name, kind) is not kind:
        raise InputError(f"the placement name {name!r} is taken: choose another.")
    PLACEMENTS[name] = kind


def placement_options(name: str) -> list[str]:
    """The names of a placement's own options."""
    return list(PLACEMENTS[name].option_defaults())


_OPTION = Limits(least=-1e6, most=1e6)


@cache
def _option_kinds(kind: type[Placement]) -> dict[str, Any]:
    """A placement's own options → their kinds, as its `layout` declares them."""
    try:
        hints = get_type_hints(kind.layout)
    except (NameError, TypeError):  # a user's placement may use a name that only type checkers know
        hints = {}
    return {name: hints.get(name, Any) for name in kind.option_defaults()}


@dataclass(frozen=True)
class Stack:
    """All blocks of a model: the placement of each, and what they share: depth rule, options, norms at both ends.

        stack = Stack("span", 32)
        blocks = [Block(MyAttention(), MyFFN(), stack.block(b, hidden_size=512)) for b in range(32)]

    Nothing is built until `block` is called.

    Args:
        placement: a name of `PLACEMENTS`.
        num_layers: blocks, at least 1.
        depth_rule: a name of `spannorm.depth_rule`; None becomes the placement's default.
        options: the placement's own options.
        norm: `rmsnorm`, `layernorm` or `dyt`.
        eps: the norms' epsilon.

    Raises:
        InputError: an unknown placement, rule, norm or option.
    """

    placement: str
    num_layers: int
    depth_rule: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    norm: str = "rmsnorm"
    eps: float = 1e-6
    kinds: Mapping[int, type[Placement]] = field(init=False, repr=False, compare=False)
    """First block → the class of the blocks from there on."""
    embedding_norm: bool = field(init=False, repr=False, compare=False)
    """Whether the embedding is normalized once, before block 0."""

    def __post_init__(self) -> None:
        one_of("placement", self.placement, PLACEMENTS)
        one_of("norm", self.norm, NORMS)
        own = _option_kinds(self.kind)
        given = dict(self.options)
        for option, value in given.items():
            if option not in own:
                takes = f"it takes {', '.join(own)}." if own else "it takes none."
                raise InputError(f"placement {self.placement!r} has no option {shown(option)}: {takes}")
            given[option] = checked(own[option], value, f"{self.placement}'s `{option}`", _OPTION)
        name = self.kind.default_depth_rule if self.depth_rule is None else self.depth_rule
        rule, layout = work_out(name, self.num_layers), self.kind.layout(self.num_layers, **given)
        for kind in layout.kinds.values():
            check_output_norms(kind, rule)
            check_norm(kind, self.norm)
        for key, value in {"depth_rule": name, "options": given, **layout._asdict()}.items():
            object.__setattr__(self, key, value)

    @property
    def kind(self) -> type[Placement]:
        """The registered class."""
        return PLACEMENTS[self.placement]

    @property
    def final_norm(self) -> bool:
        """Whether a norm stands between the last block and the head."""
        return self.kind_of(self.num_layers - 1).final_norm

    @property
    def inner_norms(self) -> Mapping[str, Literal["head", "width"]]:
        """The norms inside the sublayers."""
        return self.kind_of(self.num_layers - 1).inner_norms

    def kind_of(self, layer_idx: int) -> type[Placement]:
        """The class of one block."""
        return self.kinds[max(first for first in self.kinds if first <= max(layer_idx, 0))]

    def block(self, layer_idx: int, hidden_size: int) -> Placement:
        """Build one block's placement."""
        kind = self.kind_of(layer_idx)
        options = self.options if kind is self.kind else {}
        return kind(
            hidden_size=hidden_size, layer_idx=layer_idx, num_layers=self.num_layers, depth_rule=self.depth_rule,
            norm=self.norm, eps=self.eps, **options,
        )  # fmt: skip

    def new_norm(self, channels: int) -> Norm:
        """A norm of the stack's kind, for its two ends and for inside the sublayers."""
        return build_norm(self.norm, channels, self.eps)

    def blocks(self, hidden_size: int) -> list[Placement]:
        """Build every block's placement."""
        return [self.block(b, hidden_size) for b in range(self.num_layers)]


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

    Args and errors are those of `Placement`; `options` are the placement's own (SpanNorm: `initial_norm`).
    """
    return Stack(name, num_layers, depth_rule, options, norm, eps).block(layer_idx, hidden_size)
