"""What the depth check shows: a live line, the table, the words, the figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from spannorm import theory
from spannorm.errors import InputError
from spannorm.files import write_bytes, write_json
from spannorm.lab.arms import Look, looks
from spannorm.lab.depth_check import Stack, body_of, words
from spannorm.lab.panels import STYLE, WIDTH, plain_log
from spannorm.train.display import wide_console

COLUMNS = {
    "variance": "variance", "skip_gain": "skip gain", "total_gain": "total gain", "attention_share": "attention",
    "ffn_share": "FFN", "token_cosine": "token cos", "effective_rank": "rank", "block_skip_cost": "skip cost",
    "loss": "loss",
}  # fmt: skip
"""Quantities in the table; the JSON has them all."""

Results = Mapping[str, Any]


@contextmanager
def progress(count: int) -> Iterator[Callable[[Stack], None]]:
    """A live line that is told of every stack as it begins."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=wide_console(), transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("preparing the text", total=count, completed=-1)

        def on_stack(stack: Stack) -> None:
            placement, rule, depth = stack.key
            bar.update(task, advance=1, description=f"{placement} {rule}, {depth} blocks")

        yield on_stack


def show(
    chosen: Sequence[Stack],
    results: Results,
    json_file: Path | None = None,
    plot: Path | None = None,
    console: Console | None = None,
) -> None:
    """Print the table and the words; write the numbers and the figure where asked.

    Raises:
        InputError: the figure's name ends neither in .png nor in .svg.
    """
    console = console or wide_console()
    console.print(table(results["rows"]))
    sentences = words(chosen, results)
    for sentence in sentences:
        console.print(sentence, highlight=False, soft_wrap=True)
    if json_file:
        write_json(json_file, {**results, "words": sentences})
    if plot:
        draw(chosen, results, plot)


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line per stack and step; predicted, then measured, where there are both."""
    made = Table(
        title="predicted → measured; gains from the stack's output to its input", title_justify="left", box=None
    )
    for heading in ("placement", "depth rule"):
        made.add_column(heading, no_wrap=True)
    found: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in ("placement", "depth_rule", "depth", "step")), {})[row["quantity"]] = row
    shown = [q for q in COLUMNS if any(q in cells for cells in found.values())]
    for heading in ("blocks", "step", *(COLUMNS[q] for q in shown)):
        made.add_column(heading, justify="right", no_wrap=True)
    for (placement, rule, depth, step), cells in found.items():
        made.add_row(placement, rule, str(depth), str(step), *(_cell(cells.get(q)) for q in shown))
    return made


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    both = [_figure(row[key]) for key in ("predicted", "measured") if row[key] is not None]
    return " → ".join(both) or "–"


def _figure(value: float) -> str:
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 or not value else f"{value:.0e}"


def draw(chosen: Sequence[Stack], results: Results, path: Path) -> None:
    """Skip gain and total gain against depth: lines predicted, points measured (filled at init, open after training).

    Raises:
        InputError: the name ends neither in .png nor in .svg.
    """
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"--plot draws .png or .svg; got {path}.")
    import io

    with matplotlib.rc_context(STYLE):
        content = io.BytesIO()
        _figure_of(chosen, results["rows"]).savefig(content, format=path.suffix[1:], dpi=200, metadata={})
    write_bytes(path, content.getvalue())


def _figure_of(chosen: Sequence[Stack], rows: Sequence[Mapping[str, Any]]) -> Figure:
    arms: dict[tuple[str, str], list[Stack]] = {}
    for stack in chosen:
        arms.setdefault(stack.key[:2], []).append(stack)
    look = looks(arms)
    figure = Figure(figsize=(WIDTH, 3.6 + 0.13 * ((len(arms) + 2) // 3)))
    axes = figure.subplots(1, 2)
    first_step = min((row["step"] for row in rows), default=0)
    for ax, quantity, title in zip(
        axes, ("skip_gain", "total_gain"), ("the skip path alone", "the whole gradient"), strict=True
    ):
        for arm, members in arms.items():
            depths = [stack.key[2] for stack in members]
            _line(ax, arm, members, quantity, look[arm], (min(depths), max(depths)))
            points = [
                (row["depth"], row["measured"], row["step"]) for row in rows
                if (row["placement"], row["depth_rule"], row["quantity"]) == (*arm, quantity) and row["measured"]
            ]  # fmt: skip
            for depth, value, step in points:
                filled = step == first_step
                color = look[arm].color
                ax.plot(depth, value, "o", color=color, markerfacecolor=color if filled else "white",
                        markersize=4.5 if filled else 3.5, markeredgewidth=0.9, zorder=4)  # fmt: skip
        ax.axhspan(1 / theory.FACTOR, theory.FACTOR, color="#f1f1f1", zorder=0)
        ax.set(xscale="log", yscale="log", xlabel="blocks", title=title)
        ax.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
        ax.xaxis.set_minor_formatter(lambda v, _: "")
        plain_log(ax.yaxis)
    axes[0].set_ylabel("gain of the gradient, output to input")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=7, frameon=False, handlelength=3.2)
    below = 0.25 + 0.14 * ((len(arms) + 2) // 3)
    figure.tight_layout(rect=(0, below / figure.get_figheight(), 1, 1))
    return figure


def _line(
    ax: Any, arm: tuple[str, str], members: Sequence[Stack], quantity: str, look: Look, span: tuple[int, int]
) -> None:
    stack = members[0]
    body = body_of(stack.config, stack.recipe.train.sequence_length)
    depths = sorted({round(depth) for depth in np.geomspace(*span, 12)})
    options = stack.config.placement_options or {}
    found = [theory.predict(arm[0], depth, depth_rule=arm[1], body=body, **options) for depth in depths]
    logs = [p.log_skip_gain if quantity == "skip_gain" else p.log_total_gain for p in found]
    ax.plot(depths, [math.exp(max(min(v, 700), -700)) for v in logs], label=" ".join(arm), **look.line)
