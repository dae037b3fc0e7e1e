"""Reads a comparison's files and writes its report: one HTML file that needs nothing beside it, and its figures.

Nothing here needs a model, or torch: a report can be drawn again from the files alone, on another machine.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from spannorm.errors import InputError
from spannorm.files import write_text, writing_to
from spannorm.lab.charts.library import INSTALL, library, own_scripts, packed_json
from spannorm.lab.report.ablation import Ablation, ablation
from spannorm.lab.report.answers import AnswersTable, answers
from spannorm.lab.report.arms import Arm, Key, choose, read_arms
from spannorm.lab.report.figure_files import FigureFolder, Figures, begins
from spannorm.lab.report.figures.collapse import draw_collapse
from spannorm.lab.report.figures.conditions import draw_conditions, draw_tolerances
from spannorm.lab.report.figures.ladder import draw_ladder
from spannorm.lab.report.figures.layers import draw_layers
from spannorm.lab.report.figures.panels import MAX_ARMS, STYLE, Drawing
from spannorm.lab.report.figures.routing import draw_routing
from spannorm.lab.report.figures.training import draw_ramps, draw_rates, draw_training
from spannorm.lab.report.interactive import Name, legend, legend_of, with_charts
from spannorm.lab.report.looks import Look, looks
from spannorm.lab.report.rows import TableRow, rows_of, strip
from spannorm.lab.report.words import about, behind, count, number
from spannorm.lab.results.files import RESULTS, JobResult, read_results
from spannorm.lab.results.groups import Group, JobsByArm, by_arm, groups_of, values_of
from spannorm.lab.results.summary import ConditionSummary, summaries_of, summary_lines
from spannorm.lab.results.tolerance import Tolerance, tolerance_lines, tolerances
from spannorm.train.health import CRITERIA
from spannorm.train.ramp import SHARES

Looks = Mapping[Key, Look]
_DETAILED = 2
"""Conditions whose curves by step and layer are drawn where there are more: the first and the last."""


@dataclass(frozen=True)
class Section:
    """One table of a comparison under one condition, with its figures."""

    name: str
    """Empty where a comparison has a single one."""
    rows: list[TableRow]
    """Each arm at its best learning rate; none of ramps."""
    every: list[TableRow]
    """All learning rates, where there are several."""
    strip: Callable[[TableRow], dict[str, float] | None]
    ablation: Ablation | None
    answers: AnswersTable | None
    figures: Figures
    legend: list[Name]
    left_out: int
    """Arms beyond what a figure can hold."""


def draw_report(directory: Path) -> Path:
    """Draw the report of a comparison, as far as its jobs are, and return the path of `report.html`.

    Reads `results.json` and `jobs/*/{records,probes}.jsonl` under `directory`; writes `report.html` and, under
    `figures/`, every figure as PNG, SVG and CSV. Raises `InputError` if `results.json` is missing or malformed.
    """
    directory = Path(directory)
    results = read_results(directory / RESULTS)
    jobs: list[JobResult] = results["jobs"]
    groups = [(group, by_arm(group.jobs)) for group in groups_of(jobs)]
    ramps, conditions = tolerances(jobs), summaries_of(results)
    page_file = directory / "report.html"
    if os.path.lexists(page_file) and not begins(page_file, "spannorm", within=1 << 16):
        raise InputError(f"{page_file} was not written by this command: move it to another place.")
    unread: list[str] = []
    with writing_to(directory), matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A name in a script that DejaVu lacks is drawn as boxes in the PNG; the SVG and the table have it right. And
        # what is too large, or alike, to have an axis of its own is drawn all the same.
        warnings.simplefilter("ignore")
        sections, across = _drawn(directory, results, groups, ramps, unread)
    page = _environment().get_template("report.html.jinja").render(
        results=results,
        about=about(results, len({(group.table, *key) for group, arms in groups for key in arms})),
        ladder=bool(results["ladder"]),
        behind=behind([rates for _, arms in groups for rates in arms.values()], jobs),
        verdict=_headlines(results, ramps, conditions),
        pairs=[(condition.title, pair) for condition in conditions for pair in condition.pairs if pair.p is not None],
        across=across,
        across_legend=legend_of(_looks(groups)),
        tolerances=ramps,
        shares=SHARES,
        sections=sections,
        skipped=0 if _all_detailed(len(groups)) else len(groups) - _DETAILED,
        unread=list(dict.fromkeys(unread)),
        probes=any((directory / "jobs" / job["job"] / "probes.jsonl").is_file() for job in jobs),
        recipe=yaml.safe_dump(results["recipe"], sort_keys=False, allow_unicode=True),
        unigram=_unigram(jobs),
        criteria=CRITERIA,
        library=library(),
        charts=any(drawing.chart for section in sections for drawing, _ in section.figures),
        own_scripts=own_scripts("charts/live.js", "report/report.js"),
        install=INSTALL,
    )  # fmt: skip
    with writing_to(directory):
        write_text(page_file, page)
    return page_file


def _drawn(
    directory: Path,
    results: Mapping[str, Any],
    groups: Sequence[tuple[Group, JobsByArm]],
    ramps: Sequence[Tolerance],
    unread: list[str],
) -> tuple[list[Section], Figures]:
    """Each group's section, and the figures across conditions. Call it inside `matplotlib.rc_context(STYLE)`."""
    look = _looks(groups)
    folder = FigureFolder(directory / "figures")
    sections, by_table = [], dict[str, list[tuple[Mapping[str, Any], list[Arm]]]]()
    for i, (group, jobs_by_arm) in enumerate(groups):
        choices = {key: choose(rates) for key, rates in jobs_by_arm.items()}
        arms = read_arms(directory, choices, look, unread)
        by_table.setdefault(group.table, []).append((group.condition, arms))
        unigram = _unigram(group.jobs)
        drawings = draw_ramps(arms, unigram) if ramps else draw_rates(arms)
        if _all_detailed(len(groups)) or i in (0, len(groups) - 1):
            drawings += _details(arms, unigram, bool(ramps))
        rows = [] if ramps else rows_of(choices, look)
        sections.append(_section(group.title, arms, rows, folder.save(drawings, group.title)))
    across = folder.save(_ladder(results, look), "")
    for table, conditions in by_table.items():
        its_ramps = [ramp for ramp in ramps if ramp.table == table]
        peak = _peak(results, its_ramps)
        across += folder.save(
            draw_tolerances(its_ramps, look, peak) if its_ramps else draw_conditions(conditions), table
        )
    return sections, across


