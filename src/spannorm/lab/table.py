"""The table a comparison ends in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from spannorm.lab.compare import RESULTS
from spannorm.train.display import wide_console


def print_results(results: dict[str, Any], out: Path, console: Console | None = None) -> None:
    """Print the arms by validation loss, failures last, and where the report lies."""
    console = console or wide_console()
    table = Table(title=f"{results['name']}: validation loss in nats per token", title_justify="left", box=None)
    for heading in ("placement", "depth rule"):
        table.add_column(heading, no_wrap=True)
    for heading in ("lr", "seed", "val loss", "bits/byte", "test loss", "max grad", "spikes", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for arm in sorted(results["arms"], key=by_loss):
        table.add_row(
            arm["placement"],
            arm["depth_rule"],
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
    console.print(table)
    console.print(f"results  {out / RESULTS}\nreport   {out / 'report.html'}", highlight=False, soft_wrap=True)


def by_loss(arm: dict[str, Any]) -> tuple[bool, float]:
    """Sorting key: finished arms by validation loss, then failures."""
    loss = arm.get("val_loss")
    return arm["status"] == "failed", math.inf if loss is None else loss


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
