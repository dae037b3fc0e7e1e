"""The protocol, played against made-up losses: equal trials, edges, fresh seeds, and the same plan every time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from spannorm.errors import InputError
from spannorm.lab.jobs.plan import Job, Plan
from spannorm.train.recipe import CompareRecipe, ProtocolRecipe, Recipe

ARMS = ({"model.placement": "pre"}, {"model.placement": "span"})
RATES = (1e-3, 2e-3, 4e-3)
Loss = Callable[[Job], float | None]


def with_protocol(recipe: Recipe, arms: tuple = ARMS, grid: dict[str, Any] | None = None, **given: Any) -> Recipe:
    protocol = ProtocolRecipe(**{"seeds": (1, 2, 3), **given})
    grid = {"train.learning_rate": RATES, **(grid or {})}
    return replace(recipe, compare=CompareRecipe(arms=arms, grid=grid, protocol=protocol))


def best_at(**rates: float) -> Loss:
    """A loss that is lowest at each placement's rate."""
    return lambda job: 2 + abs(math.log(job.recipe.train.learning_rate / rates[str(job.recipe.model["placement"])]))


def play(recipe: Recipe, loss: Loss) -> list[Job]:
    """Every job that comes up, in order, each finished before the next is asked for."""
    plan, done = Plan(recipe), {}
    order: list[Job] = []
    while fresh := [job for job in plan.jobs(done) if job.name not in done]:
        order.append(fresh[0])
        done[fresh[0].name] = loss(fresh[0])
    assert {job.name for job in plan.jobs(done)} == {job.name for job in order}, "what was run stays in the plan"
    assert [job.name for job in Plan(recipe).jobs(done)] == [job.name for job in plan.jobs(done)]
    return order


def rates(jobs: list[Job], placement: str, stage: str) -> list[float]:
    mine = [job for job in jobs if job.recipe.model["placement"] == placement and job.stage == stage]
    return sorted(job.recipe.train.learning_rate for job in mine)


def test_a_best_rate_inside_the_grid_is_confirmed_on_fresh_seeds(recipe: Recipe) -> None:
    jobs = play(with_protocol(recipe), best_at(pre=2e-3, span=2.2e-3))
    assert rates(jobs, "pre", "choice") == rates(jobs, "span", "choice") == list(RATES)
    assert rates(jobs, "pre", "confirmation") == rates(jobs, "span", "confirmation") == [2e-3] * 3
    choice = {job.recipe.train.seed for job in jobs if job.stage == "choice"}
    confirmed = {job.recipe.train.seed for job in jobs if job.stage == "confirmation"}
    assert choice == {0} and confirmed == {1, 2, 3}


