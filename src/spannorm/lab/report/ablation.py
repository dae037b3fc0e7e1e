"""Structure against init: placements across, depth rules down, each at its own best learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spannorm.lab.report.figures.conditions import final_losses
from spannorm.lab.results.arms import Arm
from spannorm.lab.results.statistics import Estimate, estimate


@dataclass(frozen=True)
class Entry:
    """One combination."""

    loss: Estimate | None
    """Of the seeds that held."""
    failed: int
    seeds: int
    learning_rate: float | None


@dataclass(frozen=True)
class Ablation:
    """All combinations; None where one was not run."""

    placements: list[str]
    variants: list[str]
    entries: dict[tuple[str, str], Entry]


def ablation(arms: Sequence[Arm]) -> Ablation | None:
    """The table, where at least two placements share at least two variants."""
    entries = {}
    for arm in arms:
        failed = sum(run.status == "failed" for run in arm.runs)
        entries[arm.placement, arm.variant] = Entry(
            estimate(final_losses(arm)), failed, len(arm.runs), arm.learning_rate
        )
    variants = list(dict.fromkeys(arm.variant for arm in sorted(arms, key=lambda a: (a.variant != "none", a.variant))))
    shared = [v for v in variants if sum((arm.placement, v) in entries for arm in arms if arm.variant == v) > 1]
    if len(shared) < 2:
        return None
    return Ablation(sorted({arm.placement for arm in arms}), variants, entries)
