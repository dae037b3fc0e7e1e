"""What the arms answered on the tasks of `train.evaluate`, as a table of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from spannorm.evaluate.table import margin
from spannorm.lab.report.arms import Arm
from spannorm.lab.report.words import plural
from spannorm.lab.results.runs import Run
from spannorm.lab.results.statistics import estimate

_SHOWN = ("acc", "acc_norm", "bits_per_byte")
"""The metrics that are shown; of a task that has none of them, its first."""


@dataclass(frozen=True)
class Column:
    """One metric of one task."""

    task: str
    metric: str
    chance: float | None
    questions: int


@dataclass(frozen=True)
class Score:
    """An arm's result in one column."""

    mean: float
    margin: float | None
    """Half of the 95 % interval: over the seeds (Student), or over the questions where there is one seed."""
    over: str
    """What the interval is over."""
    chance: bool
    """Whether the score of a guesser lies in the interval."""


@dataclass(frozen=True)
class AnswersTable:
    """A table: arms down, tasks across."""

    columns: list[Column]
    rows: list[tuple[Arm, list[Score | None]]]
    same: bool
    """Whether all arms answered the same questions, as far as is known."""


def answers(arms: Sequence[Arm]) -> AnswersTable | None:
    """The table of the arms that were evaluated; None where none was."""
    evaluated = [arm for arm in arms if any(run.evaluation for run in arm.shown)]
    columns: dict[tuple[str, str], Column] = {}
    asked: dict[str, set[tuple[Any, Any]]] = {}
    for run in (run for arm in evaluated for run in arm.shown):
        for task, result in run.evaluation.items():
            asked.setdefault(task, set()).add((result["questions"], result.get("questions_sha256")))
            for metric in [m for m in result["metrics"] if m in _SHOWN] or list(result["metrics"])[:1]:
                guess = result.get("chance") if metric in ("acc", "acc_norm") else None
                columns.setdefault((task, metric), Column(task, metric, guess, result["questions"]))
    if not columns:
        return None
    rows = [(arm, [_score(arm.shown, column) for column in columns.values()]) for arm in evaluated]
    return AnswersTable(list(columns.values()), rows, all(len(questions) == 1 for questions in asked.values()))


def _score(runs: Sequence[Run], column: Column) -> Score | None:
    results = [run.evaluation[column.task] for run in runs if column.task in run.evaluation]
    measured = [result["metrics"][column.metric] for result in results if column.metric in result["metrics"]]
    values = [value for metric in measured if (value := metric.get("value")) is not None]
    if not values:
        return None
    if len(values) == 1:
        half, over = margin(measured[0].get("stderr")), plural(results[0]["questions"], "question")
    else:
        seeds = estimate(values)
        half, over = seeds.margin if seeds else None, plural(len(values), "seed")
    mean = fmean(values)
    at_chance = column.chance is not None and half is not None and abs(mean - column.chance) <= half
    return Score(mean, half, over, at_chance)
