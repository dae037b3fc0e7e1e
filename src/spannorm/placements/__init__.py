"""Where the norms go: every placement, their registry, and the stack that a name stands for."""

from spannorm.placements.base import Layout, Placement, Projection, Sublayer
from spannorm.placements.hybrid import HybridNorm, HybridNormStar
from spannorm.placements.output import NormFormer, OLMo2Norm, PeriLN
from spannorm.placements.post import B2T, DeepNorm, Keel, PostNorm
from spannorm.placements.pre import LayerNormScaling, MixLN, PreNorm, SubLN
from spannorm.placements.span import SpanNorm
from spannorm.placements.stack import PLACEMENTS, Stack, build_placement, placement_options, register_placement
from spannorm.placements.streams import ResiDual, SiameseNorm

__all__ = [
    "B2T", "PLACEMENTS", "DeepNorm", "HybridNorm", "HybridNormStar", "Keel", "LayerNormScaling", "Layout", "MixLN",
    "NormFormer", "OLMo2Norm", "PeriLN", "Placement", "PostNorm", "PreNorm", "Projection", "ResiDual",
    "SiameseNorm", "SpanNorm", "Stack", "SubLN", "Sublayer", "build_placement", "placement_options",
    "register_placement",
]  # fmt: skip
