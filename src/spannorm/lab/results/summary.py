"""The results of a comparison under a protocol: each arm at its own best learning rate, and the pairs named beforehand.

Reads the jobs of `results.json` alone, so that a summary can be made again on another machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spannorm.lab.results.files import LARGEST, JobResult
from spannorm.lab.results.groups import by_name, groups_of, title
from spannorm.lab.results.statistics import LEVEL, Estimate, estimate, holm, pair_in_words, paired, sensitivity, stands

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
    """On the fresh seeds that did not fail."""
    val_loss: Estimate | None
    failed: int
    """Fresh seeds that failed."""
    seeds: int
    """Fresh seeds that ended."""
    spike_score: float | None
    """Spikes per step over all fresh seeds."""


@dataclass(frozen=True)
class Pair:
    """Two arms compared with each other, seed by seed, on the test split."""

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
class ConditionSummary:
    """Arms that met under one condition, in one table."""

    table: str
    condition: Mapping[str, Any]
    standings: list[Standing]
    pairs: list[Pair]

    @property
    def title(self) -> str:
        return title(self.table, self.condition)


def summarize_conditions(jobs: Sequence[JobResult], pairs: Sequence[Sequence[str]]) -> list[ConditionSummary]:
    """Every condition of a comparison under a protocol.

    Args:
        pairs: by the arms' full names, or by a placement that one arm has.
    """
    summaries = []
    for group in groups_of(jobs):
        arms = by_name(group.jobs)
        named = [[arm for name in pair for arm in arms_named(name, arms)] for pair in pairs]
        compared = [_pair(both[0], both[1], arms) for both in named if len(both) == 2]
        standings = [_standing(arm, its_jobs) for arm, its_jobs in arms.items()]
        summaries.append(ConditionSummary(group.table, group.condition, standings, compared))
    return _corrected(summaries)


def summaries_of(results: Mapping[str, Any]) -> list[ConditionSummary]:
    """`summarize_conditions` of a comparison's results; nothing without a protocol, or of a ladder, whose seeds serve
    its curves."""
    recipe = results["recipe"]
    protocol = (recipe.get("compare") or {}).get("protocol") or {}
    if not protocol.get("seeds") or (recipe.get("ladder") or {}).get("sizes"):
        return []
    return summarize_conditions(results["jobs"], protocol.get("pairs") or [])


def _corrected(summaries: Sequence[ConditionSummary]) -> list[ConditionSummary]:
    """The conditions with each pair's p-value corrected for the number of pairs that are judged, of all conditions."""
    judged = [pair.p for summary in summaries for pair in summary.pairs if pair.p is not None]
    if len(judged) < 2:
        return list(summaries)
    corrected = iter(holm(judged))

    def pair_of(pair: Pair) -> Pair:
        if pair.p is None:
            return pair
        p = next(corrected)
        words = pair_in_words(pair.first, pair.second, pair.difference, pair.failures, p, len(judged))
        return replace(pair, p_holm=p, words=words)

    return [replace(summary, pairs=[pair_of(pair) for pair in summary.pairs]) for summary in summaries]


def arms_named(name: str, arms: Iterable[str]) -> list[str]:
    """The arms that a name means: the one of that full name, or all of that placement."""
    arms = list(arms)
    return [arm for arm in arms if arm == name] or [arm for arm in arms if arm.split()[:1] == [name]]


def _by_seed(jobs: Sequence[JobResult], key: str) -> dict[int, float]:
    """The values of the jobs that did not fail, by seed."""
    sound = [job for job in jobs if job["status"] == "ok" and job["seed"] is not None and _number(job.get(key))]
    return {job["seed"]: job[key] for job in sound}


def _number(value: float | None) -> bool:
    return value is not None and abs(value) < LARGEST


def _confirmed(jobs: Sequence[JobResult]) -> list[JobResult]:
    """The jobs on fresh seeds that have ended."""
    return [job for job in jobs if job["stage"] == "confirmation" and job["status"] in ("ok", "failed")]


