"""What a comparison comes to, from rows whose losses are made up: choices, pairs, words, and the report of them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lab_files import arm, comparison, played
from scipy import stats

from spannorm.lab.jobs.plan import Job
from spannorm.lab.report.arms import choose, read_arms
from spannorm.lab.report.figures.conditions import draw_tolerances
from spannorm.lab.report.figures.training import draw_ramps
from spannorm.lab.report.looks import looks
from spannorm.lab.report.page import draw_report
from spannorm.lab.results.files import read_results
from spannorm.lab.results.groups import by_arm
from spannorm.lab.results.summary import ConditionSummary, summaries_of, summarize_conditions, summary_lines
from spannorm.lab.results.tolerance import tolerance_lines, tolerances
from spannorm.train.recipe import Recipe, recipe_from_dict

RATES = [1e-3, 3e-3, 9e-3]
LUCK = {0: 0.0, 1: 0.3, 2: -0.2, 3: 0.1, 4: -0.4, 5: 0.25}
"""What a seed does to every arm alike: far more than the arms differ by."""
RIPPLE = {0: 0.0, 1: 0.001, 2: -0.001, 3: 0.0, 4: 0.002, 5: -0.002}
"""What it does to SpanNorm besides."""


def recipe(depths: tuple[int, ...] = (4,), seeds: tuple[int, ...] = (1, 2, 3, 4, 5)) -> Recipe:
    arms = [{"model.placement": p, "model.depth_rule": "none"} for p in ("pre", "span", "post")]
    grid = {"train.learning_rate": RATES, "model.num_hidden_layers": list(depths)}
    protocol = {"seeds": list(seeds), "pairs": [["span", "pre"], ["post", "pre"]], "extensions": 0}
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    return recipe_from_dict(
        {"name": "made up", "model": sizes, "compare": {"arms": arms, "grid": grid, "protocol": protocol}}
    )


def losses(span: float = -0.02, noise: float = 1.0) -> Callable[[Job], float | None]:
    """PreNorm's best is 2.0 at 3e-3; SpanNorm's is `span` lower at 9e-3, the grid's edge; PostNorm always fails."""

    def loss(job: Job) -> float | None:
        rate, seed, placement = job.recipe.train.learning_rate, job.recipe.train.seed, job.arm.split()[0]
        if placement == "post":
            return None
        if placement == "pre":
            return 2.0 + LUCK[seed] + 0.1 * abs(RATES.index(rate) - 1)
        return 2.0 + span + LUCK[seed] + noise * RIPPLE[seed] + 0.1 * (2 - RATES.index(rate))

    return loss


def conditions(
    depths: tuple[int, ...] = (4,), seeds: tuple[int, ...] = (1, 2, 3, 4, 5), **given: float
) -> list[ConditionSummary]:
    made = recipe(depths, seeds)
    return summarize_conditions(played(made, losses(**given)), made.compare.protocol.pairs)


def test_each_arm_stands_at_its_own_best_rate_with_its_fresh_seeds() -> None:
    (condition,) = conditions()
    pre, span, post = condition.standings
    assert (pre.learning_rate, pre.edge, pre.seeds, pre.trials) == (3e-3, False, 5, 3)
    assert (span.learning_rate, span.edge) == (9e-3, True)
    assert (post.learning_rate, post.edge, post.seeds, post.failed_rates) == (None, False, 0, RATES)
    fresh = [2.0 + LUCK[seed] for seed in (1, 2, 3, 4, 5)]
    assert pre.val_loss is not None and pre.val_loss.mean == pytest.approx(sum(fresh) / 5)
    assert pre.test_loss is not None and pre.test_loss.mean == pytest.approx(pre.val_loss.mean + 0.05)
    assert pre.sensitivity == pytest.approx(0.2 / 3), "0.1, 0 and 0.1 above its best"


def test_a_pair_is_compared_seed_by_seed_on_the_test_split() -> None:
    (condition,) = conditions()
    pair = condition.pairs[0]
    assert pair.difference is not None
    assert pair.difference.mean == pytest.approx(-0.02) and pair.difference.margin == pytest.approx(
        2.776 * 1.5811e-3 / 5**0.5, rel=1e-3
    )
    assert pair.words.startswith("span none ends below pre none") and "look" not in pair.words


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"span": -0.001}, "no difference shown"),
        ({"span": 0.02}, "pre none ends below span none"),
        ({"seeds": (1, 2, 3)}, "a look, not a claim"),
        ({"seeds": (1,)}, "one seed in common, no interval, nothing shown"),
    ],
)
def test_the_words_follow_the_numbers(given: dict[str, Any], says: str) -> None:
    assert says in conditions(**given)[0].pairs[0].words


