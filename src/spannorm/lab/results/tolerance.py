"""The largest tolerable learning rate of each arm, from ramps (`spannorm.train.ramp`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spannorm.lab.results.files import JobResult
from spannorm.lab.results.groups import by_name, condition_words, groups_of, title
from spannorm.train.ramp import SHARE, SHARES

_MOST_LINES = 10


@dataclass(frozen=True)
class Tolerance:
    """The rate at which an arm lost a share of what it had learned, over its seeds."""

    table: str
    condition: Mapping[str, Any]
    arm: str
    placement: str
    depth_rule: str
    rates: dict[str, list[float | None]]
    """By share, one per seed that learned; None where the ramp ended before."""
    unlearned: int
    """Seeds that never came 0.2 nats below a unigram model."""

    @property
    def title(self) -> str:
        return title(self.table, self.condition)

    @property
    def seeds(self) -> int:
        return self.unlearned + len(self.rates[f"{SHARE:g}"])

    def rate(self, share: float = SHARE) -> float | None:
        """The geometric mean over the seeds; None where one never diverged, or none learned."""
        rates = self.rates[f"{share:g}"]
        logs = [math.log(rate) for rate in rates if rate]
        return math.exp(math.fsum(logs) / len(logs)) if rates and len(logs) == len(rates) else None

    @property
    def words(self) -> str:
        """The rate with its range over the seeds."""
        rates = self.rates[f"{SHARE:g}"]
        if not rates:
            return "never learned"
        if self.rate() is None:
            return f"not reached with {rates.count(None)} of {len(rates)} seeds"
        low, high = min(r for r in rates if r), max(r for r in rates if r)
        return f"{self.rate():.2e}" + (f" ({low:.2e}–{high:.2e})" if len(rates) > 1 else "")


def tolerances(jobs: Sequence[JobResult]) -> list[Tolerance]:
    """Every arm under every condition, from the jobs of `results.json` that were ramps."""
    return [
        _tolerance(group.table, group.condition, arm, ramps)
        for group in groups_of(job for job in jobs if job.get("tolerated"))
        for arm, ramps in by_name(group.jobs).items()
    ]


def _tolerance(table: str, condition: Mapping[str, Any], arm: str, ramps: Sequence[JobResult]) -> Tolerance:
    learned = [job["tolerated"]["rates"] for job in ramps if job["tolerated"]["learned"]]
    rates = {f"{share:g}": [rate[f"{share:g}"] for rate in learned] for share in SHARES}
    placement, rule, unlearned = ramps[0]["placement"], ramps[0]["depth_rule"], len(ramps) - len(learned)
    return Tolerance(table, condition, arm, placement, rule, rates, unlearned)


def tolerance_lines(tolerances: Sequence[Tolerance]) -> list[str]:
    """Each arm's rates in a line, in the order of the conditions; ten lines at most."""
    by_arm: dict[str, list[Tolerance]] = {}
    for t in tolerances:
        by_arm.setdefault(f"{t.table}: {t.arm}" if t.table else t.arm, []).append(t)
    lines = []
    for arm, its in by_arm.items():
        rates = [f"{t.words} at {condition_words(t.condition)}" if t.condition else t.words for t in its]
        lines.append(f"{arm}: {'; '.join(rates)}.")
    return lines if len(lines) <= _MOST_LINES else [*lines[: _MOST_LINES - 1], "The other arms are in the table."]
