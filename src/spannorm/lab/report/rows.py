"""The rows of the report's table: an arm at one learning rate, over its seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spannorm.lab.report.arms import Choice, Key, rank
from spannorm.lab.report.looks import Look
from spannorm.lab.report.words import listed
from spannorm.lab.results.files import JobResult
from spannorm.lab.results.groups import failed, not_failed, values_of
from spannorm.lab.results.statistics import estimate
from spannorm.train.health import CRITERIA

_KEYS = (
    *("val_loss", "bits_per_byte", "test_loss", "max_grad_norm", "spike_score", "tokens_per_second", "matrix_share"),
    *("parameters", "body_parameters", "active_parameters", "flops_per_token"),
)


@dataclass(frozen=True)
class TableRow:
    """An arm at one learning rate, over its seeds."""

    placement: str
    variant: str
    look: Look
    drawn: bool
    """Whether the figures draw the arm at this learning rate: its best one."""
    learning_rate: float | None
    seeds: str
    values: dict[str, float | None]
    """Means over the seeds that did not fail (over all, where every one failed)."""
    losses: list[float]
    margin: float | None
    """Half the interval of the test loss, where it was confirmed on fresh seeds."""
    status: str
    failed: bool


def rows_of(choices: Mapping[Key, Choice], looks: Mapping[Key, Look]) -> list[TableRow]:
    """A row for every arm and learning rate, by validation loss, failures last."""
    rows = []
    for key, choice in choices.items():
        for rate, tried in choice.tried.items():
            jobs = choice.shown if rate == choice.best else tried
            rows.append((rank(jobs), _row(key, looks[key], rate, jobs, choice)))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def _row(key: Key, look: Look, rate: float | None, jobs: list[JobResult], choice: Choice) -> TableRow:
    values = {name: values_of(not_failed(jobs) or jobs, name) for name in _KEYS}
    drawn = rate == choice.best
    test_loss = estimate(values["test_loss"]) if drawn and choice.confirmed else None
    status = _status(jobs)
    elsewhere = [f"{r:g}" for r, tried in choice.tried.items() if r is not None and r != rate and failed(tried)]
    if drawn and elsewhere:
        status.append(f"also failed at learning rate {', '.join(elsewhere)}")
    return TableRow(
        *key,
        look,
        drawn,
        rate,
        listed(job["seed"] for job in jobs),
        {name: float(np.mean(v)) if v else None for name, v in values.items()},
        values["val_loss"],
        test_loss.margin if test_loss else None,
        "; ".join(status),
        not not_failed(jobs),
    )


def _status(jobs: Sequence[JobResult]) -> list[str]:
    """Which jobs failed and why, and how far the unfinished ones are."""
    notes = []
    for reason in dict.fromkeys(job["reason"] for job in failed(jobs)):
        these = [job for job in failed(jobs) if job["reason"] == reason]
        which = "" if len(these) == len(jobs) else f" (seed {listed(job['seed'] for job in these)})"
        steps = {int(s) for s in values_of(these, "steps_done")}
        at = f", at step {listed(sorted(steps))}" if reason == "non-finite" and steps else ""
        notes.append(f"failed{which}: {CRITERIA.get(reason or '', reason or 'reason not recorded')}{at}")
    for status in dict.fromkeys(job["status"] for job in jobs if job["status"] not in ("ok", "failed")):
        these = [job for job in jobs if job["status"] == status]
        which = "" if len(these) == len(jobs) else f"seed {listed(job['seed'] for job in these)} "
        done, whole = sum(values_of(these, "steps_done")), sum(values_of(these, "steps"))
        notes.append(f"{which}{status}" + (f", {done / whole:.0%} done" if done and whole else ""))
    return notes


def strip(rows: Sequence[TableRow]) -> Callable[[TableRow], dict[str, float] | None]:
    """Where a row's losses lie on an axis common to the table, in per cent; failures have no place on it."""
    means = [float(np.mean(row.losses)) for row in rows if row.losses and not row.failed]
    low = min(means, default=0.0)
    # The same cut as the figures': one arm far behind stands at the edge instead of flattening the others.
    high = min(max(means, default=0.0), 5 * float(np.median(means or [0])) - 4 * low) or 1.0

    def place(row: TableRow) -> dict[str, float] | None:
        if not row.losses or row.failed or high <= low:
            return None
        spots = {"least": min(row.losses), "mean": float(np.mean(row.losses)), "greatest": max(row.losses)}
        return {k: round(4 + 92 * min(max((v - low) / (high - low), 0), 1), 1) for k, v in spots.items()}

    return place