def _standing(arm: str, jobs: Sequence[JobResult]) -> Standing:
    choice = sorted((job for job in jobs if job["stage"] == "choice"), key=lambda job: job["learning_rate"] or 0)
    ended = all(job["status"] in ("ok", "failed") for job in choice)
    sound = [job for job in choice if job["status"] == "ok" and _number(job.get("val_loss"))]
    best = min(sound, key=lambda job: job["val_loss"])["learning_rate"] if sound and ended else None
    confirmed = _confirmed(jobs)
    initial = next((job["initial_loss"] for job in choice if _number(job.get("initial_loss"))), None)
    losses = {job["learning_rate"]: job["val_loss"] if _number(job.get("val_loss")) else None for job in choice}
    steps = sum(job["steps_done"] for job in confirmed)
    return Standing(
        arm=arm,
        trials=len(choice),
        learning_rate=best,
        edge=best is not None and best in (choice[0]["learning_rate"], choice[-1]["learning_rate"]),
        failed_rates=[job["learning_rate"] or 0 for job in choice if job["status"] == "failed"],
        sensitivity=sensitivity(losses, initial) if ended and initial is not None else None,
        test_loss=estimate(list(_by_seed(confirmed, "test_loss").values())),
        val_loss=estimate(list(_by_seed(confirmed, "val_loss").values())),
        failed=sum(job["status"] == "failed" for job in confirmed),
        seeds=len(confirmed),
        spike_score=sum(job.get("spikes") or 0 for job in confirmed) / steps if steps else None,
    )


def _pair(first: str, second: str, arms: Mapping[str, list[JobResult]]) -> Pair:
    ended = {name: _confirmed(arms[name]) for name in (first, second)}
    choices = {name: [job for job in arms[name] if job["stage"] == "choice"] for name in (first, second)}
    hopeless = [name for name, jobs in choices.items() if jobs and all(job["status"] == "failed" for job in jobs)]
    difference = paired(_by_seed(ended[first], "test_loss"), _by_seed(ended[second], "test_loss"))
    failures = {name: (sum(job["status"] == "failed" for job in jobs), len(jobs)) for name, jobs in ended.items()}
    if hopeless:
        words = f"{' and '.join(hopeless)} failed at every learning rate: no difference in loss is claimed"
        return Pair(first, second, None, failures, words)
    p = difference.p_value if difference and not any(failed for failed, _ in failures.values()) else None
    return Pair(first, second, difference, failures, pair_in_words(first, second, difference, failures), p)


def summary_lines(summaries: Sequence[ConditionSummary]) -> list[str]:
    """The whole comparison in ten lines at most: the pairs first, then what failed and what a reader must know."""
    pairs = [(summary.title, pair) for summary in summaries for pair in summary.pairs]
    lines = [f"{f'{where}: ' if where else ''}{pair.words}." for where, pair in pairs]
    if len(lines) > _MOST_LINES - 3:
        lines = [_over_conditions(pairs, names) for names in dict.fromkeys((p.first, p.second) for _, p in pairs)]
    judged = [pair for _, pair in pairs if pair.p_holm is not None]
    if judged:
        different = [pair for pair in judged if pair.difference and pair.difference.direction]
        lines.append(
            f"Of {len(judged)} pairs {len(different)} differ at {LEVEL:.0%}, where about one in twenty would by chance "
            f"alone; {sum(stands(pair.p_holm) for pair in different)} still do after Holm over {len(judged)} pairs."
        )
    standings = [(summary.title, standing) for summary in summaries for standing in summary.standings]
    lost = [(where, s.arm) for where, s in standings if len(s.failed_rates) == s.trials > 0]
    lines += _listed("Failed at every learning rate", lost)
    edge = [(where, s.arm) for where, s in standings if s.edge]
    lines += _listed("Best on the edge of the grid, so possibly better beyond", edge)
    return lines[:_MOST_LINES]


def _over_conditions(pairs: Sequence[tuple[str, Pair]], names: tuple[str, str]) -> str:
    """One pair's outcomes over all conditions, in a line."""
    by_outcome: dict[str, list[str]] = {}
    standing: Counter[str] = Counter()
    for where, pair in pairs:
        if (pair.first, pair.second) == names:
            sign = pair.difference.direction if pair.difference else 0
            outcome = {-1: "ends below it", 1: "ends above it", 0: "no difference shown"}[sign]
            outcome = outcome if pair.difference else "not compared yet"
            outcome = "cannot be compared for failures" if "failed" in pair.words else outcome
            by_outcome.setdefault(outcome, []).append(where)
            standing[outcome] += not sign or stands(pair.p_holm)
    parts = [
        f"{outcome} in {len(conditions)} ({'; '.join(conditions)})"
        + (f", after Holm in {standing[outcome]} of them" if standing[outcome] < len(conditions) else "")
        for outcome, conditions in by_outcome.items()
    ]
    return f"{names[0]} against {names[1]}, of {sum(map(len, by_outcome.values()))} conditions: {', '.join(parts)}."


def _listed(words: str, arms: Sequence[tuple[str, str]]) -> list[str]:
    by_arm: dict[str, list[str]] = {}
    for where, arm in arms:
        by_arm.setdefault(arm, []).append(where)
    listed = [arm + (f" ({'; '.join(wheres)})" if any(wheres) else "") for arm, wheres in by_arm.items()]
    return [f"{words}: {', '.join(listed)}."] if listed else []
