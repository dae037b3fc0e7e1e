"""Which runs a comparison consists of: arms × conditions × learning rates × seeds, as far as can be known so far.

Arms are compared with each other; the grid repeats the comparison under other conditions. Under a protocol the later
runs depend on the results of the earlier ones, and on nothing else, so that a plan made again is the same plan.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spannorm.errors import InputError, shown, unknown
from spannorm.lab.results.summary import arms_named
from spannorm.models import SpanNormConfig
from spannorm.train.needs import Needs, check_fits, needs
from spannorm.train.recipe import Recipe, recipe_from_dict, set_key
from spannorm.train.run import model_config, run_recipe

RATE, SEED = "train.learning_rate", "train.seed"
MOST_RUNS = 100_000
_LONGEST_FOLDER = 120
_OF_A_RUN = {"seed", "learning_rate"}
"""What does not change how large a model is."""
IDENTITY = ("model.placement", "model.depth_rule")
"""Keys that make another arm, even in the grid; the grid's other keys make another condition."""

Done = Mapping[str, float | None]
"""Final validation loss by the name of a finished job; None where it failed."""


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    name: str
    """Its folder: readable, and fixed by what the run depends on."""
    overrides: Mapping[str, Any]
    """How it differs from the recipe, by dotted key."""
    recipe: Recipe
    arm: str
    """Placement, depth rule, and what else the arm overrides."""
    condition: Mapping[str, Any]
    """The grid's values other than the arm's, the learning rate and the seed."""
    tables: tuple[str, ...]
    """The tables it stands in."""
    stage: str = ""
    """Of a protocol: `choice` or `confirmation`."""


@dataclass(frozen=True)
class ArmInCondition:
    """An arm under one condition, in one table."""

    table: str
    overrides: Mapping[str, Any]
    """The arm's own, by dotted key."""
    condition: Mapping[str, Any]


