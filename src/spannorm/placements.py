"""Where the norms go. A placement is a block-level object that takes two opaque sublayers.

    placement(x, attn, ffn)        attn, ffn: Tensor → Tensor, shape (batch, seq, hidden)

`N` is a norm with a learned gain, `A` attention, `F` the feed-forward, `x` the block's input, `h` what stands
between the two sublayers, `x'` the block's output. `c_a`, `c_f` are the branch factors of a `:forward` depth rule
(1 otherwise, or a learned gain).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from inspect import signature
from typing import Any, ClassVar, final

import torch
from torch import nn

from spannorm.errors import InputError, unknown
from spannorm.norms import Norm, Scale, build_norm, scaled_add
from spannorm.scaling import depth_rule as work_out
from spannorm.shapes import Stream

Sublayer = Callable[[Stream], Stream]


class Placement(nn.Module, ABC):
    """The norms, skips and branch factors of one block.

    Args:
        hidden_size: channels of the residual stream.
        layer_idx: this block's index, from 0.
        num_layers: blocks in the stack; with `layer_idx` it fixes every constant.
        depth_rule: a name of `spannorm.scaling.depth_rule`; None means `default_depth_rule`.
        norm: `rmsnorm` or `layernorm`.
        eps: the norms' epsilon.
    """

    default_depth_rule: ClassVar[str] = "none"
    final_norm: ClassVar[bool]
    """Whether the stack needs a norm between its last block and the head. It belongs to the model."""
    inner_norms: ClassVar[frozenset[str]] = frozenset()
    """Norms that live inside a sublayer, put there by whoever builds it: a subset of q, k, v, attn_out,
    ffn_down, head_scale."""
    embedding_norm: bool = False
    """Whether the embedding is normalized once, before block 0, by the model."""
    attn_norm: Norm
    ffn_norm: Norm
    """The two norms nearly every placement has, by role. What else a placement needs it builds itself."""

    def __init__(
        self,
        *,
        hidden_size: int,
        layer_idx: int,
        num_layers: int,
        depth_rule: str | None = None,
        norm: str = "rmsnorm",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.rule = work_out(self.default_depth_rule if depth_rule is None else depth_rule, num_layers)
        if not 0 <= layer_idx < num_layers:
            raise InputError(f"layer_idx must lie in 0 … {num_layers - 1} for {num_layers} blocks; got {layer_idx}.")
        self.hidden_size, self.layer_idx, self.num_layers = hidden_size, layer_idx, num_layers
        self.norm_name, self.eps = norm, eps
        self.attn_scale: Scale = self._scale(self.rule.attn_forward)
        self.ffn_scale: Scale = self._scale(self.rule.ffn_forward)
        self.attn_norm, self.ffn_norm = self.new_norm(), self.new_norm()

    def _scale(self, factor: float) -> Scale:
        if not self.rule.learned:
            return factor
        shape = () if self.rule.learned == "scalar" else (self.hidden_size,)
        return nn.Parameter(torch.full(shape, self.rule.gain))

    def new_norm(self) -> Norm:
        """A norm of this placement's kind and width."""
        return build_norm(self.norm_name, self.hidden_size, self.eps)

    def forward(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        """One block; the first also enters the stack's inner state, the last leaves it."""
        if self.layer_idx == 0:
            x = self.enter(x)
        x = self.block(x, attn, ffn)
        return self.exit(x) if self.layer_idx == self.num_layers - 1 else x

    @abstractmethod
    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        """The placement's equation."""

    def enter(self, x: Stream) -> Stream:
        """Embedding → the state the blocks carry. A second stream would be opened here."""
        return x

    def exit(self, x: Stream) -> Stream:
        """The state the blocks carry → what the final norm or the head reads."""
        return x

    def extra_repr(self) -> str:
        return f"block {self.layer_idx} of {self.num_layers}, depth_rule={self.rule.name!r}"


@final
class PreNorm(Placement):
    """Normalize what each sublayer reads; the stream itself is never normalized (GPT-2, Llama).

        x ─┬─ N ─ A ─(+)─┬─ N ─ F ─(+)─ x'
           └───────────┘ └───────────┘

    `h = x + c_a·A(N x)`, `x' = h + c_f·F(N h)`; a final norm before the head. Default depth rule: GPT-2's output
    init ×1/√(2L).
    """

    default_depth_rule = "1/sqrt(2L)"
    final_norm = True

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        n, h = self.ffn_norm(x, attn(self.attn_norm(x)), branch=self.attn_scale, return_sum=True)
        return scaled_add(h, ffn(n), branch=self.ffn_scale)


@final
class PostNorm(Placement):
    """Normalize every sum (Vaswani et al. 2017).

        x ─┬─ A ─(+)─ N ─┬─ F ─(+)─ N ─ x'
           └─────┘       └─────┘

    `h = N(x + c_a·A x)`, `x' = N(h + c_f·F h)`; no final norm: the last block ends in one.
    """

    final_norm = False

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        h = self.attn_norm(x, attn(x), branch=self.attn_scale)
        return self.ffn_norm(h, ffn(h), branch=self.ffn_scale)


@final
class SpanNorm(Placement):
    """PostNorm, except that the second skip starts at the block's input and spans the whole block
    (arXiv 2601.22580).

           ┌─────────────────────┐
        x ─┼─ A ─(+)─ N ── F ──(+)─ N ─ x'
           └─────┘

    `h = N(x + c_a·A x)`, `x' = N(x + c_f·F h)`; no final norm. Default depth rule: the paper's Scale Init, a
    depth-dependent *init* that bounds each branch's variance to O(1/L), read as attention-out and FFN-down times
    1/√L. The block's equation is about certain (~95 %); the form of Scale Init (~65 %), the first block (~60 %)
    and RMSNorm are our reading: the paper's full text was not available to us.

    Args:
        initial_norm: the first block, where `x` is the raw embedding. `attention`: A reads `N0(x)`, both skips stay
            raw (our reading). `embedding`: the embedding is normalized once, before block 0 (the other reading).
            `none`: neither.
    """

    default_depth_rule = "1/sqrt(L)"
    final_norm = False

    def __init__(self, *, initial_norm: str = "attention", **common: Any) -> None:
        super().__init__(**common)
        if initial_norm not in ("attention", "embedding", "none"):
            raise unknown("initial_norm", initial_norm, ["attention", "embedding", "none"])
        self.embedding_norm = initial_norm == "embedding"
        reads_norm = initial_norm == "attention" and self.layer_idx == 0
        self.initial_norm = self.new_norm() if reads_norm else nn.Identity()

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        h = self.attn_norm(x, attn(self.initial_norm(x)), branch=self.attn_scale)
        return self.ffn_norm(x, ffn(h), branch=self.ffn_scale)


PLACEMENTS: dict[str, type[Placement]] = {"pre": PreNorm, "post": PostNorm, "span": SpanNorm}
"""The registry: every name that `build_placement`, the configuration and the recipes take."""


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
    cls = PLACEMENTS[name]
    own = [p for p in signature(cls).parameters if p not in signature(Placement).parameters and p != "common"]
    for option in options:
        if option not in own:
            raise InputError(
                f"placement {name!r} has no option {option!r}: "
                + (f"it takes {', '.join(own)}." if own else "it takes none.")
            )
    return cls(
        hidden_size=hidden_size,
        layer_idx=layer_idx,
        num_layers=num_layers,
        depth_rule=depth_rule,
        norm=norm,
        eps=eps,
        **options,
    )
