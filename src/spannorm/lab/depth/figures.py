"""The depth check's two figures: gains against depth, and what training does to the deepest stacks."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from spannorm import theory
from spannorm.files import write_bytes
from spannorm.lab.depth.theory import Case
from spannorm.lab.report.figures.panels import STYLE, WIDTH, plain_log
from spannorm.lab.report.looks import Look, looks

Results = Mapping[str, Any]


def draw(chosen: Sequence[Case], results: Results, path: Path) -> list[Path]:
    """Skip gain and total gain against depth: lines predicted, points measured. Where stacks were trained, a second
    file, `<name>-training`, shows the deepest ones through it. Returns the files."""
    figures: dict[Path, Callable[[], Figure]] = {path: lambda: gains(chosen, results)}
    if any(row["step"] for row in results["rows"]):
        figures[path.with_stem(f"{path.stem}-training")] = lambda: training(chosen, results)
    with matplotlib.rc_context(STYLE):
        for file, figure in figures.items():
            content = io.BytesIO()
            figure().savefig(content, format=file.suffix[1:], dpi=200, metadata={})
            write_bytes(file, content.getvalue())
    return list(figures)


def gains(chosen: Sequence[Case], results: Results) -> Figure:
    """Against depth."""
    rows = results["rows"]
    arms: dict[tuple[str, str], list[Case]] = {}
    for case in chosen:
        arms.setdefault(case.key[:2], []).append(case)
    look = looks(arms)
    lines = (len(arms) + 2) // 3
    figure = Figure(figsize=(WIDTH, 3.5 + 0.16 * lines))
    axes = figure.subplots(1, 2)
    depths = sorted({case.key[2] for case in chosen})
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
    legend = ["lines: predicted"]
    legend += [f"{'dots' if step == steps[0] else 'circles'}: measured {_when(step)}" for step in steps[:2]]
    figure.text(0.5, 0.99, ", ".join([*legend, "grey: within a factor 2"]), ha="center", va="top", fontsize=7)
    _named(figure, axes[0], lines)
    return figure


def training(chosen: Sequence[Case], results: Results) -> Figure:
    """Through training, the deepest stack of each arm: skip–branch correlation, gradient, rank by layer at the end."""
    deepest = max(case.key[2] for case in chosen)
    arms = [case.key[:2] for case in chosen if case.key[2] == deepest]
    look = looks(arms)
    lines = (len(arms) + 2) // 3
    figure = Figure(figsize=(WIDTH, 2.9 + 0.16 * lines))
    axes = figure.subplots(1, 3)
    last = max(row["step"] for row in results["rows"])
    axes[1].axhspan(1 / theory.FACTOR, theory.FACTOR, color="#ececec", zorder=0)
    for arm in arms:
        points_of = {
            quantity: sorted(
                (row["step"], row["measured"]) for row in results["rows"]
                if (row["placement"], row["depth_rule"], row["depth"], row["quantity"]) == (*arm, deepest, quantity)
                and row["measured"] is not None
            )
            for quantity in ("rho:ffn", "total_gain")
        }  # fmt: skip
        for ax, points in zip(axes, points_of.values(), strict=False):
            ax.plot(*zip(*points, strict=True), marker="o", markersize=2.5, label=" ".join(arm), **look[arm].line)
        for profile in results["profiles"]:
            names = tuple(profile[k] for k in ("placement", "depth_rule", "depth", "step", "quantity"))
            if names == (*arm, deepest, last, "effective_rank"):
                axes[2].plot(range(len(profile["measured"])), profile["measured"], **look[arm].line)
    axes[0].set(title="correlation of FFN and skip, ρ", xlabel="step")
    axes[1].set(title="gradient, input over output", xlabel="step", yscale="log")
    plain_log(axes[1].yaxis)
    axes[2].set(title=f"effective rank {_when(last)}", xlabel="block", ylim=(0, None))
    figure.text(0.5, 0.99, f"{deepest} blocks; grey: within a factor 2", ha="center", va="top", fontsize=7)
    _named(figure, axes[0], lines)
    return figure


def _named(figure: Figure, ax: Any, lines: int) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=7, frameon=False, handlelength=3.2)
    figure.tight_layout(rect=(0, (0.12 + 0.16 * lines) / figure.get_figheight(), 1, 0.97))


def _when(step: int) -> str:
    return f"after {step} steps" if step else "at initialization"


def _line(ax: Any, arm: tuple[str, str], members: Sequence[Case], quantity: str, look: Look, repeat: float) -> None:
    ends = [case.key[2] for case in members]
    depths = sorted({round(depth) for depth in np.geomspace(min(ends), max(ends), 12)})
    try:
        predictions = [members[0].predicted(repeat, depth) for depth in depths]
    except theory.NoRule:  # the words say so
        ax.plot([], [], label=" ".join(arm), **look.line)
        return
    logs = [p.log_skip_gain if quantity == "skip_gain" else p.log_total_gain for p in predictions]
    ax.plot(depths, [math.exp(max(min(v, 700), -700)) for v in logs], label=" ".join(arm), **look.line)
