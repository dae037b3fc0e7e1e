"""Placements that normalize what a sublayer reads, and do not normalize the stream."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.nn import functional as F

from spannorm.errors import InputError
from spannorm.norms import Scale
from spannorm.placements.base import Layout, Placement, Sublayer
from spannorm.placements.post import PostNorm
from spannorm.scaling import OUTPUTS, DepthRule
from spannorm.shapes import Stream


@final
class PreNorm(Placement):
    """Normalize what each sublayer reads; the stream itself is never normalized.

        x ─┬─ N ─ A ─(+)─┬─ N ─ F ─(+)─ x'
           └─────────┘   └─────────┘

    Equation: `h = x + c·A(N(x))`, `x' = h + c·F(N(h))`.
    Ends: a final norm before the head.
    Init: GPT-2's N(0, 0.02²), attention-out and FFN-down ×1/√(2L).
    Source: GPT-2 (Radford et al. 2019); Llama, arXiv 2302.13971.
    """

    default_depth_rule = "1/sqrt(2L)"
    final_norm = True
    norms_only_reads = True

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        n, h = self.ffn_norm(x, attn(self.attn_norm(x)), branch=self.attn_scale, return_sum=True)
        return self.add(h, ffn(n), branch=self.ffn_scale)


@final
class LayerNormScaling(Placement):
    """PreNorm, except that what a sublayer reads shrinks with depth.

        x ─┬─ N ─ ÷√l ─ A ─(+)─┬─ N ─ ÷√l ─ F ─(+)─ x'
           └───────────────┘   └───────────────┘

    Equation: `h = x + c·A(N(x)/√l)`, `x' = h + c·F(N(h)/√l)`, l = b+1.
    Ends: a final norm, not scaled.
    Init: plain N(0, 0.02²). The authors warn that a scaled output init undoes the method.
    Source: arXiv 2502.05795.
    """

    final_norm = True
    norms_only_reads = True

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        self.factor = (self.layer_idx + 1.0) ** -0.5

    def discouraged(self, rule: DepthRule) -> str | None:
        if any(rule.init.get(role, 1.0) != 1.0 for role in OUTPUTS.values()):
            return "the authors warn that a scaled output init undoes LayerNorm Scaling (arXiv 2502.05795)."
        return None

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        n, h = self.ffn_norm(x, attn(self.factor * self.attn_norm(x)), branch=self.attn_scale, return_sum=True)
        return self.add(h, ffn(self.factor * n), branch=self.ffn_scale)


@final
class SubLN(Placement):
    """PreNorm, except that each sublayer also normalizes what its last projection reads.

        x ─┬─ N ─ QKV ─ N ─ out ─(+)─┬─ N ─ gate, up ─ N ─ down ─(+)─ x'
           └─────────────────────┘   └───────────────────────────┘

    Equation: PreNorm's, with `N` before attention-out and before FFN-down.
    Ends: a final norm.
    Init: Xavier normal; V, attention-out and the FFN matrices × √ln(2L). Not together with DeepNorm's init.
    Source: Magneto, arXiv 2210.06423.
    Our reading: √ln(2L) also on the gate of a gated FFN; base init Xavier.
    """

    default_depth_rule = "subln"
    recommended_base_init = "xavier"
    final_norm = True
    inner_norms = {"attn_out": "width", "ffn_down": "width"}  # noqa: RUF012

    def discouraged(self, rule: DepthRule) -> str | None:
        if rule.name == "deepnorm":
            return "SubLN is not to be mixed with DeepNorm's init: it has its own, √ln(2L) (arXiv 2210.06423)."
        return None

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        n, h = self.ffn_norm(x, attn(self.attn_norm(x)), branch=self.attn_scale, return_sum=True)
        return self.add(h, ffn(n), branch=self.ffn_scale)


class MixLN(Placement):
    """PostNorm in the lower blocks, PreNorm in the rest. It has no equation of its own.

        blocks 0 … ⌊aL⌋−1:  PostNorm        blocks ⌊aL⌋ … L−1:  PreNorm

    Equation: PostNorm's or PreNorm's.
    Ends: a final norm.
    Init: plain N(0, 0.02²); no depth rule, for either kind of block.
    Source: arXiv 2412.13795; a = 0.25 up to 1 B parameters.

    Args:
        post_fraction: a, from 0 (PreNorm in all blocks) to 1 (PostNorm in all blocks, and no final norm).
    """

    @classmethod
    def layout(cls, num_layers: int, *, post_fraction: float = 0.25) -> Layout:
        if not 0 <= post_fraction <= 1:
            raise InputError(f"Mix-LN's post_fraction must lie in [0, 1]; got {post_fraction}.")
        lower = math.floor(Fraction(str(post_fraction)) * num_layers)  # exact: in floats 0.29 · 100 is 28.999…
        kinds = {0: PostNorm if lower else PreNorm, lower: PreNorm}
        return Layout({b: kind for b, kind in kinds.items() if b < num_layers}, embedding_norm=False)


@final
class GPAS(Placement):
    """PreNorm, except that after each sum a learned gate scales the stream down, but not its gradient.

        x ─┬─ N ─ A ─(+)─ ×(1−g) ─┬─ N ─ F ─(+)─ ×(1−g) ─ x'        g = silu(γ), seen by the forward pass alone
           └─────────┘            └─────────┘

    Equation: `h = s(x + c·A(N(x)))`, `x' = s(h + c·F(N(h)))`, s(y) = y − silu(γ)·sg(y), γ a learned scalar per
    sublayer, sg = stop-gradient.
    Ends: a final norm.
    Init: γ = 0, so that the block starts as PreNorm; PreNorm's otherwise.
    Source: GPAS, arXiv 2506.22049; dandingsky/GPAS.
    Our reading: the paper uses the same gate with other placements too; this is its Pre + GPAS.
    """

    default_depth_rule = "1/sqrt(2L)"
    final_norm = True
    norms_only_reads = True
    attn_gate: Tensor
    ffn_gate: Tensor

    def gains(self) -> dict[str, Tensor]:
        return {"attn_gate": torch.zeros(()), "ffn_gate": torch.zeros(())}

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        h = self._scaled(self.add(x, attn(self.attn_norm(x)), branch=self.attn_scale), self.attn_gate)
        return self._scaled(self.add(h, ffn(self.ffn_norm(h)), branch=self.ffn_scale), self.ffn_gate)

    @staticmethod
    def _scaled(y: Stream, gate: Tensor) -> Stream:
        return y - F.silu(gate) * y.detach()


@final
class Parallel(Placement):
    """PreNorm, except that attention and FFN read the same stream.

        x ─┬─ N ─┬─ A ─(+)─(+)─ x'
           │     └─ F ──│───┘
           └────────────┘

    Equation: `x' = x + c·A(N(x)) + c·F(N(x))`; with two norms `x' = x + c·A(N(x)) + c·F(N2(x))`.
    Ends: a final norm.
    Init: PreNorm's.
    Source: GPT-J; GPT-NeoX-20B, arXiv 2204.06745 (two norms); PaLM, arXiv 2204.02311, and Cohere (one norm).
    Our reading: the depth rule. It counts two branches per block, as PreNorm's does.

    Args:
        norms: 1 for both sublayers, or 2 as in GPT-NeoX, one for each sublayer.
    """

    default_depth_rule = "1/sqrt(2L)"
    final_norm = True
    norms_only_reads = True

    @classmethod
    def layout(cls, num_layers: int, *, norms: int = 1) -> Layout:
        if norms not in (1, 2):
            raise InputError(f"parallel's `norms` must be 1 (both sublayers read the same) or 2; got {norms!r}.")
        return Layout({0: cls}, embedding_norm=False)

    def norms(self) -> tuple[str, ...]:
        return ("attn_norm", "ffn_norm")[: self.options["norms"]]

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        n = self.attn_norm(x)
        h = self.add(x, attn(n), branch=self.attn_scale)
        return self.add(h, ffn(n if self.options["norms"] == 1 else self.ffn_norm(x)), branch=self.ffn_scale)


@final
class ChannelScaling(Placement):
    """PreNorm, except that each channel of skip and branch is scaled and shifted before they are added.

        x ─┬─ N ─ A ─ +e ─ ×γ ─(+)─┬─ N ─ F ─ +e ─ ×γ ─(+)─ x'
           └───── +b ─── ×a ───┘   └───── +b ─── ×a ───┘

    Equation: per sublayer `x ← a⊙(x + b) + γ⊙(c·f(N(x)) + e)`, a, b, γ, e learned vectors.
    Ends: a final norm. ZAYA also scales and shifts the embedding in this way, once. We leave that to the model.
    Init: a = γ = 1, b = e = 0, so that the block starts as PreNorm; N(0, 0.02²).
    Source: ZAYA1 (Zyphra 2025), as in Transformers' `zaya`.
    Our reading: no depth rule, as in that code.
    """

    final_norm = True
    norms_only_reads = True

    STARTS: ClassVar[dict[str, float]] = {"skip_gain": 1.0, "skip_shift": 0.0, "branch_gain": 1.0, "branch_shift": 0.0}

    def gains(self) -> dict[str, Tensor]:
        sites = [(f"{site}_{name}", start) for site in ("attn", "ffn") for name, start in self.STARTS.items()]
        return {name: torch.full((self.hidden_size,), start) for name, start in sites}

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        h = self._added(x, attn(self.attn_norm(x)), "attn", self.attn_scale)
        return self._added(h, ffn(self.ffn_norm(h)), "ffn", self.ffn_scale)

    def _added(self, x: Stream, f: Stream, site: str, scale: Scale) -> Stream:
        a, b, gain, e = (getattr(self, f"{site}_{name}") for name in self.STARTS)
        return self.add(x + b, scale * f + e, skip=a, branch=gain)