def test_an_arm_at_the_edge_extends_the_grid_of_every_arm(recipe: Recipe) -> None:
    jobs = play(with_protocol(recipe, extensions=3), best_at(pre=2e-3, span=1.5e-2))
    assert rates(jobs, "pre", "choice") == rates(jobs, "span", "choice") == [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
    assert set(rates(jobs, "span", "confirmation")) == {1.6e-2}
    assert set(rates(jobs, "pre", "confirmation")) == {2e-3}, "each at its own best"


def test_the_grid_grows_no_further_than_is_written(recipe: Recipe) -> None:
    jobs = play(with_protocol(recipe, extensions=2), best_at(pre=1e-9, span=1e9))
    assert rates(jobs, "pre", "choice") == rates(jobs, "span", "choice") == [2.5e-4, 5e-4, *RATES, 8e-3, 1.6e-2]
    assert rates(play(with_protocol(recipe, extensions=0), best_at(pre=1e-9, span=1e9)), "pre", "choice") == [*RATES]


def test_an_arm_that_fails_everywhere_looks_lower_and_is_not_confirmed(recipe: Recipe) -> None:
    def loss(job: Job) -> float | None:
        return None if job.recipe.model["placement"] == "span" else best_at(pre=2e-3)(job)

    jobs = play(with_protocol(recipe, extensions=1), loss)
    assert rates(jobs, "pre", "choice") == rates(jobs, "span", "choice") == [5e-4, *RATES]
    assert rates(jobs, "span", "confirmation") == [] and len(rates(jobs, "pre", "confirmation")) == 3


def test_each_condition_has_its_own_grid_and_choice(recipe: Recipe) -> None:
    sizes = ({"model.num_hidden_layers": 2, "model.hidden_size": 32}, {"model.num_hidden_layers": 8})

    def loss(job: Job) -> float:
        return best_at(pre=2e-3, span=2e-3 if job.recipe.model["num_hidden_layers"] == 2 else 4e-3)(job)

    jobs = play(with_protocol(recipe, grid={"size": sizes}), loss)
    deep = [job for job in jobs if job.condition == sizes[1]]
    shallow = [job for job in jobs if job.condition == sizes[0]]
    assert len(deep) + len(shallow) == len(jobs)
    assert rates(deep, "pre", "choice") == [*RATES, 8e-3] and rates(shallow, "pre", "choice") == [*RATES]
    assert set(rates(deep, "span", "confirmation")) == {4e-3}
    assert all(job.recipe.model["hidden_size"] == 32 for job in shallow)


def test_a_depth_rule_in_the_grid_makes_arms_and_other_keys_make_conditions(recipe: Recipe) -> None:
    grid = {"model.depth_rule": ("none", "1/sqrt(L)"), "train.clip_norm": (0.0, 1.0)}
    jobs = Plan(replace(recipe, compare=CompareRecipe(arms=ARMS, grid=grid))).jobs({})
    assert {job.arm for job in jobs} == {"pre none", "pre 1/sqrt(L)", "span none", "span 1/sqrt(L)"}
    assert sorted(job.condition["train.clip_norm"] for job in jobs) == [0.0] * 4 + [1.0] * 4
    assert all(job.recipe.train.clip_norm == job.condition["train.clip_norm"] for job in jobs)


def test_a_pair_may_be_named_in_full_or_by_a_placement_that_one_arm_has(recipe: Recipe) -> None:
    plan = Plan(with_protocol(recipe, pairs=(("span 1/sqrt(L)", "pre"),)))
    assert plan.pairs == [("", "span 1/sqrt(L)", "pre 1/sqrt(2L)")]


TWICE = (*ARMS, {"model.placement": "span", "model.depth_rule": "none"})


OTHER_TEXT = (*ARMS, {"model.placement": "peri", "data.tokenizer": "bpe"})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"seeds": (0, 1)}, "must be fresh"),
        ({"seeds": (1, 1)}, "must be fresh"),
        ({"grid": {"train.seed": (0, 1)}}, "take train.seed out"),
        ({"grid": {"draw": ({"train.seed": 5}, {"train.seed": 6})}}, "take train.seed out"),
        ({"arms": (*ARMS, {"model.placement": "peri", "train.seed": 1})}, "take train.seed out"),
        ({"grid": {"train.learning_rate": (1e-3, 2e-3)}}, "three or more"),
        ({"pairs": (("span", "per"),)}, "Known: pre 1/sqrt(2L)"),
        ({"pairs": (("span", "span"),)}, "two different arms"),
        ({"pairs": (("span", "pre", "span"),)}, "two arms each"),
        ({"pairs": (("span", "pre"),), "arms": TWICE}, "span none"),
        ({"pairs": (("peri", "pre"),), "arms": OTHER_TEXT}, "have other `data`"),
    ],
)
def test_a_protocol_that_cannot_be_followed_is_refused(recipe: Recipe, given: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        Plan(with_protocol(recipe, **given))
    assert says in str(caught.value)


SIZE = {"size": ({"model.hidden_size": 16}, {"model.hidden_size": 32})}


@pytest.mark.parametrize(
    ("arms", "grid", "says"),
    [
        ((), {}, "lists no arm"),
        (ARMS, {"train.seed": ()}, "compare.grid.train.seed lists no value"),
        (ARMS, {"train.seed": tuple(range(1000)), "train.steps": tuple(range(1, 1001))}, "2,000,000 runs"),
        (({"model.placement": "span"}, {"model.placement": "span", "model.depth_rule": "1/sqrt(L)"}), {}, "twice"),
        (({"model.placement": "span"}, {"model.placement": "span", "model.qk_norm": False}), {}, "twice"),
        (ARMS, {"train.clip_norm": (1, 1.0)}, "twice"),
        (({"model.hidden_size": 16},), SIZE, "sets model.hidden_size and compare.grid.size sets model.hidden_size"),
        (({"train.learning_rate": 1e-3},), {"train.learning_rate": (1e-3, 2e-3)}, "silently win"),
        (({"train.seed": 1},), {"train.seed": (0, 1)}, "silently win"),
        (({"model.depth_rule": "none"},), {"model.depth_rule": ("none", "1/sqrt(L)")}, "silently win"),
        (ARMS, {**SIZE, "model.hidden_size": (8,)}, "silently win"),
        (
            ({"model.placement_options": {"initial_norm": "embedding"}},),
            {"model.placement_options.initial_norm": ("none", "attention")},
            "silently win",
        ),
        (({"train": {"steps": 3}},), {}, "dotted keys"),
        (({"compare.grid.train.seed": [1]},), {}, "dotted keys"),
        (({"name": "x"},), {}, "dotted keys"),
        (ARMS, {"size": (8, 16)}, "dotted keys"),
        (ARMS, {"train.learning_rate": (1e-3, "fast")}, "train.learning_rate must be a number"),
    ],
)
def test_a_comparison_that_would_fool_its_reader_is_refused(
    recipe: Recipe, arms: tuple, grid: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError) as caught:
        Plan(replace(recipe, compare=CompareRecipe(arms=arms, grid=grid)))
    assert says in str(caught.value)


def test_one_run_spelled_in_two_ways_in_two_tables_is_run_once(recipe: Recipe) -> None:
    arms = ({"model.placement": "span", "table": "a"}, {"model.depth_rule": "1/sqrt(L)", "table": "b"})
    jobs = Plan(replace(recipe, compare=CompareRecipe(arms=arms))).jobs({})
    assert [job.tables for job in jobs] == [("a", "b")]


def test_two_keys_that_end_alike_make_two_arms(recipe: Recipe) -> None:
    arms = ({"model.vocab_size": 300}, {"data.vocab_size": 300})
    jobs = Plan(replace(recipe, compare=CompareRecipe(arms=arms))).jobs({})
    assert len({job.arm for job in jobs}) == 2
