"""Attention over depth: the state holds what was written before, (batch, seq, sources, hidden), and it grows."""

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
    """What both have in common: every read is an attention over the sources, with a learned query of its own."""

    default_depth_rule = "none"
    final_norm = True
    norms_only_reads = True

    def gains(self) -> dict[str, Tensor]:
        sites = (*(() if self.is_first else ("attn",)), "ffn", *(("readout",) if self.is_last else ()))
        return {f"{site}_query": torch.zeros(self.hidden_size) for site in sites}

    def enter(self, x: Stream) -> State:
        return x.unsqueeze(-2)

    def exit(self, x: Stream) -> State:
        return self._attended(x, "readout").clone()  # FSDP2 wants no view of a model's parts

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
    """Every sublayer reads an attention over all that was written before it, in the place of a sum.

        v_0 … v_l ─ softmax(q_l·unit(v)) ─ Σ ─ N ─ f ─┐        v_0 is the embedding
              └────────────────────────── and v_(l+1) ┘

    Equation: before sublayer l `h = Σ_i softmax_i(q_l·unit(v_i))·v_i`, `v_(l+1) = c·f(N(h))`; q_l a learned vector.
    Ends: block 0's attention reads the embedding; one more read leaves; a final norm. The state grows by two a block.
    Init: q_l = 0, so that a read is a mean; N(0, 0.02²).
    Source: Attention Residuals, arXiv 2603.15031 (Kimi).
    Our reading: no depth rule. The authors' norm on the sources has a gain, which is folded into q_l here. As we read
    them, they do not divide by √d; Inkling does.

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
    """Attention residuals over sums: blocks form groups, and a group's outputs are added to each other.

        s_0 … s_g ─ softmax(q_l·unit(s)) ─ Σ ─ N ─ f ─(+)─ s_g        s_0 is the embedding, s_g the running group's sum
              └────────────────────────────────────────┘

    Equation: before sublayer l `h = Σ_i softmax_i(q_l·unit(s_i))·s_i`, `s_g ← s_g + c·f(N(h))`; a group's first output
    opens its sum.
    Ends: block 0's attention reads the embedding; one more read leaves; a final norm. The state grows by one a group.
    Init: q_l = 0, so that a read is a mean; N(0, 0.02²).
    Source: Attention Residuals, arXiv 2603.15031 (Kimi); Transformers' `inkling2`.
    Our reading: as for `attnres`. Groups are of whole blocks, ⌈L/groups⌉ each, the last one perhaps shorter.

    Args:
        groups: how many, at most.
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
    """The sources, and one more."""
    f = f if isinstance(scale, float) and scale == 1.0 else scale * f
    return torch.cat((x, f.unsqueeze(-2)), dim=-2)
