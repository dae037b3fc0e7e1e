"""What figures are made of: panels with named lines, curves with bands, crosses where a run failed, log axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from spannorm.lab.report.arms import Arm
from spannorm.lab.results.files import LARGEST
from spannorm.lab.results.runs import Array, Series

WIDTH = 7.6  # inches
MAX_ARMS = 48  # more lines than this cannot be told apart by anyone; the table still has them all
INK, _GREY = "#222222", "#8a8a8a"
STYLE = {
    "font.size": 8, "font.family": ["DejaVu Sans"], "axes.titlesize": 8.5, "axes.labelsize": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#666666", "axes.linewidth": 0.7,
    "xtick.labelsize": 7.5, "ytick.labelsize": 7.5, "xtick.color": "#444444", "ytick.color": "#444444",
    "axes.labelcolor": INK, "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.6,
    "axes.axisbelow": True, "lines.linewidth": 1.5, "lines.solid_capstyle": "round",
    "svg.fonttype": "none", "svg.hashsalt": "spannorm",  # text stays text; the same input gives the same file
}  # fmt: skip


Band = tuple[Array, Array, Array, Array]
"""x, and mean, least and greatest over the seeds."""


@dataclass(frozen=True)
class Drawing:
    """A figure and the words under it."""

    name: str
    title: str
    caption: str
    figure: Figure
    chart: dict[str, Any] | None = None
    """The numbers behind it, where a reader can ask for them; see `spannorm.lab.report.interactive`."""


def panels(
    count: int, arms: Sequence[Arm], share: bool = False
) -> tuple[Figure, Sequence[Any], Callable[[Any, Mapping[str, float]], None]]:
    """Panels with a margin at the right in which every arm has its name, and the function that writes them."""
    names = {arm.label: shortened(arm.label, 34) + why(arm) for arm in arms}
    margin = 0.42 + 4.35 * max(map(len, names.values())) / 72
    height = max(3.1, 0.8 + 10.5 * len(arms) / 72)
    fig = Figure(figsize=(WIDTH, height))
    axes = fig.subplots(1, count, sharey=share, squeeze=False)[0]
    fig.subplots_adjust(left=0.075, right=1 - margin / WIDTH, top=1 - 0.27 / height, bottom=0.42 / height,
                        wspace=0.06 if share else 0.2)  # fmt: skip

    def label(ax: Any, ends: Mapping[str, float]) -> None:
        """Names at the line ends, pushed apart; those without an end here stand at the top, failed ones last."""
        points = fig.get_figheight() * 72 * ax.get_position().height
        to_axes = (ax.transData + ax.transAxes.inverted()).transform
        spots = []
        for i, arm in enumerate(arms):
            y = ends.get(arm.label)
            spot = None if y is None else float(to_axes((ax.get_xlim()[0], y))[1])
            inside = spot is not None and -0.01 <= spot <= 1.01
            spots.append((min(max(spot, 0.0), 1.0) if spot is not None else 1 - i / 1e3, inside, arm))
        spots.sort(key=lambda s: (s[0], s[1]))
        placed = spread([s[0] * points for s in spots], 10.2, points)
        width = ax.get_position().width * WIDTH * 72
        for (y, inside, arm), at in zip(spots, placed, strict=True):
            low, high = at / points, y
            if inside:
                ax.plot([1 + 2 / width, 1 + 9 / width], [high, low], color=arm.look.color, linewidth=0.6, alpha=0.7,
                        transform=ax.transAxes, clip_on=False)  # fmt: skip
            ax.plot([1 + 10 / width, 1 + 25 / width], [low, low], linewidth=1.6, transform=ax.transAxes,
                    clip_on=False, dash_capstyle="butt", **arm.look.line)  # fmt: skip
            ax.text(1 + 28 / width, low, names[arm.label], fontsize=7, va="center_baseline", color=arm.look.color,
                    transform=ax.transAxes, parse_math=False)  # fmt: skip

    return fig, axes, label


def spread(wanted: Sequence[float], gap: float, room: float) -> list[float]:
    """Positions at least `gap` apart, in order, as near to the sorted `wanted` ones as least squares allows."""
    groups: list[list[float]] = []  # [sum of (wanted - rank * gap), count]
    for i, value in enumerate(wanted):
        groups.append([value - i * gap, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, count = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += count
    bases = [total / count for total, count in groups for _ in range(int(count))]
    ceiling = room - (len(wanted) - 1) * gap
    return [min(max(base, 0.0), max(ceiling, 0.0)) + i * gap for i, base in enumerate(bases)]


def curve(ax: Any, arm: Arm, x: Array, mean: Array, low: Array, high: Array, width: float = 1.5) -> None:
    ax.plot(x, mean, linewidth=0.75 * width if arm.failed else width, label=arm.label, **arm.look.line)
    if len(arm.shown) > 1:
        ax.fill_between(x, low, high, color=arm.look.color, alpha=0.13, linewidth=0)


def cross(ax: Any, x: float, y: float, arm: Arm) -> None:
    """The end of a failed run; on the edge of the panel when it lies beyond."""
    if ax.get_xlim()[0] <= x:
        y = min(max(y, ax.get_ylim()[0]), ax.get_ylim()[1])
        ax.plot(x, y, "X", color=arm.look.color, markersize=7.5, markeredgecolor="white", markeredgewidth=0.8,
                clip_on=False, zorder=6)  # fmt: skip


def color_bar(fig: Figure, image: Any, words: str) -> None:
    """A horizontal colour bar at the lower left, with words beside it."""
    height = fig.get_figheight()
    bar = fig.add_axes((0.45 / WIDTH, 0.2 / height, 1.6 / WIDTH, 0.07 / height))
    fig.colorbar(image, cax=bar, orientation="horizontal")
    bar.tick_params(labelsize=6.5, length=2)
    bar.grid(False)
    fig.text(2.2 / WIDTH, 0.2 / height, words, fontsize=7, color="#444444")


def map_axes(fig: Figure, left: float, bottom: float, width: float, height: float) -> Any:
    """Axes for a map, at a place given in inches."""
    tall = fig.get_figheight()
    return fig.add_axes((left / WIDTH, bottom / tall, width / WIDTH, height / tall))


def name_map(ax: Any, arm: Arm, most: int) -> None:
    """An arm's placement and variant above its map; the variant is cut to `most` letters."""
    variant = f"{shortened(arm.variant, most)}{' ✕' if arm.failed else ''}"
    for words, dy, weight in ((arm.placement, 10.5, "bold"), (variant, 2.5, "normal")):
        ax.annotate(words, (0, 1), (0, dy), xycoords="axes fraction", textcoords="offset points", fontsize=6.6,
                    weight=weight, color=arm.look.color, parse_math=False)  # fmt: skip