class Plan:
    """The runs of a recipe's comparison.

    Args:
        here: whether they are to run on this machine, and must fit.

    Raises:
        InputError: no arms, the same run twice, an arm that no model can be built from, or a protocol that cannot be
            followed.
    """

    def __init__(self, recipe: Recipe, here: bool = True) -> None:
        self.recipe, self.protocol, self._here = recipe, recipe.compare.protocol, here
        self._raw = json.dumps(run_recipe(recipe))
        self._made: dict[str, Job] = {}
        self._resolved: dict[str, tuple[SpanNormConfig, str]] = {}
        self._runs: dict[str, Job] = {}
        self.largest: Needs | None = None
        """What the largest run will need."""
        grid = {key: values for key, values in recipe.compare.grid.items() if key not in (RATE, SEED)}
        self.rates = recipe.compare.grid.get(RATE, (recipe.train.learning_rate,))
        self.seeds = recipe.compare.grid.get(SEED, (recipe.train.seed,))
        _check_keys(recipe)
        self.conditions: dict[tuple[str, str], list[ArmInCondition]] = {}
        for given in recipe.compare.arms:
            for values in itertools.product(*grid.values()):
                own: dict[str, Any] = dict(given)
                condition: dict[str, Any] = {}
                table = str(own.pop("table", ""))
                for key, value in zip(grid, values, strict=True):
                    overrides = value if isinstance(value, Mapping) else {key: value}
                    (own if key in IDENTITY else condition).update(overrides)
                self.conditions.setdefault((table, json.dumps(condition)), []).append(
                    ArmInCondition(table, own, condition)
                )
        first: dict[tuple[str, str], ArmInCondition] = {}
        for arm, rate, seed in itertools.product(self._arms(), self.rates, self.seeds):
            job = self.job(arm, rate, seed)
            if (arm.table, job.name) in first:
                this, twin = ({**e.overrides, **e.condition} for e in (arm, first[arm.table, job.name]))
                raise InputError(
                    f"compare lists the same run twice: {shown(this)} and {shown(twin)} are both {job.arm}, learning "
                    f"rate {rate:g}, seed {seed}. Take one out: a run counts once."
                )
            first[arm.table, job.name] = arm
        self.pairs = self._checked_pairs()
        if self.protocol.seeds:
            self._check_protocol()

    def jobs(self, done: Done) -> list[Job]:
        """Every run that can be known from the finished ones, in the order in which to run them."""
        jobs: dict[str, Job] = {}

        def add(arm: ArmInCondition, rate: float, seed: int, stage: str) -> None:
            job = self.job(arm, rate, seed)
            tables = jobs[job.name].tables if job.name in jobs else ()
            jobs[job.name] = replace(job, tables=tuple(dict.fromkeys([*tables, arm.table])), stage=stage)

        if not self.protocol.seeds:
            for arm, rate, seed in itertools.product(self._arms(), self.rates, self.seeds):
                add(arm, rate, seed, "")
            return list(jobs.values())
        confirmed = []
        for arms in self.conditions.values():
            rates, settled = self.grid_of(arms, done)
            for arm, rate in itertools.product(arms, rates):
                add(arm, rate, self.seeds[0], "choice")
            if settled:
                best = [(arm, self.best_rate(arm, rates, done)) for arm in arms]
                confirmed += [(arm, rate) for arm, rate in best if rate is not None]
        for arm, rate in confirmed:
            for seed in self.protocol.seeds:
                add(arm, rate, seed, "confirmation")
        return list(jobs.values())

    def _arms(self) -> list[ArmInCondition]:
        return [arm for arms in self.conditions.values() for arm in arms]

    def grid_of(self, arms: Sequence[ArmInCondition], done: Done) -> tuple[list[float], bool]:
        """The grid of one condition, and whether it is settled.

        It grows by one rate beyond an edge, for every arm alike, as long as some arm has its best there; an arm that
        failed throughout looks for a lower one.
        """
        rates = sorted(self.rates)
        below, above = rates[0] / rates[1], rates[-1] / rates[-2]
        left = {0: self.protocol.extensions, -1: self.protocol.extensions}
        while all(self.job(e, rate, self.seeds[0]).name in done for e in arms for rate in rates):
            best = [self.best_rate(arm, rates, done) for arm in arms]
            edges = [0] * any(b in (None, rates[0]) for b in best) + [-1] * any(b == rates[-1] for b in best)
            edges = [edge for edge in edges if left[edge]]
            if not edges:
                return rates, True
            more = [float(f"{rates[edge] * (above if edge else below):.4g}") for edge in edges]
            rates = sorted([*rates, *more])
            for edge in edges:
                left[edge] -= 1
        return rates, False

    def best_rate(self, arm: ArmInCondition, rates: Sequence[float], done: Done) -> float | None:
        """The learning rate of the lowest loss; None where every one failed."""
        losses = {rate: done[self.job(arm, rate, self.seeds[0]).name] for rate in rates}
        finite = {rate: loss for rate, loss in losses.items() if loss is not None}
        return min(finite, key=lambda rate: finite[rate]) if finite else None

    def job(self, arm: ArmInCondition, rate: float, seed: int) -> Job:
        """The run of an arm under its condition, at one learning rate and seed."""
        overrides = {**arm.overrides, **arm.condition}
        overrides |= {key: v for key, v in ((RATE, rate), (SEED, seed)) if v != self._own(key) or self._in_grid(key)}
        key = json.dumps(overrides)
        if key not in self._made:
            raw = json.loads(self._raw)
            for name, value in overrides.items():
                set_key(raw, name, value)
            recipe = recipe_from_dict(raw)
            config, resolved = self._resolve(recipe)
            placement, rule = config.placement, str(config.depth_rule)
            t, resolved_run = recipe.train, run_recipe(recipe)
            text = json.dumps(resolved_run, sort_keys=True)
            resolved_run["model"] = [resolved, recipe.model.get("init_seed", t.seed)]
            digest = hashlib.sha256(text.encode()).hexdigest()[:8]
            words = f"{placement}-{rule}-lr{t.learning_rate:g}-seed{t.seed}"
            folder = re.sub(r"[^\w.+-]+", "_", words.replace("/", "-"))[:_LONGEST_FOLDER] + f"-{digest}"
            extras = [f"{self._short(k)}={v}" for k, v in arm.overrides.items() if k not in (*IDENTITY, RATE, SEED)]
            name = " ".join([placement, rule, *extras])
            job = Job(folder, overrides, recipe, name, arm.condition, (arm.table,))
            # one run, however its arm is spelled: a placement's own depth rule may be said or not
            self._made[key] = self._runs.setdefault(json.dumps(resolved_run, sort_keys=True), job)
        return self._made[key]

    def _resolve(self, recipe: Recipe) -> tuple[SpanNormConfig, str]:
        """A recipe's model configuration, and all of it but the seed of its weights as text."""
        run = run_recipe(recipe)
        key = json.dumps([run["model"], run["data"], {k: v for k, v in run["train"].items() if k not in _OF_A_RUN}])
        if key not in self._resolved:
            config = model_config(recipe)
            needed = check_fits(recipe, config) if self._here else needs(recipe, config)
            self.largest = max(self.largest or needed, needed, key=lambda n: n.memory)
            rest = {k: v for k, v in config.to_dict().items() if k != "init_seed"}
            self._resolved[key] = config, json.dumps(rest, sort_keys=True, default=str)
        return self._resolved[key]

    def _short(self, key: str) -> str:
        """The last part of an arm's key, or the key itself where two share it."""
        last = key.rpartition(".")[2]
        keys = {k for arm in self.recipe.compare.arms for k in arm if k.rpartition(".")[2] == last}
        return key if len(keys) > 1 else last

    def _own(self, key: str) -> Any:
        return getattr(self.recipe.train, key.rpartition(".")[2])

    def _in_grid(self, key: str) -> bool:
        return key in self.recipe.compare.grid

    def _checked_pairs(self) -> list[tuple[str, str, str]]:
        """Each pair in each table that has both: table and full names."""
        pairs = []
        for pair in self.protocol.pairs:
            if len(pair) != 2:
                raise InputError(f"compare.protocol.pairs takes two arms each; got {list(pair)}.")
            in_tables = []
            for table in dict.fromkeys(arm.table for arm in self._arms()):
                arms = dict.fromkeys(
                    self.job(e, self.rates[0], self.seeds[0]).arm for e in self._arms() if e.table == table
                )
                first, second = (arms_named(name, arms) for name in pair)
                if len(first) > 1 or len(second) > 1 or (first and first == second):
                    raise InputError(
                        f"compare.protocol.pairs must name two different arms each, and no more: {list(pair)} can be "
                        f"{', '.join([*first, *second])}."
                    )
                if first and second:
                    self._check_same_text(table, first[0], second[0])
                    in_tables.append((table, first[0], second[0]))
            if not in_tables:
                every = dict.fromkeys(self.job(e, self.rates[0], self.seeds[0]).arm for e in self._arms())
                wrong = next((name for name in pair if not arms_named(name, every)), pair[0])
                raise unknown("arm in compare.protocol.pairs", wrong, every)
            pairs += in_tables
        return pairs

    def _check_same_text(self, table: str, *pair: str) -> None:
        """Refuse two arms on other tokens: a loss is in nats per token, and their tokens are not alike."""
        for (of, _), arms in self.conditions.items():
            jobs = [self.job(e, self.rates[0], self.seeds[0]) for e in arms if of == table]
            text = {job.recipe.data for job in jobs if job.arm in pair}
            if len(text) > 1:
                raise InputError(
                    f"compare.protocol.pairs compares losses per token, and {' and '.join(pair)} have other `data`: "
                    "compare arms on the same tokens, or read bits per byte from the table and name no pair."
                )

    def _check_protocol(self) -> None:
        seeds, own = self.protocol.seeds, self.recipe.train.seed
        grid = self.recipe.compare.grid
        by_name = [value for values in grid.values() for value in values if isinstance(value, Mapping)]
        if self._in_grid(SEED) or any(SEED in given for given in (*self.recipe.compare.arms, *by_name)):
            raise InputError(
                f"under compare.protocol the seeds are train.seed ({own}) for the choice and compare.protocol.seeds "
                "for the confirmation: take train.seed out of compare.grid and compare.arms."
            )
        if own in seeds or len(set(seeds)) < len(seeds):
            raise InputError(
                f"compare.protocol.seeds must be fresh: different from each other and from train.seed ({own}), on "
                f"which the learning rate is chosen; got {list(seeds)}."
            )
        if len(set(self.rates)) < 3:
            raise InputError(
                "compare.protocol chooses a learning rate among three or more, so that there is a middle and two "
                f"edges; compare.grid has {list(self.rates)} under {RATE}."
            )


