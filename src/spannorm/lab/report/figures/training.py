"""Figures by optimizer step and by learning rate: loss, gradient norm, and loss on a ramp.

One hue per placement, one dash and shade per depth rule, the same in every figure and in the report's table.
Only `Figure` objects are used, never pyplot's state, so drawing leaves no trace in the calling program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spannorm.lab.report.arms import Arm, Rate
from spannorm.lab.report.figures.panels import (
    INK,
    MAX_ARMS,
    WIDTH,
    Band,
    Drawing,
    band,
    cross,
    curve,
    limits,
    panels,
    plain_log,
    seed_note,
    shortened,
    smooth,
    why,
)
from spannorm.lab.results.runs import Array, Run, Series

_POINTS = 300  # a curve needs no more than the figure has room for


def draw_training(arms: Sequence[Arm], unigram_loss: float | None) -> list[Drawing]:
    """Loss and gradient norm by step. Call it inside `matplotlib.rc_context(STYLE)`."""
    drawings = [_loss(arms[:MAX_ARMS], unigram_loss), _grad_norm(arms[:MAX_ARMS])]
    return [drawing for drawing in drawings if drawing is not None]


def draw_rates(arms: Sequence[Arm]) -> list[Drawing]:
    """Loss by learning rate, where there are several. Call it inside `matplotlib.rc_context(STYLE)`."""
    drawing = _rates(arms[:MAX_ARMS])
    return [] if drawing is None else [drawing]


def _loss(arms: Sequence[Arm], unigram: float | None) -> Drawing | None:
    last = max((run.loss.steps[-1] for arm in arms for run in arm.runs if len(run.loss.steps)), default=0.0)
    if not last:
        return None
    window = max(1, int(last) // 20)
    grid = np.unique(np.linspace(1, last, _POINTS).round())
    bands = {arm.label: band(grid, [smooth(run.loss, window, grid) for run in arm.shown]) for arm in arms}
    zoom = _late_losses([arm for arm in arms if not arm.failed and len(bands[arm.label][0])], bands, 0.75 * last)
    fig, axes, label = panels(2 if len(zoom) else 1, arms)
    _loss_axes(axes, np.concatenate([mean for _, mean, *_ in bands.values()]), zoom, unigram, last)
    ends = {}
    for arm in arms:
        x, mean, *_ = bands[arm.label]
        for ax in axes:
            curve(ax, arm, *bands[arm.label])
            for run in arm.runs:
                _loss_end(ax, arm, run, grid, window, last, clipped=ax is not axes[0])
        if not arm.failed:
            values = [run.val_loss for run in arm.shown if run.val_loss is not None]
            if values:
                ends[arm.label] = float(np.mean(values))
            elif len(mean) and x[-1] >= 0.98 * last:
                ends[arm.label] = float(mean[-1])
    for ax in axes:
        ax.set_xlabel("optimizer step")
    label(axes[-1], ends)
    how = f"trailing mean over {window} steps" if window > 1 else "not smoothed"
    caption = (
        f"Training loss ({how}); dots are the final validation loss. {seed_note(arms)} A line that ends in ✕ "
        "failed, with its reason beside the name. The axes are cut so that one diverged arm does not flatten the "
        "others: a ✕ on the upper edge, and a name without a leader, belong to what lies outside."
    )
    return Drawing("loss", "Loss", caption, fig)


def _late_losses(arms: Sequence[Arm], bands: Mapping[str, Band], late: float) -> Array:
    """The losses that the magnified panel must hold: those from step `late` on, and the final validation losses."""
    reached = [bands[arm.label] for arm in arms if bands[arm.label][0][-1] >= late]
    losses = np.concatenate([part[x >= late] for x, *parts in reached for part in parts] or [np.empty(0)])
    final = [run.val_loss for arm in arms for run in arm.shown if run.val_loss is not None]
    return np.concatenate([losses, final])


def _loss_axes(axes: Sequence[Any], means: Array, zoom: Array, unigram: float | None, last: float) -> None:
    """Limits, titles, and the unigram model's line."""
    low = float(zoom.min() if len(zoom) else means.min())
    # Above the unigram model lie only the first steps and the failures: the room belongs to what is below.
    high = max(unigram or 0.0, float(np.quantile(means, 0.5)))
    axes[0].set_ylim(low - 0.06 * (high - low), high + 0.12 * (high - low) + 1e-9)
    axes[0].set(title="whole run", ylabel="training loss (nats per token)", xlim=(0, last))
    if len(zoom):
        axes[1].set(title="last quarter, magnified", xlim=(0.75 * last, last), ylim=limits(zoom))
    if unigram is not None:
        for ax in axes:
            ax.axhline(unigram, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
        axes[0].annotate("unigram model", (0.93, unigram), (0, 4), xycoords=("axes fraction", "data"),
                         textcoords="offset points", ha="right", fontsize=7, color="#444444")  # fmt: skip


def _loss_end(ax: Any, arm: Arm, run: Run, grid: Array, window: int, last: float, clipped: bool) -> None:
    """A cross where a run failed, with its own line if the arm's mean is without it; a dot for a validation loss."""
    if run.status == "failed" and len(run.loss.steps):
        if not arm.failed:
            steps = grid[grid <= run.loss.steps[-1]]
            ax.plot(steps, smooth(run.loss, window, steps), linewidth=0.8, alpha=0.7, **arm.look.line)
        y = smooth(run.loss, window, run.loss.steps[-1:])[0]
        if not clipped or y <= ax.get_ylim()[1]:
            cross(ax, run.loss.steps[-1], y, arm)
    elif run.val_loss is not None:
        ax.plot(last, run.val_loss, "o", color=arm.look.color, markersize=4.5, markeredgecolor="white",
                markeredgewidth=0.7, clip_on=False, zorder=5)  # fmt: skip


def _rates(arms: Sequence[Arm]) -> Drawing | None:
    tried = {arm.label: [r for r in arm.rates if r.learning_rate and (r.losses or r.failures)] for arm in arms}
    known = sorted({r.learning_rate for rates in tried.values() for r in rates if r.learning_rate})
    if len(known) < 2:
        return None
    fig, (ax,), label = panels(1, arms)
    ends, edge, means = {}, [], []
    for arm in arms:
        its_means = _rate_line(ax, arm, tried[arm.label])
        means += its_means
        sound = [r for r in tried[arm.label] if r.losses]
        if sound and sound[-1].learning_rate == known[-1]:
            ends[arm.label] = its_means[-1]
        outer = [r.learning_rate for r in tried[arm.label]]
        if len(outer) > 1 and arm.learning_rate in (outer[0], outer[-1]) and not arm.failed:
            edge.append(arm.label)
    failures = {rate: [arm for arm in arms for r in tried[arm.label] if r.failures and r.learning_rate == rate]
                for rate in known}  # fmt: skip
    height = fig.get_figheight() * 72 * ax.get_position().height
    strip = _failure_strip(ax, failures, height)
    if means:
        low, high = limits(means)
        ax.set_ylim(low, low + (high - low) / (1 - strip))
        ax.set_yticks([tick for tick in ax.get_yticks() if low <= tick <= high])
    ax.set_xscale("log")
    ax.set_xticks(known, [f"{rate:g}" for rate in known])
    ax.minorticks_off()
    ax.set(xlabel="peak learning rate", ylabel="validation loss (nats per token)")
    label(ax, ends)
    caption = (
        "Final validation loss by learning rate: mean over the seeds that did not fail, with bars from least to "
        "greatest. A ✕ in the upper strip is an arm that failed at that rate with at least one seed. What lies far "
        "above is cut off."
    )
    if edge:
        caption += f" The lowest loss lies on the edge of the grid, which should be extended, for {', '.join(edge)}."
    return Drawing("learning_rate", "Learning rate", caption, fig)


def _rate_line(ax: Any, arm: Arm, tried: Sequence[Rate]) -> list[float]:
    """An arm's mean loss against the learning rate, with bars over the seeds; returns the means."""
    sound = [r for r in tried if r.losses]
    means = [float(np.mean(r.losses)) for r in sound]
    ax.plot([r.learning_rate for r in sound], means, marker="o", markersize=3.5, linewidth=1.3, label=arm.label,
            **arm.look.line)  # fmt: skip
    for r in sound:
        ax.plot([r.learning_rate] * 2, [min(r.losses), max(r.losses)], color=arm.look.color, lw=3, alpha=0.25)
    return means


def _failure_strip(ax: Any, failures: Mapping[float, Sequence[Arm]], height: float) -> float:
    """A strip at the top with a cross for each arm that failed at a rate; returns its share of the axes.

    Args:
        height: of the axes, in points.
    """
    tallest = max(map(len, failures.values()))
    strip = min(0.5, (6.5 * tallest + 13) / height) if tallest else 0.0
    for rate, arms in failures.items():
        for i, arm in enumerate(arms):
            y = 1 - strip + (6.5 * i + 5) / height
            ax.plot(rate, y, "x", color=arm.look.color, markersize=4.5, markeredgewidth=1.6,
                    transform=ax.get_xaxis_transform(), clip_on=False)  # fmt: skip
    if strip:
        ax.fill_between([0, 1], 1 - strip, 1, transform=ax.transAxes, color="#f3f3f3", linewidth=0, zorder=0.5)
        ax.text(0.006, 1 - 3 / height, "failed", transform=ax.transAxes, fontsize=7, color="#444444", va="top")
    return strip


def _grad_norm(arms: Sequence[Arm]) -> Drawing | None:
    last = max((r.grad_norm.steps[-1] for arm in arms for r in arm.runs if len(r.grad_norm.steps)), default=0.0)
    if not last:
        return None
    bins = int(min(_POINTS, last))
    middle = (np.arange(bins) + 0.5) * last / bins
    bands = {arm.label: band(middle, [_largest(run.grad_norm, bins, last) for run in arm.shown]) for arm in arms}
    names = list(dict.fromkeys(arm.placement for arm in arms))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    fig = Figure(figsize=(WIDTH, 0.55 + 1.75 * rows))
    axes = fig.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    highs = np.concatenate([high for *_, high in bands.values()])
    sound = np.concatenate([bands[arm.label][3] for arm in arms if not arm.failed] or [highs])
    sound = sound if len(sound) else highs
    lows = np.concatenate([low for _, _, low, _ in bands.values()])
    axes[0].set(yscale="log", xlim=(0, last))
    axes[0].set_ylim(lows.min() / 1.3, min(highs.max(), 30 * sound.max()) * 1.6)
    for ax, name in zip(axes, names, strict=False):
        _grad_norm_panel(ax, name, arms, bands)
    for ax in axes[len(names) :]:
        ax.set_visible(False)
    for i in range(len(names)):
        if i + columns >= len(names):
            axes[i].set_xlabel("optimizer step")
            axes[i].tick_params(labelbottom=True)
        if i % columns == 0:
            axes[i].set_ylabel("gradient norm")
    fig.subplots_adjust(left=0.075, right=0.99, top=1 - 0.22 / fig.get_figheight(),
                        bottom=0.42 / fig.get_figheight(), hspace=0.28, wspace=0.06)  # fmt: skip
    per = f"the largest of each {last / bins:.3g} steps" if last > bins else "every step"
    caption = (
        f"Global gradient norm before clipping ({per}), one panel per placement with the other arms in grey. Needles "
        f"are spikes. {seed_note(arms)} A ✕ marks where a failed arm ends, on the upper edge if above it."
    )
    return Drawing("gradient_norm", "Gradient norm", caption, fig)


def _largest(series: Series, bins: int, last: float) -> Array:
    """The largest value in each of the bins of steps, so that no spike is lost; NaN where there is none."""
    largest = np.full(bins, -np.inf)
    index = ((series.steps - 1) * bins / last).astype(int).clip(0, bins - 1)
    np.maximum.at(largest, index, series.values)
    return np.where(largest > 0, largest, np.nan)


def _grad_norm_panel(ax: Any, placement: str, arms: Sequence[Arm], bands: Mapping[str, Band]) -> None:
    """The arms of one placement, with the others in grey behind them."""
    own = [arm for arm in arms if arm.placement == placement]
    for arm in arms:
        if arm.placement != placement:
            x, mean = bands[arm.label][:2]
            if len(x):
                ax.plot(x[::3], np.maximum.reduceat(mean, np.arange(0, len(x), 3)), color="#e2e2e2", lw=0.6,
                        zorder=1)  # fmt: skip
    for i, arm in enumerate(own):
        x, mean, low, high = bands[arm.label]
        curve(ax, arm, x, mean, low, high, width=1.1)
        if arm.failed and len(x):
            cross(ax, x[-1], mean[-1], arm)
        ax.annotate(f"{shortened(arm.variant)}{why(arm)}", (1, 1), (-1, -2 - 8.5 * i), va="top", ha="right",
                    xycoords="axes fraction", textcoords="offset points", fontsize=6.6, parse_math=False,
                    color=arm.look.color, bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.4},
                    )  # fmt: skip
    ax.set_title(shortened(placement), loc="left", weight="bold", color=own[0].look.color, parse_math=False, pad=3)
    ax.xaxis.set_major_locator(MaxNLocator(4, prune="upper"))
    plain_log(ax.yaxis)


