"""One block of plain PyTorch: your attention and feed-forward, wired by a placement."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from spannorm.placements import build_placement
from spannorm.shapes import State, Stream


class Block(nn.Module):
    """A placement around two modules of your own.

        blocks = nn.ModuleList(
            Block(MyAttention(), MyFFN(), "span", hidden_size=512, layer_idx=b, num_layers=24) for b in range(24)
        )

    The model adds a norm after the last block where `blocks[-1].placement.final_norm` says so, and one after the
    embedding where `blocks[0].placement.embedding_norm` does. Give `attn` and `ffn` the names in
    `spannorm.init.ROLE_OF_MODULE` for their matrices, and `init_plan`, `init_weights_` and `parameter_groups` know
    them.

    Args:
        attn: (batch, seq, hidden) and whatever else the block is called with → (batch, seq, hidden).
        ffn: (batch, seq, hidden) → (batch, seq, hidden).
        placement: a name of `spannorm.PLACEMENTS`.
        sizes: `hidden_size`, `layer_idx`, `num_layers`, and the other arguments of `spannorm.build_placement`.

    Raises:
        InputError: those of `build_placement`.
    """

    def __init__(self, attn: nn.Module, ffn: nn.Module, placement: str = "span", **sizes: Any) -> None:
        super().__init__()
        self.placement = build_placement(placement, **sizes)
        self.attn, self.ffn = attn, ffn
        if self.placement.inner_norms and self.placement.is_first:
            inner = ", ".join(f"{role} (over each {over})" for role, over in self.placement.inner_norms.items())
            warnings.warn(
                f"{placement!r} also normalizes inside its sublayers, at {inner}: build that into yours.", stacklevel=2
            )

    def forward(self, x: Stream, *args: Any, **kwargs: Any) -> State:
        return self.placement(x, lambda y: self.attn(y, *args, **kwargs), self.ffn)
