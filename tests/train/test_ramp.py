"""The ramp's thresholds on made-up losses, and one real ramp that ends when all is lost."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spannorm.models import SpanNormConfig, SpanNormForCausalLM
from spannorm.train.collapse import collapse
from spannorm.train.data import TokenData
from spannorm.train.ramp import WINDOW, tolerated
from spannorm.train.recipe import Recipe
from spannorm.train.run import train

UNIGRAM = 3.0


def records(*parts: tuple[int, float | None]) -> list[dict[str, Any]]:
    """Steps at constant losses; the rate of step i is i."""
    losses = [loss for count, loss in parts for _ in range(count)]
    return [{"step": i, "loss": loss, "learning_rate": float(i)} for i, loss in enumerate(losses, 1)]


def test_a_share_is_lost_when_the_mean_of_the_window_says_so() -> None:
    # from 2.0, one nat below unigram, up to 2.75: the window's mean has lost the share f after 16·f/0.75 such steps
    found = tolerated(records((100, 2.0), (100, 2.75)), UNIGRAM)
    assert found["learned"]
    after = {"0.25": 6, "0.5": 11}  # ⌈16/3⌉, ⌈32/3⌉
    assert found["rates"] == {key: 100 + n - WINDOW + 1 for key, n in after.items()} | {"1": None}


def test_a_loss_that_is_not_finite_has_lost_everything() -> None:
    found = tolerated(records((50, 2.0), (1, None)), UNIGRAM)
    assert set(found["rates"].values()) == {51 - WINDOW + 1}


def test_a_short_spike_is_no_divergence() -> None:
    assert set(tolerated(records((50, 2.0), (3, 3.0), (50, 1.9)), UNIGRAM)["rates"].values()) == {None}


def test_what_never_learned_has_nothing_to_lose() -> None:
    found = tolerated(records((50, 5.0), (50, 2.95), (50, 4.0)), UNIGRAM)
    assert not found["learned"] and set(found["rates"].values()) == {None}


def test_a_ramp_rises_evenly_and_ends_when_all_is_lost(recipe: Recipe, tokens: TokenData, tmp_path: Path) -> None:
    t = replace(recipe.train, schedule="ramp", learning_rate=1.0, steps=600, checkpoint_every=1000)
    result = train(replace(recipe, train=t), tmp_path / "run", data=tokens.directory)
    lines = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    steps = [b["learning_rate"] - a["learning_rate"] for a, b in itertools.pairwise(lines)]
    assert steps == pytest.approx([1.0 / 600] * len(steps))
    assert len(lines) < 600 and result["status"] == "ok"
    rates = result["tolerated"]["rates"]
    assert (
        result["tolerated"]["learned"] and 0 < rates["0.25"] <= rates["0.5"] <= rates["1"] <= lines[-1]["learning_rate"]
    )


def test_every_sequence_counts_the_same_in_the_cost_of_a_block() -> None:
    config = SpanNormConfig(
        vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, placement="pre"
    )
    model = SpanNormForCausalLM(config)
    sequences = list(torch.randint(0, 29, (3, 8), generator=torch.Generator().manual_seed(0)))
    in_one, in_two = (collapse(model, sequences, batch_size, bf16=False)["skip_cost"] for batch_size in (3, 2))
    assert in_two == pytest.approx(in_one, rel=1e-4, abs=1e-6)


def test_collapse_is_measured_after_training(recipe: Recipe, tokens: TokenData, tmp_path: Path) -> None:
    result = train(replace(recipe, train=replace(recipe.train, collapse=True)), tmp_path / "run", data=tokens.directory)
    found, depth, width = result["collapse"], 2, 32
    assert len(found["effective_rank"]) == len(found["token_cosine"]) == depth + 1
    assert all(1 <= rank <= width for rank in found["effective_rank"])
    assert len(found["skip_cost"]) == len(found["layer_cosine"]) == depth
    assert sum(found["skip_cost"]) > 0, "the blocks of a trained model are good for something"
    assert found["spectrum"][0] == 1 and found["spectrum"] == sorted(found["spectrum"], reverse=True)
