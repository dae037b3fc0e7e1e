"""A torchtitan block with one of our placements around its two sublayers.

torchtitan builds, shards and initializes only instances of its own `Module`. A placement and its norms are plain
PyTorch; here they become torchtitan's `Module` too. Every process has their whole parameters. A placement computes
token by token, so it works on any share of the sequence.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import spmd_types as spmd
import torch
from torch import Tensor, nn
from torchtitan.models.common.attention import AttentionMasksType
from torchtitan.models.common.decoder import TransformerBlock
from torchtitan.models.common.decoder_sharding import dense_param_placement
from torchtitan.models.common.nn_modules import Identity, LayerNorm, RMSNorm
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import ShardingConfig

from spannorm.adopt import adopt
from spannorm.errors import InputError
from spannorm.placements import Placement, Stack


@dataclass(kw_only=True, slots=True)
class PlacementConfig:
    """Where the norms go and how the weights are drawn: `--placement.name`, `--placement.depth_rule`, …"""

    name: str = "span"
    """A name of `spannorm placements`."""
    depth_rule: str | None = None
    """A name of `spannorm.depth_rule`; None means the placement's default."""
    options: str = "{}"
    """The placement's own options, as JSON: '{"initial_norm": "embedding"}'."""
    norm: str = "rmsnorm"
    """`rmsnorm` or `layernorm`, for the placement's norms and for those at the two ends."""
    eps: float | None = None
    """The norms' epsilon; None keeps that of torchtitan's model."""
    base_init: str = "fan_in"
    """A name of `spannorm.scaling.BASE_INITS`. A matrix's role decides its std."""
    initializer_range: float = 0.02
    """The σ of `base_init="normal"`."""
    init_seed: int | None = None
    """None: torchtitan's random numbers, drawn on the device. A number: the same values as our Hugging Face model with
    this `init_seed`, drawn on the CPU of every process (about 10 s per 10^9 parameters)."""
    embedding_multiplier: float | None = None
    """A factor on the embedding. None: √d if it is tied to the head and drawn with std d^-1/2, otherwise 1."""
    decay_matrices_only: bool = True
    """True: norms, biases, learned gains and embeddings have no weight decay. False: torchtitan's optimizer groups
    decide."""

    def stack(self, num_layers: int, eps: float) -> Stack:
        """The placements of a model with `num_layers` blocks.

        Args:
            eps: torchtitan's epsilon, which is used if none is configured.

        Raises:
            InputError: an unknown placement, rule, norm or option; options that are not a JSON object.
        """
        try:
            options = json.loads(self.options)
        except json.JSONDecodeError:
            options = None
        if not isinstance(options, dict):
            raise InputError(f'placement.options must be a JSON object such as {{"norms": 1}}; got {self.options!r}.')
        eps = eps if self.eps is None else self.eps
        return Stack(self.name, num_layers, self.depth_rule, options, self.norm, eps)


def whole(module: nn.Module, sequence_parallel: bool) -> ShardingConfig:
    """Every process of a tensor-parallel group has all parameters of a module, not sharded.

    If the processes share the sequence, each has a part of the gradient, and FSDP adds the parts (torchtitan's `R`).
    Otherwise each has the whole gradient (`I`).
    """
    layout = dense_param_placement(tp=spmd.R if sequence_parallel else spmd.I)
    return ShardingConfig(state_shardings={name: layout for name, _ in module.named_parameters(recurse=False)})


def as_titan(module: nn.Module, sequence_parallel: bool) -> Any:
    """Let torchtitan shard and initialize a module of ours and its children, in place."""
    for part in module.modules():
        if not isinstance(part, Module):
            adopt(part, Module)
        part._sharding_config = whole(part, sequence_parallel)
    return module


def end_norm(stack: Stack, dim: int) -> Any:
    """The configuration of a norm at one of the model's two ends, torchtitan's own."""
    if stack.norm == "layernorm":
        return LayerNorm.Config(normalized_shape=dim, eps=stack.eps)
    return RMSNorm.Config(normalized_shape=dim, eps=stack.eps)


def no_norm() -> Any:
    """Replaces the final norm if a stack has none."""
    return Identity.Config()


class PlacedBlock(TransformerBlock):
    """A placement around torchtitan's attention and its feed-forward or experts."""

    placement: Placement

    @dataclass(kw_only=True, slots=True)
    class Config(TransformerBlock.Config):
        """torchtitan's, whose two norms are not built: the placement has its own."""

        stack: Stack
        layer_idx: int
        dim: int
        sequence_parallel: bool = True
        embedding_norm: Module.Config | None = None

        def to_dict(self) -> dict[str, Any]:
            """As text, for torchtitan's logs."""
            return {"placement": repr(self.stack), "layer_idx": self.layer_idx, "attention": self.attention.to_dict()}

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embedding_norm = None if config.embedding_norm is None else config.embedding_norm.build()
        self.placement = as_titan(config.stack.block(config.layer_idx, config.dim), config.sequence_parallel)
        self.attention = config.attention.build()
        self.moe_enabled = config.moe is not None  # FSDP asks for it
        if config.moe is not None:
            self.moe = config.moe.build()
        else:
            assert config.feed_forward is not None
            self.feed_forward = config.feed_forward.build()

    def forward(
        self, x: Tensor, attention_masks: AttentionMasksType | None, positions: torch.Tensor | None = None
    ) -> Tensor:
        """The state that the blocks carry → the next one: (batch, seq, hidden), or (batch, seq, n, hidden)."""
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        ffn = self.moe if self.moe_enabled else self.feed_forward
        return self.placement(x, lambda y: self.attention(y, attention_masks, positions), lambda y: ffn(y))
