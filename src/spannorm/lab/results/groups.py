"""A comparison's jobs in groups: those that are compared with each other, then by arm and learning rate."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spannorm.lab.results.files import LARGEST, JobResult

JobsByArm = dict[tuple[str, str], dict[float | None, list[JobResult]]]
"""By arm (placement, variant), then by learning rate."""

CHOOSING = ("choice", "rate", "check")
"""Stages whose runs choose an arm's learning rate: a protocol's, then a ladder's."""
FRESH = ("confirmation", "rung", "held out")
"""Stages whose runs measure an arm at the learning rate that it has."""

_SHORT = {"num_hidden_layers": "{} blocks", "hidden_size": "width {}"}
_ARM_KEYS = ("model.placement", "model.depth_rule", "train.seed", "train.learning_rate")


@dataclass(frozen=True)
class Group:
    """Jobs that are compared with each other: those of one table under one condition."""

    table: str
    condition: Mapping[str, Any]
    """The grid's values, by dotted key, other than the arm's, the learning rate and the seed."""
    jobs: list[JobResult]

    @property
    def title(self) -> str:
        return title(self.table, self.condition)


def groups_of(jobs: Iterable[JobResult]) -> list[Group]:
    """The groups of a comparison, in the order of its jobs. A job stands in one group for each of its tables."""
    by_key: dict[tuple[str, str], Group] = {}
    for job in jobs:
        for table in job["tables"]:
            key = (table, json.dumps(job["condition"]))
            by_key.setdefault(key, Group(table, job["condition"], [])).jobs.append(job)
    return list(by_key.values())


def title(table: str, condition: Mapping[str, Any]) -> str:
    """A table and a condition in words; empty where a comparison has one of each."""
    return ", ".join(filter(None, [table, condition_words(condition)]))


def condition_words(condition: Mapping[str, Any]) -> str:
    """A condition in words: `16 blocks, width 64`."""
    names = {key.rpartition(".")[2]: value for key, value in condition.items()}
    return ", ".join(_SHORT[n].format(value) if n in _SHORT else f"{n} {value}" for n, value in names.items())


def by_name(jobs: Iterable[JobResult]) -> dict[str, list[JobResult]]:
    """Jobs by the full name of their arm."""
    groups: dict[str, list[JobResult]] = {}
    for job in jobs:
        groups.setdefault(job.get("arm") or f"{job['placement']} {job['depth_rule']}", []).append(job)
    return groups


def by_arm(jobs: Sequence[JobResult]) -> JobsByArm:
    """Jobs by arm, then by learning rate. What else differs between arms joins the depth rule in the name."""
    extras = {key for job in jobs for key in job["overrides"]} - set(_ARM_KEYS)
    varied = [k for k in sorted(extras) if len({json.dumps(job["overrides"].get(k)) for job in jobs}) > 1]
    groups: JobsByArm = {}
    for job in sorted(jobs, key=lambda job: (job["learning_rate"] or 0, job["seed"] or 0)):
        parts = [f"{k.rpartition('.')[2]}={job['overrides'][k]}" for k in varied if k in job["overrides"]]
        variant = job["arm"].partition(" ")[2] if job.get("arm") else " ".join([job["depth_rule"], *parts])
        key = (job["placement"], variant)
        groups.setdefault(key, {}).setdefault(job["learning_rate"], []).append(job)
    return groups


def not_failed(jobs: Iterable[JobResult]) -> list[JobResult]:
    return [job for job in jobs if job["status"] != "failed"]


def failed(jobs: Iterable[JobResult]) -> list[JobResult]:
    return [job for job in jobs if job["status"] == "failed"]


def values_of(jobs: Iterable[JobResult], key: str) -> list[float]:
    """The finite numbers under a key; a job without one is left out."""
    values = [job.get(key) for job in jobs]
    return [float(v) for v in values if isinstance(v, int | float) and abs(v) < LARGEST]
