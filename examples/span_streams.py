"""SpanNorm's block on n streams, as a placement in your own file: a skip that spans the block, and a norm on every sum.

    spannorm theory --placements span,span_all,span_turns --depth-rules 'none,1/sqrt(L)' --depths 32,128 \
        --import examples/span_streams.py

The result, and why it is not an option of `span` today: docs/theory.md, "SpanNorm with streams".
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from spannorm import Placement, register_placement
from spannorm.placements import Layout, Sublayer

STREAMS = 4


class _SpanStreams(Placement):
    """Attention and FFN read one mixture of the streams, and the FFN is written to each stream as in hyper-connections.

    Equation: `u = Σ α_i R_i`, `h = N(u + c·A(u))`, `R'_j = N(Σ_i M_ij R_i + β_j c·F(h))`, α, M, β learned.
    Ends: the embedding is normalized once and copied n times; the mean of the streams leaves; a final norm.
    Init: α = e_(b mod n), M = 1; β = 1 for every stream, or e_(b mod n): one stream in turn.
    """

    default_depth_rule = "1/sqrt(L)"
    recommended_base_init = "fan_in"
    final_norm = True
    in_turn: bool
    read_weights: Tensor
    mix: Tensor
    write: Tensor

    @classmethod
    def layout(cls, num_layers: int) -> Layout:
        return Layout({0: cls}, embedding_norm=True)

    def gains(self) -> dict[str, Tensor]:
        chosen = torch.eye(STREAMS)[self.layer_idx % STREAMS]
        write = chosen if self.in_turn else torch.ones(STREAMS)
        return {"read_weights": chosen, "mix": torch.eye(STREAMS), "write": write}

    def enter(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-2).expand(*x.shape[:-1], STREAMS, x.shape[-1])

    def exit(self, x: Tensor) -> Tensor:
        return x.mean(-2)

    def read(self, x: Tensor) -> Tensor:
        return torch.einsum("bsnd,n->bsd", x, self.read_weights)

    def block(self, x: Tensor, attn: Sublayer, ffn: Sublayer) -> Tensor:
        u = self.read(x)
        f = ffn(self.attn_norm(u, attn(u), branch=self.attn_scale))
        o = self.write[:, None] * f.unsqueeze(-2)
        return self.ffn_norm(self.add(torch.einsum("bsnd,nm->bsmd", x, self.mix), o, branch=self.ffn_scale))


@final
class SpanAll(_SpanStreams):
    """Written to all streams: equal streams stay equal, so it starts as SpanNorm."""

    in_turn = False


@final
class SpanTurns(_SpanStreams):
    """Written to one stream in turn: each meets every n-th block's norm alone."""

    in_turn = True


register_placement("span_all", SpanAll)
register_placement("span_turns", SpanTurns)
