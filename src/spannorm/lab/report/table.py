"""The table a comparison ends in."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console

from spannorm.console import Grid, say, wide_console
from spannorm.lab.compare import RESULTS
from spannorm.lab.results.arms import group_jobs
from spannorm.lab.results.summary import condition, summarize, verdict_lines


def print_results(results: dict[str, Any], out: Path, console: Console | None = None) -> None:
    """Print each table's arms by validation loss, failures last, then the verdict and where the report lies."""
    console = console or wide_console()
    keys = dict.fromkeys((table, json.dumps(arm["cell"])) for arm in results["arms"] for table in arm["tables"])
    for table_name, cell in keys:
        name = ", ".join(filter(None, [table_name, condition(json.loads(cell))]))
        title = f"{results['name']}{', ' if name else ''}{name}: validation loss in nats per token"
        grid = Grid(title)
        for heading in ("placement", "depth rule"):
            grid.column(heading)
        for heading in ("lr", "seed", "val loss"):
            grid.column(heading, "number")
        for heading in ("bits/byte", "test loss", "max grad", "spikes", "tokens/s"):
            grid.column(heading, "spare")
        grid.column("", "note")
        mine = [a for a in results["arms"] if table_name in a["tables"] and json.dumps(a["cell"]) == cell]
        groups = group_jobs(mine)
        rows = [(arm, variant) for (_, variant), rates in groups.items() for group in rates.values() for arm in group]
        for arm, variant in sorted(rows, key=lambda row: by_loss(row[0])):
            grid.row(
                arm["placement"],
                variant,
                f"{arm['learning_rate']:g}",
                str(arm["seed"]),
                _figure(arm.get("val_loss"), ".4f"),
                _figure(arm.get("bits_per_byte"), ".3f"),
                _figure(arm.get("test_loss"), ".4f"),
                _figure(arm.get("max_grad_norm"), ".2f"),
                _figure(arm.get("spikes"), "d"),
                _figure(arm.get("tokens_per_second"), ",.0f"),
                f"failed: {arm['reason']}" if arm["status"] == "failed" else arm["status"],
                style="red" if arm["status"] == "failed" else "",
            )
        console.print(grid.fitted(console))
    protocol = results["recipe"]["compare"]["protocol"]
    if protocol["seeds"]:
        for line in verdict_lines(summarize(results["arms"], protocol["pairs"])):
            say(console, f"• {line}")
    say(console, f"results  {out / RESULTS}\nreport   {out / 'report.html'}")


def by_loss(arm: dict[str, Any]) -> tuple[bool, float]:
    """Sorting key: finished arms by validation loss, then failures."""
    loss = arm.get("val_loss")
    return arm["status"] == "failed", math.inf if loss is None else loss


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
