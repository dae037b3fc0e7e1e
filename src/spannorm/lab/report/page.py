"""Reads a comparison's files and writes its report: one HTML file that needs nothing beside it, and its figures.

Nothing here needs a model, or torch: a report can be drawn again from the files alone, on another machine.
"""

from __future__ import annotations

import io
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from spannorm.errors import InputError
from spannorm.files import write_bytes, write_text, writing_to
from spannorm.folders import own_folder
from spannorm.lab.report.ablation import Ablation, ablation
from spannorm.lab.report.answers import Answers, answers
from spannorm.lab.report.figures.conditions import draw_conditions, draw_tolerances
from spannorm.lab.report.figures.ladder import draw_ladder
from spannorm.lab.report.figures.layers import draw_layers, draw_ramps
from spannorm.lab.report.figures.panels import STYLE
from spannorm.lab.report.figures.routing import draw_routing
from spannorm.lab.report.figures.training import MAX_ARMS, Drawing, draw, draw_rates
from spannorm.lab.report.interactive import Name, legend, with_charts
from spannorm.lab.report.library import INSTALL, library, own_scripts, packed_json
from spannorm.lab.report.rows import Row, arms_and_rows, strip
from spannorm.lab.report.sheets import HEADER, sheet
from spannorm.lab.report.words import about, behind, count, number
from spannorm.lab.results.arms import Arm, Job, Look, group_jobs, looks, read_results, values_of
from spannorm.lab.results.summary import Race, condition, summarize, verdict_lines, where
from spannorm.lab.results.tolerance import Tolerance, tolerance_lines, tolerances
from spannorm.text import file_name
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
    legend: list[Name]
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
    page_file = directory / "report.html"
    if os.path.lexists(page_file) and not _begins(page_file, "spannorm", within=1 << 16):
        raise InputError(f"{page_file} was not written by this command: move it to another place.")
    sections, by_table = [], dict[str, list[tuple[Mapping[str, Any], list[Arm]]]]()
    with writing_to(directory), matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A name in a script that DejaVu lacks is drawn as boxes in the PNG; the SVG and the table have it right. And
        # what is too large, or alike, to have an axis of its own is drawn all the same.
        warnings.simplefilter("ignore")
        folder = _Folder(directory / "figures")
        for i, ((table, cell), groups) in enumerate(parts.items()):
            arms, rows = arms_and_rows(directory, groups, look, unread)
            by_table.setdefault(table, []).append((json.loads(cell), arms))
            name = ", ".join(filter(None, [table, condition(json.loads(cell))]))
            unigram = next(iter(values_of([j for rates in groups.values() for js in rates.values() for j in js],
                                          "unigram_loss")), None)  # fmt: skip
            detailed = len(parts) <= _DETAILED + 1 or i in (0, len(parts) - 1)
            drawings = draw_ramps(arms, unigram) if ramps else draw_rates(arms)
            drawings += _details(arms, unigram, bool(ramps)) if detailed else []
            sections.append(_section(name, arms, [] if ramps else rows, folder.save(drawings, name)))
        across = folder.save(_ladder(results, look), "")
        for table, races in by_table.items():
            mine = [t for t in ramps if t.table == table]
            drawn = draw_tolerances(mine, look, _peak(results, mine)) if mine else draw_conditions(races)
            across += folder.save(drawn, table)
    judged = _races(results)
    page = _environment().get_template("report.html.jinja").render(
        results=results,
        about=about(results, len({(table, *key) for (table, _), groups in parts.items() for key in groups})),
        behind=behind([rates for groups in parts.values() for rates in groups.values()], jobs),
        verdict=_verdict(results, ramps, judged),
        pairs=[(where(race), pair) for race in judged for pair in race.pairs if pair.p is not None],
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
        library=library(),
        charts=any(drawing.chart for section in sections for drawing, _ in section.figures),
        own_scripts=own_scripts("report/live.js", "report/report.js"),
        install=INSTALL,
    )  # fmt: skip
    with writing_to(directory):
        write_text(page_file, page)
    return page_file


def _ladder(results: Mapping[str, Any], look: Mapping[tuple[str, str], Look]) -> list[Drawing]:
    """The figures of a ladder, where the comparison was one."""
    try:
        return draw_ladder(results["ladder"], look)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise InputError("results.json: `ladder` is not as it was written: run `spannorm ladder` again.") from None