def _looks(groups: Sequence[tuple[Group, JobsByArm]]) -> Looks:
    return looks(dict.fromkeys(key for _, arms in groups for key in arms))


def _all_detailed(groups: int) -> bool:
    """Whether every condition has its curves by step and layer."""
    return groups <= _DETAILED + 1


def _unigram(jobs: Sequence[JobResult]) -> float | None:
    """The loss of a unigram model, nats per token."""
    return next(iter(values_of(jobs, "unigram_loss")), None)


def _ladder(results: Mapping[str, Any], look: Looks) -> list[Drawing]:
    """The figures of a ladder, where the comparison was one."""
    try:
        return draw_ladder(results["ladder"], look)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise InputError("results.json: `ladder` is not as it was written: run `spannorm ladder` again.") from None


def _peak(results: Mapping[str, Any], ramps: Sequence[Tolerance]) -> float:
    """Where the ramps ended; as far as they came, where the recipe does not say."""
    rates = [rate for ramp in ramps for seeds in ramp.rates.values() for rate in seeds if rate]
    peak = (results["recipe"].get("train") or {}).get("learning_rate")
    return float(peak) if peak and peak > 0 else max(rates, default=1.0)


def _environment() -> Environment:
    loaders = [PackageLoader(f"spannorm.lab.{room}", ".") for room in ("report", "charts")]
    environment = Environment(
        loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip
    environment.filters.update(number=number, count=count, packed=packed_json)
    return environment


def _headlines(
    results: Mapping[str, Any], ramps: Sequence[Tolerance], conditions: Sequence[ConditionSummary]
) -> list[str]:
    """The lines that the report begins with."""
    if ramps:
        return tolerance_lines(ramps)
    if results["ladder"]:
        return [str(line) for line in results["ladder"].get("words") or ()]
    return summary_lines(conditions)


def _details(arms: Sequence[Arm], unigram: float | None, ramp: bool) -> list[Drawing]:
    """The figures by step and by layer."""
    drawings = [*draw_training(arms, unigram), *draw_layers(arms), *draw_collapse(arms), *draw_routing(arms)]
    drawings = [drawing for drawing in drawings if not (ramp and drawing.name == "loss")]
    return with_charts(drawings, arms, unigram) if library() else drawings


def _section(name: str, arms: Sequence[Arm], rows: list[TableRow], figures: Figures) -> Section:
    return Section(
        name=name,
        rows=[row for row in rows if row.drawn],
        every=rows if any(len(arm.rates) > 1 for arm in arms) else [],
        strip=strip(rows),
        ablation=ablation(arms) if rows else None,
        answers=answers(arms) if rows else None,
        figures=figures,
        legend=legend(arms) if figures else [],
        left_out=max(0, len(arms) - MAX_ARMS),
    )
