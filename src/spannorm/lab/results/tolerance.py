"""The largest tolerable learning rate of each arm, from ramps (`spannorm.train.ramp`)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spannorm.lab.results.summary import condition
from spannorm.train.ramp import SHARE, SHARES

_MOST_LINES = 10


@dataclass(frozen=True)
class Tolerance:
    """The rate at which an arm lost a share of what it had learned, over its seeds."""

    table: str
    cell: dict[str, Any]
    arm: str
    placement: str
    depth_rule: str
    rates: dict[str, list[float | None]]
    """By share, one per seed that learned; None where the ramp ended before."""
    unlearned: int
    """Seeds that never came 0.2 nats below a unigram model."""

    @property
    def seeds(self) -> int:
        return self.unlearned + len(self.rates[f"{SHARE:g}"])

    def rate(self, share: float = SHARE) -> float | None:
        """The geometric mean over the seeds; None where one never diverged, or none learned."""
        found = self.rates[f"{share:g}"]
        logs = [math.log(rate) for rate in found if rate]
        return math.exp(math.fsum(logs) / len(logs)) if found and len(logs) == len(found) else None

    @property
    def words(self) -> str:
        """The rate with its range over the seeds."""
        found = self.rates[f"{SHARE:g}"]
        if not found:
            return "never learned"
        if self.rate() is None:
            return f"not reached with {found.count(None)} of {len(found)} seeds"
        low, high = min(r for r in found if r), max(r for r in found if r)
        return f"{self.rate():.2e}" + (f" ({low:.2e}–{high:.2e})" if len(found) > 1 else "")


def tolerances(rows: Sequence[Mapping[str, Any]]) -> list[Tolerance]:
    """Every arm under every condition, from the rows of `results.json`."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        for table in row["tables"] if row.get("tolerated") else ():
            groups.setdefault((table, json.dumps(row["cell"]), row["arm"]), []).append(row)
    found = []
    for (table, cell, arm), of in groups.items():
        learned = [row["tolerated"]["rates"] for row in of if row["tolerated"]["learned"]]
        rates = {f"{share:g}": [rate[f"{share:g}"] for rate in learned] for share in SHARES}
        first = of[0]
        unlearned = len(of) - len(learned)
        found.append(Tolerance(table, json.loads(cell), arm, first["placement"], first["depth_rule"], rates, unlearned))
    return found


def tolerance_lines(found: Sequence[Tolerance]) -> list[str]:
    """Each arm's rates in a line, in the order of the conditions; ten lines at most."""
    by_arm: dict[str, list[Tolerance]] = {}
    for t in found:
        by_arm.setdefault(f"{t.table}: {t.arm}" if t.table else t.arm, []).append(t)
    lines = []
    for arm, of in by_arm.items():
        told = [f"{t.words} at {condition(t.cell)}" if t.cell else t.words for t in of]
        lines.append(f"{arm}: {'; '.join(told)}.")
    return lines if len(lines) <= _MOST_LINES else [*lines[: _MOST_LINES - 1], "The other arms are in the table."]
