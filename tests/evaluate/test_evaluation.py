"""`spannorm eval` and `train.evaluate`: from a run's folder to its scores, and every way it can go wrong."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import spannorm as package
from spannorm.errors import InputError
from spannorm.evaluate import tasks
from spannorm.lab.compare import compare
from spannorm.models import SpanNormForCausalLM
from spannorm.train.data import TokenData, prepare_data
from spannorm.train.evaluation import evaluate_folder
from spannorm.train.recipe import Recipe, recipe_from_dict
from spannorm.train.run import train

needs_lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'spannorm[eval]'")


@pytest.fixture(scope="module")
def longer(recipe: Recipe, tokens: TokenData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, TokenData]:
    """The recipe with contexts and a test split that questions can be made from."""
    data = replace(recipe.data, test_fraction=0.3)
    long = replace(recipe, data=data, train=replace(recipe.train, sequence_length=96, steps=20))
    long = replace(long, train=replace(long.train, evaluate=("local",), evaluate_questions=30))
    return long, prepare_data(data, tmp_path_factory.mktemp("tokens") / "data")


@pytest.fixture(scope="module")
def run(longer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    train(longer[0], out, data=longer[1].directory)
    return out


def spannorm(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "spannorm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_run_evaluates_its_model_and_the_command_finds_the_same(run, longer):
    inside = json.loads((run / "result.json").read_text())["evaluation"]
    assert set(inside) == {"identifier_cloze", "bracket_matching"}
    assert all(score["questions"] == 30 and score["cut"] == 0 for score in inside.values())
    ran = spannorm("eval", run, "--questions", 30, "--data", longer[1].directory)
    assert ran.returncode == 0 and ran.stderr == "", ran.stderr
    results = json.loads((run / "eval" / "results.json").read_text())
    assert results["tasks"] == inside and results["text"]["sha256"] == longer[1].sha256
    for name, score in inside.items():
        row = next(line for line in ran.stdout.splitlines() if name in line).split()
        acc = score["metrics"]["acc"]
        margin = 1.959964 * acc["stderr"]  # the standard normal's 97.5 % quantile
        assert row[1:] == ["acc", *(f"{value:.4g}" for value in (acc["value"], margin, score["chance"])), "30"]
        assert len((run / "eval" / f"{name}.jsonl").read_text().splitlines()) == 30


def test_the_pages_rules_of_thumb_run_as_printed_and_beat_guessing(run, longer):
    evaluate_folder(run, ["local"], data=longer[1].directory, count=30)
    page = (Path(__file__).parents[2] / "docs" / "eval.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    scope: dict = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code.replace("runs/eval/eval", str(run / "eval")), scope)
    identifiers, brackets = scope["rules"]
    assert identifiers > 0.4 and brackets > 0.6


def test_a_saved_model_is_evaluated_on_the_tokens_it_is_given(run, longer, tmp_path):
    shutil.copytree(run / "model", tmp_path / "model")
    found = evaluate_folder(tmp_path / "model", ["bracket_matching"], data=longer[1].directory, count=30)
    inside = json.loads((run / "result.json").read_text())["evaluation"]["bracket_matching"]
    assert found["tasks"]["bracket_matching"] == inside


def test_a_rewired_model_is_evaluated_from_its_folder(longer, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    rewired = LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=96, **sizes))
    package.rewire(rewired, "span")
    rewired.save_pretrained(tmp_path / "model")
    longer[1].tokenizer().save_pretrained(tmp_path / "model")
    ran = spannorm("eval", tmp_path / "model", "--questions", 30, "--data", longer[1].directory,
                   "--out", tmp_path / "scores")  # fmt: skip
    assert ran.returncode == 0 and ran.stderr == "", ran.stderr
    scores = json.loads((tmp_path / "scores" / "results.json").read_text())["tasks"]
    assert all(0 < score["metrics"]["acc"]["value"] < 0.7 for score in scores.values())


def test_bad_input_is_one_clear_message(run, longer, tmp_path, monkeypatch):
    def refused(match: str, folder: Path = run, names: tuple[str, ...] = ("local",), **options) -> None:
        with pytest.raises(InputError, match=match):
            evaluate_folder(folder, names, **options)

    refused("neither in it nor beside it: give their folder with --data")  # of a run whose tokens lie elsewhere
    refused("holds neither a run nor a model", tmp_path)
    refused("is a model without a run: give tokens with --data", run / "model")
    refused("no prepared data", data=tmp_path)
    refused("the data of the task piqa is neither", names=("piqa",))
    shutil.copytree(run, tmp_path / "unfinished", ignore=shutil.ignore_patterns("model"))
    refused("has no model yet", tmp_path / "unfinished")
    package.load(run / "model").save_pretrained(tmp_path / "bare")
    refused("has no tokenizer", tmp_path / "bare", data=longer[1].directory)
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    refused(r"lm-eval, which is not installed: pip install 'spannorm\[eval\]'")
    ran = spannorm("eval", tmp_path / "nothing")
    assert ran.returncode == 2 and ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1


def test_what_cannot_be_evaluated_is_refused_before_training(longer, tmp_path, monkeypatch):
    recipe, tokens = longer
    hub = replace(recipe, train=replace(recipe.train, evaluate=("sciq",)))
    with pytest.raises(InputError, match="the data of the task sciq"):
        train(hub, tmp_path / "run", data=tokens.directory)
    assert not (tmp_path / "run" / "records.jsonl").exists()
    sharded = recipe.to_dict()
    sharded["train"]["parallel"] = "fsdp"
    with pytest.raises(InputError, match=r"train\.evaluate needs the whole model"):
        recipe_from_dict(sharded)
    comparison = hub.to_dict() | {"compare": {"arms": [{"model.placement": "pre"}]}}
    with pytest.raises(InputError, match="the data of the task sciq"):
        compare(recipe_from_dict(comparison), tmp_path / "compared")
    assert not (tmp_path / "compared" / "jobs").exists()


def test_a_diverged_run_is_not_evaluated(longer, tmp_path, monkeypatch):
    recipe, tokens = longer
    monkeypatch.setattr(SpanNormForCausalLM, "forward", broken(SpanNormForCausalLM.forward))
    assert "evaluation" not in train(recipe, tmp_path / "run", data=tokens.directory)


def broken(forward):
    def diverging(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss * float("nan")
        return outputs

    return diverging


@pytest.mark.slow
def test_a_comparison_evaluates_every_arm_and_its_report_shows_it(longer, tmp_path):
    raw = longer[0].to_dict()
    raw["compare"] = {"arms": [{"model.placement": "pre"}, {"model.placement": "span"}], "grid": {"train.seed": [0, 1]}}
    results = compare(recipe_from_dict(raw), tmp_path / "out")
    scores = [arm["evaluation"] for arm in results["jobs"]]
    assert len(scores) == 4 and all(set(score) == {"identifier_cloze", "bracket_matching"} for score in scores)
    assert len({score["identifier_cloze"]["questions_sha256"] for score in scores}) == 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        "Questions answered after training" in page and page.count("2 seeds</small>") + page.count("2 seeds, as") == 4
    )
    job = tmp_path / "out" / "jobs" / results["jobs"][0]["job"]
    assert evaluate_folder(job, ["local"], count=30)["tasks"] == scores[0]  # the tokens lie beside the comparison
    before = (tmp_path / "out" / "results.json").read_text()
    compare(recipe_from_dict(raw), tmp_path / "out")
    assert (tmp_path / "out" / "results.json").read_text() == before