def test_pairs_are_corrected_for_the_number_of_those_that_are_judged() -> None:
    found = [pair for condition in conditions((2, 3, 4), span=-0.0025) for pair in condition.pairs]
    judged = [pair for pair in found if pair.p is not None]
    assert len(judged) == 3 and len(found) == 6, "PostNorm failed: nothing is judged there"
    differences = [-0.0025 + RIPPLE[seed] for seed in (1, 2, 3, 4, 5)]
    assert judged[0].p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    assert [pair.p_holm for pair in judged] == pytest.approx([3 * p for pair in judged if (p := pair.p)])
    assert 0.01 < (judged[0].p or 0) < 0.05 < (judged[0].p_holm or 0)
    assert "span none ends below pre none at 95%, but not after Holm over 3 pairs" in judged[0].words
    lines = summary_lines(conditions((2, 3, 4), span=-0.0025))
    assert any(line.startswith("Of 3 pairs 3 differ at 95%") and "0 still do after Holm" in line for line in lines)
    one = next(pair for condition in conditions() for pair in condition.pairs)
    assert one.p is not None and one.p_holm is None and "Holm" not in one.words
    many = " ".join(summary_lines(conditions((2, 3, 4, 5, 6, 7), span=-0.0025)))
    assert "ends below it in 6 (2 blocks; 3 blocks;" in many and "7 blocks), after Holm in 0 of them" in many


def test_what_has_not_been_run_is_called_so() -> None:
    made = recipe((2, 3, 4, 5, 6, 7))
    chosen = [job for job in played(made, losses()) if job["stage"] == "choice"]
    lines = " ".join(summary_lines(summarize_conditions(chosen, made.compare.protocol.pairs)))
    assert "not compared yet in 6" in lines and "no difference shown" not in lines
    ladder = replace(made, ladder=replace(made.ladder, sizes=(1, 2, 3, 4)))
    assert summaries_of({"recipe": made.to_dict(), "jobs": chosen})
    assert not summaries_of({"recipe": ladder.to_dict(), "jobs": chosen}), "a ladder's seeds are for its curves"


def test_over_many_conditions_a_pair_with_failures_is_not_called_better() -> None:
    made = recipe((2, 3, 4, 5, 6, 7))

    def loss(job: Job) -> float | None:
        return None if job.arm.startswith("span") and job.recipe.train.seed == 5 else losses()(job)

    lines = " ".join(summary_lines(summarize_conditions(played(made, loss), made.compare.protocol.pairs)))
    assert "span none against pre none, of 6 conditions: cannot be compared for failures in 6" in lines
    assert "ends below" not in lines


def test_what_crashed_says_nothing_of_its_arm() -> None:
    made = recipe()
    rows = played(made, losses())
    for row in rows:
        if row["placement"] == "span" and (row["stage"] == "choice" or row["seed"] == 5):
            row.update(status="crashed", reason="crashed (exit code -9)", val_loss=None, test_loss=None)
    (condition,) = summarize_conditions(rows, made.compare.protocol.pairs)
    span = next(s for s in condition.standings if s.arm.startswith("span"))
    assert (span.learning_rate, span.failed_rates, span.failed, span.seeds) == (None, [], 0, 4)
    assert condition.pairs[0].difference is not None and condition.pairs[0].failures["span none"] == (0, 4)
    assert not any("Failed" in line and "span" in line for line in summary_lines([condition]))


def test_what_fails_at_every_rate_is_not_compared() -> None:
    (condition,) = conditions()
    assert condition.pairs[1].difference is None
    assert "post none failed at every learning rate" in condition.pairs[1].words


def test_the_verdict_has_ten_lines_at_most_and_says_what_a_reader_must_know() -> None:
    for depths in ((4,), (2, 3, 4, 5, 6, 7)):
        lines = summary_lines(conditions(depths))
        assert 0 < len(lines) <= 10
        text = " ".join(lines)
        assert "Failed at every learning rate: post none" in text
        assert "Best on the edge of the grid, so possibly better beyond: span none" in text
        assert ("by chance alone" in text) == (len(depths) > 1)
    assert "span none against pre none, of 6 conditions: ends below it in 6 (2 blocks; 3 blocks;" in text