def _check_keys(recipe: Recipe) -> None:
    """Refuse a comparison that lists nothing or too much, or sets one key in two places."""
    arms, grid = recipe.compare.arms, recipe.compare.grid
    if not arms:
        raise InputError("compare.arms lists no arm: give one mapping per arm, such as {model.placement: span}.")
    for name, values in grid.items():
        if not values:
            raise InputError(f"compare.grid.{name} lists no value: give one or more, or take it out.")
    if (count := len(arms) * math.prod(map(len, grid.values()))) > MOST_RUNS:
        raise InputError(f"compare asks for {count:,} runs (arms x grid), and can hold {MOST_RUNS:,}.")
    by_name: dict[str, set[str]] = {}
    for name, values in grid.items():
        by_name[name] = {key for value in values for key in (value if isinstance(value, Mapping) else [name])}
    for index, arm in enumerate(arms):
        sections = {f"compare.arms[{index}]": set(arm) - {"table"}}
        sections |= {f"compare.grid.{name}": keys for name, keys in by_name.items()}
        for where, keys in sections.items():
            for key in keys:
                if key.partition(".")[0] not in ("model", "data", "train") or not key.partition(".")[2]:
                    raise InputError(
                        f"{where} sets {shown(key)}: it takes dotted keys of model, data and train, such as "
                        "model.placement."
                    )
        for (one, keys), (other, others) in itertools.combinations(sections.items(), 2):
            for key, twin in itertools.product(sorted(keys), sorted(others)):
                if f"{key}.".startswith(f"{twin}.") or twin.startswith(f"{key}."):
                    raise InputError(
                        f"{one} sets {key} and {other} sets {twin}, which would silently win: take it out of one."
                    )
