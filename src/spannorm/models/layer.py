"""One block of the language model, and small modules that other code finds by their class."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast

from spannorm.errors import InputError
from spannorm.models.configuration import SpanNormConfig
from spannorm.models.sublayers import build_attention, build_ffn
from spannorm.shapes import State, Stream

# Transformers said `past_key_values` up to 5.23 and says `cache` since: the name its layers and outputs know it by.
CACHE = "cache" if "cache" in MoeModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class HiddenState(nn.Identity):
    """Its input is recorded as a hidden state: (batch, seq, hidden), for any number of streams."""


class SpanNormDecoderLayer(GradientCheckpointingLayer):
    """One block: a placement around attention and feed-forward. Its code is the same for every placement and FFN."""

    def __init__(self, config: SpanNormConfig, layer_idx: int) -> None:
        super().__init__()
        stack = config.stack
        # a child of the first block and not of the model, so that a pipeline puts both on the same stage
        self.embedding_norm = stack.new_norm(config.hidden_size) if stack.embedding_norm and layer_idx == 0 else None
        self.placement = stack.block(layer_idx, config.hidden_size)
        self.hidden_state = HiddenState()
        self.self_attn = build_attention(config, layer_idx, self.placement.inner_norms)
        self.mlp = build_ffn(config, layer_idx, self.placement.inner_norms)

    def forward(self, hidden_states: State, *, record: bool = False, **kwargs: Any) -> State:
        """The state that the blocks carry → the next state. With `record`, its input is recorded as a hidden state."""

        def attn(x: Stream) -> Stream:
            return self.self_attn(hidden_states=x, **kwargs)[0]

        def ffn(x: Stream) -> Stream:  # a function, because Accelerate's hooks would move a module given as an argument
            return self.mlp(x)

        if self.embedding_norm is not None:
            hidden_states = self.embedding_norm(hidden_states)
        if record:
            placement = self.placement
            read = placement.read(placement.enter(hidden_states) if placement.is_first else hidden_states)
            checkpointed = self.gradient_checkpointing and self.training
            if checkpointed and hidden_states.requires_grad and not read.requires_grad:
                raise InputError(
                    "reentrant activation checkpointing cuts the hidden states of several streams from the graph: use "
                    "it with `use_reentrant=False`, or leave `output_hidden_states` out."
                )
            self.hidden_state(read)
        return self.placement(hidden_states, attn, ffn)


class ScaledEmbedding(nn.Embedding):
    """Token ids (batch, seq) → `embed_scale` · embedding (batch, seq, hidden)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, embed_scale: float) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.embed_scale = embed_scale  # the name that PEFT and vLLM know from Gemma 3

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale
