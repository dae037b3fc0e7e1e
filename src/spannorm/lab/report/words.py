"""The report's sentences about a comparison as a whole, and its numbers in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spannorm.lab.results.files import JobResult
from spannorm.lab.results.groups import CHOOSING, FRESH, by_name, groups_of, values_of
from spannorm.lab.results.statistics import CLAIM


def listed(values: Iterable[object]) -> str:
    return ", ".join("?" if value is None else str(value) for value in values)


def about(results: dict[str, Any], arms: int) -> str:
    """What was compared, in a sentence, as far as the files say."""
    jobs, recipe = results["jobs"], results["recipe"]
    model, train = recipe.get("model") or {}, recipe.get("train") or {}
    depths = sorted({int(depth) for depth in values_of(jobs, "depth")})
    placements = {job["placement"] for job in jobs}
    text = f"{plural(arms, 'arm')} of {plural(len(placements), 'placement')}"
    shape = [f"{' and '.join([*filter(None, [listed(depths[:-1])]), str(depths[-1])])} blocks"] if depths else []
    shape += [f"width {model['hidden_size']}"] if model.get("hidden_size") else []
    text += f": a decoder of {', '.join(shape)}," if shape else ","
    tokens = max(values_of(jobs, "tokens"), default=0)
    steps = max(values_of(jobs, "steps"), default=train.get("steps") or 0)
    text += f" trained for {int(steps):,} steps" if steps else " trained"
    text += f" ({count(tokens)} tokens)" if tokens else ""
    corpus = results["data"].get("corpus")
    return text + (f" on {corpus}." if corpus else ".")


def behind(arms: Sequence[Mapping[float | None, list[JobResult]]], jobs: Sequence[JobResult]) -> str:
    """How many seeds and learning rates the figures rest on, and what may be said with that number.

    Args:
        arms: by arm, its jobs by learning rate.
    """
    states = Counter("finished" if job["status"] == "ok" else job["status"] for job in jobs)
    finished = f"Of {plural(len(jobs), 'job')}, {', '.join(f'{n} {status}' for status, n in states.most_common())}."
    elsewhere = sum("taken_from" in job for job in jobs)
    if elsewhere:
        finished += f" {plural(elsewhere, 'result')} taken over from elsewhere (`taken_from` in results.json)."
    choosing, fresh = ({job["seed"] for job in jobs if job["stage"] in stages} for stages in (CHOOSING, FRESH))
    fresh -= choosing
    if any(job["stage"] for job in jobs):
        look = "" if len(fresh) >= CLAIM else f": a look, not a claim, which takes {CLAIM} seeds"
        by_group = [its_jobs for group in groups_of(jobs) for its_jobs in by_name(group.jobs).values()]
        tried = sorted({len({job["learning_rate"] for job in its_jobs}) for its_jobs in by_group})
        text = f"Each arm had {_span(tried, 'learning rate')} on one seed and the validation split; what it came to is "
        return f"{text}measured on {plural(len(fresh), 'fresh seed')} and the test split{look}. {finished}"
    seeds = sorted({len(its_jobs) for arm in arms for its_jobs in arm.values()})
    tried = sorted({len(arm) for arm in arms})
    text = f"Each arm has {_span(seeds, 'seed')} and {_span(tried, 'learning rate')}"
    if seeds[0] < 3:
        text += ": a look, not a claim (three seeds make a look worth taking, five a claim)."
    elif seeds[0] < 5:
        text += ": a look, not a claim, which takes five seeds."
    else:
        text += ": as many seeds as a claim takes"
        text += ", if the learning rates were chosen on others." if tried[-1] > 1 else "."
    if len(seeds) > 1 or len(tried) > 1:
        text += " The arms did not get the same number of trials: this is not a matched comparison."
    return f"{text} {finished}"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _span(counts: Sequence[int], noun: str) -> str:
    return plural(counts[0], noun) if len(counts) == 1 else f"{counts[0]} to {plural(counts[-1], noun)}"


def number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form).rstrip(".")


def count(value: float | None) -> str:
    """12 300 000 as 12.3 M."""
    if value is None:
        return "–"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:#.3g}".rstrip(".") + f"\N{NO-BREAK SPACE}{unit}"
    return f"{value:#.3g}".rstrip(".")
