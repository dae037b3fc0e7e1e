"""Structure against init: placements across, depth rules down, each at its own best learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spannorm.lab.report.arms import Arm
from spannorm.lab.results.statistics import Estimate, estimate


@dataclass(frozen=True)
class Combination:
    """A placement with a depth rule (and what else the arm overrides)."""

    loss: Estimate | None
    """Of the seeds that did not fail."""
    failed: int
    seeds: int
    learning_rate: float | None


@dataclass(frozen=True)
class Ablation:
    """All combinations; None where one was not run."""

    placements: list[str]
    variants: list[str]
    combinations: dict[tuple[str, str], Combination]


def ablation(arms: Sequence[Arm]) -> Ablation | None:
    """The table, where at least two placements share at least two variants."""
    combinations = {}
    for arm in arms:
        failed = sum(run.status == "failed" for run in arm.runs)
        loss = estimate(arm.final_losses)
        combinations[arm.placement, arm.variant] = Combination(loss, failed, len(arm.runs), arm.learning_rate)
    variants = list(dict.fromkeys(arm.variant for arm in sorted(arms, key=lambda a: (a.variant != "none", a.variant))))
    shared = [v for v in variants if sum((arm.placement, v) in combinations for arm in arms if arm.variant == v) > 1]
    if len(shared) < 2:
        return None
    return Ablation(sorted({arm.placement for arm in arms}), variants, combinations)
