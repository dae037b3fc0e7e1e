"""Norms inside torchtitan's attention and feed-forward, for placements that need them.

torchtitan's own forward runs. When it calls a projection, the call includes the projection's norms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import spmd_types as spmd
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torchtitan.models.common.attention import AttentionMasksType, GQAttention
from torchtitan.models.common.decoder_sharding import dense_param_placement
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import ShardingConfig

from spannorm.adopt import adopt
from spannorm.inner_norms import HeadScale
from spannorm.placements import Stack


class _Instead:
    """A sublayer in which some children are replaced."""

    def __init__(self, sublayer: Any, answers: Mapping[str, Callable[..., Any]]) -> None:
        self.sublayer, self.answers = sublayer, answers

    def __getattr__(self, name: str) -> Any:
        return self.answers[name] if name in self.answers else getattr(self.sublayer, name)


def _titan(norm: nn.Module) -> Any:
    """A norm inside a sublayer, as a module of torchtitan's.

    Under tensor parallelism a process has some of the heads. If all heads share a gain, each process has the whole gain
    and a part of its gradient. If each head has a gain, each process has the gains of its heads.
    """
    adopt(norm, Module)
    layout = dense_param_placement(tp=spmd.S(0) if isinstance(norm, HeadScale) else spmd.R)
    made: Any = norm
    made._sharding_config = ShardingConfig(state_shardings={name: layout for name, _ in norm.named_parameters()})
    return made


def over_width(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A norm over all channels. A process may have a share of them as a DTensor: gather, normalize, shard again."""
    if not isinstance(x, DTensor):
        return norm(x)
    gathered = [Replicate() if p.is_shard(x.ndim - 1) or p.is_shard(-1) else p for p in x.placements]
    normed: Any = norm(x.redistribute(placements=gathered))
    return normed.redistribute(placements=x.placements)  # type: ignore[no-any-return]


class NormedAttention(GQAttention):
    """torchtitan's attention, with the norms of `Placement.inner_norms` on q, k, v, attn_out and a gain per head."""

    @dataclass(kw_only=True, slots=True)
    class Config(GQAttention.Config):
        stack: Stack
        inner: dict[str, str] = field(default_factory=dict)
        """Role → `head` or `width`."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        heads = {"k": self.n_kv_heads, "v": self.n_kv_heads}
        self.inner = dict(config.inner)
        for role, over in self.inner.items():
            count: Any = heads.get(role, self.n_heads)
            channels = self.head_dim if over == "head" and role != "head_scale" else count * self.head_dim
            norm = HeadScale(torch.ones(count)) if role == "head_scale" else config.stack.new_norm(channels)
            setattr(self, f"{role}_norm", _titan(norm))

    def forward(
        self, x_BLD: Tensor, attention_masks: AttentionMasksType | None, positions: Tensor | None = None
    ) -> Tensor:
        return GQAttention.forward(
            # torchtitan would apply its own q_norm and k_norm per head
            _Instead(self, {"qkv_linear": self._qkv, "wo": self._out, "q_norm": None, "k_norm": None}),  # type: ignore[arg-type, dict-item]
            x_BLD, attention_masks, positions,
        )  # fmt: skip

    def _qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = []
        for role, part in zip("qkv", self.qkv_linear(x), strict=True):  # (batch, seq, heads, channels)
            norm = getattr(self, f"{role}_norm", None)
            if norm is not None:
                part = (
                    norm(part)
                    if self.inner.get(role, "head") == "head"
                    else over_width(norm, part.flatten(2)).view_as(part)
                )
            parts.append(part)
        return tuple(parts)

    def _out(self, x: Tensor) -> Tensor:
        for role in ("head_scale", "attn_out"):
            if role in self.inner:
                norm = getattr(self, f"{role}_norm")
                x = norm(x) if role == "head_scale" else over_width(norm, x)
        return self.wo(x)


class NormedFeedForward(FeedForward):
    """torchtitan's feed-forward, with a norm on the input of its down projection."""

    @dataclass(kw_only=True, slots=True)
    class Config(FeedForward.Config):
        stack: Stack

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.ffn_down_norm = _titan(config.stack.new_norm(config.w2.in_features))

    def forward(self, x: Tensor) -> Tensor:
        return FeedForward.forward(_Instead(self, {"w2": lambda y: self.w2(over_width(self.ffn_down_norm, y))}), x)  # type: ignore[arg-type]


def copied(config: Any, kind: Any, **more: Any) -> Any:
    """A configuration converted to another class, field by field."""
    own = {f.name for f in fields(kind)}
    return kind(**{**{f.name: getattr(config, f.name) for f in fields(config) if f.name in own}, **more})


def attention(config: Any, stack: Stack, inner: Mapping[str, str]) -> Any:
    """The configuration of attention, with the norms that a placement puts into it."""
    roles = {role: over for role, over in inner.items() if role != "ffn_down"}
    if not roles:
        return config
    if config.qk_norm is not None and {"q", "k"} & {*roles}:
        # a placement with its own norms on q and k replaces the model's QK norm
        config = copied(config, type(config), qk_norm=None)
    return copied(config, NormedAttention.Config, stack=stack, inner=roles)


def feed_forward(config: Any, stack: Stack, inner: Mapping[str, str]) -> Any:
    """The configuration of a dense feed-forward, with the norm that a placement puts into it."""
    if config is None or "ffn_down" not in inner:
        return config
    return copied(config, NormedFeedForward.Config, stack=stack)
