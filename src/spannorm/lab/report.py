"""Reads a comparison's files and writes its report: one HTML file that needs nothing beside it, and its figures.

Nothing here needs a model, or torch: a report can be drawn again from the files alone, on another machine.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from spannorm.files import write_bytes, write_text, writing_to
from spannorm.lab.ablation import Ablation, ablation
from spannorm.lab.answers import Answers, answers
from spannorm.lab.arms import Arm, Job, group_jobs, looks, read_results, values_of
from spannorm.lab.conditions import draw_conditions, draw_tolerances
from spannorm.lab.figures import MAX_ARMS, Drawing, draw, draw_rates
from spannorm.lab.layers import draw_layers, draw_ramps
from spannorm.lab.panels import STYLE
from spannorm.lab.routing import draw_routing
from spannorm.lab.rows import Row, arms_and_rows, strip
from spannorm.lab.sheets import sheet
from spannorm.lab.summary import condition, summarize, verdict_lines
from spannorm.lab.tolerance import Tolerance, tolerance_lines, tolerances
from spannorm.lab.words import about, behind, count, number
from spannorm.train.health import CRITERIA
from spannorm.train.ramp import SHARES

Figures = list[tuple[Drawing, str]]
_DETAILED = 2
"""Conditions whose curves by step and layer are drawn where there are more: the first and the last."""


@dataclass(frozen=True)
class Section:
    """One table of a comparison under one condition, with its figures."""

    name: str
    """Empty where a comparison has a single one."""
    rows: list[Row]
    """Each arm at its best learning rate; none of ramps."""
    every: list[Row]
    """All learning rates, where there are several."""
    strip: Callable[[Row], dict[str, float] | None]
    ablation: Ablation | None
    answers: Answers | None
    figures: Figures
    left_out: int
    """Arms beyond what a figure can hold."""


def draw_report(directory: Path) -> Path:
    """Draw the report of a comparison, as far as its jobs are, and return the path of `report.html`.

    Reads `results.json` and `jobs/*/{records,probes}.jsonl` under `directory`; writes `report.html` and, under
    `figures/`, every figure as PNG, SVG and CSV. Raises `InputError` if `results.json` is missing or malformed.
    """
    directory = Path(directory)
    results = read_results(directory / "results.json")
    jobs: list[Job] = results["arms"]
    unread: list[str] = []
    keys = dict.fromkeys((table, json.dumps(job["cell"])) for job in jobs for table in job["tables"])
    parts = {
        (table, cell): group_jobs([j for j in jobs if table in j["tables"] and json.dumps(j["cell"]) == cell])
        for table, cell in keys
    }
    look = looks(dict.fromkeys(key for groups in parts.values() for key in groups))
    ramps = tolerances(jobs)
    sections, by_table = [], dict[str, list[tuple[Mapping[str, Any], list[Arm]]]]()
    with writing_to(directory), matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A name in a script that DejaVu lacks is drawn as boxes in the PNG; the SVG and the table have it right.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        folder = directory / "figures"
        folder.mkdir(exist_ok=True)
        for i, ((table, cell), groups) in enumerate(parts.items()):
            arms, rows = arms_and_rows(directory, groups, look, unread)
            by_table.setdefault(table, []).append((json.loads(cell), arms))
            name = ", ".join(filter(None, [table, condition(json.loads(cell))]))
            unigram = next(iter(values_of([j for rates in groups.values() for js in rates.values() for j in js],
                                          "unigram_loss")), None)  # fmt: skip
            detailed = len(parts) <= _DETAILED + 1 or i in (0, len(parts) - 1)
            drawings = draw_ramps(arms, unigram) if ramps else draw_rates(arms)
            drawings += _details(arms, unigram, bool(ramps)) if detailed else []
            sections.append(_section(name, arms, [] if ramps else rows, _saved(drawings, folder, name)))
        across = []
        for table, races in by_table.items():
            mine = [t for t in ramps if t.table == table]
            if mine:
                drawn = draw_tolerances(mine, look, float(results["recipe"]["train"]["learning_rate"]))
            else:
                drawn = draw_conditions(races)
            across += _saved(drawn, folder, table)
    page = _environment().get_template("report.html.jinja").render(
        results=results,
        about=about(results, len({(table, *key) for (table, _), groups in parts.items() for key in groups})),
        behind=behind([rates for groups in parts.values() for rates in groups.values()], jobs),
        verdict=_verdict(results, ramps),
        across=across,
        tolerances=ramps,
        shares=SHARES,
        sections=sections,
        skipped=max(0, len(parts) - _DETAILED) if len(parts) > _DETAILED + 1 else 0,
        unread=list(dict.fromkeys(unread)),
        probes=any((directory / "jobs" / job["job"] / "probes.jsonl").is_file() for job in jobs),
        recipe=yaml.safe_dump(results["recipe"], sort_keys=False, allow_unicode=True),
        unigram=next(iter(values_of(jobs, "unigram_loss")), None),
        criteria=CRITERIA,
    )  # fmt: skip
    path = directory / "report.html"
    with writing_to(directory):
        write_text(path, page)
    return path


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("spannorm.lab", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(number=number, count=count, condition=condition)
    return environment


def _verdict(results: Mapping[str, Any], ramps: Sequence[Tolerance]) -> list[str]:
    if ramps:
        return tolerance_lines(ramps)
    protocol = (results["recipe"].get("compare") or {}).get("protocol") or {}
    return verdict_lines(summarize(results["arms"], protocol["pairs"])) if protocol.get("seeds") else []


def _details(arms: Sequence[Arm], unigram: float | None, ramp: bool) -> list[Drawing]:
    """The figures by step and by layer."""
    drawings = [*draw(arms, unigram), *draw_layers(arms), *draw_routing(arms)]
    return [drawing for drawing in drawings if not (ramp and drawing.name == "loss")]


def _section(name: str, arms: Sequence[Arm], rows: list[Row], figures: Figures) -> Section:
    return Section(
        name=name,
        rows=[row for row in rows if row.drawn],
        every=rows if any(len(arm.rates) > 1 for arm in arms) else [],
        strip=strip(rows),
        ablation=ablation(arms) if rows else None,
        answers=answers(arms) if rows else None,
        figures=figures,
        left_out=max(0, len(arms) - MAX_ARMS),
    )


def _saved(drawings: Sequence[Drawing], folder: Path, name: str) -> Figures:
    stem = re.sub(r"\W+", "_", name)
    named = [replace(drawing, name=f"{stem}_{drawing.name}" if stem else drawing.name) for drawing in drawings]
    return [(drawing, _save(drawing, folder)) for drawing in named]


def _save(drawing: Drawing, folder: Path) -> str:
    """Write a figure as PNG, SVG and CSV, and return the SVG as it goes into the page."""
    png, raw = io.BytesIO(), io.BytesIO()
    drawing.figure.savefig(png, format="png", dpi=180)
    drawing.figure.savefig(raw, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    # A hundredth of a point cannot be seen, and six decimals are half of the file.
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), raw.getvalue().decode())
    write_bytes(folder / f"{drawing.name}.png", png.getvalue())
    write_bytes(folder / f"{drawing.name}.svg", svg.encode())
    write_text(folder / f"{drawing.name}.csv", sheet(drawing.figure))
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (xmlns(:xlink)?|width|height)="[^"]*"', "", svg, count=4)
    # Several figures share a page: what one calls `clip1` must not be another's. Most ids name nothing used.
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{drawing.name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-labelledby="title-{drawing.name}"', 1)
