"""`spannorm max-lr`: how high a learning rate each arm takes, by ramps that run like any comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from spannorm.console import Grid, wide_console
from spannorm.errors import InputError
from spannorm.lab.jobs.plan import RATE
from spannorm.lab.results.files import JobResult
from spannorm.lab.results.tolerance import tolerances
from spannorm.train.ramp import PEAK, SHARE, SHARES
from spannorm.train.recipe import CompareRecipe, Recipe, recipe_from_dict

_OF_THE_RAMP = (RATE, "train.schedule")


def ramps(recipe: Recipe, peak: float = PEAK) -> Recipe:
    """The comparison that ramps every arm of a recipe under every condition of its grid.

    Learning rates and schedules are left out, wherever the recipe has them.

    A ramp takes `train.steps` steps from 0 to `peak` (published: 5,000 steps to 5e-2). Name is the recipe's, with
    `-max-lr`, so that both may lie in the same folder of runs.

    Raises:
        InputError: the recipe has a ladder.
    """
    if recipe.ladder.sizes:
        raise InputError("a ladder chooses its rates itself: give max-lr a recipe without ladder.sizes.")
    arms = tuple(_without_rates(arm) for arm in recipe.compare.arms or ({},))
    grid = {
        key: tuple(_without_rates(value) if isinstance(value, Mapping) else value for value in values)
        for key, values in recipe.compare.grid.items()
        if key not in _OF_THE_RAMP
    }
    ramped = replace(
        recipe,
        name=f"{recipe.name}-max-lr",
        train=replace(recipe.train, schedule="ramp", learning_rate=peak),
        compare=CompareRecipe(arms, grid),
    )
    return recipe_from_dict(ramped.to_dict())


def _without_rates(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in overrides.items() if key not in _OF_THE_RAMP}


def print_tolerances(jobs: Sequence[JobResult], console: Console | None = None) -> None:
    """Print each arm's rate by condition, and how it moves with the threshold."""
    grid = Grid("largest tolerable learning rate (when a share of what was learned is lost again)")
    for heading in ("condition", "arm"):
        grid.column(heading)
    for share in SHARES:
        grid.column(f"{share:.0%} lost", "spare")
    grid.column(f"{SHARE:.0%} lost, over seeds", "note")
    for t in tolerances(jobs):
        rates = [t.rate(share) for share in SHARES]
        grid.row(t.title, t.arm, *("–" if rate is None else f"{rate:.2e}" for rate in rates), t.words)
    console = console or wide_console()
    console.print(grid.fitted(console))
