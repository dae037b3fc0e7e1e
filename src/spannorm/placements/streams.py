"""Placements with two residual streams, carried as one tensor (batch, seq, 2, hidden)."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from spannorm.errors import unknown
from spannorm.norms import Norm, Scale
from spannorm.placements.base import Layout, Placement, Sublayer
from spannorm.shapes import State, Stream


@final
class ResiDual(Placement):
    """PostNorm, and a second stream that adds up the outputs of all branches without a norm.

        d ────────(+)──────────────(+)─────── d'        readout: x + N(d)
        x ─┬─ A ─┬─(+)─ N ─┬─ F ─┬─(+)─ N ─── x'
           └───────┘       └───────┘

    Equation: per sublayer `f = c·f(x)`, `d ← d + f`, `x ← N(x + f)`.
    Ends: both streams start at the embedding; the last block reads out `x + N(d)`; no other final norm.
    Init: Xavier.
    Source: arXiv 2304.14802.
    Our reading: the base init.
    """

    recommended_base_init = "xavier"
    final_norm = False
    readout_norm: Norm

    def norms(self) -> tuple[str, ...]:
        return ("attn_norm", "ffn_norm", *(("readout_norm",) if self.is_last else ()))

    def enter(self, x: Stream) -> State:
        return torch.stack((x, x), dim=-2)

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        x, d = x.unbind(-2)
        for f, norm, scale in ((attn, self.attn_norm, self.attn_scale), (ffn, self.ffn_norm, self.ffn_scale)):
            o = f(x)
            x, d = norm(x, o, branch=scale), self.add(d, o, branch=scale)
        return torch.stack((x, d), dim=-2)

    def exit(self, x: Stream) -> State:
        x, d = x.unbind(-2)
        return x + self.readout_norm(d)

    def read(self, x: State) -> Stream:
        return x.select(-2, 0)


@final
class SiameseNorm(Placement):
    """Two streams, one normalized and one not, that share every sublayer.

        Y ──┬──────────────(+)── Y'
            N               │            readout: X + N(Y)
        X ─(+)─ N ─ f ──────┼ ÷√(l+1)
         └────────────────(+)─ N ── X'

    Equation: per sublayer `o = c·f(N_in(X + N_Y(Y)))`, `X ← N_X(X + o/√(l+1))`, `Y ← Y + o`.
    Ends: both streams start at the embedding; the last block reads out `X + N(Y)`; no other final norm.
    Init: gains 1; N(0, 0.02²).
    Source: arXiv 2602.08064v2.
    Our reading: the base init's σ; l counts sublayers from 0. We follow the paper. The official code divides by
    √(2(b+1)) in both sublayers of a block and reads out `N(N(X) + N(Y))`.
    """

    final_norm = False
    readout_norm: Norm

    def norms(self) -> tuple[str, ...]:
        names = [f"{site}_{which}norm" for site in ("attn", "ffn") for which in ("", "x_", "y_")]
        return (*names, *(("readout_norm",) if self.is_last else ()))

    def enter(self, x: Stream) -> State:
        return torch.stack((x, x), dim=-2)

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        streams = x.unbind(-2)
        streams = self._sublayer(streams, attn, "attn", 2 * self.layer_idx, self.attn_scale)
        streams = self._sublayer(streams, ffn, "ffn", 2 * self.layer_idx + 1, self.ffn_scale)
        return torch.stack(streams, dim=-2)

    def _sublayer(
        self, streams: tuple[Stream, ...], f: Sublayer, site: str, index: int, scale: Scale
    ) -> tuple[Stream, ...]:
        x, y = streams
        norm_in, norm_x, norm_y = (self._norm(f"{site}_{which}norm") for which in ("", "x_", "y_"))
        o = f(norm_in(x, norm_y(y)))
        return norm_x(x, o, branch=scale * (index + 1.0) ** -0.5), self.add(y, o, branch=scale)

    def _norm(self, name: str) -> Norm:
        norm: Any = self.get_submodule(name)
        return norm

    def exit(self, x: Stream) -> State:
        x, y = x.unbind(-2)
        return x + self.readout_norm(y)

    def read(self, x: State) -> Stream:
        x, y = x.unbind(-2)
        return x + self._norm("attn_y_norm")(y)


@final
class MixedInput(Placement):
    """PreNorm, except that before each block the stream is mixed with the embedding.

        x_0 ──── ×λ₀ ───┐
        x ── ×λ ──────(+)─┬─ N ─ A ─(+)─┬─ N ─ F ─(+)─ x'
                          └─────────┘   └─────────┘

    Equation: `y = λ·x + λ₀·x_0`, `h = y + c·A(N(y))`, `x' = h + c·F(N(h))`; λ, λ₀ are learned scalars of each block.
    x_0 is the normalized embedding, which is carried as a second stream.
    Ends: the embedding is normalized once; a final norm.
    Init: λ from 1.15 down to 1.05 and λ₀ from 0.20 down to 0.05 over depth; N(0, 0.02²).
    Source: nanochat and modded-nanogpt, whose blocks are Transformers' `nanochat` (without the λ).
    Our reading: PreNorm's depth rule. Their norms have no gain.

    Args:
        start: `nanochat`, or `plain`: λ = 1 and λ₀ = 0, as both projects had it at first.
    """

    default_depth_rule = "1/sqrt(2L)"
    final_norm = True
    stream_lambda: Tensor
    input_lambda: Tensor

    @classmethod
    def layout(cls, num_layers: int, *, start: str = "nanochat") -> Layout:
        if start not in ("nanochat", "plain"):
            raise unknown("start", start, ["nanochat", "plain"])
        return Layout({0: cls}, embedding_norm=True)

    def gains(self) -> dict[str, Tensor]:
        depth = self.layer_idx / max(self.num_layers - 1, 1)
        plain = self.options["start"] == "plain"
        starts = (1.0, 0.0) if plain else (1.15 - 0.10 * depth, 0.20 - 0.15 * depth)
        return {
            name: torch.tensor(value) for name, value in zip(("stream_lambda", "input_lambda"), starts, strict=True)
        }

    def enter(self, x: Stream) -> State:
        return torch.stack((x, x), dim=-2)

    def exit(self, x: Stream) -> State:
        return x.select(-2, 0).clone()  # FSDP2 does not accept a view as a module's output

    def read(self, x: State) -> Stream:
        x, x_0 = x.unbind(-2)
        return self.stream_lambda * x + self.input_lambda * x_0

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        y = self.read(x)
        n, h = self.ffn_norm(y, attn(self.attn_norm(y)), branch=self.attn_scale, return_sum=True)
        return torch.stack((self.add(h, ffn(n), branch=self.ffn_scale), x.select(-2, 1)), dim=-2)
