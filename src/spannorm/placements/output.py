"""Placements that normalize a sublayer's output before it is added."""

from __future__ import annotations

from typing import final

from spannorm.norms import Norm, Scale
from spannorm.placements.base import Layout, Placement, Sublayer
from spannorm.shapes import Stream


@final
class PeriLN(Placement):
    """PreNorm, except that each branch's output is normalized too (sandwich norm).

        x ─┬─ N ─ A ─ N ─(+)─┬─ N ─ F ─ N ─(+)─ x'
           └─────────────┘   └─────────────┘

    Equation: `h = x + c·N(A(N(x)))`, `x' = h + c·N(F(N(h)))`.
    Ends: a final norm; the embedding may be normalized too.
    Init: N(0, 0.02²). An init factor on the outputs has no effect in the forward pass: the output norm undoes it.
    Source: arXiv 2502.02732; Gemma 2 and 3.
    Our reading: the base init. Gemma's embedding ×√d is the configuration's `embedding_multiplier`; its gain 1+w is a
    plain gain here.

    Args:
        embedding_norm: normalize the embedding once, before block 0.
    """

    final_norm = True
    output_norms = {"attn_output_norm": "attn", "ffn_output_norm": "ffn"}  # noqa: RUF012
    attn_output_norm: Norm
    ffn_output_norm: Norm

    @classmethod
    def layout(cls, num_layers: int, *, embedding_norm: bool = False) -> Layout:
        return Layout({0: cls}, embedding_norm)

    def norms(self) -> tuple[str, ...]:
        return "attn_norm", "attn_output_norm", "ffn_norm", "ffn_output_norm"

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        f = self.attn_output_norm(attn(self.attn_norm(x)))
        n, h = self.ffn_norm(x, f, branch=self.attn_scale, return_sum=True)
        return self.add(h, self.ffn_output_norm(ffn(n)), branch=self.ffn_scale)


@final
class OLMo2Norm(Placement):
    """Peri-LN without the input norms: only each branch's output is normalized (reordered norm).

        x ─┬─ A ─ N ─(+)─┬─ F ─ N ─(+)─ x'
           └─────────┘   └─────────┘

    Equation: `h = x + c·N(A(x))`, `x' = h + c·N(F(h))`.
    Ends: a final norm. Queries and keys are normalized over the whole projected width, before the split into heads.
    Init: N(0, 0.02²) cut at 3σ.
    Source: OLMo 2, arXiv 2501.00656.
    """

    recommended_base_init = "normal_cut"
    final_norm = True
    inner_norms = {"q": "width", "k": "width"}  # noqa: RUF012
    output_norms = {"attn_norm": "attn", "ffn_norm": "ffn"}  # noqa: RUF012

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        h = self.add(x, self.attn_norm(attn(x)), branch=self.attn_scale)
        return self.add(h, self.ffn_norm(ffn(h)), branch=self.ffn_scale)


@final
class NormFormer(Placement):
    """PreNorm, except that attention's output, its heads and the FFN's inner activation are normalized or scaled.

        x ─┬─ N ─ heads ─ ×γ ─ out ─ N ─(+)─┬─ N ─ gate, up ─ N ─ down ─(+)─ x'
           └────────────────────────────┘   └───────────────────────────┘

    Equation: `h = x + c·N(A(N(x)))`, `x' = h + c·F(N(h))`; a gain γ = 1 per head before attention-out, `N` before
    FFN-down.
    Ends: a final norm.
    Init: PreNorm's base, N(0, 0.02²).
    Source: arXiv 2110.09456.
    Our reading: the base init; in a gated FFN the inner norm reads the product of gate and up.
    """

    final_norm = True
    inner_norms = {"head_scale": "head", "ffn_down": "width"}  # noqa: RUF012
    output_norms = {"attn_output_norm": "attn"}  # noqa: RUF012
    attn_output_norm: Norm

    def norms(self) -> tuple[str, ...]:
        return "attn_norm", "attn_output_norm", "ffn_norm"

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        f = self.attn_output_norm(attn(self.attn_norm(x)))
        n, h = self.ffn_norm(x, f, branch=self.attn_scale, return_sum=True)
        return self.add(h, ffn(n), branch=self.ffn_scale)


@final
class AveragedResidual(Placement):
    """Peri-LN, except that each sum is a running average, so that the stream's variance stays 1.

        x ─┬─ N ─ A ─ N ─ ×√(1/i) ─(+)─┬─ N ─ F ─ N ─ ×√(1/i) ─(+)─ x'
           └──────── ×√((i−1)/i) ──┘   └──────── ×√((i−1)/i) ──┘

    Equation: per sublayer `x ← √((i−1)/i)·x + √(1/i)·c·N(f(N(x)))`, i = 2, 3, … counts the sums of the whole stack.
    Ends: a final norm.
    Init: N(0, 0.02²); the method assumes an embedding of unit variance.
    Source: Transformers' `beam` (Reflection AI 2026); we know of no paper.
    Our reading: the base init.
    """

    final_norm = True
    output_norms = PeriLN.output_norms
    attn_output_norm: Norm
    ffn_output_norm: Norm

    def norms(self) -> tuple[str, ...]:
        return "attn_norm", "attn_output_norm", "ffn_norm", "ffn_output_norm"

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        f = self.attn_output_norm(attn(self.attn_norm(x)))
        n, h = self.ffn_norm(x, f, **self._weights(0, self.attn_scale), return_sum=True)
        return self.add(h, self.ffn_output_norm(ffn(n)), **self._weights(1, self.ffn_scale))

    def _weights(self, sublayer: int, scale: Scale) -> dict[str, Scale]:
        i = 2.0 * self.layer_idx + 2.0 + sublayer
        return {"skip": (1.0 - 1.0 / i) ** 0.5, "branch": scale * i**-0.5}
