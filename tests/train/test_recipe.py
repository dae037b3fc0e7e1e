"""Recipes: YAML to frozen dataclasses and back, and what is refused before any time is spent."""

from pathlib import Path

import pytest
import yaml

from spannorm.errors import InputError
from spannorm.lab.jobs.plan import Plan
from spannorm.lab.ladder.plan import LadderPlan
from spannorm.placements import PLACEMENTS
from spannorm.train.recipe import load_recipe, recipe_from_dict
from spannorm.train.run import model_config

ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_of_the_repository_loads_and_builds(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe_from_dict(recipe.to_dict()) == recipe, "a recipe survives its own record"
    if recipe.ladder.sizes:
        assert LadderPlan(recipe, here=False).jobs({})
    else:  # sizes may stand in the arms or the grid alone
        assert all(model_config(job.recipe).num_hidden_layers >= 1 for job in Plan(recipe, here=False).jobs({})[:9])


def test_the_zoo_holds_every_placement_in_both_tables_each_by_its_own_recipe() -> None:
    arms = load_recipe(ROOT / "recipes" / "zoo.yaml").compare.arms
    for table in ("common body", "own recipe"):
        assert list(dict.fromkeys(a["model.placement"] for a in arms if a["table"] == table)) == list(PLACEMENTS)
    for arm in arms:
        if ":gain" in arm.get("model.depth_rule", ""):
            continue  # depth-scaled sandwich: a placement that is there, by a recipe of its own
        kind = PLACEMENTS[arm["model.placement"]]
        asked = kind.recommended_base_init if arm["table"] == "own recipe" else "fan_in"
        assert arm.get("model.base_init", "fan_in") == asked


def test_a_number_written_as_yaml_1_1_text_is_a_number(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path / "r.yaml", "train: {learning_rate: 6e-3}"))
    assert recipe.train.learning_rate == 0.006
    grid = "compare: {arms: [{}], grid: {train.learning_rate: [1e-3, 3e-3]}}"
    assert load_recipe(write(tmp_path / "g.yaml", grid)).compare.grid == {"train.learning_rate": (0.001, 0.003)}


def test_set_overrides_any_key_and_is_typed_like_yaml(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "train: {steps: 50}")
    overrides = ["train.steps=7", "train.warmup_steps=0", "model.placement=post", "data.document_separator=null"]
    recipe = load_recipe(path, [*overrides, "train.compile=true"])
    assert (recipe.train.steps, recipe.train.compile, recipe.data.document_separator) == (7, True, None)
    assert recipe.model["placement"] == "post" and recipe.name == "r"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trian: {}", ["trian", "'train'"]),
        ("train: {stepps: 3}", ["stepps", "'steps'"]),
        ("data: {corpas: x}", ["corpas", "'corpus'"]),
        ("train: {steps: many}", ["train.steps", "whole number", "many"]),
        ("train: {steps: 2.5}", ["train.steps", "whole number", "2.5"]),
        ("train: {compile: 1}", ["train.compile", "true or false"]),
        ("train: 3", ["train", "mapping"]),
        ("compare: {arms: 3}", ["compare.arms", "list"]),
        ("[1, 2]", ["mapping"]),
        ("a: [", ["YAML"]),
        ("train: {steps: 0}", ["train.steps", "at least 1"]),
        ("train: {steps: 10, warmup_steps: 10}", ["train.warmup_steps", "below", "try 1"]),
        ("train: {learning_rate: -1}", ["train.learning_rate", "above 0"]),
        ("train: {learning_rate: .nan}", ["train.learning_rate", "finite", "nan"]),
        ("train: {adam_beta2: 1}", ["adam_beta2", "below 1", "1.0"]),
        ("train: {schedule: cosin}", ["cosin", "'cosine'"]),
        ("train: {precision: fp16}", ["fp16", "bf16"]),
        ("train: {kernels: cuda}", ["train.kernels", "cuda", "triton"]),
        ("train: {sequence_length: 1}", ["sequence_length", "2"]),
        ("data: {validation_fraction: 0.9}", ["validation_fraction", "0.5"]),
        ("data: {vocab_size: 100}", ["vocab_size", "258"]),
    ],
)
def test_a_bad_recipe_is_refused_in_words(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(write(tmp_path / "r.yaml", text))
    for word in words:
        assert word in str(caught.value)


def test_a_missing_recipe_and_a_set_without_value_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="key=value"):
        load_recipe(write(tmp_path / "r.yaml", ""), ["train.steps"])
    with pytest.raises(InputError, match="is a value, not a section"):
        load_recipe(write(tmp_path / "r.yaml", "name: x"), ["name.steps=3"])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"hidden_siz": 16}, ["hidden_siz", "'hidden_size'"]),
        ({**SIZES, "hidden_size": 250, "num_attention_heads": 16}, ["250", "16", "try 256"]),
        ({"hidden_size": "wide"}, ["hidden_size", "wide"]),
        ({**SIZES, "placement": "spam"}, ["spam", "'span'"]),
        ({**SIZES, "depth_rule": "1/sqrt(2l)"}, ["1/sqrt(2l)", "1/sqrt(2L)"]),
        ({**SIZES, "max_position_embeddings": 8}, ["sequence_length", "8"]),
        ({}, ["model.hidden_size", "model.num_hidden_layers", "no default"]),
    ],
)
def test_an_impossible_model_is_refused_before_any_data_is_read(model: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        model_config(recipe_from_dict({"model": model}))
    for word in words:
        assert word in str(caught.value)


def test_the_written_record_is_plain_yaml() -> None:
    recipe = load_recipe(ROOT / "recipes" / "demo.yaml")
    assert recipe_from_dict(yaml.safe_load(yaml.safe_dump({**recipe.to_dict(), "compare": {}}))).train == recipe.train


def test_a_key_of_the_grid_is_set_whole(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("compare: {grid: {train.learning_rate: [1e-3, 2e-3]}}")
    overrides = ["compare.grid.train.seed=[0, 1]", "compare.grid.train.learning_rate=[5e-3]"]
    assert load_recipe(tmp_path / "r.yaml", overrides).compare.grid == {
        "train.learning_rate": (5e-3,),
        "train.seed": (0, 1),
    }


def test_a_value_of_the_grid_may_be_a_mapping_and_the_protocol_is_checked(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("compare: {grid: {size: [{model.hidden_size: 8}]}, protocol: {pairs: [[a, b]]}}")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.compare.grid == {"size": ({"model.hidden_size": 8},)} and recipe.compare.protocol.pairs == (
        ("a", "b"),
    )
    assert recipe_from_dict(recipe.to_dict()) == recipe
    with pytest.raises(InputError, match=r"compare\.protocol\.extensions must not be negative"):
        load_recipe(tmp_path / "r.yaml", ["compare.protocol.extensions=-1"])


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/x", "..", "a/b", "", "."])
def test_a_recipe_names_a_folder_below_runs_and_nowhere_else(name: str) -> None:
    with pytest.raises(InputError, match="plain folder name"):
        recipe_from_dict({"name": name})
