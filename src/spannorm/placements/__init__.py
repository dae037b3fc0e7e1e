"""Where the norms go: what a placement is, the registry, and the stack that a name stands for."""

from spannorm.placements.base import Layout, Owned, Placement, Projection, Sublayer
from spannorm.placements.post import PostNorm
from spannorm.placements.pre import PreNorm
from spannorm.placements.span import SpanNorm
from spannorm.placements.stack import PLACEMENTS, Stack, build_placement, placement_options, register_placement

__all__ = [
    "PLACEMENTS", "Layout", "Owned", "Placement", "PostNorm", "PreNorm", "Projection", "SpanNorm", "Stack", "Sublayer",
    "build_placement", "placement_options", "register_placement",
]  # fmt: skip
