"""One block of plain PyTorch: your attention and feed-forward, wired by a placement."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from spannorm.placements import Placement, build_placement
from spannorm.shapes import State, Stream


class Block(nn.Module):
    """A placement around your own attention and feed-forward modules.

        stack = Stack("span", 24)
        blocks = nn.ModuleList(Block(MyAttention(), MyFFN(), stack.block(b, hidden_size=512)) for b in range(24))

    Your model adds a norm after the last block if `stack.final_norm` is true, and one after the embedding if
    `stack.embedding_norm` is true. `init_plan`, `init_weights_` and `parameter_groups` recognize matrices by the names
    in `spannorm.roles.LLAMA`, or by the `roles` that you give them.

    Args:
        attn: (batch, seq, hidden) and all further arguments of the block → (batch, seq, hidden).
        ffn: (batch, seq, hidden) → (batch, seq, hidden).
        placement: a placement, or a name of `spannorm.PLACEMENTS` together with `sizes`.
        sizes: `hidden_size`, `layer_idx`, `num_layers`, and the other arguments of `spannorm.build_placement`.

    Raises:
        InputError: as in `build_placement`.
    """

    def __init__(self, attn: nn.Module, ffn: nn.Module, placement: Placement | str = "span", **sizes: Any) -> None:
        super().__init__()
        self.placement = build_placement(placement, **sizes) if isinstance(placement, str) else placement
        self.attn, self.ffn = attn, ffn
        if self.placement.inner_norms and self.placement.is_first:
            inner = ", ".join(f"{role} (over each {over})" for role, over in self.placement.inner_norms.items())
            warnings.warn(
                f"{type(self.placement).__name__} also normalizes inside its sublayers, at {inner}: build that into "
                "yours.",
                stacklevel=2,
            )

    def forward(self, x: Stream, *args: Any, **kwargs: Any) -> State:
        # functions, because Accelerate's hooks would move a module given as an argument
        return self.placement(x, lambda y: self.attn(y, *args, **kwargs), lambda y: self.ffn(y))