def test_the_report_says_the_verdict_and_shows_fresh_seeds_apart_from_the_choice(tmp_path: Path) -> None:
    made = recipe((2, 4, 8))
    comparison(tmp_path, played(made, losses()))
    results = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps(results | {"recipe": made.to_dict()}))
    page = re.sub(r"<style>.*?</style>", "", draw_report(tmp_path).read_text(), flags=re.DOTALL)
    words = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    for line in summary_lines(summarize_conditions(results["jobs"], made.compare.protocol.pairs)):
        assert line in words
    assert "3 learning rates on one seed and the validation split" in words and "5 fresh seeds" in words
    assert all(f"{depth} blocks" in words for depth in (2, 4, 8))
    assert "The pairs named beforehand in numbers (3)" in words and "p after Holm over 3" in words
    assert "span none − pre none 8 blocks 5 -0.0200 -0.0220 to -0.0180" in words
    assert "2.0600" in words and "± 0.3735" in words, "PreNorm's mean test loss; 2.776·0.30083/√5"


def test_a_figures_csv_holds_what_it_draws(tmp_path: Path) -> None:
    made = recipe((2, 4))
    comparison(tmp_path, played(made, losses()))
    draw_report(tmp_path)
    with open(tmp_path / "figures" / "against_blocks.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["series"] == "span none"]
    rates = {float(row["x"]): float(row["y"]) for row in rows if row["panel"] == "best learning rate"}
    assert rates == {2.0: 9e-3, 4.0: 9e-3}
    ends = {float(row["x"]): float(row["y"]) for row in rows if row["panel"].startswith("loss")}
    assert ends == pytest.approx({x: 2.0 - 0.02 + 0.05 + 0.01 for x in (2.0, 4.0)}, abs=1e-4)
    assert {path.stem for path in tmp_path.glob("figures/*.csv")} == {p.stem for p in tmp_path.glob("figures/*.png")}


def ramp(arm: str, seed: int, rate: float | None, learned: bool = True) -> dict[str, Any]:
    rates = {"0.25": rate and rate / 2, "0.5": rate, "1": None}
    placement, rule = arm.split()
    given = {"placement": placement, "depth_rule": rule, "seed": seed, "condition": {"model.num_hidden_layers": 8}}
    return {"arm": arm, "tables": [""], "tolerated": {"learned": learned, "rates": rates}, **given}


def test_every_ramp_that_lost_all_ends_in_a_cross(tmp_path: Path) -> None:
    def row(placement: str, steps: int, lost: float | None) -> dict[str, Any]:
        rates = {"0.25": 1e-3, "0.5": 2e-3, "1": lost}
        return arm(placement, steps_done=steps, tolerated={"learned": True, "rates": rates})

    rows = [row("pre", 60, None), row("span", 60, 0.05), row("post", 40, 0.03)]
    drawn = read_results(comparison(tmp_path / "out", rows) / "results.json")["jobs"]
    by_key = by_arm(drawn)
    choices = {key: choose(rates) for key, rates in by_key.items()}
    (drawing,) = draw_ramps(read_arms(tmp_path / "out", choices, looks(by_key), []), 3.1)
    (ax,) = drawing.figure.axes
    colors = {line.get_color() for line in ax.lines if line.get_marker() == "X"}
    expected = {look.color for key, look in looks(by_key).items() if key[0] != "pre"}
    assert colors == expected and len(colors) == 2


def test_tolerances_are_geometric_means_over_the_seeds_that_learned() -> None:
    rows = [
        ramp("pre none", 0, 1e-3),
        ramp("pre none", 1, 4e-3),
        ramp("span none", 0, 1e-3),
        ramp("span none", 1, None),
    ]
    rows += [ramp("post none", seed, None, learned=False) for seed in (0, 1)]
    pre, span, post = tolerances(rows)
    assert pre.rate() == pytest.approx(2e-3) and pre.rate(0.25) == pytest.approx(1e-3) and pre.rate(1.0) is None
    assert span.rate() is None and "not reached with 1 of 2 seeds" in span.words
    assert post.words == "never learned" and post.unlearned == 2
    assert tolerance_lines([pre])[0] == "pre none: 2.00e-03 (1.00e-03–4.00e-03) at 8 blocks."


def test_an_arm_whose_rule_has_its_placements_name_is_drawn() -> None:
    found = tolerances([ramp(arm, 0, 1e-3) for arm in ("deepnorm deepnorm", "keel none")])
    look = looks([(t.placement, t.arm.split()[1]) for t in found])
    (drawing,) = draw_tolerances(found, look, 5e-2)
    curves = [line for line in drawing.figure.axes[0].lines if list(line.get_ydata()) == [1e-3]]
    assert len(curves) == 2, "one each"