def band(x: Array, rows: Sequence[Array]) -> Band:
    """Mean, least and greatest over the rows, where at least one is finite."""
    rows = [row for row in rows if len(row) == len(x)]
    if not rows:
        return (np.empty(0),) * 4
    table = np.stack(rows)
    some = np.isfinite(table).any(axis=0)
    table = table[:, some]
    if not table.size:
        return (np.empty(0),) * 4
    return x[some], np.nanmean(table, axis=0), np.nanmin(table, axis=0), np.nanmax(table, axis=0)


def smooth(series: Series, window: int, at: Array) -> Array:
    """Trailing mean over `window` records at the given steps; NaN after the last record."""
    count = len(series.values)
    if not count:
        return np.full(len(at), np.nan)
    window = min(window, count)
    mean = np.convolve(series.values, np.ones(window))[:count] / np.minimum(np.arange(count) + 1, window)
    return np.interp(at, series.steps, mean, right=np.nan)


def limits(values: Sequence[float] | Array) -> tuple[float, float]:
    """Limits that hold the values, save for a few that lie so far above the rest that they would flatten it."""
    low, middle = float(np.min(values)), float(np.median(values))
    high = max(value for value in values if value <= middle + 4 * (middle - low) + 1e-3)
    pad = 0.06 * (high - low) + 1e-3
    return low - pad, high + pad


def numbers(values: Sequence[float | None] | None) -> Array:
    numbers = np.array([np.nan if v is None else v for v in values or []], dtype=np.float64)
    return np.where(np.abs(numbers) < LARGEST, numbers, np.nan)


def seed_note(arms: Sequence[Arm]) -> str:
    if max(len(arm.runs) for arm in arms) == 1 and all(len(arm.rates) == 1 for arm in arms):
        return "One line per run."
    note = "Line: mean over the seeds that did not fail; band: least to greatest."
    if any(len(arm.rates) > 1 for arm in arms):
        note += " Each arm is drawn at the learning rate of its lowest validation loss."
    return note


def why(arm: Arm) -> str:
    """What follows an arm's name when not all of its runs are finished and sound."""
    # A job that crashed says why at length; beside a line there is room for a word.
    reasons = dict.fromkeys(shortened(run.reason or "failed", 14) for run in arm.runs if run.status == "failed")
    if not reasons:
        states = {run.status for run in arm.runs} - {"ok"}
        return f" ({', '.join(sorted(states))})" if states else ""
    count = "" if arm.failed else f"{sum(run.status == 'failed' for run in arm.runs)} of {len(arm.runs)} "
    return f" ✕ {count}{', '.join(reasons)}"


def shortened(text: str, most: int = 30) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def plain_log(axis: Any) -> None:
    """Powers of ten in plain text: math text would come out as paths among the text of the SVG."""
    raised = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

    def name(value: float, _: int) -> str:
        power = int(np.floor(np.log10(value) + 1e-9)) if value > 0 else 0
        if -3 < power < 4:
            return f"{value:g}"
        digit = round(value / 10.0**power)
        return f"{digit} × " * (digit > 1) + "10" + str(power).translate(raised)

    low, high = axis.get_view_interval()
    if high < 100 * low:  # less than two decades: powers of ten alone would leave it bare
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(name)
    axis.set_minor_formatter(NullFormatter())
