"""What every placement is: a block-level object that takes two opaque sublayers.

    placement(x, attn, ffn)        attn, ffn: Tensor → Tensor, shape (batch, seq, hidden)

In the equations `N` is a norm with a learned gain, `A` attention, `F` the feed-forward, `x` the block's input, `h`
what stands between the two sublayers, `x'` the block's output; `L` is the number of blocks, `b` this block's index
from 0. `c` is the branch factor of a `:forward` depth rule, of attention or of the FFN (1 otherwise, or a learned
gain); it multiplies what is added to the skip.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch
from torch import nn

from spannorm.errors import InputError
from spannorm.norms import Add, Norm, Scale, build_norm
from spannorm.scaling import DepthRule
from spannorm.scaling import depth_rule as work_out
from spannorm.shapes import State, Stream

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
    recommended_base_init: str = "normal"
    """The base init of the method's own recipe; a comparison on a common body uses the same one for all."""
    final_norm: ClassVar[bool]
    """Whether the stack needs a norm between its last block and the head. It belongs to the model."""
    embedding_norm: bool = False
    """Whether the embedding is normalized once, before block 0, by the model."""
    inner_norms: ClassVar[Mapping[str, Literal["head", "width"]]] = {}
    """Norms that live inside a sublayer, put there by whoever builds it: which of q, k, v (the projection's output),
    attn_out, ffn_down (the projection's input), head_scale (a gain per head before attn_out), and whether a norm goes
    over each head by itself or over the whole width."""

    attn_norm: Norm
    ffn_norm: Norm

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
        self.add = Add()
        for name in self.norms():
            self.add_module(name, build_norm(norm, hidden_size, eps))
        reason = self.discouraged(self.rule)
        if reason is not None and layer_idx == 0:
            warnings.warn(f"{type(self).__name__} with depth rule {self.rule.name!r}: {reason}", stacklevel=2)

    def _scale(self, factor: float) -> Scale:
        if not self.rule.learned:
            return factor
        shape = () if self.rule.learned == "scalar" else (self.hidden_size,)
        return nn.Parameter(torch.full(shape, self.rule.gain))

    def norms(self) -> tuple[str, ...]:
        """The role names of this block's norms."""
        return "attn_norm", "ffn_norm"

    def discouraged(self, rule: DepthRule) -> str | None:
        """Why the method's authors warn against a depth rule, with the source; None where they do not."""
        return None

    @property
    def is_first(self) -> bool:
        return self.layer_idx == 0

    @property
    def is_last(self) -> bool:
        return self.layer_idx == self.num_layers - 1

    def forward(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> State:
        """One block; the first also enters the stack's inner state, the last leaves it."""
        if self.is_first:
            x = self.enter(x)
        x = self.block(x, attn, ffn)
        return self.exit(x) if self.is_last else x

    @abstractmethod
    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        """The placement's equation."""

    def enter(self, x: Stream) -> State:
        """Embedding → the state the blocks carry. A second stream is opened here."""
        return x

    def exit(self, x: Stream) -> State:
        """The state the blocks carry → what the final norm or the head reads."""
        return x

    def extra_repr(self) -> str:
        return f"block {self.layer_idx} of {self.num_layers}, depth_rule={self.rule.name!r}"