def _peak(results: Mapping[str, Any], found: Sequence[Tolerance]) -> float:
    """Where the ramps ended; as far as they came, where the recipe does not say."""
    peak = (results["recipe"].get("train") or {}).get("learning_rate")
    return float(peak) if peak and peak > 0 else max((rate for t in found for rate in _all(t)), default=1.0)


def _all(found: Tolerance) -> list[float]:
    return [rate for rates in found.rates.values() for rate in rates if rate]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("spannorm.lab.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(number=number, count=count, condition=condition, packed=packed_json)
    return environment


def _races(results: Mapping[str, Any]) -> list[Race]:
    """What a protocol came to; nothing where there was none, or a ladder's."""
    protocol = (results["recipe"].get("compare") or {}).get("protocol") or {}
    if not protocol.get("seeds") or results["ladder"]:
        return []
    return summarize(results["arms"], protocol.get("pairs") or [])


def _verdict(results: Mapping[str, Any], ramps: Sequence[Tolerance], races: Sequence[Race]) -> list[str]:
    if ramps:
        return tolerance_lines(ramps)
    if results["ladder"]:
        return [str(line) for line in results["ladder"].get("words") or ()]
    return verdict_lines(races) if races else []


def _details(arms: Sequence[Arm], unigram: float | None, ramp: bool) -> list[Drawing]:
    """The figures by step and by layer."""
    drawings = [*draw(arms, unigram), *draw_layers(arms), *draw_routing(arms)]
    drawings = [drawing for drawing in drawings if not (ramp and drawing.name == "loss")]
    return with_charts(drawings, arms, unigram) if library() else drawings


def _section(name: str, arms: Sequence[Arm], rows: list[Row], figures: Figures) -> Section:
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


class _Folder:
    """`figures/`, into which figures go as PNG, SVG and CSV under names of their own."""

    def __init__(self, path: Path) -> None:
        self.path = own_folder(path)
        self.names: set[str] = set()

    def save(self, drawings: Sequence[Drawing], where: str) -> Figures:
        """Write figures of one table and condition, and return them with their SVG as it goes into the page."""
        stem = file_name(where)
        named = [replace(d, name=self._free(f"{stem}_{d.name}" if stem else d.name)) for d in drawings]
        return [(drawing, self._save(drawing)) for drawing in named]

    def _free(self, wanted: str) -> str:
        name, number = file_name(wanted, 150), 1
        while name.lower() in self.names:
            number += 1
            name = f"{file_name(wanted, 150)}-{number}"
        self.names.add(name.lower())
        return name

    def _save(self, drawing: Drawing) -> str:
        png, raw = io.BytesIO(), io.BytesIO()
        drawing.figure.savefig(png, format="png", dpi=180)
        drawing.figure.savefig(raw, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        # A hundredth of a point cannot be seen, and six decimals are half of the file.
        svg = _in_tags(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), raw.getvalue().decode())
        files = [self.path / f"{drawing.name}.{kind}" for kind in ("csv", "png", "svg")]
        if any(map(os.path.lexists, files)) and not _begins(files[0], ",".join(HEADER)):
            raise InputError(f"{files[0].with_suffix('')}.* was not drawn by this command: move it to another place.")
        write_text(files[0], sheet(drawing.figure))  # first: by it the other two are known as ours
        write_bytes(files[1], png.getvalue())
        write_bytes(files[2], svg.encode())
        return _inlined(svg, drawing.name)


def _begins(path: Path, words: str, within: int = 0) -> bool:
    """Whether a file is one of ours: it begins with the words, or holds them within so many bytes."""
    if path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(max(len(words.encode()), within)).decode(errors="replace")
    return words in head if within else head == words


def _in_tags(pattern: str, new: str | Callable[[re.Match[str]], str], svg: str, count: int = 0) -> str:
    """`re.sub` inside the tags alone: what stands between them is a stranger's text."""
    left = [count]

    def tag(found: re.Match[str]) -> str:
        if count and not left[0]:
            return found[0]
        text, done = re.subn(pattern, new, found[0], count=left[0])
        left[0] -= done if count else 0
        return text

    return re.sub(r"<[^>]*>", tag, svg)


def _inlined(svg: str, name: str) -> str:
    """An SVG file as a part of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = _in_tags(r' (xmlns(:xlink)?|width|height)="[^"]*"', "", svg, count=4)
    # Several figures share a page: what one calls `clip1` must not be another's. Most ids name nothing used.
    used = {n for tag in re.findall(r"<[^>]*>", svg) for n in re.findall(r'(?:url\(#|href="#)([^")]+)', tag)}
    svg = _in_tags(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = _in_tags(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-labelledby="title-{name}"', 1)
