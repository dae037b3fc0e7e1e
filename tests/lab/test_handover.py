"""Finished runs handed from one comparison to another: taken over where they are the same, and only there."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spannorm.cli import app
from spannorm.errors import InputError
from spannorm.lab.compare import commands, compare
from spannorm.lab.jobs.handover import identity, merge, read_finished
from spannorm.lab.jobs.plan import Plan
from spannorm.train.recipe import CompareRecipe, Recipe
from spannorm.train.run import run_recipe

ARMS = ({"model.placement": "pre"}, {"model.placement": "span"})


@pytest.fixture(scope="module")
def small(recipe: Recipe) -> Recipe:
    train = replace(recipe.train, steps=6, checkpoint_every=6, probe_every=6, warmup_steps=1)
    return replace(recipe, train=train, compare=CompareRecipe(arms=ARMS))


@pytest.fixture(scope="module")
def done(small: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of the two arms, on a machine that called its recipe something else."""
    out = tmp_path_factory.mktemp("elsewhere") / "out"
    compare(replace(small, name="another day", compare=CompareRecipe(arms=ARMS[:1])), out)
    return out


def test_a_run_that_was_finished_elsewhere_is_not_run_again(
    small: Recipe, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = CliRunner().invoke(app, ["results", "merge", str(done), str(done), "--out", str(tmp_path / "done.json")])
    assert ran.exit_code == 0 and "1 finished runs, 1 more were equal" in ran.stdout
    assert len(commands(small, tmp_path / "both", finished=[tmp_path / "done.json"])) == 1, "the other arm is left"
    one = replace(small, compare=CompareRecipe(arms=ARMS[:1]))
    monkeypatch.setattr(sys, "executable", "/nowhere")
    for source in (tmp_path / "done.json", done):
        out = tmp_path / source.stem
        results = compare(one, out, finished=[source])
        (arm,), (before,) = results["jobs"], json.loads((done / "results.json").read_text())["jobs"]
        assert results["complete"] and arm["val_loss"] == before["val_loss"] and arm["job"] != before["job"]
        assert arm["taken_from"]["source"].startswith(str(source))
        assert "1 result taken over from elsewhere" in (out / "report.html").read_text()
        run = json.loads((out / "jobs" / arm["job"] / "run.json").read_text())
        assert run["recipe"] == json.loads(json.dumps(run_recipe(Plan(one).jobs({})[0].recipe)))
    assert (tmp_path / "out" / "jobs" / arm["job"] / "records.jsonl").is_file(), "a folder has the curves too"
    assert commands(one, tmp_path / "out") == []


def test_another_recipe_other_tokens_or_another_version_are_another_run(
    small: Recipe, done: Path, tmp_path: Path
) -> None:
    merge([done], tmp_path / "done.json")
    raw = json.loads((tmp_path / "done.json").read_text())
    one = replace(small, compare=CompareRecipe(arms=ARMS[:1]))

    def left(name: str, recipe: Recipe = one) -> int:
        (tmp_path / "done.json").write_text(json.dumps(raw))
        return len(commands(recipe, tmp_path / name, finished=[tmp_path / "done.json"]))

    assert left("same") == 0
    assert raw.pop("format") == 1
    assert left("older") == 0, "a file written before there was a number"
    assert left("rate", replace(one, train=replace(one.train, learning_rate=0.02))) == 1
    assert left("data", replace(one, data=replace(one.data, validation_fraction=0.3))) == 1
    run, result = raw["finished"][0]["run"], raw["finished"][0]["result"]
    for holder, key, other in ((result, "precision", "bf16"), (run["data"], "vocab_size", 1026)):
        own, holder[key] = holder[key], other
        assert left(f"{key} {other}") == 1
        holder[key] = own
    assert left("said", replace(one, train=replace(one.train, precision="fp32"))) == 0, "what auto comes to here"
    run["versions"]["spannorm"] = "99.0"
    assert left("a later version whose runs end alike") == 0
    run["runs_since"] = "99.0"
    assert left("one whose runs end otherwise") == 1


def test_runs_of_0_1_0_which_wrote_its_version_alone_are_taken_over(small: Recipe, done: Path, tmp_path: Path) -> None:
    merge([done], tmp_path / "done.json")
    raw = json.loads((tmp_path / "done.json").read_text())
    one = replace(small, compare=CompareRecipe(arms=ARMS[:1]))
    del raw["finished"][0]["run"]["runs_since"]
    for version, left in (("0.1.0", 0), ("0.0.1", 1)):
        raw["finished"][0]["run"]["versions"]["spannorm"] = version
        (tmp_path / "done.json").write_text(json.dumps(raw))
        assert len(commands(one, tmp_path / version, finished=[tmp_path / "done.json"])) == left


def test_the_name_and_the_place_of_the_text_are_free(recipe: Recipe) -> None:
    run = run_recipe(recipe)
    rest = ("tokens", "1", "fp32", 257)
    same = identity(run | {"name": "x", "data": {**run["data"], "corpus": "/somewhere/else"}}, *rest)
    assert same == identity(json.loads(json.dumps(run)), *rest), "tuples and lists are the same"
    assert same != identity(run | {"model": {**run["model"], "hidden_size": 64}}, *rest)


def test_what_holds_no_finished_run_is_refused_in_words(done: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished run"):
        read_finished(tmp_path)
    (tmp_path / "cut.json").write_text('{"finished": [{"run": {}}]}')
    with pytest.raises(InputError, match=r"cut\.json.*finished\[0\]"):
        read_finished(tmp_path / "cut.json")
    (tmp_path / "newer.json").write_text('{"format": 9, "finished": []}')
    with pytest.raises(InputError, match=r"newer\.json has format 9, and this version of spannorm reads 1"):
        read_finished(tmp_path / "newer.json")
    with pytest.raises(InputError, match="cannot write to"):
        merge([done], tmp_path / "cut.json" / "deeper.json")
