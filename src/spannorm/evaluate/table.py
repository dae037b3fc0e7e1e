"""The table at the end of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

from rich.console import Console

from spannorm.console import Grid, wide_console

LEVEL = 0.95
"""Of every interval."""


def margin(stderr: float | None) -> float | None:
    """Half of the confidence interval over the questions, by the normal approximation: z · standard error."""
    return None if stderr is None else NormalDist().inv_cdf((1 + LEVEL) / 2) * stderr


def print_scores(tasks: Mapping[str, Mapping[str, Any]], title: str, console: Console | None = None) -> None:
    """Print each task's metrics with their intervals, the result of guessing, and the contexts that were cut."""
    grid = Grid(title)
    grid.column("task")
    grid.column("metric")
    for heading in ("value", f"± ({LEVEL:.0%})"):
        grid.column(heading, "number")
    for heading in ("chance", "questions"):
        grid.column(heading, "spare")
    grid.column("", "note")
    for name, score in tasks.items():
        for metric, of in score["metrics"].items():
            grid.row(
                name,
                metric + ("" if of["higher_is_better"] in (True, None) else " ↓"),
                _figure(of["value"]),
                _figure(margin(of["stderr"])),
                _figure(score["chance"] if metric in ("acc", "acc_norm") else None),
                str(score["questions"]),
                f"{score['cut']:,} contexts cut: longer than the model's" if score["cut"] else "",
            )
    console = console or wide_console()
    console.print(grid.fitted(console))


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
