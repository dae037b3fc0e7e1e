"""What the depth check shows: a live line, the table, the words, the figure."""

from __future__ import annotations

import io
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
from spannorm.files import write_bytes, write_json
from spannorm.lab.arms import Look, looks
from spannorm.lab.depth_check import Stack, body_of, words
from spannorm.lab.panels import STYLE, WIDTH, plain_log
from spannorm.train.display import wide_console

COLUMNS = {
    "variance": "variance", "skip_gain": "skip path", "total_gain": "gradient", "attention_share": "by attn",
    "ffn_share": "by FFN", "token_cosine": "cosine", "effective_rank": "rank", "block_skip_cost": "skipped",
    "loss": "loss",
}  # fmt: skip
"""Quantities in the table; the JSON has them all."""

TITLE = (
    "predicted→measured: variance and cosine of tokens of what leaves the stack; gains of the skip path and\n"
    "of the whole gradient down to its input, and the shares that attention and FFN carry. Then measured\n"
    "alone: effective rank at the last layer, the rise of the loss with a block skipped, the loss"
)

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
    """Print the table and the words; write the numbers and the figure (.png or .svg) where asked."""
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
    made = Table(title=TITLE, title_justify="left", box=None, padding=(0, 1, 0, 0))
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
    return "→".join(both) or "–"


def _figure(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3g}" if abs(value) >= 1 else f"{value:.2g}"


def draw(chosen: Sequence[Stack], results: Results, path: Path) -> None:
    """Skip gain and total gain against depth: lines predicted, points measured."""
    with matplotlib.rc_context(STYLE):
        content = io.BytesIO()
        _figure_of(chosen, results).savefig(content, format=path.suffix[1:], dpi=200, metadata={})
    write_bytes(path, content.getvalue())


def _figure_of(chosen: Sequence[Stack], results: Results) -> Figure:
    rows = results["rows"]
    arms: dict[tuple[str, str], list[Stack]] = {}
    for stack in chosen:
        arms.setdefault(stack.key[:2], []).append(stack)
    look = looks(arms)
    lines = (len(arms) + 2) // 3
    figure = Figure(figsize=(WIDTH, 3.5 + 0.16 * lines))
    axes = figure.subplots(1, 2)
    depths = sorted({stack.key[2] for stack in chosen})
    steps = sorted({row["step"] for row in rows if row["measured"] is not None})
    for ax, quantity, title in zip(
        axes, ("skip_gain", "total_gain"), ("the skip path alone", "the whole gradient"), strict=True
    ):
        ax.axhspan(1 / theory.FACTOR, theory.FACTOR, color="#ececec", zorder=0)
        for arm, members in arms.items():
            _line(ax, arm, members, quantity, look[arm], results["repeat"])
            for step in steps:
                points = sorted(
                    (row["depth"], row["measured"]) for row in rows
                    if (row["placement"], row["depth_rule"], row["quantity"], row["step"]) == (*arm, quantity, step)
                    and row["measured"]
                )  # fmt: skip
                color, filled = look[arm].color, step == steps[0]
                ax.plot(*zip(*points, strict=True), "o" if filled else "o:", color=color, linewidth=0.7,
                        markerfacecolor=color if filled else "white", markersize=4.5 if filled else 3.5,
                        markeredgewidth=0.9, zorder=4)  # fmt: skip
        ax.set(xscale="log", yscale="log", xlabel="blocks", title=title)
        ax.set_xticks(depths, [str(depth) for depth in depths])
        ax.minorticks_off()
        plain_log(ax.yaxis)
    axes[0].set_ylabel("gain of the gradient, output to input")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=7, frameon=False, handlelength=3.2)
    said = ["lines: predicted"]
    said += [f"{'dots' if step == steps[0] else 'circles'}: measured {_when(step)}" for step in steps[:2]]
    figure.text(0.5, 0.99, ", ".join([*said, "grey: within a factor 2"]), ha="center", va="top", fontsize=7)
    below = 0.12 + 0.16 * lines
    figure.tight_layout(rect=(0, below / figure.get_figheight(), 1, 0.97))
    return figure


def _when(step: int) -> str:
    return f"after {step} steps" if step else "at initialization"


def _line(ax: Any, arm: tuple[str, str], members: Sequence[Stack], quantity: str, look: Look, repeat: float) -> None:
    stack = members[0]
    body = body_of(stack.config, stack.recipe.train.sequence_length, repeat)
    ends = [stack.key[2] for stack in members]
    depths = sorted({round(depth) for depth in np.geomspace(min(ends), max(ends), 12)})
    options = stack.config.placement_options or {}
    found = [theory.predict(arm[0], depth, depth_rule=arm[1], body=body, **options) for depth in depths]
    logs = [p.log_skip_gain if quantity == "skip_gain" else p.log_total_gain for p in found]
    ax.plot(depths, [math.exp(max(min(v, 700), -700)) for v in logs], label=" ".join(arm), **look.line)
