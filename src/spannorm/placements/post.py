"""Placements that normalize the sum of skip and branch."""

from __future__ import annotations

from typing import Any, final

from spannorm.errors import InputError
from spannorm.norms import Norm
from spannorm.placements.base import Layout, Placement, Sublayer
from spannorm.scaling import DepthRule
from spannorm.shapes import Stream


@final
class PostNorm(Placement):
    """Normalize every sum.

        x ─┬─ A ─(+)─ N ─┬─ F ─(+)─ N ─ x'
           └─────┘       └─────┘

    Equation: `h = N(x + c·A(x))`, `x' = N(h + c·F(h))`.
    Ends: no final norm, because the last block ends in one.
    Init: Xavier; the embedding reaches block 0 at unit variance (×√d on std d^-1/2).
    Source: Vaswani et al. 2017, arXiv 1706.03762.
    Our reading: Xavier normal as the base init, which the paper does not state.
    """

    recommended_base_init = "xavier"
    final_norm = False

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        h = self.attn_norm(x, attn(x), branch=self.attn_scale)
        return self.ffn_norm(h, ffn(h), branch=self.ffn_scale)


@final
class B2T(Placement):
    """PostNorm, except that the block's input is also added to the sum before the block's last norm.

           ┌──────────────────────────┐
        x ─┼─ A ─(+)─ N ─┬─ F ─(+)──(+)─ N ─ x'
           └─────┘       └─────┘

    Equation: `h = N(x + c·A(x))`, `x' = N(x + h + c·F(h))`.
    Ends: no final norm.
    Init: Xavier.
    Source: B2T Connection, arXiv 2206.00330; takase/b2t_connection (the block of its encoder).
    Our reading: the base init. The block is SpanNorm's with the inner skip kept.
    """

    recommended_base_init = "xavier"
    final_norm = False

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        h = self.attn_norm(x, attn(x), branch=self.attn_scale)
        return self.ffn_norm(x + h, ffn(h), branch=self.ffn_scale)


@final
class DeepNorm(Placement):
    """PostNorm, except that the skip is multiplied by α, which grows with depth.

        x ─┬─── A ──(+)─ N ─┬─── F ──(+)─ N ─ x'
           └── ×α ──┘       └── ×α ──┘

    Equation: `h = N(αx + c·A(x))`, `x' = N(αh + c·F(h))`, decoder-only α = (2L)^1/4.
    Ends: no final norm.
    Init: Xavier normal, gain β = (8L)^-1/4 on V, attention-out and the FFN matrices, 1 on Q and K.
    Source: DeepNet, arXiv 2203.00555.
    Our reading: β also on the gate of a gated FFN. We follow the paper at every depth. Other code has α for one fixed
    depth, the wrong sign in β's exponent, or no β on the experts.
    """

    default_depth_rule = "deepnorm"
    recommended_base_init = "xavier"
    final_norm = False

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        self.alpha = (2.0 * self.num_layers) ** 0.25

    def discouraged(self, rule: DepthRule) -> str | None:
        if rule.name == "subln":
            return "SubLN's init belongs to SubLN's norms and is not to be mixed with DeepNorm (arXiv 2210.06423)."
        return None

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        h = self.attn_norm(x, attn(x), skip=self.alpha, branch=self.attn_scale)
        return self.ffn_norm(h, ffn(h), skip=self.alpha, branch=self.ffn_scale)


@final
class Keel(Placement):
    """DeepNorm, except that each branch also normalizes its input, and α is the number of sublayers in the stack.

        x ─┬─ N ─ A ─(+)─ N ─┬─ N ─ F ─(+)─ N ─ x'
           └─── ×α ──┘       └─── ×α ──┘

    Equation: `h = N(αx + c·A(N(x)))`, `x' = N(αh + c·F(N(h)))`, α = 2L.
    Ends: in block 0 attention has no outer norm and α is 1, `h = x + c·A(N(x))`, `x' = N(h + c·F(N(h)))`; no final
    norm.
    Init: the method has none of its own; AdamW betas (0.9, 0.95).
    Source: arXiv 2601.19895.
    Our reading: no final norm, because the last block ends in one; base init N(0, 0.02²).

    Args:
        alpha: the skip factor outside block 0, above 1; None means 2L.
    """

    final_norm = False
    attn_outer_norm: Norm
    ffn_outer_norm: Norm

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        alpha = self.options["alpha"] or 2.0 * self.num_layers
        self.alpha = 1.0 if self.is_first else float(alpha)

    @classmethod
    def layout(cls, num_layers: int, *, alpha: float | None = None) -> Layout:
        if alpha is not None and not alpha > 1:
            raise InputError(f"Keel's alpha must be above 1; got {alpha}. Leave it out for 2L.")
        return Layout({0: cls}, embedding_norm=False)

    def norms(self) -> tuple[str, ...]:
        outer = () if self.is_first else ("attn_outer_norm",)
        return ("attn_norm", *outer, "ffn_norm", "ffn_outer_norm")

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        f = attn(self.attn_norm(x))
        if self.is_first:
            n, h = self.ffn_norm(x, f, branch=self.attn_scale, return_sum=True)
        else:
            h = self.attn_outer_norm(x, f, skip=self.alpha, branch=self.attn_scale)
            n = self.ffn_norm(h)
        return self.ffn_outer_norm(h, ffn(n), skip=self.alpha, branch=self.ffn_scale)
