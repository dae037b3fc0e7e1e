"""The memory that a run will need, computed from its recipe alone, and whether this machine has it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from spannorm.errors import InputError
from spannorm.models import SpanNormConfig
from spannorm.train.environment import memory
from spannorm.train.recipe import Recipe
from spannorm.train.tokenizer import BYTES_VOCABULARY

_GIB = 1 << 30


@dataclass(frozen=True)
class Needs:
    """The parameters of a run's model, and a lower bound of the memory that it takes, in bytes."""

    parameters: int
    memory: int

    def __str__(self) -> str:
        return f"{short(self.parameters)} parameters, {self.memory / _GIB:.2g} GiB of memory or more"


def needs(recipe: Recipe, config: SpanNormConfig, processes: int = 1) -> Needs:
    """The memory that each of a run's processes will need.

    It counts weights, gradients and the optimizer's moments in fp32; the sublayers' inputs that each block keeps for
    backward, and the logits with their gradient, of one forward pass; and the tokens of one step. Other memory is not
    counted.

    Args:
        config: the model's. If the recipe leaves the vocabulary to the data, the tokenizer's is used.
    """
    t, d = recipe.train, recipe.data
    vocabulary = config.vocab_size
    if "vocab_size" not in recipe.model:
        vocabulary = {"bytes": BYTES_VOCABULARY, "bpe": 258}.get(d.tokenizer, 1)
    count = parameters(config, vocabulary)
    share = processes if t.parallel == "fsdp" else 1
    tokens = t.batch_size * t.sequence_length
    width = config.hidden_size if t.activation_checkpointing else 4 * config.hidden_size + 3 * _active_channels(config)
    kept = tokens * config.num_hidden_layers * width * 2  # in bf16 or wider
    logits = min(tokens, t.loss_chunk or tokens) * vocabulary * 2 * 4
    step = tokens * t.accumulation * 2 * 8
    return Needs(count, count * (16 if t.optimizer == "adamw" else 12) // share + kept + logits + step)


def check_fits(recipe: Recipe, config: SpanNormConfig, processes: int = 1) -> Needs:
    """The memory that a run will need.

    Raises:
        InputError: it is more than the GPU, or else the machine, has.
    """
    needed, there = needs(recipe, config, processes), memory()
    if needed.memory > there:
        raise InputError(
            f"this run needs {needed}, and there are {there / _GIB:.3g} GiB here: make the model, train.batch_size or "
            "train.sequence_length smaller, or set train.activation_checkpointing or train.loss_chunk."
        )
    return needed


def parameters(config: SpanNormConfig, vocabulary: int) -> int:
    """The number of parameters: of Transformers' modules by their sizes, of a placement from its own description."""
    width, ends = config.hidden_size, 1 + (not config.tie_word_embeddings)
    stack, norm = config.stack, sum(p.numel() for p in config.stack.new_norm(width).parameters())
    at_the_ends = (stack.final_norm + stack.embedding_norm) * norm
    layers = range(config.num_hidden_layers)
    alike = Counter((stack.kind_of(b), config.is_sparse(b), b == 0, b == layers[-1]) for b in layers)
    example = {(stack.kind_of(b), config.is_sparse(b), b == 0, b == layers[-1]): b for b in layers}
    blocks = sum(count * _block(config, example[kind]) for kind, count in alike.items())
    return vocabulary * width * ends + at_the_ends + blocks


def _block(config: SpanNormConfig, layer_idx: int) -> int:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        placement = config.stack.block(layer_idx, config.hidden_size)
    own = sum(p.numel() for p in placement.parameters())
    size, heads, kv = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    q, k, width = heads * size, kv * size, config.hidden_size
    attention = width * (2 * q + 2 * k) + (q + 2 * k + width if config.attention_bias else 0)
    inner = ({"q": "head", "k": "head"} if config.qk_norm else {}) | dict(placement.inner_norms)
    channels = {"q": q, "k": k, "v": k, "attn_out": q}
    norms = sum(size if over == "head" else channels[role] for role, over in inner.items() if role in channels)
    each = 2 if config.norm == "layernorm" else 1
    return own + attention + norms * each + heads * ("head_scale" in inner) + _ffn(config, layer_idx, inner, each)


def _ffn(config: SpanNormConfig, layer_idx: int, inner: Mapping[str, str], each: int) -> int:
    width, normed = config.hidden_size, each if "ffn_down" in inner else 0
    if not config.is_sparse(layer_idx):
        channels = config.intermediate_size
        return channels * (3 * width + normed) + (2 * channels + width if config.mlp_bias else 0)
    shared = config.shared_expert_intermediate_size or 0
    channels = config.num_experts * config.moe_intermediate_size + shared
    return channels * (3 * width + normed) + config.num_experts * width


def _active_channels(config: SpanNormConfig) -> int:
    """Of the feed-forward of a token, at least."""
    sparse = config.num_experts_per_tok * config.moe_intermediate_size if config.num_experts else 0
    return min(config.intermediate_size, sparse) if sparse else config.intermediate_size


def short(count: int) -> str:
    """A count with three digits: 7.01 B."""
    for unit, name in ((10**12, " T"), (10**9, " B"), (10**6, " M"), (10**3, " k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)
