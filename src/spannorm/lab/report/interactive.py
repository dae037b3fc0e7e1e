"""The curves of a report as numbers that the page's script draws and that a reader can ask: arm, seed, step, value.

They say what the still figures say, with every seed as a line of its own. A line names its arm by number: the arm's
name stands in the page's legend alone, so no stranger's text enters a script.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from spannorm.lab.charts.library import rounded
from spannorm.lab.report.arms import Arm
from spannorm.lab.report.figures.panels import MAX_ARMS, Drawing, numbers, smooth, why
from spannorm.lab.report.looks import Look
from spannorm.lab.results.runs import Array, Run, Series

_MOST, _LEAST, _TOGETHER = 300, 80, 40_000
"""Points of a line, at most and at least, and of all lines of a chart: what a browser redraws in one go."""


@dataclass(frozen=True)
class Name:
    """A line of the legend."""

    text: str
    note: str
    """Why its runs are not all sound; empty if they are."""
    look: Look


@dataclass
class Chart:
    """One figure as numbers."""

    group: str
    """Charts of one group share their horizontal axis: `step` or `layer`."""
    x_name: str
    y_name: str
    y_log: bool
    window: tuple[float, float]
    """What is shown of the vertical axis at first: as in the still figure."""
    lines: list[dict[str, Any]] = field(default_factory=list)
    marks: list[dict[str, Any]] = field(default_factory=list)
    level: float | None = None
    """The unigram model's loss."""

    def to_json(self, looks: Sequence[Look]) -> dict[str, Any]:
        return {
            "group": self.group, "x_name": self.x_name, "y_name": self.y_name, "y_log": self.y_log,
            "window": rounded(self.window), "lines": self.lines, "marks": self.marks, "level": self.level,
            "looks": [{"color": look.color, "dash": [2 * part for part in look.dash]} for look in looks],
        }  # fmt: skip


def legend(arms: Sequence[Arm]) -> list[Name]:
    """The names of the arms that figures show, in the order that the lines' numbers mean."""
    return [Name(arm.label, why(arm).strip(), arm.look) for arm in arms[:MAX_ARMS]]


def legend_of(looks: Mapping[tuple[str, str], Look]) -> list[Name]:
    """The names of all arms of a comparison, for figures across its conditions."""
    names = {(one if one == other else f"{one} {other}"): look for (one, other), look in looks.items()}
    return [Name(text, "", look) for text, look in names.items()][:MAX_ARMS]


def with_charts(drawings: Sequence[Drawing], arms: Sequence[Arm], unigram: float | None) -> list[Drawing]:
    """Drawings with the numbers behind them, where a reader can ask for these."""
    arms = arms[:MAX_ARMS]
    makers: dict[str, Callable[[tuple[float, float]], Chart]] = {
        "loss": lambda window: _loss(arms, unigram, window),
        "gradient_norm": lambda window: _gradient_norm(arms, window),
        "gradient_by_layer": lambda window: _layers(arms, "gradient_rms", "RMS of ∂loss/∂x", window),
        "signal_by_layer": lambda window: _layers(arms, "signal_rms", "RMS of x", window),
    }
    done = []
    for drawing in drawings:
        maker = makers.get(drawing.name)
        chart = maker(drawing.figure.axes[0].get_ylim()) if maker else None
        known = chart is not None and chart.lines
        done.append(replace(drawing, chart=chart.to_json([a.look for a in arms])) if chart and known else drawing)
    return done


def _loss(arms: Sequence[Arm], unigram: float | None, window: tuple[float, float]) -> Chart:
    chart = Chart("step", "step", "training loss", False, window, level=unigram)
    last = _last(arms, lambda run: run.loss)
    span = max(1, int(last) // 20)  # the still figure's
    grid = np.unique(np.linspace(1, last, _points(arms)).round())
    _add(chart, arms, grid, lambda run: smooth(run.loss, span, grid))
    for number, arm in enumerate(arms):
        for run in arm.runs:
            if run.status != "failed" and run.val_loss is not None:
                mark = {"arm": number, "seed": run.seed, "x": last, "y": rounded([run.val_loss])[0]}
                chart.marks.append(mark | {"y_name": "final validation loss"})
    return chart


def _gradient_norm(arms: Sequence[Arm], window: tuple[float, float]) -> Chart:
    chart = Chart("step", "step", "gradient norm", True, window)
    last = _last(arms, lambda run: run.grad_norm)
    bins = int(min(_points(arms), last))

    def greatest(run: Run) -> Array:  # of each bin, at its middle, so that no spike is lost
        row = np.full(bins, -np.inf)
        index = ((run.grad_norm.steps - 1) * bins / last).astype(int).clip(0, bins - 1)
        np.maximum.at(row, index, run.grad_norm.values)
        return np.where(row > 0, row, np.nan)

    _add(chart, arms, ((np.arange(bins) + 0.5) * last / bins + 0.5).round(), greatest)
    return chart


def _layers(arms: Sequence[Arm], key: str, y_name: str, window: tuple[float, float]) -> Chart:
    chart = Chart("layer", "layer", y_name, True, window)

    def at(run: Run) -> Array:  # the last probe
        row = numbers(run.probes[-1].get(key)) if run.probes else np.empty(0)
        return np.where(row > 0, row, np.nan)

    depth = max((len(at(run)) for arm in arms for run in arm.runs), default=0)
    _add(chart, arms, np.arange(float(depth)), lambda run: np.append(last := at(run), [np.nan] * (depth - len(last))))
    for line in chart.lines:
        steps = {run.probes[-1].get("step") for run in arms[line["arm"]].runs if run.probes}
        line["at"] = f"step {steps.pop()}" if len(steps) == 1 else "last probe"
    return chart


def _last(arms: Sequence[Arm], series: Callable[[Run], Series]) -> float:
    return max((series(run).steps[-1] for arm in arms for run in arm.runs if len(series(run).steps)), default=1.0)


def _points(arms: Sequence[Arm]) -> int:
    return int(np.clip(_TOGETHER // max(1, sum(len(arm.runs) for arm in arms)), _LEAST, _MOST))


def _add(chart: Chart, arms: Sequence[Arm], x: Array, values: Callable[[Run], Array]) -> None:
    """A line for each run and, where an arm has several, one for the mean of those that held."""
    for number, arm in enumerate(arms):
        rows = [(run, values(run)) for run in arm.runs]
        for run, row in rows:
            failed = run.status == "failed"
            _line(chart, x, row, arm=number, seed=run.seed, faint=len(rows) > 1 and not failed, failed=failed)
        shown = [row for run, row in rows if any(run is held for held in arm.shown) and np.isfinite(row).any()]
        if len(shown) > 1:
            table = np.stack(shown)
            some = np.isfinite(table).any(axis=0)
            mean = np.full(len(x), np.nan)
            mean[some] = np.nanmean(table[:, some], axis=0)
            _line(chart, x, mean, arm=number, seed=None, faint=False, failed=False, mean=len(shown))


def _line(chart: Chart, x: Array, y: Array, **about: Any) -> None:
    some = np.isfinite(y)
    if some.any():
        chart.lines.append({**about, "x": rounded(x[some], 12), "y": rounded(y[some])})
