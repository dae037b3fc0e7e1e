"""What the depth check shows: a live line, the table, the words, the figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from spannorm import theory
from spannorm.console import Grid, say, wide_console
from spannorm.files import write_json
from spannorm.lab.depth.theory import Case

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


@contextmanager
def progress(count: int, first: str = "preparing the text") -> Iterator[Callable[[Case], None]]:
    """A live line that is told of every stack as it begins."""
    bar = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=wide_console(), transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task(first, total=count, completed=-1)

        def on_case(case: Case) -> None:
            placement, rule, depth = case.key
            bar.update(task, advance=1, description=f"{placement} {rule}, {depth} blocks")

        yield on_case


def show(
    chosen: Sequence[Case],
    results: Mapping[str, Any],
    json_file: Path | None = None,
    plot: Path | None = None,
    console: Console | None = None,
) -> None:
    """Print the table and the words; write the numbers and the figure (.png or .svg) where asked."""
    console = console or wide_console()
    console.print(table(results["rows"]).fitted(console))
    with console.status(Text("weighing the depth rules")):
        sentences = words(chosen, results)
    for sentence in sentences:
        say(console, sentence)
    if json_file:
        write_json(json_file, {**results, "words": sentences})
    if plot:
        from spannorm.lab.depth.figures import draw  # Matplotlib

        for file in draw(chosen, results, plot):
            say(console, f"drawn: {file}")


def table(rows: Sequence[Mapping[str, Any]]) -> Grid:
    """A line per stack and step; predicted, then measured, where there are both."""
    made = Grid(TITLE)
    for heading in ("placement", "depth rule"):
        made.column(heading)
    stacks: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        stack = tuple(row[key] for key in ("placement", "depth_rule", "depth", "step"))
        stacks.setdefault(stack, {})[row["quantity"]] = row
    shown = [q for q in COLUMNS if any(q in quantities for quantities in stacks.values())]
    for heading in ("blocks", "step"):
        made.column(heading, "number")
    for quantity in shown:
        made.column(COLUMNS[quantity], "number" if quantity in ("total_gain", "loss") else "spare")
    for (placement, rule, depth, step), quantities in stacks.items():
        made.row(placement, rule, str(depth), str(step), *(_both(quantities.get(q)) for q in shown))
    return made


def _both(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    both = [_figure(row[key]) for key in ("predicted", "measured") if row[key] is not None]
    return "→".join(both) or "–"


def _figure(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3g}" if abs(value) >= 1 else f"{value:.2g}"


def words(chosen: Sequence[Case], results: Mapping[str, Any]) -> list[str]:
    """What the check after, a sentence for each placement under each rule, at its largest depth; then, for each
    placement, the rule to choose."""
    repeat, last_step = results["repeat"], max(row["step"] for row in results["rows"])
    measured: dict[Any, dict[int, float]] = {}
    for row in results["rows"]:
        if row["quantity"] == "total_gain" and row["measured"]:
            measured.setdefault((row["placement"], row["depth_rule"], row["depth"]), {})[row["step"]] = row["measured"]
    deepest: dict[tuple[str, str], Case] = {}
    for case in sorted(chosen, key=lambda s: s.key[2]):
        deepest[case.key[:2]] = case
    sentences = []
    last: dict[str, Case] = {}
    for (placement, rule), case in deepest.items():
        why = results.get("unpredicted", {}).get(" ".join(map(str, case.key)))
        if why is None:
            statement = theory.verdict(case.predicted(repeat), _body(case, repeat), **case.stack.options).words
        else:
            statement = f"measured without a prediction ({why.rstrip('.')})"
        gains = [
            f"after {step} steps {theory.times(math.log(gain))}" if step else f"measured {theory.times(math.log(gain))}"
            for step, gain in sorted(measured.get(case.key, {}).items())
            if step in (0, last_step)
        ]
        after = f"; {', '.join(gains)}" if gains else ""
        sentences.append(f"{placement} {rule}, {case.key[2]} blocks: {statement}{after}.")
        if why is None:
            last[placement] = max(case, last.get(placement, case), key=lambda s: s.key[2])
    for placement, case in last.items():
        depth = case.key[2]
        advised = theory.advised_rule(placement, depth, _body(case, repeat), **case.stack.options)
        advice = f"choose {advised}" if advised else "no rule of 1/sqrt(L), 1/sqrt(2L), 1/L keeps the gradient"
        sentences.append(f"{placement}: at {depth} blocks and at initialization {advice}.")
        trained = {key[1]: gains[last_step] for key, gains in measured.items()
                   if (key[0], key[2]) == (placement, depth) and last_step in gains}  # fmt: skip
        if last_step and trained:
            kept = [rule for rule, gain in trained.items() if 1 / theory.FACTOR <= gain <= theory.FACTOR]
            under = ", ".join(kept) if kept else f"none of {', '.join(trained)}"
            sentences.append(f"{placement}: after {last_step} steps within a factor {theory.FACTOR:g} under {under}.")
    return sentences


def _body(case: Case, repeat: float) -> theory.Body:
    return replace(case.body, repeat=repeat)