def draw_ramps(arms: Sequence[Arm], unigram: float | None) -> list[Drawing]:
    """Loss against the learning rate while it rises."""
    arms = [arm for arm in arms[:MAX_ARMS] if any(len(run.learning_rate.steps) for run in arm.runs)]
    if not arms:
        return []
    peak = max(run.learning_rate.values[-1] for arm in arms for run in arm.runs if len(run.learning_rate.steps))
    last = max((run.loss.steps[-1] for arm in arms for run in arm.runs if len(run.loss.steps)), default=0)
    if not (last and peak > 0):
        return []
    grid = np.unique(np.linspace(1, last, _POINTS).round())
    fig, (ax,), label = panels(1, arms)
    end, lows, ends = {}, [], []
    for arm in arms:
        rows = [smooth(run.loss, 16, grid) for run in arm.shown]
        x, mean, low, high = band(grid / last * peak, rows)
        if not len(x):
            continue
        curve(ax, arm, x, mean, low, high)
        lows += [*mean]
        end[arm.label] = float(mean[-1])
        ends.append((arm, x[-1], mean[-1]))
    top = (unigram or max(lows)) + 0.3
    ax.set(xlim=(0, peak), ylim=(min(lows) - 0.1, top), xlabel="learning rate", ylabel="training loss (nats per token)")
    for arm, x, y in ends:
        if any(run.all_lost for run in arm.shown):
            cross(ax, x, y, arm)
    if unigram is not None:
        ax.axhline(unigram, color="#222222", linewidth=0.9, linestyle=(0, (1, 2)))
        ax.annotate("unigram model", (0.98, unigram), (0, 4), xycoords=("axes fraction", "data"), ha="right",
                    textcoords="offset points", fontsize=7, color="#444444")  # fmt: skip
    label(ax, end)
    caption = (
        "Training loss (trailing mean over 16 steps) while the learning rate rises evenly with the steps. A ✕ marks a "
        f"ramp that ended because all that was learned was lost. {seed_note(arms)}"
    )
    return [Drawing("ramp", "Loss on the ramp", caption, fig)]
