"""A comparison's jobs as arms for the figures and as rows for the table, each arm at its own best learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spannorm.lab.report.words import listed
from spannorm.lab.results.arms import (
    Arm,
    Groups,
    Job,
    Look,
    Rate,
    failed_jobs,
    held_jobs,
    rank,
    read_run,
    values_of,
)
from spannorm.lab.results.statistics import estimate
from spannorm.train.health import CRITERIA


@dataclass(frozen=True)
class Row:
    """A line of the table: an arm at one learning rate, over its seeds."""

    placement: str
    variant: str
    look: Look
    drawn: bool
    learning_rate: float | None
    seeds: str
    values: dict[str, float | None]
    """Means over the seeds that held (over all, where none did)."""
    losses: list[float]
    margin: float | None
    """Half the interval of the test loss, where it was confirmed on fresh seeds."""
    status: str
    failed: bool


def arms_and_rows(
    directory: Path, groups: Groups, look: dict[tuple[str, str], Look], unread: list[str]
) -> tuple[list[Arm], list[Row]]:
    """Arms and rows by validation loss, failures last.

    Under a protocol the rate is chosen on the seed of the choice, and the arm stands with its fresh seeds.
    """
    arms, rows = [], []
    orders: dict[tuple[str, str], tuple[float, ...]] = {}
    for (placement, variant), rates in groups.items():
        chosen = {rate: _stage(group, "choice") or group for rate, group in rates.items()}
        best = min(chosen, key=lambda rate: rank(chosen[rate]))
        fresh = _stage(rates[best], "confirmation")
        shown = [job for job in fresh if job["status"] != "waiting"] or chosen[best]
        summary = [
            Rate(rate, values_of(held_jobs(group), "val_loss"), [j["reason"] or "failed" for j in failed_jobs(group)])
            for rate, group in chosen.items()
        ]
        its = look[placement, variant]
        runs = [read_run(directory, job, unread) for job in shown]
        arms.append(Arm(placement, variant, its, summary, best, runs, shown is not chosen[best]))
        rows += [
            _row(placement, variant, its, rate, shown if rate == best else group, rate == best, chosen)
            for rate, group in chosen.items()
        ]
        orders |= {(f"{placement} {rate}", variant): rank(group) for rate, group in chosen.items()}
        orders |= {(name, variant): rank(shown) for name in (placement, f"{placement} {best}")}
    arms.sort(key=lambda arm: orders[arm.placement, arm.variant])
    rows.sort(key=lambda row: orders[f"{row.placement} {row.learning_rate}", row.variant])
    return arms, rows


def _stage(group: Sequence[Job], stage: str) -> list[Job]:
    return [job for job in group if job["stage"] == stage]


def _row(
    placement: str, variant: str, look: Look, rate: float | None, group: list[Job], drawn: bool,
    rates: dict[float | None, list[Job]],
) -> Row:  # fmt: skip
    keys = ("val_loss", "bits_per_byte", "test_loss", "max_grad_norm", "spike_score", "tokens_per_second")
    shown = held_jobs(group) or group
    values = {
        key: values_of(shown, key)
        for key in (*keys, "matrix_share", "parameters", "body_parameters", "active_parameters", "flops_per_token")
    }
    means = {key: float(np.mean(v)) if v else None for key, v in values.items()}
    said = []
    failed = failed_jobs(group)
    for reason in dict.fromkeys(job["reason"] for job in failed):
        these = [job for job in failed if job["reason"] == reason]
        which = "" if len(these) == len(group) else f" (seed {listed(job['seed'] for job in these)})"
        steps = {int(s) for s in values_of(these, "steps_done")}
        at = f", at step {listed(sorted(steps))}" if reason == "non-finite" and steps else ""
        said.append(f"failed{which}: {CRITERIA.get(reason or '', reason or 'reason not recorded')}{at}")
    for status in dict.fromkeys(job["status"] for job in group if job["status"] not in ("ok", "failed")):
        these = [job for job in group if job["status"] == status]
        which = "" if len(these) == len(group) else f"seed {listed(job['seed'] for job in these)} "
        done, whole = sum(values_of(these, "steps_done")), sum(values_of(these, "steps"))
        said.append(f"{which}{status}" + (f", {done / whole:.0%} done" if done and whole else ""))
    other = [f"{r:g}" for r, jobs in rates.items() if r is not None and r != rate and failed_jobs(jobs)]
    if drawn and other:
        said.append(f"also failed at learning rate {', '.join(other)}")
    seeds = listed(job["seed"] for job in group)
    losses = values["val_loss"]
    confirmed = (
        estimate(values["test_loss"]) if drawn and any(job["stage"] == "confirmation" for job in group) else None
    )
    margin = confirmed.margin if confirmed else None
    return Row(
        placement, variant, look, drawn, rate, seeds, means, losses, margin, "; ".join(said), not held_jobs(group)
    )


def strip(rows: Sequence[Row]) -> Callable[[Row], dict[str, float] | None]:
    """Where a row's losses lie on an axis common to the table, in per cent; failures have no place on it."""
    means = [float(np.mean(row.losses)) for row in rows if row.losses and not row.failed]
    low = min(means, default=0.0)
    # The same cut as the figures': one arm far behind stands at the edge instead of flattening the others.
    high = min(max(means, default=0.0), 5 * float(np.median(means or [0])) - 4 * low) or 1.0

    def place(row: Row) -> dict[str, float] | None:
        if not row.losses or row.failed or high <= low:
            return None
        spots = {"least": min(row.losses), "mean": float(np.mean(row.losses)), "greatest": max(row.losses)}
        return {k: round(4 + 92 * min(max((v - low) / (high - low), 0), 1), 1) for k, v in spots.items()}

    return place
