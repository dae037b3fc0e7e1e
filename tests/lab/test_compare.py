"""A comparison, really run in worker processes: its file, its resumption, and what it refuses."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from spannorm.errors import InputError
from spannorm.lab.compare import commands, compare
from spannorm.lab.jobs.plan import Plan
from spannorm.lab.max_lr import ramps
from spannorm.lab.report.page import draw_report
from spannorm.train.recipe import CompareRecipe, ProtocolRecipe, Recipe, recipe_from_dict

ARMS = ({"model.placement": "pre"}, {"model.placement": "post"}, {"model.placement": "span"})
PROMISED = {"placement", "depth_rule", "seed", "learning_rate", "status", "reason", "val_loss", "bits_per_byte"}
PROMISED |= {"unigram_loss", "spike_score", "max_grad_norm", "tokens_per_second", "parameters"}


@pytest.fixture(scope="module")
def comparison(recipe: Recipe) -> Recipe:
    t = replace(recipe.train, steps=30, checkpoint_every=10, probe_every=15)
    return replace(recipe, train=t, compare=CompareRecipe(arms=ARMS, grid={"train.seed": (0, 1)}))


@pytest.fixture(scope="module")
def finished(comparison: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("comparison") / "out"
    compare(comparison, out)
    return out


def losses(out: Path) -> dict[str, list[float]]:
    """Every job's training losses, by its folder's name."""
    return {
        path.parent.name: [json.loads(line)["loss"] for line in path.read_text().splitlines()]
        for path in sorted(out.glob("jobs/*/records.jsonl"))
    }


def test_results_hold_every_arm_and_all_that_is_needed_to_repeat_them(finished: Path, comparison: Recipe) -> None:
    text = (finished / "results.json").read_text()
    results = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in results.json"))
    assert [(a["placement"], a["depth_rule"], a["seed"]) for a in results["jobs"]] == [
        (p, r, s) for p, r in [("pre", "1/sqrt(2L)"), ("post", "none"), ("span", "1/sqrt(L)")] for s in (0, 1)
    ], "resolved names, in the order of the recipe"
    for arm in results["jobs"]:
        assert arm.keys() >= PROMISED
        assert (finished / "jobs" / arm["job"] / "result.json").is_file()
    assert recipe_from_dict(results["recipe"]) == comparison
    assert {"python", "torch", "transformers", "spannorm"} <= results["versions"].keys()
    assert len(results["data"]["sha256"]) == 64 and results["machine"]["cores"] >= 1


def test_arms_of_one_seed_see_the_same_tokens_from_bodies_of_the_same_draw(finished: Path) -> None:
    runs = [json.loads(path.read_text()) for path in finished.glob("jobs/*/run.json")]
    assert len({run["data"]["sha256"] for run in runs}) == 1
    seeds = {run["recipe"]["train"]["seed"]: run["model_config"]["init_seed"] for run in runs}
    assert seeds == {0: 0, 1: 1}


def test_the_report_stands_and_redraws_from_the_files_alone(finished: Path) -> None:
    assert (finished / "report.html").stat().st_size > 10_000
    (finished / "report.html").unlink()
    assert draw_report(finished) == finished / "report.html"
    assert "1/sqrt(2L)" in (finished / "report.html").read_text()


def test_a_finished_comparison_is_not_run_again(finished: Path, comparison: Recipe) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("jobs/*/records.jsonl")}
    results = compare(comparison, finished)
    assert all(arm["val_loss"] is not None for arm in results["jobs"])
    assert before == {path: path.stat().st_mtime_ns for path in finished.glob("jobs/*/records.jsonl")}


def start(comparison: Recipe, out: Path) -> subprocess.Popen:
    path = out.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(comparison.to_dict()))))
    command = [sys.executable, "-m", "spannorm", "compare", str(path), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_a_checkpoint(out: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while not list(out.glob("jobs/*/checkpoint-*/complete.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "no job got going"
        time.sleep(0.01)


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=lambda s: s.name
)
def test_a_stopped_comparison_goes_on_to_the_same_losses(
    comparison: Recipe, finished: Path, tmp_path: Path, how: signal.Signals
) -> None:
    longer = replace(comparison, compare=replace(comparison.compare, grid={}))
    process = start(longer, tmp_path / "out")
    wait_for_a_checkpoint(tmp_path / "out", process)
    process.send_signal(how)
    output = process.communicate(timeout=60)[0]
    if how != signal.SIGKILL:
        assert (
            process.returncode == (130 if how == signal.SIGINT else 75)
            and "Go on with: spannorm compare" in output
            and "Traceback" not in output
        )
        statuses = {arm["status"] for arm in json.loads((tmp_path / "out" / "results.json").read_text())["jobs"]}
        assert statuses & {"stopped", "waiting"}
    results = compare(longer, tmp_path / "out")
    assert {arm["status"] for arm in results["jobs"]} <= {"ok", "failed"}
    assert all(arm["val_loss"] for arm in results["jobs"])
    assert losses(tmp_path / "out") == {k: v for k, v in losses(finished).items() if "seed0" in k}


def test_a_folder_with_another_comparison_or_a_run_is_refused(finished: Path, comparison: Recipe) -> None:
    other = replace(comparison, train=replace(comparison.train, learning_rate=0.5))
    with pytest.raises(InputError, match=r"train.learning_rate is 0.01 there and 0.5 here"):
        compare(other, finished)
    with pytest.raises(InputError, match="already holds a single run"):
        compare(comparison, next(finished.glob("jobs/*")))


def test_a_crashed_job_is_named_with_its_log_and_tried_again(
    comparison: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = replace(comparison, compare=CompareRecipe(arms=ARMS[:1]))
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho boom >&2\nexit 3\n")
    fake.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(fake))
        results = compare(one, tmp_path / "out")
    arm = results["jobs"][0]
    assert not results["complete"] and arm["status"] == "crashed" and "crashed (exit code 3)" in arm["reason"]
    assert "boom" in (tmp_path / "out" / "jobs" / arm["job"] / "log.txt").read_text()
    results = compare(one, tmp_path / "out")
    assert results["complete"] and results["jobs"][0]["val_loss"] is not None


def test_a_finished_job_on_other_tokens_is_refused(comparison: Recipe, tmp_path: Path) -> None:
    one, out = replace(comparison, compare=CompareRecipe(arms=ARMS[:1])), tmp_path / "out"
    job = compare(one, out)["jobs"][0]["job"]
    described = json.loads((out / "jobs" / job / "run.json").read_text())
    described["data"]["sha256"] = "0" * 64
    (out / "jobs" / job / "run.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match=r"begun on other tokens \(sha256 0000.*the corpus has changed"):
        compare(one, out)


def test_printed_commands_run_anywhere_and_the_comparison_gathers_them(
    comparison: Recipe, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = replace(comparison, compare=CompareRecipe(arms=ARMS[:2]))
    printed = commands(two, tmp_path / "out")
    assert len(printed) == 2 and not list(tmp_path.glob("out/jobs/*/result.json")), "nothing runs"
    subprocess.run(printed[0], shell=True, check=True, cwd="/", capture_output=True)
    assert commands(two, tmp_path / "out") == printed[1:]
    subprocess.run(printed[1], shell=True, check=True, cwd="/", capture_output=True)
    monkeypatch.setattr(sys, "executable", "/nowhere")
    results = compare(two, tmp_path / "out")
    assert results["complete"] and commands(two, tmp_path / "out") == []
    assert losses(tmp_path / "out").items() <= losses(finished).items(), "the same runs as on this machine's cores"
    assert not list(tmp_path.glob("out/jobs/*/checkpoint-*")), "a finished run needs none"


def test_jobs_are_arms_times_grid(recipe: Recipe) -> None:
    grid = {"train.learning_rate": (1e-3, 3e-3), "train.seed": (0, 1, 2)}
    jobs = Plan(replace(recipe, compare=CompareRecipe(arms=ARMS, grid=grid))).jobs({})
    seen = [(j.recipe.model["placement"], j.recipe.train.learning_rate, j.recipe.train.seed) for j in jobs]
    assert seen == list(itertools.product(["pre", "post", "span"], [1e-3, 3e-3], [0, 1, 2]))
    assert len({job.name for job in jobs}) == 18 and not any(os.sep in job.name for job in jobs)


def test_a_run_that_stands_in_two_tables_is_one_job(recipe: Recipe) -> None:
    arms = [{"table": t, "model.placement": p} for t in ("common body", "own recipe") for p in ("pre", "span")]
    arms.append({"table": "own recipe", "model.placement": "pre", "model.base_init": "normal"})
    jobs = Plan(replace(recipe, compare=CompareRecipe(arms=tuple(arms)))).jobs({})
    assert [job.tables for job in jobs] == [("common body", "own recipe")] * 2 + [("own recipe",)]
    assert all("table" not in job.overrides for job in jobs)


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ((), ["lists no arm"]),
        (({"model.placement": "span"}, {"model.placement": "span"}), ["same run twice"]),
        (({"model.placement": "spam"},), ["spam", "'span'"]),
        (({"train.stepps": 3},), ["stepps", "'steps'"]),
        (({"model.hidden_size": 33},), ["33", "try"]),
    ],
)
def test_a_bad_comparison_is_refused_before_anything_is_written(
    recipe: Recipe, tmp_path: Path, arms: tuple, words: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        compare(replace(recipe, compare=CompareRecipe(arms=arms)), tmp_path / "out")
    assert all(word in str(caught.value) for word in words)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_protocol_runs_to_its_verdict_and_never_runs_a_job_twice(comparison: Recipe, tmp_path: Path) -> None:
    protocol = ProtocolRecipe(seeds=(1, 2), extensions=0, pairs=(("span", "pre"),))
    grid = {"train.learning_rate": (3e-3, 1e-2, 3e-2)}
    recipe = replace(comparison, compare=CompareRecipe((ARMS[0], ARMS[2]), grid, protocol))
    results = compare(recipe, tmp_path / "out")
    stages = [(arm["stage"], arm["seed"]) for arm in results["jobs"]]
    assert stages == [("choice", 0)] * 6 + [("confirmation", 1), ("confirmation", 2)] * 2 and results["complete"]
    (condition,) = results["summary"]
    assert [s["trials"] for s in condition["standings"]] == [3, 3] and len(condition["pairs"]) == 1
    assert condition["pairs"][0]["words"] in (tmp_path / "out" / "report.html").read_text()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/jobs/*/records.jsonl")}
    assert compare(recipe, tmp_path / "out")["summary"] == results["summary"]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/jobs/*/records.jsonl")}


def test_ramps_take_a_recipes_arms_and_conditions_but_no_learning_rates(comparison: Recipe, tmp_path: Path) -> None:
    grid = {"train.learning_rate": (1e-3, 1e-2), "train.clip_norm": (0.0, 1.0)}
    protocol = ProtocolRecipe(seeds=(1, 2), extensions=0, pairs=(("span", "pre"),))
    jobs = Plan(ramps(replace(comparison, compare=CompareRecipe(ARMS[:2], grid, protocol)), 0.5)).jobs({})
    assert {(j.arm.split()[0], j.condition["train.clip_norm"]) for j in jobs} == set(
        itertools.product(("pre", "post"), (0.0, 1.0))
    )
    assert len(jobs) == 4
    assert all((j.recipe.train.schedule, j.recipe.train.learning_rate) == ("ramp", 0.5) for j in jobs)


def test_ramps_leave_out_the_rates_and_schedules_of_arms_and_conditions(comparison: Recipe) -> None:
    arms = (ARMS[0] | {"train.learning_rate": 1e-3}, ARMS[1] | {"train.schedule": "wsd"})
    grid = {"size": ({"model.num_hidden_layers": 1, "train.learning_rate": 2e-3}, {"model.num_hidden_layers": 2})}
    jobs = Plan(ramps(replace(comparison, compare=CompareRecipe(arms, grid)), 0.5)).jobs({})
    assert [(j.recipe.train.schedule, j.recipe.train.learning_rate) for j in jobs] == [("ramp", 0.5)] * 4
    with pytest.raises(InputError, match=r"without ladder\.sizes"):
        ramps(replace(comparison, ladder=replace(comparison.ladder, sizes=(1, 2, 3, 4))))


@pytest.mark.slow
def test_ramps_end_in_tolerances(comparison: Recipe, tmp_path: Path) -> None:
    train = replace(comparison.train, steps=400, checkpoint_every=400, probe_every=400)
    one = replace(comparison, train=train, compare=CompareRecipe(ARMS[:1]))
    results = compare(ramps(one, 1.0), tmp_path / "out")
    assert [(t["arm"], t["unlearned"]) for t in results["tolerances"]] == [("pre 1/sqrt(2L)", 0)]
    assert "Largest tolerable learning rate" in (tmp_path / "out" / "report.html").read_text()
