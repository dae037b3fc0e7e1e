"""What a comparison under a protocol comes to: each arm at its own best learning rate, and the pairs named beforehand.

Reads the rows of `results.json` alone, so that a summary can be made again on another machine.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spannorm.lab.results.arms import LARGEST
from spannorm.lab.results.statistics import LEVEL, Estimate, estimate, holm, paired, sensitivity, stands, verdict

Row = Mapping[str, Any]

_SHORT = {"num_hidden_layers": "{} blocks", "hidden_size": "width {}"}
_MOST_LINES = 10


@dataclass(frozen=True)
class Standing:
    """An arm under one condition."""

    arm: str
    trials: int
    """Learning rates tried."""
    learning_rate: float | None
    """The best on the seed of the choice; None while it is not chosen, or where every rate failed."""
    edge: bool
    """Whether that is the lowest or the highest rate tried: the best may lie beyond."""
    failed_rates: list[float]
    sensitivity: float | None
    """Learning-rate sensitivity on the seed of the choice, nats per token."""
    test_loss: Estimate | None
    """On the fresh seeds that held."""
    val_loss: Estimate | None
    failed: int
    """Fresh seeds that failed."""
    seeds: int
    """Fresh seeds that ended."""
    spike_score: float | None
    """Spikes per step over all fresh seeds."""


@dataclass(frozen=True)
class Pair:
    """Two arms held against each other, seed by seed, on the test split."""

    first: str
    second: str
    difference: Estimate | None
    """first − second, nats per token."""
    failures: dict[str, tuple[int, int]]
    """(failed, run) fresh seeds of each."""
    words: str
    p: float | None = None
    """Of the difference, at the seeds that both have; None where no difference is judged: too few, or failures."""
    p_holm: float | None = None
    """Corrected for the number of all pairs of the comparison that are judged; None where it is the only one."""


@dataclass(frozen=True)
class Race:
    """Arms that met under one condition, in one table."""

    table: str
    cell: dict[str, Any]
    standings: list[Standing]
    pairs: list[Pair]

    @property
    def condition(self) -> str:
        return condition(self.cell)


def condition(cell: Mapping[str, Any]) -> str:
    """A condition in words: `16 blocks, width 64`."""
    names = {key.rpartition(".")[2]: value for key, value in cell.items()}
    return ", ".join(_SHORT[n].format(value) if n in _SHORT else f"{n} {value}" for n, value in names.items())


def summarize(rows: Sequence[Row], pairs: Sequence[Sequence[str]]) -> list[Race]:
    """Every race of a comparison under a protocol.

    Args:
        pairs: by the arms' full names, or by a placement that one arm has.
    """
    races = []
    for table, cell in dict.fromkeys((t, json.dumps(row["cell"])) for row in rows for t in row["tables"]):
        mine = [row for row in rows if table in row["tables"] and json.dumps(row["cell"]) == cell]
        arms: dict[str, list[Row]] = {}
        for row in mine:
            arms.setdefault(row["arm"], []).append(row)
        named = [[arm for name in pair for arm in arms_named(name, arms)] for pair in pairs]
        found = [_pair(both[0], both[1], arms) for both in named if len(both) == 2]
        races.append(Race(table, json.loads(cell), [_standing(arm, of) for arm, of in arms.items()], found))
    return _corrected(races)


def _corrected(races: Sequence[Race]) -> list[Race]:
    """The races with each pair's p-value corrected for the number of pairs that are judged, of all conditions."""
    judged = [pair.p for race in races for pair in race.pairs if pair.p is not None]
    if len(judged) < 2:
        return list(races)
    corrected = iter(holm(judged))

    def pair_of(pair: Pair) -> Pair:
        if pair.p is None:
            return pair
        p = next(corrected)
        words = verdict(pair.first, pair.second, pair.difference, pair.failures, p, len(judged))
        return replace(pair, p_holm=p, words=words)

    return [replace(race, pairs=[pair_of(pair) for pair in race.pairs]) for race in races]


def arms_named(name: str, arms: Iterable[str]) -> list[str]:
    """The arms that a name means: the one of that full name, or all of that placement."""
    arms = list(arms)
    return [arm for arm in arms if arm == name] or [arm for arm in arms if arm.split()[:1] == [name]]


def _held(rows: Sequence[Row], key: str) -> dict[int, float]:
    held = [row for row in rows if row["status"] == "ok" and row["seed"] is not None and _number(row.get(key))]
    return {row["seed"]: row[key] for row in held}


def _number(value: float | None) -> bool:
    return value is not None and abs(value) < LARGEST


def _confirmed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["stage"] == "confirmation" and row["status"] in ("ok", "failed")]


