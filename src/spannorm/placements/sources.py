"""Attention over depth: the state holds all earlier outputs, (batch, seq, sources, hidden), and grows with depth."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from spannorm.errors import InputError, unknown
from spannorm.norms import Scale
from spannorm.placements.base import Layout, Placement, Sublayer
from spannorm.placements.hyper import exact, mixed
from spannorm.shapes import State, Stream


class _Sources(Placement):
    """Common part of both: every read is an attention over the sources, each with its own learned query."""

    default_depth_rule = "none"
    final_norm = True
    norms_only_reads = True

    def gains(self) -> dict[str, Tensor]:
        sites = (*(() if self.is_first else ("attn",)), "ffn", *(("readout",) if self.is_last else ()))
        return {f"{site}_query": torch.zeros(self.hidden_size) for site in sites}

    def enter(self, x: Stream) -> State:
        return x.unsqueeze(-2)

    def exit(self, x: Stream) -> State:
        return self._attended(x, "readout").clone()  # FSDP2 does not accept a view as a module's output

    def read(self, x: State) -> Stream:
        return x[..., 0, :] if self.is_first else self._attended(x, "attn")  # the embedding is the only source

    def _attended(self, x: Stream, site: str) -> State:
        inkling, unit = self.options["form"] == "inkling", self.unit(x)
        logits = exact(torch.einsum("bsnd,d->bsn", unit, getattr(self, f"{site}_query")))
        weights = torch.softmax(logits * self.hidden_size**-0.5 if inkling else logits, dim=-1)
        return mixed(weights.unsqueeze(-1), unit if inkling else x)[..., 0, :]

    @staticmethod
    def _check(form: str) -> None:
        if form not in ("paper", "inkling"):
            raise unknown("form", form, ["paper", "inkling"])


@final
class AttentionResiduals(_Sources):
    """Every sublayer reads an attention over all earlier outputs, instead of their sum.

        v_0 … v_l ─ softmax(q_l·unit(v)) ─ Σ ─ N ─ f ─┐        v_0 is the embedding
              └────────────────────────── and v_(l+1) ┘

    Equation: before sublayer l `h = Σ_i softmax_i(q_l·unit(v_i))·v_i`, `v_(l+1) = c·f(N(h))`; q_l a learned vector.
    Ends: block 0's attention reads the embedding; one more read leaves; a final norm. Each block adds two sources.
    Init: q_l = 0, so that a read is a mean; N(0, 0.02²).
    Source: Attention Residuals, arXiv 2603.15031 (Kimi).
    Our reading: no depth rule. The authors' norm on the sources has a gain; here it is part of q_l. As we read the
    paper, there is no division by √d; Inkling has one.

    Args:
        form: `paper`, or `inkling`: `h = Σ_i softmax_i(q_l·unit(v_i)/√d)·unit(v_i)`, as in Transformers' `inkling2`.
    """

    @classmethod
    def layout(cls, num_layers: int, *, form: str = "paper") -> Layout:
        cls._check(form)
        return Layout({0: cls}, embedding_norm=False)

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> State:
        x = written(x, attn(self.attn_norm(self.read(x))), self.attn_scale)
        return written(x, ffn(self.ffn_norm(self._attended(x, "ffn"))), self.ffn_scale)


@final
class BlockAttentionResiduals(_Sources):
    """Attention residuals over sums: blocks form groups, and the outputs within a group are added up.

        s_0 … s_g ─ softmax(q_l·unit(s)) ─ Σ ─ N ─ f ─(+)─ s_g        s_0 is the embedding, s_g the running group's sum
              └────────────────────────────────────────┘

    Equation: before sublayer l `h = Σ_i softmax_i(q_l·unit(s_i))·s_i`, `s_g ← s_g + c·f(N(h))`; s_g starts as the
    group's first output.
    Ends: block 0's attention reads the embedding; one more read leaves; a final norm. Each group adds one source.
    Init: q_l = 0, so that a read is a mean; N(0, 0.02²).
    Source: Attention Residuals, arXiv 2603.15031 (Kimi); Transformers' `inkling2`.
    Our reading: as for `attnres`. A group has ⌈L/groups⌉ whole blocks; the last group may have fewer.

    Args:
        groups: the largest number of groups.
        form: as for `attnres`.
    """

    @classmethod
    def layout(cls, num_layers: int, *, groups: int = 8, form: str = "paper") -> Layout:
        cls._check(form)
        if groups < 1:
            raise InputError(f"attnres_block's `groups` must be at least 1; got {groups}.")
        return Layout({0: cls}, embedding_norm=False)

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        self.opens_group = self.layer_idx % -(-self.num_layers // self.options["groups"]) == 0

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> State:
        f = attn(self.attn_norm(self.read(x)))
        x = written(x, f, self.attn_scale) if self.opens_group else self._added(x, f, self.attn_scale)
        return self._added(x, ffn(self.ffn_norm(self._attended(x, "ffn"))), self.ffn_scale)

    def _added(self, x: Stream, f: Tensor, scale: Scale) -> State:
        last = self.add(x[..., -1:, :], f.unsqueeze(-2), branch=scale)
        return torch.cat((x[..., :-1, :], last), dim=-2)


def written(x: Stream, f: Tensor, scale: Scale) -> State:
    """The sources with one more: the scaled output `f`."""
    f = f if isinstance(scale, float) and scale == 1.0 else scale * f
    return torch.cat((x, f.unsqueeze(-2)), dim=-2)
