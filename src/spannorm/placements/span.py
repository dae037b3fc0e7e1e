"""SpanNorm."""

from __future__ import annotations

from typing import Any, final

from torch import nn

from spannorm.errors import unknown
from spannorm.placements.base import Layout, Placement, Sublayer
from spannorm.shapes import Stream


@final
class SpanNorm(Placement):
    """PostNorm, except that the second skip starts at the block's input and spans the whole block.

           ┌─────────────────────┐
        x ─┼─ A ─(+)─ N ── F ──(+)─ N ─ x'
           └─────┘

    Equation: `h = N(x + c·A(x))`, `x' = N(x + c·F(h))`.
    Ends: no final norm. Block 0's attention reads `N0(x)`; both skips keep the raw embedding.
    Init: the paper's Scale Init, a depth-dependent *init* that bounds each branch's variance to O(1/L). We read it as
    attention-out and FFN-down times 1/√L.
    Source: arXiv 2601.22580, Eqs. 5–8.
    Our reading: the paper's full text was not available to us. How sure we are: the block's equation ~95 %, no final
    norm ~70 %, the form of Scale Init ~50 %, block 0 ~65 %. RMSNorm is our default. No official code exists.

    Args:
        initial_norm: what happens in block 0, where `x` is the raw embedding. `attention`: A reads `N0(x)`, both skips
            stay raw (our reading). `embedding`: the embedding is normalized once, before block 0 (the other reading).
            `none`: no such norm.
    """

    default_depth_rule = "1/sqrt(L)"
    recommended_base_init = "fan_in"
    final_norm = False

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        if "initial_norm" not in self.norms():
            self.initial_norm = nn.Identity()

    @classmethod
    def layout(cls, num_layers: int, *, initial_norm: str = "attention") -> Layout:
        if initial_norm not in ("attention", "embedding", "none"):
            raise unknown("initial_norm", initial_norm, ["attention", "embedding", "none"])
        return Layout({0: cls}, embedding_norm=initial_norm == "embedding")

    def norms(self) -> tuple[str, ...]:
        first = ("initial_norm",) if self.options["initial_norm"] == "attention" and self.is_first else ()
        return (*first, "attn_norm", "ffn_norm")

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        h = self.attn_norm(x, attn(self.initial_norm(x)), branch=self.attn_scale)
        return self.ffn_norm(x, ffn(h), branch=self.ffn_scale)
