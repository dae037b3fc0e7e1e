"""The table a comparison ends in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console

from spannorm.console import Grid, say, wide_console
from spannorm.lab.results.files import RESULTS
from spannorm.lab.results.groups import by_arm, groups_of
from spannorm.lab.results.summary import summaries_of, summary_lines


def print_results(results: dict[str, Any], out: Path, console: Console | None = None) -> None:
    """Print each table's jobs by validation loss, failures last, then the summary and where the report lies."""
    console = console or wide_console()
    for group in groups_of(results["jobs"]):
        grid = Grid(f"{results['name']}{f', {group.title}' if group.title else ''}: validation loss in nats per token")
        for heading in ("placement", "depth rule"):
            grid.column(heading)
        for heading in ("lr", "seed", "val loss"):
            grid.column(heading, "number")
        for heading in ("bits/byte", "test loss", "max grad", "spikes", "tokens/s"):
            grid.column(heading, "spare")
        grid.column("", "note")
        rows = [
            (variant, job)
            for (_, variant), rates in by_arm(group.jobs).items()
            for jobs in rates.values()
            for job in jobs
        ]
        for variant, job in sorted(rows, key=lambda row: _by_loss(row[1])):
            grid.row(
                job["placement"],
                variant,
                f"{job['learning_rate']:g}",
                str(job["seed"]),
                _figure(job.get("val_loss"), ".4f"),
                _figure(job.get("bits_per_byte"), ".3f"),
                _figure(job.get("test_loss"), ".4f"),
                _figure(job.get("max_grad_norm"), ".2f"),
                _figure(job.get("spikes"), "d"),
                _figure(job.get("tokens_per_second"), ",.0f"),
                f"failed: {job['reason']}" if job["status"] == "failed" else job["reason"] or job["status"],
                style="red" if job["status"] in ("failed", "crashed") else "",
            )
        console.print(grid.fitted(console))
    for line in summary_lines(summaries_of(results)):
        say(console, f"• {line}")
    say(console, f"results  {out / RESULTS}\nreport   {out / 'report.html'}")


def _by_loss(job: dict[str, Any]) -> tuple[bool, float]:
    """Sorting key: finished jobs by validation loss, then failures."""
    loss = job.get("val_loss")
    return job["status"] == "failed", math.inf if loss is None else loss


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
