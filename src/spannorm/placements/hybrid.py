"""HybridNorm: norms on Q, K and V inside attention, a PostNorm-like FFN."""

from __future__ import annotations

from typing import final

from spannorm.placements.base import Placement, Sublayer
from spannorm.shapes import Stream


@final
class HybridNorm(Placement):
    """Normalize Q, K and V inside attention. The FFN's input and its skip are the same normalized stream.

        x ─┬─ A_qkv ─(+)─ N ─┬─ F ─(+)─ x'
           └─────────┘       └─────┘

    Equation: `h = x + c·A_qkv(x)`, `x' = N(h) + c·F(N(h))`; both N are the same norm.
    Ends: a final norm. `A_qkv` normalizes Q, K and V per head, before RoPE.
    Init: Megatron's, N(0, 1/(2.5 d)) cut at 3σ, outputs ×1/√(2L).
    Source: arXiv 2503.04598.
    """

    default_depth_rule = "1/sqrt(2L)"
    recommended_base_init = "megatron"
    final_norm = True
    inner_norms = {"q": "head", "k": "head", "v": "head"}  # noqa: RUF012

    def norms(self) -> tuple[str, ...]:
        return ("ffn_norm",)

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        n = self.ffn_norm(x, attn(x), branch=self.attn_scale)
        return self.add(n, ffn(n), branch=self.ffn_scale)


@final
class HybridNormStar(Placement):
    """HybridNorm, except that block 0 is PreNorm (with the norms on Q, K and V).

        x ─┬─ N ─ A_qkv ─(+)─┬─ N ─ F ─(+)─ x'         block 0; the others as in HybridNorm
           └─────────────┘   └─────────┘

    Equation: block 0 `h = x + c·A_qkv(N(x))`, `x' = h + c·F(N(h))`; else HybridNorm's.
    Ends: a final norm.
    Init: HybridNorm's.
    Source: arXiv 2503.04598.
    """

    default_depth_rule = "1/sqrt(2L)"
    recommended_base_init = "megatron"
    final_norm = True
    inner_norms = HybridNorm.inner_norms

    def norms(self) -> tuple[str, ...]:
        return ("attn_norm", "ffn_norm") if self.is_first else ("ffn_norm",)

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        f = attn(self.attn_norm(x)) if self.is_first else attn(x)
        n, h = self.ffn_norm(x, f, branch=self.attn_scale, return_sum=True)
        return self.add(h if self.is_first else n, ffn(n), branch=self.ffn_scale)
