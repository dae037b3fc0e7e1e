"""A comparison's jobs as arms, each at its own best learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spannorm.lab.report.looks import Look
from spannorm.lab.results.files import JobResult
from spannorm.lab.results.groups import CHOOSING, FRESH, failed, not_failed, values_of
from spannorm.lab.results.runs import Run, read_run

Key = tuple[str, str]
"""Placement and variant, which name an arm."""


@dataclass(frozen=True)
class Choice:
    """The learning rates of an arm, and the best of them."""

    tried: dict[float | None, list[JobResult]]
    """By learning rate, the jobs on which the best one is chosen."""
    best: float | None
    shown: list[JobResult]
    """The jobs at the best one: under a protocol and of a ladder those on fresh seeds, as soon as one has begun."""
    confirmed: bool
    """Whether they are on fresh seeds."""


def choose(rates: Mapping[float | None, list[JobResult]]) -> Choice:
    """Choose an arm's learning rate among its jobs: the one at which it is measured, or else the best.

    Runs on fresh seeds do not choose: a mean of several seeds would lose against a rate with one lucky seed.
    """
    tried = {rate: _of_stage(jobs, CHOOSING) or jobs for rate, jobs in rates.items()}
    measured = [rate for rate, jobs in rates.items() if _of_stage(jobs, FRESH)]
    best = measured[0] if len(measured) == 1 else min(tried, key=lambda rate: rank(tried[rate]))
    fresh = [job for job in _of_stage(rates[best], FRESH) if job["status"] != "waiting"]
    return Choice(tried, best, fresh or tried[best], bool(fresh))


def _of_stage(jobs: Sequence[JobResult], stages: Sequence[str]) -> list[JobResult]:
    return [job for job in jobs if job["stage"] in stages]


def rank(jobs: Sequence[JobResult]) -> tuple[float, ...]:
    """Sorts arms and learning rates: by validation loss where no seed failed, then unfinished ones, then failures."""
    share_failed, losses = len(failed(jobs)) / len(jobs), values_of(not_failed(jobs), "val_loss")
    waiting = all(job["status"] == "waiting" for job in jobs)
    steps = sum(values_of(jobs, "steps_done"))
    if share_failed:
        own = losses or values_of(jobs, "val_loss")
        return (3, share_failed, float(np.mean(own)) if own else float("inf"), -steps)
    if losses:
        return (0, float(np.mean(losses)))
    return (2 if waiting else 1, -steps)


@dataclass(frozen=True)
class Rate:
    """An arm at one learning rate."""

    learning_rate: float | None
    losses: list[float]
    """Validation losses of the seeds that did not fail."""
    failures: list[str]
    """Why the others failed."""


@dataclass(frozen=True)
class Arm:
    """A placement with its depth rule (and what else it overrides), as the figures draw it."""

    placement: str
    variant: str
    look: Look
    rates: list[Rate]
    learning_rate: float | None
    """The one drawn."""
    runs: list[Run]
    """The seeds at that learning rate: under a protocol the fresh ones, as soon as there are any."""
    confirmed: bool = False
    """Whether they are fresh: others than the one on which the rate was chosen."""

    @property
    def label(self) -> str:
        return self.placement if self.variant == self.placement else f"{self.placement} {self.variant}"

    @property
    def failed(self) -> bool:
        return bool(self.runs) and all(run.status == "failed" for run in self.runs)

    @property
    def shown(self) -> list[Run]:
        """The seeds that make the mean line: those that did not fail, or all where every one failed."""
        return self.runs if self.failed else [run for run in self.runs if run.status != "failed"]

    @property
    def final_losses(self) -> list[float]:
        """Of the seeds that finished: on the test split where the arm was confirmed, else on the validation split."""
        losses = [run.test_loss if self.confirmed else run.val_loss for run in self.runs if run.status == "ok"]
        return [loss for loss in losses if loss is not None]


def read_arms(
    directory: Path, choices: Mapping[Key, Choice], looks: Mapping[Key, Look], unread: list[str]
) -> list[Arm]:
    """Arms by validation loss, failures last, with the records of the jobs that are shown.

    Args:
        directory: the comparison's folder.
        unread: takes a note of every file with lines that could not be read.
    """
    return [
        Arm(
            *key,
            looks[key],
            [
                Rate(rate, values_of(not_failed(jobs), "val_loss"), [job["reason"] or "failed" for job in failed(jobs)])
                for rate, jobs in choice.tried.items()
            ],
            choice.best,
            [read_run(directory, job, unread) for job in choice.shown],
            choice.confirmed,
        )
        for key, choice in sorted(choices.items(), key=lambda item: rank(item[1].shown))
    ]
