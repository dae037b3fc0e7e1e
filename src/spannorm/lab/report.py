"""Reads a comparison's files and writes its report: one HTML file that needs nothing beside it, and its figures.

Nothing here needs a model, or torch: a report can be drawn again from the files alone, on another machine.
"""

from __future__ import annotations

import io
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from spannorm.files import write_bytes, write_text, writing_to
from spannorm.lab.arms import (
    Arm,
    Groups,
    Job,
    Look,
    Rate,
    failed_jobs,
    group_jobs,
    held_jobs,
    looks,
    rank,
    read_results,
    read_run,
    values_of,
)
from spannorm.lab.figures import MAX_ARMS, Drawing, draw
from spannorm.lab.panels import STYLE
from spannorm.lab.routing import draw_routing
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
    status: str
    failed: bool


@dataclass(frozen=True)
class Section:
    """One table of a comparison with its figures."""

    name: str
    """Empty where a comparison has a single table."""
    rows: list[Row]
    """Each arm at its best learning rate."""
    every: list[Row]
    """All learning rates, where there are several."""
    strip: Callable[[Row], dict[str, float] | None]
    figures: list[tuple[Drawing, str]]
    left_out: int
    """Arms beyond what a figure can hold."""


def draw_report(directory: Path) -> Path:
    """Draw the report of a comparison, as far as its jobs are, and return the path of `report.html`.

    Reads `results.json` and `jobs/*/{records,probes}.jsonl` under `directory`; writes `report.html` and, under
    `figures/`, every figure as PNG and SVG. Raises `InputError` if `results.json` is missing or malformed.
    """
    directory = Path(directory)
    results = read_results(directory / "results.json")
    jobs: list[Job] = results["arms"]
    unread: list[str] = []
    tables = list(dict.fromkeys(table for job in jobs for table in job["tables"]))
    sections = [_section(directory, table, [job for job in jobs if table in job["tables"]], unread) for table in tables]
    groups = {(table, *key): rates for table in tables for key, rates in _in_table(jobs, table).items()}
    environment = Environment(
        loader=PackageLoader("spannorm.lab", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(number=_number, count=_count)
    page = environment.get_template("report.html.jinja").render(
        results=results,
        about=_about(results, len(groups)),
        behind=_behind(list(groups.values()), jobs),
        sections=sections,
        unread=list(dict.fromkeys(unread)),
        probes=any((directory / "jobs" / job["job"] / "probes.jsonl").is_file() for job in jobs),
        recipe=yaml.safe_dump(results["recipe"], sort_keys=False, allow_unicode=True),
        unigram=next(iter(values_of(jobs, "unigram_loss")), None),
        criteria=CRITERIA,
    )
    path = directory / "report.html"
    with writing_to(directory):
        write_text(path, page)
    return path


def _in_table(jobs: Sequence[Job], table: str) -> Groups:
    return group_jobs([job for job in jobs if table in job["tables"]])


def _section(directory: Path, name: str, jobs: list[Job], unread: list[str]) -> Section:
    groups = group_jobs(jobs)
    look = looks(groups)
    rows, arms = [], []
    for (placement, variant), rates in groups.items():
        best = min(rates, key=lambda rate: rank(rates[rate]))
        runs = [read_run(directory, job, unread) for job in rates[best]]
        summary = [
            Rate(rate, values_of(held_jobs(group), "val_loss"), [j["reason"] or "failed" for j in failed_jobs(group)])
            for rate, group in rates.items()
        ]
        arms.append(Arm(placement, variant, look[placement, variant], summary, best, runs))
        rows += [
            _row(placement, variant, look[placement, variant], rate, group, rate == best, rates)
            for rate, group in rates.items()
        ]
    orders = {key: min(map(rank, rates.values())) for key, rates in groups.items()}
    arms.sort(key=lambda arm: orders[arm.placement, arm.variant])
    by_rate = {(*key, rate): rank(group) for key, rates in groups.items() for rate, group in rates.items()}
    rows.sort(key=lambda row: by_rate[row.placement, row.variant, row.learning_rate])

    folder = directory / "figures"
    with writing_to(directory), matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A name in a script that DejaVu lacks is drawn as boxes in the PNG; the SVG and the table have it right.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        folder.mkdir(exist_ok=True)
        stem = re.sub(r"\W+", "_", name)
        drawings = [*draw(arms, next(iter(values_of(jobs, "unigram_loss")), None)), *draw_routing(arms)]
        named = [replace(drawing, name=f"{stem}_{drawing.name}" if stem else drawing.name) for drawing in drawings]
        figures = [(drawing, _save(drawing, folder)) for drawing in named]
    return Section(
        name=name,
        rows=[row for row in rows if row.drawn],
        every=rows if any(len(rates) > 1 for rates in groups.values()) else [],
        strip=_strip(rows),
        figures=figures,
        left_out=max(0, len(arms) - MAX_ARMS),
    )


def _row(
    placement: str, variant: str, look: Look, rate: float | None, group: list[Job], drawn: bool,
    rates: dict[float | None, list[Job]],
) -> Row:  # fmt: skip
    keys = ("val_loss", "bits_per_byte", "test_loss", "max_grad_norm", "spike_score", "tokens_per_second")
    shown = held_jobs(group) or group
    values = {key: values_of(shown, key) for key in (*keys, "parameters", "body_parameters", "active_parameters")}
    means = {key: float(np.mean(v)) if v else None for key, v in values.items()}
    said = []
    failed = failed_jobs(group)
    for reason in dict.fromkeys(job["reason"] for job in failed):
        these = [job for job in failed if job["reason"] == reason]
        which = "" if len(these) == len(group) else f" (seed {_listed(job['seed'] for job in these)})"
        steps = {int(s) for s in values_of(these, "steps_done")}
        at = f", at step {_listed(sorted(steps))}" if reason == "non-finite" and steps else ""
        said.append(f"failed{which}: {CRITERIA.get(reason or '', reason or 'reason not recorded')}{at}")
    for status in dict.fromkeys(job["status"] for job in group if job["status"] not in ("ok", "failed")):
        these = [job for job in group if job["status"] == status]
        which = "" if len(these) == len(group) else f"seed {_listed(job['seed'] for job in these)} "
        done, whole = sum(values_of(these, "steps_done")), sum(values_of(these, "steps"))
        said.append(f"{which}{status}" + (f", {done / whole:.0%} done" if done and whole else ""))
    other = [f"{r:g}" for r, jobs in rates.items() if r is not None and r != rate and failed_jobs(jobs)]
    if drawn and other:
        said.append(f"also failed at learning rate {', '.join(other)}")
    seeds = _listed(job["seed"] for job in group)
    losses = values["val_loss"]
    return Row(placement, variant, look, drawn, rate, seeds, means, losses, "; ".join(said), not held_jobs(group))


def _listed(values: Iterable[object]) -> str:
    return ", ".join("?" if value is None else str(value) for value in values)


def _about(results: dict[str, Any], arms: int) -> str:
    """What was compared, in a sentence, as far as the files say."""
    jobs, recipe = results["arms"], results["recipe"]
    model, train = recipe.get("model") or {}, recipe.get("train") or {}
    depths = sorted({int(depth) for depth in values_of(jobs, "depth")})
    placements = {job["placement"] for job in jobs}
    text = f"{_plural(arms, 'arm')} of {_plural(len(placements), 'placement')}"
    shape = [f"{' and '.join(map(str, depths))} blocks"] if depths else []
    shape += [f"width {model['hidden_size']}"] if model.get("hidden_size") else []
    text += f": a decoder of {', '.join(shape)}," if shape else ","
    tokens = max(values_of(jobs, "tokens"), default=0)
    steps = max(values_of(jobs, "steps"), default=train.get("steps") or 0)
    text += f" trained for {int(steps):,} steps" if steps else " trained"
    text += f" ({_count(tokens)} tokens)" if tokens else ""
    corpus = results["data"].get("corpus")
    return text + (f" on {corpus}." if corpus else ".")


def _behind(arms: Sequence[dict[float | None, list[Job]]], jobs: Sequence[Job]) -> str:
    """What stands behind the figures: the number of seeds and rates, and what may be said with so many."""
    seeds = sorted({len(group) for rates in arms for group in rates.values()})
    rates = sorted({len(rates) for rates in arms})
    text = f"Each arm has {_span(seeds, 'seed')} and {_span(rates, 'learning rate')}"
    if seeds[0] < 3:
        text += ": a look, not a claim (three seeds make a look worth taking, five a claim)."
    elif seeds[0] < 5:
        text += ": a look, not a claim, which takes five seeds."
    else:
        text += ": as many seeds as a claim takes"
        text += ", if the learning rates were chosen on others." if rates[-1] > 1 else "."
    if len(seeds) > 1 or len(rates) > 1:
        text += " The arms did not get the same number of trials: this is not a matched comparison."
    states = Counter("finished" if job["status"] == "ok" else job["status"] for job in jobs)
    told = [f"{count} {status}" for status, count in states.most_common()]
    return f"{text} Of {_plural(len(jobs), 'job')}, {', '.join(told)}."


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _span(counts: Sequence[int], noun: str) -> str:
    return _plural(counts[0], noun) if len(counts) == 1 else f"{counts[0]} to {_plural(counts[-1], noun)}"


def _number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form).rstrip(".")


def _count(value: float | None) -> str:
    """12 300 000 as 12.3 M."""
    if value is None:
        return "–"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:#.3g}".rstrip(".") + f"\N{NO-BREAK SPACE}{unit}"
    return f"{value:#.3g}".rstrip(".")


def _strip(rows: Sequence[Row]) -> Callable[[Row], dict[str, float] | None]:
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


def _save(drawing: Drawing, folder: Path) -> str:
    """Write a figure as PNG and SVG, and return the SVG as it goes into the page."""
    png, raw = io.BytesIO(), io.BytesIO()
    drawing.figure.savefig(png, format="png", dpi=180)
    drawing.figure.savefig(raw, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    # A hundredth of a point cannot be seen, and six decimals are half of the file.
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), raw.getvalue().decode())
    write_bytes(folder / f"{drawing.name}.png", png.getvalue())
    write_bytes(folder / f"{drawing.name}.svg", svg.encode())
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (xmlns(:xlink)?|width|height)="[^"]*"', "", svg, count=4)
    # Several figures share a page: what one calls `clip1` must not be another's. Most ids name nothing used.
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{drawing.name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-labelledby="title-{drawing.name}"', 1)
