"""Which runs a ladder consists of, as far as can be known from the finished ones.

    1. rate      the smallest sizes try every learning rate, the grid growing beyond its edges for every arm alike
    2. check     at the next size each arm's best rate, carried up as 1 ∕ width, beside half and twice of it
    3. rung      every size but the last at its rate, and the side ladders of tokens and depth
    4. held out  the last size, once `prediction.json` holds what is predicted of it

The same plan comes of the same finished runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from spannorm.errors import InputError
from spannorm.lab.jobs.cost import config_without_tokens
from spannorm.lab.jobs.plan import RATE, SEED, ArmInCondition, Done, Job, Plan
from spannorm.lab.ladder.sizes import Rung, rungs
from spannorm.train.needs import Needs
from spannorm.train.recipe import Recipe

RATE_STAGE, CHECK, RUNG, HELD_OUT = "rate", "check", "rung", "held out"
_APART = (0.5, 2.0)
"""What a carried rate is checked against."""


@dataclass(frozen=True)
class Step:
    """A job and what it is for."""

    job: Job
    rung: Rung
    stage: str


class LadderPlan:
    """The runs of a ladder.

    Raises:
        InputError: as `rungs` and `Plan`; fewer than three learning rates; no arms.
    """

    def __init__(self, recipe: Recipe, here: bool = True) -> None:
        self.recipe, self.rungs = recipe, rungs(recipe)
        grid = dict(recipe.compare.grid)
        if set(grid) - {RATE}:
            raise InputError(
                f"a ladder's compare.grid holds {RATE} alone; got {', '.join(sorted(set(grid) - {RATE}))}: give other "
                "keys to the arms."
            )
        if len(set(grid.get(RATE, ()))) < 3:
            raise InputError(f"a ladder needs three learning rates or more under compare.grid, {RATE}.")
        if any(key in arm for arm in recipe.compare.arms for key in (RATE, SEED)):
            raise InputError(f"a ladder chooses each arm's {RATE} and {SEED}: take them out of compare.arms.")
        grid["rung"] = tuple(rung.overrides for rung in self.rungs)
        self.plan = Plan(replace(recipe, compare=replace(recipe.compare, grid=grid)), here)
        self.arms_at: list[list[ArmInCondition]] = list(self.plan.conditions.values())
        """By rung, in the order of the arms."""
        self.seeds = recipe.compare.protocol.seeds or (recipe.train.seed,)
        self._parameters: dict[tuple[str, int], int] = {}

    @property
    def arms(self) -> list[str]:
        """Full names, in the order of the recipe."""
        return [self.plan.job(e, self.plan.rates[0], self.plan.seeds[0]).arm for e in self.arms_at[0]]

    @property
    def largest(self) -> Needs | None:
        """What the largest run that was planned will need."""
        return self.plan.largest

    @property
    def sizes(self) -> int:
        """How many of the rungs are sizes; they come first."""
        return len(self.recipe.ladder.sizes)

    def jobs(self, done: Done, sealed: bool = True) -> list[Job]:
        """What can be run, in its order. Without `sealed` the largest size waits for its prediction."""
        steps = self.steps(done, sealed)
        return [replace(step.job, condition={"rung": step.rung.name}, stage=step.stage) for step in steps]

    def steps(self, done: Done, sealed: bool = True) -> list[Step]:
        """As `jobs`, each with its rung and stage."""
        steps: dict[str, Step] = {}

        def add(i: int, arm: ArmInCondition, rate: float, seed: int, stage: str) -> None:
            job = self.plan.job(arm, rate, seed)
            steps.setdefault(job.name, Step(job, self.rungs[i], stage))

        last, ladder, seed = self.sizes - 1, self.recipe.ladder, self.recipe.train.seed
        for i in range(ladder.rate_sizes):
            rates, _ = self.plan.grid_of(self.arms_at[i], done)
            for each in self.arms_at[i]:
                for rate in rates:
                    add(i, each, rate, seed, RATE_STAGE)
        if not self.settled(done):
            return list(steps.values())
        for arm in range(len(self.arms_at[0])):
            best = self.best(arm, ladder.rate_sizes - 1, done)
            if best is None:
                continue  # it failed at every rate
            i = ladder.rate_sizes
            for factor in (1.0, *_APART):
                rate = self.carried(best, i)
                add(i, self.arms_at[i][arm], _rounded(rate * factor), seed, CHECK)
            for i in [i for i in range(len(self.rungs)) if i != last]:
                own = self.best(arm, i, done) if i < ladder.rate_sizes else self.carried(best, i)
                if own is not None:
                    for fresh in self.seeds_of(i):
                        add(i, self.arms_at[i][arm], own, fresh, RUNG)
        if sealed and all(name in done for name in steps):
            for arm in range(len(self.arms_at[0])):
                if (best := self.best(arm, ladder.rate_sizes - 1, done)) is not None:
                    for fresh in self.seeds_of(last):
                        add(last, self.arms_at[last][arm], self.carried(best, last), fresh, HELD_OUT)
        return list(steps.values())

    def parameters(self, arm: str, i: int) -> int:
        """N of an arm on a rung: the sublayers' matrices, and those that the placement owns."""
        if (arm, i) not in self._parameters:
            index = self.arms.index(arm)
            config = config_without_tokens(self.plan.job(self.arms_at[i][index], self.plan.rates[0], 0).recipe)
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                blocks = config.stack.blocks(config.hidden_size)
            matrices = [matrix for block in blocks for matrix in block.projections().values()]
            self._parameters[arm, i] = self.rungs[i].parameters + sum(m.fan_out * m.fan_in for m in matrices)
        return self._parameters[arm, i]

    def seeds_of(self, i: int) -> Sequence[int]:
        seeded = self.sizes - self.recipe.ladder.seeded_sizes <= i < self.sizes
        return self.seeds if seeded else (self.recipe.train.seed,)

    def settled(self, done: Done) -> bool:
        """Whether every learning rate of the smallest sizes has been tried, so that each arm's best is known."""
        return all(self.plan.grid_of(arms, done)[1] for arms in self.arms_at[: self.recipe.ladder.rate_sizes])

    def best(self, arm: int, i: int, done: Done) -> float | None:
        """An arm's best rate at one of the smallest sizes, once they are settled; None where every rate failed."""
        rates, _ = self.plan.grid_of(self.arms_at[i], done)
        return self.plan.best_rate(self.arms_at[i][arm], rates, done)

    def carried(self, best: float, i: int) -> float:
        """The best rate of the last of the smallest sizes, times its width over this one's."""
        return _rounded(best * self.rungs[self.recipe.ladder.rate_sizes - 1].width / self.rungs[i].width)


def _rounded(rate: float) -> float:
    return float(f"{rate:.4g}")