def _standing(arm: str, rows: Sequence[Row]) -> Standing:
    choice = sorted((row for row in rows if row["stage"] == "choice"), key=lambda row: row["learning_rate"] or 0)
    ended = all(row["status"] in ("ok", "failed") for row in choice)
    held = [row for row in choice if row["status"] == "ok" and _number(row.get("val_loss"))]
    best = min(held, key=lambda row: row["val_loss"])["learning_rate"] if held and ended else None
    confirmed = _confirmed(rows)
    initial = next((row["initial_loss"] for row in choice if _number(row.get("initial_loss"))), None)
    losses = {row["learning_rate"]: row["val_loss"] if _number(row.get("val_loss")) else None for row in choice}
    steps = sum(row["steps_done"] for row in confirmed)
    return Standing(
        arm=arm,
        trials=len(choice),
        learning_rate=best,
        edge=best is not None and best in (choice[0]["learning_rate"], choice[-1]["learning_rate"]),
        failed_rates=[row["learning_rate"] or 0 for row in choice if row["status"] == "failed"],
        sensitivity=sensitivity(losses, initial) if ended and initial is not None else None,
        test_loss=estimate(list(_held(confirmed, "test_loss").values())),
        val_loss=estimate(list(_held(confirmed, "val_loss").values())),
        failed=sum(row["status"] == "failed" for row in confirmed),
        seeds=len(confirmed),
        spike_score=sum(row.get("spikes") or 0 for row in confirmed) / steps if steps else None,
    )


def _pair(first: str, second: str, arms: Mapping[str, list[Row]]) -> Pair:
    ended = {name: _confirmed(arms[name]) for name in (first, second)}
    choices = {name: [row for row in arms[name] if row["stage"] == "choice"] for name in (first, second)}
    hopeless = [name for name, rows in choices.items() if rows and all(row["status"] == "failed" for row in rows)]
    difference = paired(_held(ended[first], "test_loss"), _held(ended[second], "test_loss"))
    failures = {name: (sum(row["status"] == "failed" for row in rows), len(rows)) for name, rows in ended.items()}
    if hopeless:
        words = f"{' and '.join(hopeless)} failed at every learning rate: no difference in loss is claimed"
        return Pair(first, second, None, failures, words)
    p = difference.p_value if difference and not any(failed for failed, _ in failures.values()) else None
    return Pair(first, second, difference, failures, verdict(first, second, difference, failures), p)


def where(race: Race) -> str:
    """A race in words; empty where a comparison has one alone."""
    return ", ".join(filter(None, [race.table, race.condition]))


def verdict_lines(races: Sequence[Race]) -> list[str]:
    """The whole comparison in ten lines at most: the pairs first, then what failed and what a reader must know."""
    told = [(where(race), pair) for race in races for pair in race.pairs]
    lines = [f"{f'{place}: ' if place else ''}{pair.words}." for place, pair in told]
    if len(lines) > _MOST_LINES - 3:
        lines = [_over_conditions(told, pair) for pair in dict.fromkeys((p.first, p.second) for _, p in told)]
    judged = [pair for _, pair in told if pair.p_holm is not None]
    if judged:
        shown = [pair for pair in judged if pair.difference and pair.difference.direction]
        lines.append(
            f"Of {len(judged)} pairs {len(shown)} differ at {LEVEL:.0%}, where about one in twenty would by chance "
            f"alone; {sum(stands(pair.p_holm) for pair in shown)} still do after Holm over {len(judged)} pairs."
        )
    standings = [(where(race), s) for race in races for s in race.standings]
    lost = [(place, s.arm) for place, s in standings if len(s.failed_rates) == s.trials > 0]
    lines += _listed("Failed at every learning rate", lost)
    edge = [(place, s.arm) for place, s in standings if s.edge]
    lines += _listed("Best on the edge of the grid, so possibly better beyond", edge)
    return lines[:_MOST_LINES]


def _over_conditions(told: Sequence[tuple[str, Pair]], names: tuple[str, str]) -> str:
    groups: dict[str, list[str]] = {}
    standing: Counter[str] = Counter()
    for place, pair in told:
        if (pair.first, pair.second) == names:
            sign = pair.difference.direction if pair.difference else 0
            outcome = {-1: "ends below it", 1: "ends above it", 0: "no difference shown"}[sign]
            outcome = "cannot be compared for failures" if "failed" in pair.words else outcome
            groups.setdefault(outcome, []).append(place)
            standing[outcome] += not sign or stands(pair.p_holm)
    parts = [
        f"{outcome} in {len(places)} ({'; '.join(places)})"
        + (f", after Holm in {standing[outcome]} of them" if standing[outcome] < len(places) else "")
        for outcome, places in groups.items()
    ]
    return f"{names[0]} against {names[1]}, of {sum(map(len, groups.values()))} conditions: {', '.join(parts)}."


def _listed(words: str, items: Sequence[tuple[str, str]]) -> list[str]:
    by_arm: dict[str, list[str]] = {}
    for place, arm in items:
        by_arm.setdefault(arm, []).append(place)
    told = [arm + (f" ({'; '.join(places)})" if any(places) else "") for arm, places in by_arm.items()]
    return [f"{words}: {', '.join(told)}."] if told else []
