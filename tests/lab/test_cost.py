"""What a comparison comes to before it is run, by numbers counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from spannorm.cli import app
from spannorm.lab.jobs.cost import cost, in_words, is_large
from spannorm.lab.jobs.plan import Plan
from spannorm.train.recipe import load_recipe, recipe_from_dict

RECIPES = Path(__file__).parents[2] / "recipes"
TRAIN = {"steps": 10, "warmup_steps": 1, "batch_size": 2, "accumulation": 3, "sequence_length": 16}


def recipe(**compare: object) -> object:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}
    return recipe_from_dict({"model": sizes, "train": TRAIN, "compare": compare})


def test_runs_tokens_parameters_and_operations_are_counted() -> None:
    grid = {"train.learning_rate": [1e-3, 2e-3]}
    found = cost(recipe(arms=[{"model.placement": "pre"}, {"model.placement": "post"}], grid=grid))
    block = 4 * 8 * 8 + 3 * 8 * 12 + 2 * 8
    bodies, tables = {"pre": 3 * block + 8, "post": 3 * block}, 257 * 8  # a final norm more
    assert found.runs == 4 and not found.more
    assert found.tokens == 4 * 10 * 2 * 3 * 16
    assert found.parameters == (bodies["post"] + 2 * tables, bodies["pre"] + 2 * tables)
    attention = 12 * 3 * 8 * 16
    assert found.flops == 2 * 960 * sum(6 * (body + tables) + attention for body in bodies.values())
    assert found.gpu_hours == pytest.approx(found.flops / 989e12 / 0.4 / 3600)
    assert "4 runs of 0.0 M" in in_words(found)


def test_a_protocol_says_that_more_runs_follow() -> None:
    rates = {"train.learning_rate": [1e-3, 2e-3, 4e-3]}
    found = cost(recipe(arms=[{"model.placement": "pre"}], grid=rates, protocol={"seeds": [1, 2]}))
    assert found.more and "at least 3 runs" in in_words(found)


def test_depthbenchs_sizes_are_405_m_within_3_percent_and_its_tokens_8_billion() -> None:
    loaded = load_recipe(RECIPES / "depthbench.yaml")
    assert is_large(loaded) and not is_large(load_recipe(RECIPES / "demo.yaml"))
    assert loaded.train.steps * 512 * 2048 == pytest.approx(8e9, rel=1e-3)
    assert loaded.train.batch_size * loaded.train.accumulation == 512
    for size in loaded.compare.grid["size"]:
        one = {"size": [size], "train.learning_rate": [1e-3]}
        raw = {**loaded.to_dict(), "compare": {"arms": [{"model.placement": "pre"}], "grid": one}}
        parameters, _ = cost(recipe_from_dict(raw)).parameters
        assert parameters == pytest.approx(405e6, rel=0.03), size


def test_the_verb_prints_it_and_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(
        "model: {hidden_size: 8, intermediate_size: 12, num_hidden_layers: 2, num_attention_heads: 2}\n"
        "compare: {arms: [{model.placement: pre}, {model.placement: span}]}"
    )
    ran = CliRunner().invoke(app, ["compare", str(tmp_path / "two.yaml"), "--cost", "--out", str(tmp_path / "out")])
    assert ran.exit_code == 0 and ran.output.startswith("2 runs of"), ran.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["zoo.yaml", "findings/rivals.yaml", "depthbench.yaml"])
def test_recipes_that_are_too_long_to_run_here_can_be_planned(path: str) -> None:
    plan = Plan(load_recipe(RECIPES / path), here=False)
    assert len(plan.jobs({})) > 50
