"""What the theory promises of depth, kept by training: a thousand blocks of SpanNorm."""

from dataclasses import replace

import numpy as np
import pytest

from spannorm.files import read_jsonl
from spannorm.train.run import train


@pytest.mark.slow
def test_a_thousand_blocks_train_for_a_hundred_steps_with_falling_loss(recipe, tokens, tmp_path):
    deep = replace(
        recipe,
        model={**recipe.model, "num_hidden_layers": 1000, "placement": "span", "depth_rule": "1/sqrt(L)"},
        train=replace(recipe.train, steps=100, learning_rate=1e-4, warmup_steps=20, probe_every=100,
                      checkpoint_every=100),
    )  # fmt: skip
    result = train(deep, tmp_path / "run", data=tokens.directory)
    losses = [r["loss"] for r in read_jsonl(tmp_path / "run" / "records.jsonl") if "loss" in r]
    quarters = np.array(losses).reshape(4, 25).mean(1)
    assert len(losses) == 100 and np.isfinite(losses).all()
    assert quarters[1] < quarters[0] - 0.5 and quarters[2:].mean() < quarters[1]
    assert result["val_loss"] < losses[0] - 2
