"""The ladder against laws that are known: losses that follow E + A·C^-α exactly, and what follows from them by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from spannorm.cli import app
from spannorm.errors import InputError
from spannorm.lab.jobs.cost import config_without_tokens
from spannorm.lab.ladder.fit import Point, bootstrap, fit
from spannorm.lab.ladder.outcome import outcome
from spannorm.lab.ladder.plan import LadderPlan
from spannorm.lab.ladder.run import PREDICTION, sealed
from spannorm.lab.ladder.sizes import heads_of, rungs, shape
from spannorm.models import SpanNormForCausalLM
from spannorm.train.recipe import Recipe, recipe_from_dict

RECIPE = {
    "name": "ladder",
    "train": {"sequence_length": 64, "batch_size": 4},
    "compare": {
        "arms": [{"model.placement": "pre"}, {"model.placement": "span"}],
        "grid": {"train.learning_rate": [3e-3, 6e-3, 1.2e-2]},
        "protocol": {"seeds": [1, 2, 3], "pairs": [["span 1/sqrt(L)", "pre 1/sqrt(2L)"]]},
    },
    "ladder": {
        "sizes": [50_000, 100_000, 200_000, 400_000, 800_000], "head_size": 8, "token_ratios": [5], "depths": [32],
    },
}  # fmt: skip
IRREDUCIBLE = 0.7
LAWS = {"pre": (0.9, 0.10), "span": (0.8, 0.12), "keel": (0.9, 0.10), "gated": (0.9, 0.10)}
"""At 1e12 operations: the loss above E, and the exponent."""
BEST = {"pre": 6e-3, "span": 6e-3}


def recipe(**ladder) -> Recipe:
    return recipe_from_dict({**RECIPE, "ladder": {**RECIPE["ladder"], **ladder}})


def law(arm: str, compute: float) -> float:
    a, power = LAWS[arm.split()[0]]
    return IRREDUCIBLE + a * (compute / 1e12) ** -power


def saved(compute: float) -> float:
    """How many times span's compute pre takes to pre's loss at that compute, from the laws by hand."""
    a, power = LAWS["span"]
    return compute / (1e12 * (a / (law("pre", compute) - IRREDUCIBLE)) ** (1 / power))


def run(step, best=BEST) -> dict:
    """A finished run that follows the law, and is the worse the further its rate lies from the best of its width."""
    rung, job = step.rung, step.job
    off = math.log(job.recipe.train.learning_rate * rung.width / (best[job.arm.split()[0]] * WIDTH)) ** 2
    loss = law(job.arm, rung.compute) * (1 + 0.01 * off)
    return {"status": "ok", "val_loss": loss, "test_loss": loss}


WIDTH = rungs(recipe())[1].width  # of the last size that tries every rate


def finished(plan: LadderPlan, sealed: bool = True, best=BEST) -> dict[str, dict]:
    results: dict[str, dict] = {}
    while True:
        done = {name: r["val_loss"] for name, r in results.items()}
        new = [step for step in plan.steps(done, sealed) if step.job.name not in results]
        if not new:
            return results
        results |= {step.job.name: run(step, best) for step in new}


@pytest.mark.parametrize("size", [50_000, 200_000, 10_000_000, 300_000_000])
def test_a_size_becomes_a_shape_near_its_parameters_and_aspect(size):
    aspect, head = (4, 8) if size < 1e6 else (32, 64)
    blocks, width = shape(size, aspect, head)
    parameters = blocks * (4 * width**2 + 3 * width * 8 * math.ceil(width / 3))
    heads = heads_of(width, head)
    assert width % (2 * heads) == 0 and 0.7 < width / heads / head < 1.5
    assert parameters == pytest.approx(size, rel=0.15)
    assert width / blocks == pytest.approx(aspect, rel=0.5)


def test_rungs_follow_the_stated_rules():
    found = rungs(recipe())
    first = found[0]
    for rung in found:
        assert rung.tokens == pytest.approx(rung.ratio * rung.parameters, rel=0.05)
        assert rung.compute == 6 * rung.parameters * rung.tokens
        assert rung.batch == pytest.approx(4 * (rung.tokens / first.tokens) ** 0.5, abs=0.6)
        assert rung.warmup == pytest.approx(0.05 * rung.steps, abs=1)
    assert [rung.kind for rung in found] == ["size"] * 5 + ["tokens", "depth"]
    assert found[-1].blocks == 32


@pytest.mark.parametrize(
    ("ladder", "message"),
    [
        ({"sizes": [1000, 2000, 4000]}, "four sizes or more"),
        ({"sizes": [1000, 4000, 2000, 8000]}, "must ascend"),
        ({"sizes": [50_000, 50_001, 100_000, 200_000]}, "same model as the one before"),
        ({"rate_sizes": 4}, "ladder.rate_sizes must be at most 3 with 5 sizes; got 4"),
    ],
)
def test_ladders_that_cannot_be_are_refused(ladder, message):
    with pytest.raises(InputError, match=message):
        LadderPlan(recipe(**ladder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"num_attention_heads": 2}}, "take num_attention_heads out of the model section"),
        ({"model": {"num_key_value_heads": 1}}, "take num_key_value_heads out of the model section"),
        ({"arm": {"model.num_experts": 4}}, "take num_experts out of compare.arms"),
        ({"arm": {"train.accumulation": 4}}, "take train.accumulation out of compare.arms"),
        ({"arm": {"train.sequence_length": 32}}, "take train.sequence_length out of compare.arms"),
    ],
)
def test_what_would_make_the_stated_parameters_or_tokens_untrue_is_refused(changes, message):
    arms = [{"model.placement": "pre"}, {"model.placement": "span", **changes.get("arm", {})}]
    compare = {**RECIPE["compare"], "arms": arms, "protocol": {}}
    with pytest.raises(InputError, match=message):
        LadderPlan(recipe_from_dict({**RECIPE, "model": changes.get("model", {}), "compare": compare}))


def test_tokens_count_every_batch_of_a_step():
    accumulated = rungs(recipe_from_dict({**RECIPE, "train": {**RECIPE["train"], "accumulation": 4}}))
    for rung in accumulated:
        assert rung.tokens == rung.steps * rung.batch * 4 * 64 == pytest.approx(rung.ratio * rung.parameters, rel=0.05)


def test_an_arm_whose_placement_owns_matrices_has_their_operations_too():
    compare = {"arms": [{"model.placement": "pre"}, {"model.placement": "gated"}], "grid": RECIPE["compare"]["grid"]}
    plan = LadderPlan(recipe_from_dict({**RECIPE, "compare": compare}))
    pre, gated = plan.arms
    for i in (0, 3):
        for arm, job in zip((pre, gated), (plan.plan.job(e, 3e-3, 0) for e in plan.arms_at[i]), strict=True):
            model = SpanNormForCausalLM(config_without_tokens(job.recipe))
            matrices = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
            assert plan.parameters(arm, i) == matrices
    assert plan.parameters(pre, 3) == plan.rungs[3].parameters < plan.parameters(gated, 3)
    computes = {p["compute"] for p in outcome(plan, finished(plan, best={"pre": 6e-3, "gated": 6e-3}), None)["points"]}
    assert {6.0 * plan.parameters(arm, i) * plan.rungs[i].tokens for arm in plan.arms for i in range(4)} <= computes


def test_rates_are_found_on_the_smallest_sizes_and_carried_up_as_one_over_width():
    plan = LadderPlan(recipe())
    first = plan.steps({})
    assert {(s.rung.name, s.stage) for s in first} == {(r.name, "rate") for r in plan.rungs[:2]}
    results = finished(plan)
    done = {name: r["val_loss"] for name, r in results.items()}
    for i, rung in enumerate(plan.rungs[2:], 2):
        assert plan.carried(6e-3, i) == pytest.approx(6e-3 * WIDTH / rung.width, rel=1e-3)
    seeds = [{s.job.recipe.train.seed for s in plan.steps(done) if s.rung is rung} for rung in plan.rungs]
    assert seeds == [{0}, {0}, {0}, {0, 1, 2, 3} - {0}, {1, 2, 3}, {0}, {0}]
    checks = outcome(plan, results, None)["checks"]
    assert all(check["best"] == check["carried"] for check in checks) and len(checks) == 2
    moved = finished(plan, best={"pre": 6e-3, "span": 1.2e-2})
    rates = outcome(plan, moved, None)["rates"]
    assert rates["span 1/sqrt(L)"][plan.rungs[1].name] == 1.2e-2 and rates["pre 1/sqrt(2L)"][plan.rungs[1].name] == 6e-3


def test_the_largest_size_waits_for_its_prediction_which_nothing_changes_afterwards(tmp_path: Path):
    plan = LadderPlan(recipe())
    small = finished(plan, sealed=False)
    last = plan.rungs[4].name
    planner = sealed(plan, tmp_path)
    for name, result in small.items():
        (tmp_path / "jobs" / name).mkdir(parents=True)
        (tmp_path / "jobs" / name / "result.json").write_text(json.dumps(result))
    done = {name: r["val_loss"] for name, r in small.items()}
    missing = dict(list(done.items())[:-1])
    assert not any(job.condition["rung"] == last for job in planner(missing)) and not (tmp_path / PREDICTION).exists()
    assert any(job.condition["rung"] == last for job in planner(done))
    said = (tmp_path / PREDICTION).read_text()
    for arm, prediction in json.loads(said)["losses"].items():
        assert prediction["loss"] == pytest.approx(law(arm, plan.rungs[4].compute), rel=1e-3)
    (tmp_path / "jobs" / name / "result.json").write_text(json.dumps({**result, "test_loss": 9.0}))
    planner(done)
    assert (tmp_path / PREDICTION).read_text() == said


def test_multipliers_are_those_of_the_laws():
    plan = LadderPlan(recipe())
    found = outcome(plan, finished(plan), {"rung": "", "losses": {}})
    assert found["fit"]["irreducible"] == pytest.approx(IRREDUCIBLE, rel=0.02)
    (pair,) = found["pairs"]
    for row in pair["multipliers"]:
        assert row["multiplier"] == pytest.approx(saved(row["compute"]), rel=0.03)
        assert row["low"] <= row["multiplier"] * 1.001 and row["multiplier"] <= row["high"] * 1.001
    assert [row["extrapolated"] for row in pair["multipliers"]] == [False] * 5 + [True] * 2
    assert pair["trend"]["low"] > 0 and "saves compute" in found["words"][0] and "grows" in found["words"][0]


def test_a_multiplier_and_its_interval_come_of_the_same_fits():
    # A third arm of another law moves the shared E, and with it every curve: the intervals must move too.
    arms = [*RECIPE["compare"]["arms"], {"model.placement": "keel"}]
    plan = LadderPlan(recipe_from_dict({**RECIPE, "compare": {**RECIPE["compare"], "arms": arms}}))
    results = finished(plan, best={**BEST, "keel": 6e-3})
    for step in plan.steps({name: r["val_loss"] for name, r in results.items()}):
        if step.job.arm.startswith("keel"):
            results[step.job.name]["test_loss"] = 1.2 + 0.5 * (step.rung.compute / 1e12) ** -0.3
    (pair,) = outcome(plan, results, None)["pairs"]
    for row in pair["multipliers"]:
        assert row["low"] <= row["multiplier"] <= row["high"]


def test_a_ladder_under_way_says_what_it_has_and_calls_the_rest_extrapolation():
    plan = LadderPlan(recipe())
    every = finished(plan)
    found = outcome(plan, finished(plan, sealed=False), {"rung": "", "losses": {}})
    begun = outcome(plan, dict(list(every.items())[:-1]), {"rung": "", "losses": {}})
    assert begun["pairs"] == found["pairs"] and len(begun["points"]) > len(found["points"])
    (pair,) = found["pairs"]
    assert [row["extrapolated"] for row in pair["multipliers"]] == [False] * 4 + [True] * 3
    assert all(row["multiplier"] == pytest.approx(saved(row["compute"]), rel=0.05) for row in pair["multipliers"])
    assert f"at {plan.rungs[3].compute:.2g} operations" in found["words"][0]


def test_a_ladder_that_was_stopped_early_has_no_curve_yet():
    plan = LadderPlan(recipe())
    every = finished(plan)
    for count in (0, 1, 5):
        found = outcome(plan, dict(list(every.items())[:count]), None)
        assert found["fit"] is None and found["pairs"] == found["words"] == []


def test_the_interval_holds_the_truth_as_often_as_it_says():
    # 40 ladders with noise of 0.2 % a run: a 95 % interval may miss a few, and must not miss many
    import numpy as np

    generator, inside = np.random.default_rng(0), 0
    computes = [1e12 * 4.0**i for i in range(5)]
    truth = math.log(saved(computes[2]))
    for _ in range(40):
        points = [
            Point(arm, i, seed, 1.0, c / 6, law(arm, c) * math.exp(0.002 * generator.normal()))
            for i, c in enumerate(computes) for seed in range(3) for arm in ("pre", "span")
        ]  # fmt: skip
        curve_at = fit(points).loss("pre", computes[2])
        low, high = bootstrap(points, lambda f, at=curve_at: [math.log(f.multiplier("span", "pre", at))], draws=60)
        inside += low[0] <= truth <= high[0]
    assert inside >= 32


def test_an_arm_that_fails_everywhere_ends_there():
    plan = LadderPlan(recipe())
    results: dict[str, dict] = {}
    while True:
        done = {name: result["val_loss"] for name, result in results.items()}
        new = [step for step in plan.steps(done) if step.job.name not in results]
        if not new:
            break
        for step in new:
            fails = step.job.arm.startswith("span")
            results[step.job.name] = {"status": "failed", "val_loss": None, "test_loss": None} if fails else run(step)
    found = outcome(plan, results, None)
    assert list(found["fit"]["arms"]) == ["pre 1/sqrt(2L)"] and found["pairs"] == []
    assert "span 1/sqrt(L) failed at every learning rate of the smallest sizes: it has no curve" in found["words"]


def test_the_forecast_is_json_too_and_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "ladder.yaml").write_text(yaml.safe_dump(RECIPE))
    options = ["--out", str(tmp_path / "out"), "--plan", "--json", str(tmp_path / "plan.json")]
    ran = CliRunner().invoke(app, ["ladder", str(tmp_path / "ladder.yaml"), *options])
    assert ran.exit_code == 0, ran.output
    planned = json.loads((tmp_path / "plan.json").read_text())
    assert [rung["name"] for rung in planned["rungs"]] == [rung.name for rung in rungs(recipe())]
    assert planned["runs"] == sum(rung["runs"] for rung in planned["rungs"]) and planned["lines"][0] in ran.output
    assert planned["hours"] == pytest.approx(sum(rung["hours"] for rung in planned["rungs"]))
    assert not (tmp_path / "out").exists()
