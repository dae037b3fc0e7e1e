"""A run's description: `run.json` at its start, its row of `results.json` at its end."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch

from spannorm.files import jsonl, read_jsonl
from spannorm.models import SpanNormForCausalLM
from spannorm.routing import RoutingRecord
from spannorm.train.data import TokenData
from spannorm.train.engine import precision_of, uses_bf16
from spannorm.train.environment import RUNS_SINCE, machine, matrix_rate, versions
from spannorm.train.health import failure, spike_steps
from spannorm.train.processes import count
from spannorm.train.ramp import tolerated
from spannorm.train.recipe import Recipe
from spannorm.train.recorder import PROBE, PROBES, RECORD, RECORDS
from spannorm.train.rollback import ROLLBACK, ROLLBACKS


def describe(recipe: dict[str, Any], model: SpanNormForCausalLM, tokens: TokenData) -> dict[str, Any]:
    """The content of `run.json` for a run that begins."""
    return {
        "recipe": recipe,
        "model_config": model.config.to_dict(),
        "versions": versions(),
        "runs_since": RUNS_SINCE,
        "machine": {**machine(), "threads": torch.get_num_threads()},
        "data": {
            "sha256": tokens.sha256,
            "vocab_size": tokens.vocab_size,
            "training_tokens": tokens.splits["train"].tokens,
            "documents": sum(split.documents for split in tokens.splits.values()),
        },
    }


def body_parameters(model: SpanNormForCausalLM) -> int:
    """Parameters without embedding and head."""
    return sum(p.numel() for p in model.model.parameters()) - model.model.embed_tokens.weight.numel()


def flops_per_token(model: SpanNormForCausalLM, sequence_length: int) -> int:
    """Operations of a training step per token: six per parameter that a token uses, and attention's products over the
    whole sequence. A placement's operations on its streams are not counted, except those of its own matrices."""
    c, head = model.config, model.lm_head.weight.numel()
    attention = 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * sequence_length
    return 6 * (body_parameters(model) - model.idle_parameters() + head) + attention


def summarize(
    recipe: Recipe, out: Path, model: SpanNormForCausalLM, tokens: TokenData, losses: dict[str, float]
) -> dict[str, Any]:
    """This run's row of `results.json`."""
    t, config = recipe.train, model.config
    records = read_jsonl(out / RECORDS, RECORD)
    skipped = [r["step"] for r in records if r.get("skipped")]
    taken = [r for r in records if not r.get("skipped")]
    train_losses = [r["loss"] for r in taken]
    spiked = spike_steps(train_losses, [r["grad_norm"] for r in taken])
    unigram = tokens.unigram_loss("validation")
    ramp = t.schedule == "ramp"
    # A ramp is meant to diverge: where it does so is its result.
    reason = None if ramp else failure(train_losses, spiked, losses["validation"], unigram)
    # A median ignores the first steps, which warm caches and allocate memory, and other work on the machine.
    seconds = statistics.median(r["seconds"] for r in records)
    per_step = t.sequence_length * t.batch_size * t.accumulation
    after_warmup = [r["grad_norm"] for r in records if r["step"] > t.warmup_steps and r["grad_norm"] is not None]
    initial = next(jsonl(out / PROBES, PROBE), {"loss": None})["loss"]
    routing = [RoutingRecord(**p["routing"]).summary() for p in jsonl(out / PROBES, PROBE) if "routing" in p]
    dtype = torch.bfloat16 if uses_bf16(t) else torch.float32
    rate = matrix_rate(model.device, dtype) * count()
    per_token = flops_per_token(model, t.sequence_length)
    idle, body = model.idle_parameters(), body_parameters(model)
    return {
        "placement": config.placement,
        "depth_rule": config.depth_rule,
        "seed": t.seed,
        "learning_rate": t.learning_rate,
        "status": "failed" if reason else "ok",
        "reason": reason,
        "val_loss": losses["validation"],
        "test_loss": losses["test"],
        "bits_per_byte": losses["validation"] / tokens.bytes_per_token("validation") / math.log(2),
        "unigram_loss": unigram,
        "initial_loss": initial,
        "skipped_steps": skipped,
        "rollbacks": read_jsonl(out / ROLLBACKS, ROLLBACK),
        "spikes": len(spiked),
        "spike_score": len(spiked) / len(records),
        "max_grad_norm": max(after_warmup, default=None),
        "tokens_per_second": per_step / seconds,
        "matrix_rate": rate,
        "matrix_share": per_step / seconds * per_token / rate,
        "seconds": sum(r["seconds"] for r in records),
        "parameters": model.num_parameters(),
        "active_parameters": model.num_parameters() - idle,
        "body_parameters": body,
        "flops_per_token": per_token,
        "depth": config.num_hidden_layers,
        "steps": t.steps,
        "steps_done": len(records),
        "tokens": per_step * len(records),
        "threads": torch.get_num_threads(),
        "precision": precision_of(t),
        "routing": routing[-1] if routing else None,
        **({"tolerated": tolerated(records, unigram)} if ramp else {}),
    }
