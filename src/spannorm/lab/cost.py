"""What a comparison will come to, before anything is run: runs, tokens, operations, hours of a GPU."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch

from spannorm.lab.plan import Job, Plan
from spannorm.models import SpanNormConfig, SpanNormForCausalLM
from spannorm.train.recipe import Recipe, TrainRecipe
from spannorm.train.run import model_config
from spannorm.train.summary import flops_per_token

LARGE = 1e10
"""Tokens from which on `compare` says the cost before it starts: no laptop sees them."""
H100, SHARE = 989e12, 0.4
"""Dense bf16 operations per second of an H100 (its data sheet), and the share of them that a training step reaches: a
guess, to be replaced by what `make bench` measures on the machine (row 8)."""


@dataclass(frozen=True)
class Cost:
    """Of the runs that are known before any has ended: under a protocol, those that choose the learning rates."""

    runs: int
    more: bool
    """Whether a protocol adds runs later."""
    tokens: int
    flops: float
    parameters: tuple[int, int]
    """Least and most of a run's model, embedding and head included."""

    @property
    def gpu_hours(self) -> float:
        return self.flops / (SHARE * H100) / 3600


def is_large(recipe: Recipe) -> bool:
    """Whether the runs see so many tokens that their cost is worth a line."""
    runs = len(recipe.compare.arms) * math.prod(map(len, recipe.compare.grid.values()))
    return not recipe.ladder.sizes and runs * _tokens(recipe.train) > LARGE


def _tokens(t: TrainRecipe) -> int:
    return t.steps * t.batch_size * t.accumulation * t.sequence_length


def cost(recipe: Recipe) -> Cost:
    """Work it out from the plan, with models that hold no weights.

    Raises:
        InputError: as `Plan`.
    """
    jobs = Plan(recipe, here=False).jobs({})
    known: dict[str, tuple[int, int]] = {}
    tokens, flops = 0, 0.0
    for job in jobs:
        key = json.dumps({**job.recipe.model, "length": job.recipe.train.sequence_length}, sort_keys=True, default=str)
        if key not in known:
            known[key] = _sizes(job)
        tokens, flops = tokens + _tokens(job.recipe.train), flops + float(_tokens(job.recipe.train)) * known[key][1]
    sizes = [parameters for parameters, _ in known.values()]
    return Cost(len(jobs), bool(recipe.compare.protocol.seeds), tokens, flops, (min(sizes), max(sizes)))


def config_without_tokens(recipe: Recipe) -> SpanNormConfig:
    """A run's configuration before its text was read: a tokenizer of others' counts as the default vocabulary."""
    config, data = model_config(recipe), recipe.data
    if "vocab_size" not in recipe.model and data.tokenizer in ("bytes", "bpe"):
        config.vocab_size = 257 if data.tokenizer == "bytes" else data.vocab_size
    return config


def _sizes(job: Job) -> tuple[int, int]:
    """Parameters, and operations per token."""
    with torch.device("meta"):
        model = SpanNormForCausalLM(config_without_tokens(job.recipe))
    return model.num_parameters(), flops_per_token(model, job.recipe.train.sequence_length)


def in_words(c: Cost) -> str:
    """One line."""
    runs = f"{'at least ' if c.more else ''}{c.runs} runs"
    least, most = (f"{n / 1e6:.1f} M" for n in c.parameters)
    size = least if least == most else f"{least} to {most}"
    return (
        f"{runs} of {size} parameters, {c.tokens:.3g} tokens, {c.flops:.2g} operations: {c.gpu_hours:,.3g} hours of an "
        f"H100 at {SHARE:.0%} of its bf16 peak{', and more for the fresh seeds' if c.more else ''}"
    )
